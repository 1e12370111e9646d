/** Colours code: highlight.js finds the scopes, this makes elements of them. Its own HTML is never made. */

import { h } from "./dom.js";

/** Receives the scopes of highlight.js (its `__emitter`) and hangs them into a fragment. */
class FragmentEmitter {
  constructor() {
    this.root = new DocumentFragment();
    /** @type {ParentNode[]} */
    this.open = [this.root];
  }

  /** @param {string} text */
  addText(text) {
    this.open[this.open.length - 1].append(text);
  }

  /** @param {string} scope such as "title.function" */
  startScope(scope) {
    const element = h("span", { class: `hl-${scope.split(".")[0]}` });
    this.open[this.open.length - 1].append(element);
    this.open.push(element);
  }

  endScope() {
    if (this.open.length > 1) this.open.pop();
  }

  /** The name that highlight.js uses for the languages that a block opens with. @param {string} scope */
  openNode(scope) {
    this.startScope(scope);
  }

  closeNode() {
    this.endScope();
  }

  /** @param {FragmentEmitter} emitter of a language inside this one */
  __addSublanguage(emitter) {
    this.open[this.open.length - 1].append(emitter.root);
  }

  finalize() {
    return true;
  }

  /** What highlight.js returns as `value`: here the elements. */
  toHTML() {
    return this.root;
  }
}

const LONGEST = 30_000; // characters that are coloured: its rules can be slow on text that was made for it

/** @type {any} */
let highlighter = null;
/** @type {Promise<void> | null} */
let loading = null;

/** Load highlight.js, once, when the first code is shown. */
async function load() {
  const { default: original } = await import("./vendor/highlight.min.js");
  original.configure({ __emitter: FragmentEmitter });
  highlighter = original;
}

/**
 * Colour an element that shows code. It keeps its plain text if the language is not known.
 * @param {HTMLElement} element
 * @param {string} text
 * @param {string} language as the model wrote it
 */
export function colour(element, text, language) {
  if (text.length > LONGEST) return;
  if (!highlighter) {
    loading ??= load();
    loading.then(
      () => colour(element, text, language),
      () => {},
    ); // not coloured is not wrong
    return;
  }
  if (element.textContent !== text || !highlighter.getLanguage(language)) return; // it has grown meanwhile
  const { value } = highlighter.highlight(text, { language, ignoreIllegals: true });
  if (value instanceof DocumentFragment) element.replaceChildren(value);
}
