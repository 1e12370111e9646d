/** A text token by token: each shows its probability and its alternatives on hover and on keyboard focus. */

import { find, h } from "./dom.js";

/** @typedef {import("./requests.js").ScoredToken} ScoredToken */

const STEPS = [0.8, 0.5, 0.25, 0.1]; // probabilities below which a token is shaded one step more

/** Return a probability as people read it. @param {number} logprob */
export function percent(logprob) {
  const share = 100 * Math.exp(logprob);
  if (share > 0 && share < 0.1) return "under 0.1 %";
  return `${share.toFixed(1)} %`;
}

/** Return a token as it is named in a sentence: blanks and line breaks are seen. @param {string} text */
export const visible = (text) =>
  text === ""
    ? "end"
    : text
        .replaceAll("\n", "↵")
        .replaceAll("\t", "⇥")
        .replace(/^ +| +$/g, (blanks) => "␣".repeat(blanks.length));

/** A column's tokens. One of them is in the tab order; the arrow keys go from token to token. */
export class TokenView {
  /**
   * @param {HTMLElement} element
   * @param {(place: number) => {name: string, token: ScoredToken} | null} beside the other
   *   model's token in the same place
   */
  constructor(element, beside) {
    this.element = element;
    this.beside = beside;
    /** @type {ScoredToken[]} */
    this.tokens = [];
    this.marked = -1;
    element.addEventListener("mouseover", (event) => this.#showFor(event.target));
    element.addEventListener("mouseleave", hideTip);
    element.addEventListener("focusin", (event) => this.#showFor(event.target));
    element.addEventListener("focusout", hideTip);
    element.addEventListener("keydown", (event) => this.#onKey(event));
  }

  /** Begin anew. */
  clear() {
    this.tokens = [];
    this.marked = -1;
    this.element.replaceChildren();
    this.element.removeAttribute("role");
  }

  /** Show further tokens. @param {ScoredToken[]} tokens */
  append(tokens) {
    const first = this.tokens.length;
    if (!first && tokens.length) this.element.setAttribute("role", "listbox");
    this.tokens.push(...tokens);
    this.element.append(...tokens.map((token, place) => this.#span(token, first + place)));
  }

  /** Mark the token at which the models part; -1: none. @param {number} place */
  mark(place) {
    if (place === this.marked) return;
    this.element.children[this.marked]?.classList.remove("part");
    this.element.children[place]?.classList.add("part");
    this.marked = place;
  }

  /** @param {ScoredToken} token @param {number} place */
  #span(token, place) {
    const probability = Math.exp(token.logprob);
    const shade = STEPS.filter((step) => probability < step).length;
    const label = `${token.text.trim() ? token.text : visible(token.text)}, ${percent(token.logprob)}`;
    const attributes = {
      class: `token p${shade}`,
      role: "option",
      tabindex: place ? -1 : 0,
      "aria-label": label,
      "data-place": place,
    };
    return h("span", attributes, token.text || "∎");
  }

  /** @param {KeyboardEvent} event */
  #onKey(event) {
    const place = Number(/** @type {HTMLElement} */ (event.target).dataset.place);
    const end = this.tokens.length - 1;
    const goal = {
      ArrowRight: place + 1,
      ArrowLeft: place - 1,
      Home: 0,
      End: end,
      Enter: this.marked,
      ArrowDown: this.#line(place, 1),
      ArrowUp: this.#line(place, -1),
    }[event.key];
    if (event.key === "Escape") hideTip();
    if (goal === undefined || goal < 0 || goal > end) return;
    event.preventDefault();
    this.focus(goal);
  }

  /** Return the token above or below one. @param {number} place @param {number} step */
  #line(place, step) {
    const at = /** @type {HTMLElement} */ (this.element.children[place]);
    let goal = place + step;
    const row = () => /** @type {HTMLElement | undefined} */ (this.element.children[goal]);
    while (row() && (row()?.offsetTop === at.offsetTop || step * ((row()?.offsetLeft ?? 0) - at.offsetLeft) < 0))
      goal += step;
    return row() ? goal : place;
  }

  /** Move the focus, and the place in the tab order, to a token. @param {number} place */
  focus(place) {
    for (const element of this.element.querySelectorAll('[tabindex="0"]')) element.setAttribute("tabindex", "-1");
    const element = /** @type {HTMLElement} */ (this.element.children[place]);
    element.setAttribute("tabindex", "0");
    element.focus();
  }

  /** @param {EventTarget | null} target */
  #showFor(target) {
    if (!(target instanceof HTMLElement) || !target.matches(".token")) return;
    const place = Number(target.dataset.place);
    const token = this.tokens[place];
    const rows = token.top.map((other) => tipRow(other, other.text === token.text));
    if (!token.top.some((other) => other.text === token.text)) rows.push(tipRow(token, true));
    const other = this.beside(place);
    const rank = token.top.findIndex((entry) => entry.text === token.text) + 1;
    showTip(
      target,
      h(
        "p",
        { class: "tip-head" },
        h("strong", {}, visible(token.text)),
        ` ${percent(token.logprob)}`,
        h("span", { class: "muted" }, rank ? ` · choice ${rank}` : ""),
      ),
      h("table", {}, h("tbody", {}, rows)),
      other &&
        h(
          "p",
          { class: "tip-other" },
          `${other.name}: `,
          h("strong", {}, visible(other.token.text)),
          ` ${percent(other.token.logprob)}`,
        ),
    );
  }
}

/** @param {{text: string, logprob: number}} entry @param {boolean} taken */
function tipRow({ text, logprob }, taken) {
  const bar = h("span", { class: "tip-bar" });
  bar.style.width = `${Math.max(100 * Math.exp(logprob), 1)}%`;
  return h(
    "tr",
    { class: taken && "taken" },
    h("td", {}, visible(text)),
    h("td", {}, percent(logprob)),
    h("td", { class: "tip-cell" }, bar),
  );
}

/** @param {HTMLElement} target @param {...(Node | null)} content */
function showTip(target, ...content) {
  const tip = find("#tip");
  tip.replaceChildren(.../** @type {Node[]} */ (content.filter(Boolean)));
  tip.hidden = false;
  target.setAttribute("aria-describedby", "tip");
  const box = target.getBoundingClientRect();
  const { offsetWidth: width, offsetHeight: height } = tip;
  const below = box.bottom + 6 + height < innerHeight;
  tip.style.left = `${Math.min(Math.max(box.left - 12, 8), innerWidth - width - 8)}px`;
  tip.style.top = `${below ? box.bottom + 6 : Math.max(box.top - height - 6, 8)}px`;
}

function hideTip() {
  find("#tip").hidden = true;
  for (const element of document.querySelectorAll('[aria-describedby="tip"]'))
    element.removeAttribute("aria-describedby");
}
