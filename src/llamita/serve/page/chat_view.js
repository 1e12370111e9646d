/** The open chat's messages: which are shown, and where the view is scrolled. */

import { announce, find, h, iconButton } from "./dom.js";
import { MessageView } from "./message_view.js";
import { isChat, modelOf, on, state } from "./state.js";
import { branch, path } from "./tree.js";

const NEAR = 80; // pixels from the end at which the view follows a growing answer

/** @type {Map<string, MessageView>} */
let views = new Map();
const scroller = find("#scroller");
const list = find("#messages");
const jump = iconButton("down", "Go to the end", () => toEnd(), { id: "jump", hidden: true });
let follows = true;
let focusNext = false; // a branch was made or turned to: the focus goes along

/** Start the view. */
export function start() {
  find("#composer").append(jump);
  scroller.addEventListener(
    "scroll",
    () => {
      follows = scroller.scrollHeight - scroller.scrollTop - scroller.clientHeight < NEAR;
      jump.hidden = follows;
    },
    { passive: true },
  );
  list.addEventListener(
    "click",
    (event) => (focusNext = /** @type {Element} */ (event.target).closest("[data-do]") !== null),
  );
  on("chat", render);
  on("models", render);
  on("settings", render);
  on("grow", (node) => views.get(node.id)?.grow());
  on("done", done);
}

/** Show the chosen messages. @param {{opened?: boolean}} [detail] */
function render({ opened = false } = {}) {
  if (opened) views = new Map();
  const nodes = path(state.chat);
  const run = state.running.get(state.chat.id);
  const base = !isChat(modelOf());
  const elements = nodes.map((node) => {
    const view = views.get(node.id) ?? new MessageView(node, { onrender: follow, onblock });
    views.set(node.id, view);
    const last = node === nodes.at(-1);
    view.update({ ...branch(state.chat, node), last, busy: Boolean(run), running: run?.node === node, base });
    return view.element;
  });
  const before = [...list.children];
  if (before.length !== elements.length || elements.some((element, place) => element !== before[place]))
    replace(elements, opened);
  find("#empty").hidden = nodes.length > 0;
  if (opened || run) toEnd();
}

/** @param {HTMLElement[]} elements @param {boolean} opened */
function replace(elements, opened) {
  const changed = elements.find((element, place) => element !== list.children[place]) ?? elements.at(-1);
  list.replaceChildren(...elements);
  if (focusNext && !opened) changed?.focus({ preventScroll: true });
  focusNext = false;
}

/** @param {import("./tree.js").Message} node */
function done(node) {
  if (!views.has(node.id)) return;
  render();
  follow();
  announce(node.error ? `The answer failed: ${node.error.message}` : "The answer is complete.");
}

/** Read whole blocks to screen readers: token by token they would stumble. @param {string} text */
function onblock(text) {
  if (state.running.has(state.chat.id)) announce(text.slice(0, 1000));
}

/** Stay at the end while the answer grows, unless the user has scrolled away. */
function follow() {
  if (follows) scroller.scrollTop = scroller.scrollHeight;
  else jump.hidden = false;
}

function toEnd() {
  follows = true;
  jump.hidden = true;
  scroller.scrollTop = scroller.scrollHeight;
}

/** Move the focus to the message before or behind the one that has it. @param {number} step */
export function focusMessage(step) {
  const elements = /** @type {HTMLElement[]} */ ([...list.children]);
  const place = elements.findIndex((element) => element.contains(document.activeElement));
  const next = place < 0 ? elements.length - 1 : Math.min(Math.max(place + step, 0), elements.length - 1);
  elements[next]?.focus();
}

/** Press a button of the message with the focus, else of the last that has it. @param {string} action */
export function act(action) {
  const focused = document.activeElement?.closest(".message");
  const places = focused ? [focused] : [...list.children].reverse();
  for (const place of places) {
    const button = /** @type {HTMLButtonElement | null} */ (
      place.querySelector(`[data-do="${action}"]:not(:disabled)`)
    );
    if (button) return button.click();
  }
}

const SUGGESTIONS = {
  chat: [
    "Explain 4-bit quantization to a ten-year-old.",
    "Write a haiku about a small llama.",
    "Write a Python function that reverses a list.",
  ],
  base: [
    "Once upon a time, there was a little llama",
    "One day, Tom found a shiny red ball",
    "The old tree in the garden could talk",
  ],
};

/** Offer beginnings on the empty page. @param {(text: string) => void} use */
export function suggest(use) {
  on("models", () => {
    const texts = SUGGESTIONS[isChat(modelOf()) ? "chat" : "base"];
    find("#suggestions").replaceChildren(
      ...texts.map((text) => h("button", { type: "button", onclick: () => use(text) }, text)),
    );
  });
}
