/**
 * A chat is a tree: an edit or another answer is a new branch, nothing is written over.
 * From each message one child is chosen; the chosen ones from the root on are what is shown and sent.
 */

/**
 * @typedef {{id: string, name: string, arguments: string}} Call a tool call; its arguments are JSON text
 * @typedef {{name: string, text: string}} TextFile
 * @typedef {{tokens?: number, prompt?: number, reused?: number, perSecond?: number, firstToken?: number,
 *   queued?: number, drafted?: number, accepted?: number}} Stats times in milliseconds
 * @typedef {object} Message
 * @property {string} id
 * @property {string} parent ROOT for the first
 * @property {"user" | "assistant" | "tool"} role
 * @property {string} content
 * @property {number} created milliseconds since 1970
 * @property {TextFile[]} [files] sent before the content
 * @property {Call[]} [calls]
 * @property {string} [callId] of a tool's result
 * @property {string} [model] that wrote it
 * @property {string} [finish] why it ended: stop, length, tool_calls, stopped (by the user), failed
 * @property {{message: string, hint?: string}} [error]
 * @property {boolean} [json] the answer was held to a schema
 * @property {Stats} [stats]
 *
 * @typedef {object} Chat
 * @property {string} id
 * @property {string} title
 * @property {number} created
 * @property {number} updated
 * @property {string} model "" for the server's first
 * @property {import("./settings.js").Settings} settings
 * @property {Record<string, Message>} nodes
 * @property {Record<string, string[]>} children ids by parent, in order of making
 * @property {Record<string, string>} chosen child by parent
 */

export const ROOT = "";

/** Return an id that nobody else has. `randomUUID` needs https or localhost, this does not. */
export function newId() {
  return Array.from(crypto.getRandomValues(new Uint8Array(12)), (byte) => byte.toString(16).padStart(2, "0")).join("");
}

/**
 * @param {string} model
 * @param {import("./settings.js").Settings} settings
 * @returns {Chat}
 */
export function newChat(model, settings) {
  const now = Date.now();
  return { id: newId(), title: "", created: now, updated: now, model, settings, nodes: {}, children: {}, chosen: {} };
}

/**
 * Add a message below another and choose it.
 * @param {Chat} chat
 * @param {string} parent
 * @param {Partial<Message> & {role: Message["role"]}} fields
 * @returns {Message}
 */
export function add(chat, parent, fields) {
  const node = { content: "", ...fields, id: newId(), parent, created: Date.now() };
  chat.nodes[node.id] = node;
  (chat.children[parent] ??= []).push(node.id);
  chat.chosen[parent] = node.id;
  chat.updated = node.created;
  return node;
}

/** Return the chosen messages, first to last. @param {Chat} chat */
export function path(chat) {
  const nodes = [];
  for (let id = chat.chosen[ROOT]; id; id = chat.chosen[id]) nodes.push(chat.nodes[id]);
  return nodes;
}

/** Return the chosen messages up to one, itself included. @param {Chat} chat @param {Message} node */
export function pathTo(chat, node) {
  const nodes = [node];
  while (nodes[0].parent !== ROOT) nodes.unshift(chat.nodes[nodes[0].parent]);
  return nodes;
}

/** Return a message's place among its siblings, from 0, and their number. @param {Chat} chat @param {Message} node */
export function branch(chat, node) {
  const ids = chat.children[node.parent];
  return { place: ids.indexOf(node.id), of: ids.length };
}

/**
 * Choose the sibling `step` places on, as far as there is one.
 * @param {Chat} chat
 * @param {Message} node
 * @param {number} step
 */
export function turn(chat, node, step) {
  const ids = chat.children[node.parent];
  const place = Math.min(Math.max(ids.indexOf(node.id) + step, 0), ids.length - 1);
  chat.chosen[node.parent] = ids[place];
}

/** Return a title made of the first words of a text. @param {string} text */
export function titleOf(text) {
  const line = text.trim().replace(/\s+/g, " ");
  return line.length > 60 ? `${line.slice(0, 57).replace(/\s\S*$/, "")}…` : line;
}

/**
 * Tell whether a chat holds a text, in any branch, title or file.
 * @param {Chat} chat
 * @param {string} needle in lower case
 */
export function holds(chat, needle) {
  const has = (/** @type {string} */ text) => text.toLowerCase().includes(needle);
  return (
    has(chat.title) ||
    Object.values(chat.nodes).some((node) => has(node.content) || node.files?.some((f) => has(f.text)))
  );
}
