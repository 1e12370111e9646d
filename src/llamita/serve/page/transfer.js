/** Chats as JSON files: written for the user to keep, read back with a check of everything that is used. */

import { ROOT, newId } from "./tree.js";
import { h } from "./dom.js";

/** @typedef {import("./tree.js").Chat} Chat */

const FORMAT = "llamita-chats";
const ROLES = ["user", "assistant", "tool"];

/** Offer chats as a file. @param {Chat[]} chats @param {string} name */
export function download(chats, name) {
  const text = JSON.stringify({ format: FORMAT, version: 1, exported: new Date().toISOString(), chats }, null, 1);
  const address = URL.createObjectURL(new Blob([text], { type: "application/json" }));
  h("a", { href: address, download: name }).click();
  setTimeout(() => URL.revokeObjectURL(address), 10_000); // after the browser has begun to read it
}

/**
 * Return the chats of an exported file. Throws an Error whose message says what is wrong.
 * @param {string} text
 * @returns {Chat[]}
 */
export function parse(text) {
  let data;
  try {
    data = JSON.parse(text);
  } catch {
    throw new Error("This file is not JSON. Choose a file that this page exported.");
  }
  if (data?.format !== FORMAT || !Array.isArray(data.chats))
    throw new Error(`This file is not an export of chats: "format" is not "${FORMAT}".`);
  if (data.version !== 1) throw new Error(`This file has version ${data.version}; this page reads version 1.`);
  data.chats.forEach(check);
  return data.chats;
}

/**
 * Return the chats to add: those that are here in the same state are left out, others of the same id get a new one.
 * @param {Chat[]} chats
 * @param {Chat[]} present
 */
export function fresh(chats, present) {
  const here = new Map(present.map((chat) => [chat.id, chat.updated]));
  const added = chats.filter((chat) => here.get(chat.id) !== chat.updated);
  return added.map((chat) => (here.has(chat.id) ? { ...chat, id: newId() } : chat));
}

/** Throw unless a chat is a tree of messages that the page can show. @param {any} chat @param {number} place */
function check(chat, place) {
  const isText = (/** @type {any} */ value) => typeof value === "string";
  const isMap = (/** @type {any} */ value) => value !== null && typeof value === "object" && !Array.isArray(value);
  const refuse = (/** @type {string} */ what) => {
    throw new Error(`Chat ${place + 1} of the file: ${what}. Nothing was imported.`);
  };
  if (!isMap(chat) || !isText(chat.id) || !isText(chat.title) || !isText(chat.model))
    refuse("id, title or model is missing");
  if (!Number.isFinite(chat.created) || !Number.isFinite(chat.updated)) refuse("its dates are not numbers");
  if (![chat.settings, chat.nodes, chat.children, chat.chosen].every(isMap)) refuse("settings or messages are missing");
  for (const [id, node] of Object.entries(chat.nodes)) {
    if (!isMap(node) || node.id !== id || !ROLES.includes(node.role) || !isText(node.content))
      refuse(`message ${id} is damaged`);
    if (!chat.children[node.parent]?.includes(id)) refuse(`message ${id} hangs nowhere`);
    const files = node.files ?? [],
      calls = node.calls ?? [];
    if (![files, calls].every(Array.isArray)) refuse(`message ${id} has damaged files or calls`);
    if (!files.every((/** @type {any} */ file) => isText(file?.name) && isText(file.text)))
      refuse(`message ${id} has a damaged file`);
    if (!calls.every((/** @type {any} */ call) => isText(call?.name) && isText(call.arguments)))
      refuse(`message ${id} has a damaged call`);
  }
  if (reachable(chat) !== Object.keys(chat.nodes).length) refuse("its messages are not one tree");
}

/** Count the messages below the root, and see that what is chosen exists. @param {any} chat */
function reachable(chat) {
  const waiting = [ROOT];
  const seen = new Set();
  for (let id = waiting.pop(); id !== undefined; id = waiting.pop()) {
    const children = chat.children[id] ?? [];
    if (children.length && !children.includes(chat.chosen[id])) return -1;
    for (const child of children) {
      if (seen.has(child) || chat.nodes[child]?.parent !== id) return -1; // a circle, or a child of two
      seen.add(child);
      waiting.push(child);
    }
  }
  return seen.size;
}
