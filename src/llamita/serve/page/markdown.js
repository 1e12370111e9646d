/**
 * Markdown to elements: marked's lexer splits the text into tokens, this makes a node of each.
 * All text goes through text nodes and all addresses through `safeAddress`, so markup in an answer stays text.
 */

import { colour } from "./highlighting.js";
import { copy, find, h, icon } from "./dom.js";
import { Lexer } from "./vendor/marked.esm.js";

/** @typedef {any} Token of marked */

const DEEPEST = 24; // levels of nesting: more is not prose, and browsers lay out deep trees by recursion
const LONGEST = 50_000; // characters of a block that are read as Markdown: hostile text can make its rules slow
const ENTITIES = /** @type {Record<string, string>} */ ({
  amp: "&",
  lt: "<",
  gt: ">",
  quot: '"',
  apos: "'",
  nbsp: "\u00a0",
  copy: "©",
  reg: "®",
  trade: "™",
  hellip: "…",
  mdash: "—",
  ndash: "–",
  lsquo: "‘",
  rsquo: "’",
  ldquo: "“",
  rdquo: "”",
  laquo: "«",
  raquo: "»",
  times: "×",
  deg: "°",
  plusmn: "±",
  middot: "·",
  bull: "•",
  rarr: "→",
  larr: "←",
  le: "≤",
  ge: "≥",
  ne: "≠",
  asymp: "≈",
  infin: "∞",
  euro: "€",
});

/**
 * Split a text into blocks.
 * @param {string} text
 * @returns {Token[]}
 */
export function blocksOf(text) {
  try {
    return text.length > LONGEST ? [{ type: "plain", raw: text }] : new Lexer({ gfm: true, breaks: false }).lex(text);
  } catch {
    return [{ type: "plain", raw: text }]; // nesting that overflows the lexer's stack
  }
}

/** Return the elements of a whole text. @param {string} text */
export function rendered(text) {
  const fragment = new DocumentFragment();
  for (const token of blocksOf(text)) fragment.append(...blockNodes(token));
  return fragment;
}

/**
 * Return the nodes of a block, none for blank lines.
 * @param {Token} token
 * @param {number} [depth]
 * @returns {Node[]}
 */
export function blockNodes(token, depth = 0) {
  if (depth > DEEPEST) return [document.createTextNode(token.raw ?? "")];
  const make = BLOCKS[token.type];
  return make ? [make(token, depth + 1)].flat() : [h("p", { class: "plain" }, token.raw ?? "")];
}

/** @type {Record<string, (token: Token, depth: number) => Node | Node[]>} */
const BLOCKS = {
  space: () => [],
  def: () => [],
  hr: () => h("hr"),
  // The page's own headings end at h2.
  heading: (token, depth) => h(`h${Math.min(token.depth + 2, 6)}`, {}, inlineNodes(token.tokens, depth)),
  paragraph: (token, depth) => h("p", {}, inlineNodes(token.tokens, depth)),
  text: (token, depth) =>
    token.tokens ? inlineNodes(token.tokens, depth) : [document.createTextNode(decoded(token.text))],
  checkbox: (token) => checkbox(token),
  html: (token) => h("p", { class: "plain" }, token.raw.trimEnd()),
  blockquote: (token, depth) => h("blockquote", {}, inside(token, depth)),
  code: (token) => codeBlock(token.text, languageOf(token)),
  list: (token, depth) => list(token, depth),
  table: (token, depth) => table(token, depth),
};

/** @param {Token} token @param {number} depth */
const inside = (token, depth) => token.tokens.flatMap((/** @type {Token} */ child) => blockNodes(child, depth));

/** @param {Token} token @param {number} depth */
function list(token, depth) {
  const start = token.ordered && token.start !== 1 ? token.start : null;
  const items = token.items.map((/** @type {Token} */ item) =>
    h("li", { class: item.task && "task" }, inside(item, depth)),
  );
  return h(token.ordered ? "ol" : "ul", { start }, items);
}

/** @param {Token} token @param {number} depth */
function table(token, depth) {
  const cell = (/** @type {Token} */ { tokens, header, align }) =>
    h(header ? "th" : "td", { class: align, scope: header && "col" }, inlineNodes(tokens, depth));
  const row = (/** @type {Token[]} */ cells) => h("tr", {}, cells.map(cell));
  const parts = [h("thead", {}, row(token.header)), h("tbody", {}, token.rows.map(row))];
  // It scrolls by itself on a narrow screen, so the keyboard must reach it.
  return h("div", { class: "scroll", tabindex: 0, role: "group", "aria-label": "Table" }, h("table", {}, parts));
}

