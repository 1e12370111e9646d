/** One message on the page: its text, calls, error, figures and actions. */

import { copy, count, h, iconButton, toast } from "./dom.js";
import * as conversation from "./conversation.js";
import { GrowingText } from "./growing.js";
import { codeBlock, updateCode } from "./markdown.js";
import { callCards, resultForm, toolResult } from "./tool_view.js";
import { wireText } from "./requests.js";

/**
 * @typedef {import("./tree.js").Message} Message
 * @typedef {{place: number, of: number, last: boolean, busy: boolean, running: boolean, base: boolean}} Context
 *   its place among its branches; the last of the chat; the chat is being answered; this is the answer; the text of a
 *   model without a chat format
 */

const AUTHORS = { user: "You", assistant: "Answer", tool: "Result of a tool" };
const ENDS = /** @type {Record<string, string>} */ ({ length: "cut at the limit of tokens", stopped: "stopped" });

/** Shows a message and is told of its changes. */
export class MessageView {
  /**
   * @param {Message} node
   * @param {{onrender: () => void, onblock: (text: string) => void}} listeners of a growing text
   */
  constructor(node, listeners) {
    this.node = node;
    this.body = h("div", { class: "body", dir: "auto" });
    this.rest = h("div", { class: "rest" });
    this.element = h("article", {
      class: `message ${node.role}`,
      tabindex: -1,
      "aria-label": AUTHORS[node.role],
      "data-id": node.id,
    });
    this.element.append(this.body, this.rest);
    this.growing = new GrowingText(this.body, listeners);
    this.listeners = listeners;
    /** @type {Context} */
    this.context = { place: 0, of: 1, last: false, busy: false, running: false, base: false };
    this.frame = 0;
    /** @type {string | undefined} */
    this.shown = undefined;
    /** @type {HTMLElement | null} */
    this.editor = null;
  }

  /** Show the message as it is, in its surroundings. @param {Context} context */
  update(context) {
    this.context = context;
    if (this.editor) return;
    if (context.running) this.shown = undefined;
    this.element.classList.toggle("running", context.running);
    this.element.setAttribute("aria-busy", String(context.running));
    if (context.running) this.grow();
    else this.#settle();
    this.rest.replaceChildren(...this.#rest());
  }

  /** Show more of an answer that is coming, in the next frame. */
  grow() {
    this.frame ||= requestAnimationFrame(() => {
      this.frame = 0;
      this.#drawGrowing();
    });
  }

  #drawGrowing() {
    const { content, json, calls } = this.node;
    if (!content && !calls) this.body.replaceChildren(waiting());
    else if (this.body.firstElementChild?.matches(".waiting")) this.body.replaceChildren();
    if (calls) this.rest.replaceChildren(...callCards(calls));
    if (json && content) this.#showJson();
    else if (this.context.base && content) this.#showPlain();
    else if (content) return this.growing.grow(content);
    this.listeners.onrender();
  }

