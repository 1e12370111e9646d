/** Keys. Single letters count only where no text is written, and can be turned off: voice control types them. */

import { find } from "./dom.js";
import { showShortcuts } from "./dialogs.js";

const KEY = "llamita-single-keys"; // "off" in localStorage: single letters do nothing

/** @typedef {{keys: string[], what: string, run?: () => void}} Shortcut its last key alone may be a letter */

/** @param {Element | null} element */
const takesText = (element) =>
  element instanceof HTMLElement && (element.matches("input, textarea, select") || element.isContentEditable);

/** Return a key press as it is listed. @param {KeyboardEvent} event */
function nameOf(event) {
  const control = event.ctrlKey || event.metaKey ? "Ctrl+" : "";
  return control + (event.key.length === 1 ? event.key.toLowerCase() : event.key);
}

/** Listen for keys. @param {Shortcut[]} shortcuts */
export function start(shortcuts) {
  const box = /** @type {HTMLInputElement} */ (find("#single-keys"));
  box.checked = localStorage.getItem(KEY) !== "off";
  box.addEventListener("change", () => localStorage.setItem(KEY, box.checked ? "on" : "off"));
  const all = [...shortcuts, { keys: ["?", "Ctrl+/"], what: "Show this list", run: () => void show() }];
  const show = () => showShortcuts(all);
  find("#help").addEventListener("click", show);
  document.addEventListener("keydown", (event) => {
    if (event.defaultPrevented || event.altKey || event.isComposing || document.querySelector("dialog[open]")) return;
    const name = nameOf(event);
    const single = name.length === 1;
    if (single && (takesText(document.activeElement) || !box.checked)) return;
    const found = all.find(({ keys, run }) => run && keys.includes(name));
    if (!found?.run) return;
    event.preventDefault();
    found.run();
  });
}
