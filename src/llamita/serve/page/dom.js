/** Builds the page's elements. Strings become text nodes, never markup: nothing on this page parses HTML. */

const SVG = "http://www.w3.org/2000/svg";

/**
 * Return the element that a selector names.
 * @template {Element} [E=HTMLElement]
 * @param {string} selector
 * @param {ParentNode} [within]
 * @returns {E}
 */
export function find(selector, within = document) {
  const element = within.querySelector(selector);
  if (!element) throw new Error(`no element ${selector}`);
  return /** @type {E} */ (element);
}

/**
 * Make an element. A name `onclick` adds a listener; null, undefined and false leave an attribute or child out.
 * @param {string} tag
 * @param {Record<string, any>} [attributes]
 * @param {...any} children
 * @returns {any}
 */
export function h(tag, attributes = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (value === null || value === undefined || value === false) continue;
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else element.setAttribute(name, value === true ? "" : String(value));
  }
  element.append(...children.flat().filter((child) => child !== null && child !== undefined && child !== false));
  return element;
}

/**
 * Make an element of a drawing.
 * @param {string} tag
 * @param {Record<string, string | number>} attributes
 * @param {...Node} children
 */
export function svg(tag, attributes, ...children) {
  const element = document.createElementNS(SVG, tag);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, String(value));
  element.append(...children);
  return element;
}

/** Return an icon of the sprite in index.html. @param {string} name */
export function icon(name) {
  return svg("svg", { class: "icon", "aria-hidden": "true" }, svg("use", { href: `#i-${name}` }));
}

/**
 * Make a button that shows an icon; its label is for screen readers and the tooltip.
 * @param {string} name of the icon
 * @param {string} label
 * @param {(event: Event) => void} onclick
 * @param {Record<string, any>} [more] attributes
 * @returns {HTMLButtonElement}
 */
export function iconButton(name, label, onclick, more = {}) {
  return h(
    "button",
    { type: "button", class: "quiet", "aria-label": label, title: label, onclick, ...more },
    icon(name),
  );
}

/** Say something to screen readers, politely. @param {string} text */
export function announce(text) {
  find("#live").textContent = text;
}

/** @type {ReturnType<typeof setTimeout> | undefined} */
let toastTimer;

/** Show a line at the bottom for a while. @param {string} text */
export function toast(text) {
  const box = find("#toast");
  box.textContent = text;
  box.classList.add("shown");
  clearTimeout(toastTimer);
  toastTimer = setTimeout(() => box.classList.remove("shown"), 6000); // long enough to read two lines
}

/**
 * Copy text. The clipboard's interface needs https or localhost; elsewhere the old command still works.
 * @param {string} text
 */
export async function copy(text) {
  if (navigator.clipboard) return navigator.clipboard.writeText(text);
  const area = h("textarea", { class: "unseen", "aria-hidden": "true" });
  area.value = text;
  document.body.append(area);
  area.select();
  document.execCommand("copy");
  area.remove();
}

/** Return a number as people write it: 8192 as "8,192". @param {number} value */
export const count = (value) => Math.round(value).toLocaleString("en");

/**
 * Return a function that runs `action` once calls have ceased for a time.
 * @param {() => void} action
 * @param {number} milliseconds
 */
export function debounced(action, milliseconds) {
  /** @type {ReturnType<typeof setTimeout> | undefined} */
  let timer;
  return () => {
    clearTimeout(timer);
    timer = setTimeout(action, milliseconds);
  };
}
