/** Shows a Markdown text that grows: at most once a frame, and only its last block anew. */

import { find } from "./dom.js";
import { blockNodes, blocksOf, languageOf, updateCode } from "./markdown.js";

const REST = 4; // times as long as the last rendering took, the next waits: at most a fifth of the time goes to it

/** A text on the page that grows at its end. */
export class GrowingText {
  /**
   * @param {HTMLElement} element whose children it makes
   * @param {{onblock?: (text: string) => void, onrender?: () => void}} [listeners] of whole blocks, and of drawing
   */
  constructor(element, listeners = {}) {
    this.element = element;
    this.listeners = listeners;
    this.text = "";
    this.settled = 0; // characters whose blocks can no longer change
    this.keep = 0; // nodes that show them
    this.next = 0; // when it may be drawn again
    this.frame = 0;
  }

  /** Say what the text is now; it is drawn in a coming frame. @param {string} text */
  grow(text) {
    this.pending = text;
    if (!this.frame) this.frame = requestAnimationFrame((now) => this.#tick(now));
  }

  /** Draw the text as it is, now; it may still go on later. @param {string} text */
  finish(text) {
    cancelAnimationFrame(this.frame);
    this.frame = 0;
    // A definition such as "[1]: address" may stand below its uses, whose blocks were drawn without it.
    if (/^ {0,3}\[[^\]\n]+\]:/m.test(text)) this.#reset();
    this.#draw(text);
    this.#tell(text.slice(this.settled));
  }

  /** Show nothing. */
  clear() {
    this.#reset();
    this.element.replaceChildren();
  }

  /** @param {number} now */
  #tick(now) {
    this.frame = 0;
    if (now < this.next) return this.grow(this.pending ?? "");
    const start = performance.now();
    this.#draw(this.pending ?? "");
    this.next = performance.now() + REST * (performance.now() - start) - 1;
    this.listeners.onrender?.();
  }

  /** @param {string} text */
  #draw(text) {
    if (!text.startsWith(this.text) || this.settled > text.length) this.#reset();
    this.text = text;
    const tail = text.slice(this.settled).replace(/\r\n?/g, "\n");
    const tokens = blocksOf(tail);
    let last = tokens.length - 1;
    while (last > 0 && tokens[last].type === "space") last -= 1;

    const before = tokens.slice(0, Math.max(last, 0));
    const whole = before.flatMap((token) => blockNodes(token));
    if (whole.length || !this.#updateOpenCode(tokens[last])) {
      const open = tokens.slice(Math.max(last, 0)).flatMap((token) => blockNodes(token));
      while (this.element.childNodes.length > this.keep) this.element.lastChild?.remove();
      this.element.append(...whole, ...open);
    }

    const length = before.reduce((sum, token) => sum + token.raw.length, 0);
    const raw = before.map((token) => token.raw).join("");
    if (length && text.startsWith(raw, this.settled)) {
      // else the lexer changed the text: draw it all next time, too
      this.settled += length;
      this.keep += whole.length;
      this.#tell(raw);
    }
  }

  /**
   * Change code that is still being written where it stands; tell whether that is what the block is.
   * @param {any} token
   */
  #updateOpenCode(token) {
    const node = this.element.childNodes[this.keep];
    if (token?.type !== "code" || !(node instanceof HTMLElement) || !node.matches(".code:last-child")) return false;
    if (find("code", node).dataset.language !== languageOf(token).toLowerCase()) return false;
    updateCode(node, token.text);
    return true;
  }

  #reset() {
    this.text = "";
    this.settled = this.keep = 0;
  }

  /** @param {string} text */
  #tell(text) {
    if (text.trim()) this.listeners.onblock?.(text.trim());
  }
}
