/** Tool calls on the page: what the model asks for, and the results that the user types. */

import { h } from "./dom.js";
import * as conversation from "./conversation.js";
import { codeBlock } from "./markdown.js";

/** @typedef {import("./tree.js").Message} Message */

/** Return a card for each call. @param {import("./tree.js").Call[]} calls @returns {HTMLElement[]} */
export function callCards(calls) {
  return calls.map((call) =>
    h(
      "div",
      { class: "call" },
      h("p", {}, "Calls ", h("strong", {}, call.name)),
      codeBlock(pretty(call.arguments), "json"),
    ),
  );
}

/** Return a form in which the user answers the calls of a message. @param {Message} node @returns {HTMLElement} */
export function resultForm(node) {
  const areas = (node.calls ?? []).map((call) =>
    h("textarea", { rows: 3, "aria-label": `Result of ${call.name}`, placeholder: `What ${call.name} returns` }),
  );
  const send = (/** @type {Event} */ event) => {
    event.preventDefault();
    conversation.sendResults(
      node,
      areas.map((area) => area.value),
    );
  };
  return h("form", { class: "results", onsubmit: send }, areas, h("button", { class: "primary" }, "Send result"));
}

/** Return what shows a tool's result. @param {Message} node */
export function toolResult(node) {
  return h(
    "details",
    { class: "file", open: node.content.length < 400 },
    h("summary", {}, "Result"),
    h("pre", { tabindex: 0 }, node.content),
  );
}

/** Return JSON with line breaks, or text that is no JSON as it is. @param {string} text */
function pretty(text) {
  try {
    return JSON.stringify(JSON.parse(text), null, 2);
  } catch {
    return text;
  }
}
