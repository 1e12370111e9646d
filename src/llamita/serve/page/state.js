/** What the parts of the page share: the models, the open chat, the answers under way, and news of their changes. */

import { json } from "./api.js";
import { defaults } from "./settings.js";
import { newChat } from "./tree.js";
import * as store from "./store.js";

/**
 * @typedef {import("./tree.js").Chat} Chat
 * @typedef {import("./tree.js").Message} Message
 * @typedef {object} Model an entry of /v1/models
 * @property {string} id
 * @property {string | null} [parent] of an adapter
 * @property {number} [max_model_len]
 * @property {{has_chat?: boolean, scheme?: string | null, n_params?: number, size?: number,
 *   sampling?: Record<string, number>}} [meta]
 */

export const state = {
  /** @type {Model[]} */
  models: [],
  chat: newChat("", defaults()),
  /** @type {Map<string, {chat: Chat, node: Message, controller: AbortController}>} */
  running: new Map(), // by chat: an answer goes on while another chat is looked at
};

/** @type {Map<string, ((detail: any) => void)[]>} */
const listeners = new Map();

/**
 * Call a function at: "models" (they are known, or another is chosen), "chat" (another was opened, or its path has
 * changed), "grow" (a message has), "done" (an answer has ended), "settings" (of the open chat), "chats" (one was
 * stored; without it: many were).
 * @param {string} event
 * @param {(detail: any) => void} listener
 */
export function on(event, listener) {
  listeners.set(event, [...(listeners.get(event) ?? []), listener]);
}

/** @param {string} event @param {any} [detail] */
export function emit(event, detail) {
  for (const listener of listeners.get(event) ?? []) listener(detail);
}

/** Ask the server for its models. */
export async function loadModels() {
  state.models = (await json("/v1/models")).data;
  emit("models");
}

/** Return the model of a chat: the server's first if it names none, or one that is gone. @returns {Model} */
export function modelOf(chat = state.chat) {
  return state.models.find((model) => model.id === chat.model) ?? state.models[0] ?? { id: "" };
}

/** Tell whether a model takes messages; else it continues a text. @param {Model} model */
export const isChat = (model) => model.meta?.has_chat !== false;

/** Show a chat. @param {Chat} chat @param {boolean} [asked] by the user, not because another tab has changed it */
export function openChat(chat, asked = true) {
  state.chat = state.running.get(chat.id)?.chat ?? chat;
  emit("chat", { opened: true, asked });
}

/** Show an empty chat with the model of the one before. */
export function openNew() {
  openChat(newChat(state.chat.model, defaults()));
}

/** Store a chat if it has messages. @param {Chat} chat */
export async function save(chat) {
  if (!Object.keys(chat.nodes).length) return;
  await store.put(chat);
  emit("chats", chat);
}