/** Return the language of a block of code, "" if none is given. @param {Token} token */
export const languageOf = (token) => (token.lang ?? "").trim().split(/\s/)[0].slice(0, 40);

/** @param {Token} token */
function checkbox(token) {
  return h("input", {
    type: "checkbox",
    disabled: true,
    checked: token.checked,
    "aria-label": token.checked ? "done" : "to do",
  });
}

/**
 * Make a block of code with its language and a button that copies it.
 * @param {string} text
 * @param {string} language "" if the model gave none
 * @returns {HTMLElement}
 */
export function codeBlock(text, language) {
  const code = h("code", { "data-language": language.toLowerCase() }, text);
  const button = h("button", { type: "button", class: "quiet small", onclick: () => copied(button, code.textContent) });
  button.append(icon("copy"), "Copy");
  if (language && text) colour(code, text, language.toLowerCase());
  const label = language ? `Code in ${language}` : "Code";
  return h(
    "div",
    { class: "code" },
    h("div", { class: "code-head" }, h("span", {}, language || "text"), button),
    h("pre", { tabindex: 0, role: "group", "aria-label": label }, code),
  ); // it scrolls, so the keyboard must reach it
}

/**
 * Show another text in a block of code; its focus, selection and scrolling stay.
 * @param {HTMLElement} block
 * @param {string} text
 */
export function updateCode(block, text) {
  const code = find("code", block);
  if (code.textContent === text) return;
  code.textContent = text;
  if (code.dataset.language) colour(code, text, code.dataset.language);
}

/** @param {HTMLElement} button @param {string} text */
async function copied(button, text) {
  await copy(text);
  button.replaceChildren(icon("check"), "Copied");
  setTimeout(() => button.replaceChildren(icon("copy"), "Copy"), 1500);
}

/**
 * @param {Token[]} tokens
 * @param {number} depth
 * @returns {Node[]}
 */
function inlineNodes(tokens, depth) {
  return tokens.flatMap((token) => {
    const make = depth > DEEPEST ? undefined : INLINE[token.type];
    return make ? make(token, depth + 1) : [document.createTextNode(token.raw)];
  });
}

/** @type {Record<string, (token: Token, depth: number) => Node | Node[]>} */
const INLINE = {
  text: (token, depth) =>
    token.tokens ? inlineNodes(token.tokens, depth) : document.createTextNode(decoded(token.text)),
  escape: (token) => document.createTextNode(token.text),
  strong: (token, depth) => h("strong", {}, inlineNodes(token.tokens, depth)),
  em: (token, depth) => h("em", {}, inlineNodes(token.tokens, depth)),
  del: (token, depth) => h("del", {}, inlineNodes(token.tokens, depth)),
  codespan: (token) => h("code", {}, token.text),
  br: () => h("br"),
  checkbox: (token) => checkbox(token),
  // Models write <br> in cells of tables; every other tag is shown as it stands.
  html: (token) => (/^<br\s*\/?>$/i.test(token.raw) ? h("br") : document.createTextNode(token.raw)),
  link: (token, depth) => anchor(token.href, inlineNodes(token.tokens, depth), token.raw),
  // An image that loads by itself would tell its server that, and what, this chat is.
  image: (token) => anchor(token.href, [`Image: ${decoded(token.text) || token.href}`], token.raw),
};

/** @param {string} address @param {(Node | string)[]} children @param {string} raw */
function anchor(address, children, raw) {
  const href = safeAddress(decoded(address));
  if (!href) return document.createTextNode(raw);
  return h("a", { href, rel: "noopener noreferrer", target: "_blank" }, children);
}

/**
 * Return an address that may be followed, null for every scheme but the web's and mail's, and for relative ones.
 * @param {string} address
 */
export function safeAddress(address) {
  if (!/^(https?|mailto):/i.test(address) || !URL.canParse(address)) return null;
  const url = new URL(address);
  return ["http:", "https:", "mailto:"].includes(url.protocol) ? url.href : null;
}

/** Replace the entities that Markdown allows in text. @param {string} text */
function decoded(text) {
  if (!text.includes("&")) return text;
  return text.replace(/&(?:#(\d{1,7})|#x([\da-f]{1,6})|(\w{1,8}));/gi, (whole, decimal, hex, name) => {
    if (name) return ENTITIES[name] ?? whole;
    const point = decimal ? Number(decimal) : Number.parseInt(hex, 16);
    return point > 0 && point <= 0x10ffff ? String.fromCodePoint(point) : "\ufffd";
  });
}