  /** Show the whole text for good. */
  #settle() {
    cancelAnimationFrame(this.frame);
    this.frame = 0;
    const { role, content, json, finish } = this.node;
    const shown = `${content}|${finish}|${this.context.base}`;
    if (this.shown === shown) return;
    this.shown = shown;
    if (role === "user" || (role === "assistant" && this.context.base)) this.#showPlain();
    else if (role === "tool") this.body.replaceChildren(toolResult(this.node));
    else if (json && content) this.#showJson();
    else this.#showMarkdown(content);
  }

  /** @param {string} content */
  #showMarkdown(content) {
    if (this.body.firstElementChild?.matches(".waiting")) this.body.replaceChildren();
    if (content) this.growing.finish(content);
    else if (this.node.finish === "stopped")
      this.body.replaceChildren(h("p", { class: "muted" }, "Stopped before the first word."));
    else this.growing.clear();
  }

  #showPlain() {
    const files = (this.node.files ?? []).map((file) =>
      h(
        "details",
        { class: "file" },
        h("summary", {}, `${file.name} · ${count(file.text.length)} characters`),
        h("pre", { tabindex: 0 }, file.text),
      ),
    );
    this.body.replaceChildren(...files, ...(this.node.content ? [h("p", { class: "plain" }, this.node.content)] : []));
  }

  #showJson() {
    const block = this.body.firstElementChild;
    if (block instanceof HTMLElement && block.matches(".code")) updateCode(block, this.node.content);
    else this.body.replaceChildren(codeBlock(this.node.content, "json"));
  }

  /** @returns {HTMLElement[]} */
  #rest() {
    const { node, context } = this;
    const parts = callCards(node.calls ?? []);
    if (node.calls?.length && context.last && !context.busy) parts.push(resultForm(node));
    if (node.error) parts.push(this.#errorCard(node.error));
    if (!context.running)
      parts.push(h("footer", {}, this.#branches(), h("span", { class: "stats" }, figures(node)), this.#actions()));
    return parts;
  }

  /** @param {{message: string, hint?: string}} error */
  #errorCard({ message, hint }) {
    const again = h("button", { type: "button", onclick: () => conversation.regenerate(this.node) }, "Try again");
    const text = h("p", {}, h("strong", {}, message), hint && ` ${hint}`);
    return h("div", { class: "error" }, text, this.context.last && !this.context.busy && again);
  }

  #branches() {
    const { place, of, busy } = this.context;
    if (of < 2) return null;
    const step = (/** @type {number} */ by) => () => conversation.turnBranch(this.node, by);
    return h(
      "span",
      { class: "branches", role: "group", "aria-label": "Branches" },
      iconButton("left", "Branch before", step(-1), { "data-do": "before", disabled: busy || place === 0 }),
      h("span", {}, `${place + 1}/${of}`),
      iconButton("right", "Next branch", step(1), { "data-do": "next", disabled: busy || place === of - 1 }),
    );
  }

  #actions() {
    const { node, context } = this;
    const more = (/** @type {string} */ name) => ({ "data-do": name, disabled: context.busy && name !== "copy" });
    const buttons = [iconButton("copy", "Copy message", () => this.#copy(), more("copy"))];
    if (node.role !== "tool" && !node.calls)
      buttons.push(iconButton("edit", "Edit message", () => this.startEdit(), more("edit")));
    if (node.role === "assistant") {
      buttons.push(iconButton("retry", "Answer again", () => conversation.regenerate(node), more("regenerate")));
      if (context.last && node.content && !node.json && !node.calls)
        buttons.push(iconButton("play", "Continue this answer", () => conversation.goOn(node), more("continue")));
    }
    return h("span", { class: "actions" }, buttons);
  }

  async #copy() {
    await copy(wireText(this.node));
    toast("Copied.");
  }

  /** Let the user change the text where it stands. */
  startEdit() {
    const { node } = this;
    const area = h("textarea", {
      "aria-label": "Edit message",
      rows: Math.min(16, node.content.split("\n").length + 2),
    });
    area.value = node.content;
    const finish = (/** @type {boolean} */ keep) => {
      this.editor = null;
      this.shown = undefined;
      this.growing.clear();
      if (keep && area.value !== node.content) conversation.edit(node, area.value);
      this.update(this.context);
      this.element.focus();
    };
    area.addEventListener("keydown", (/** @type {KeyboardEvent} */ event) => {
      if (event.key === "Escape") finish(false);
      else if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) finish(true);
      else return;
      event.stopPropagation(); // Escape also stops an answer
      event.preventDefault();
    });
    this.editor = h(
      "div",
      { class: "editor" },
      area,
      h(
        "div",
        { class: "row" },
        h(
          "button",
          { type: "button", class: "primary", onclick: () => finish(true) },
          node.role === "user" ? "Send as a new branch" : "Keep as a new branch",
        ),
        h("button", { type: "button", onclick: () => finish(false) }, "Cancel"),
      ),
    );
    this.body.replaceChildren(this.editor);
    this.rest.replaceChildren();
    area.focus();
  }
}

const waiting = () =>
  h("p", { class: "waiting" }, "Reading", h("span", { class: "dots", "aria-hidden": "true" }, h("i"), h("i"), h("i")));

/** Return a message's figures in one line. @param {Message} node */
function figures({ stats, model, finish, role }) {
  if (role !== "assistant") return "";
  const { tokens, prompt, reused, perSecond, firstToken, queued, drafted, accepted } = stats ?? {};
  return [
    perSecond && `${perSecond.toFixed(1)} tok/s`,
    firstToken && `first token ${seconds(firstToken)}`,
    tokens !== undefined && `${count(tokens)} tokens`,
    prompt && `prompt of ${count(prompt)}${reused ? ` (${count(reused)} reused)` : ""}`,
    queued && queued > 100 && `waited ${seconds(queued)}`,
    drafted && `${count(accepted ?? 0)} of ${count(drafted)} guesses right`,
    ENDS[finish ?? ""],
    model,
  ]
    .filter(Boolean)
    .join(" · ");
}

/** @param {number} milliseconds */
const seconds = (milliseconds) =>
  milliseconds < 1000 ? `${Math.round(milliseconds)} ms` : `${(milliseconds / 1000).toFixed(1)} s`;
