/** Questions that stop everything else: the key, and "are you sure?". */

import { find, h } from "./dom.js";

for (const button of document.querySelectorAll("[data-close]"))
  // of type "button": Enter must not press it
  button.addEventListener("click", () => button.closest("dialog")?.close());

/**
 * Show a dialog; return its value when it is closed, "" for Escape.
 * @param {HTMLDialogElement} dialog
 * @returns {Promise<string>}
 */
function ask(dialog) {
  dialog.returnValue = "";
  dialog.showModal();
  return new Promise((resolve) => dialog.addEventListener("close", () => resolve(dialog.returnValue), { once: true }));
}

/** Ask for the server's key. @param {boolean} refused one was given that was wrong @returns {Promise<string | null>} */
export async function askKey(refused) {
  const dialog = /** @type {HTMLDialogElement} */ (find("#ask-key"));
  const input = /** @type {HTMLInputElement} */ (find("#key"));
  find("#key-note").textContent = refused ? "The server did not accept this key." : "";
  input.value = "";
  return (await ask(dialog)) === "ok" && input.value ? input.value : null;
}

/** Ask before something that cannot be undone. @param {string} question @param {string} action the button's words */
export async function confirmed(question, action) {
  const dialog = /** @type {HTMLDialogElement} */ (find("#confirm"));
  find("#question").textContent = question;
  find("#confirm-yes").textContent = action;
  return (await ask(dialog)) === "ok";
}

/** Show the list of shortcuts. @param {{keys: string[], what: string}[]} entries */
export function showShortcuts(entries) {
  const rows = entries.flatMap(({ keys, what }) => [
    h(
      "dt",
      {},
      keys.flatMap((key) => [h("kbd", {}, key), " "]),
    ),
    h("dd", {}, what),
  ]);
  find("#shortcut-list").replaceChildren(...rows);
  return ask(/** @type {HTMLDialogElement} */ (find("#shortcuts")));
}
