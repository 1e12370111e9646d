/** What a user does to a chat: send, stop, continue, regenerate, edit. Each makes messages and streams one answer. */

import { ApiError } from "./api.js";
import { toast } from "./dom.js";
import { deltas, requestFor } from "./requests.js";
import { emit, isChat, modelOf, save, state } from "./state.js";
import { ROOT, add, path, pathTo, titleOf, turn } from "./tree.js";

/**
 * @typedef {import("./tree.js").Chat} Chat
 * @typedef {import("./tree.js").Message} Message
 */

const SAVE_EVERY = 2000; // milliseconds: what a closed window may lose of an answer

/** @param {Chat} chat */
const lastOf = (chat) => path(chat).at(-1);

/** Send a message and stream the answer. @param {string} text @param {import("./tree.js").TextFile[]} files */
export function send(text, files) {
  const chat = state.chat;
  const last = lastOf(chat);
  if (!text && !files.length) return last?.role === "assistant" ? goOn(last) : undefined; // a text that is continued
  const user = add(chat, last?.id ?? ROOT, { role: "user", content: text, ...(files.length && { files }) });
  chat.title ||= titleOf(text || files[0].name);
  return answer(chat, user);
}

/** Stop the open chat's answer. What has come of it stays. */
export function stop() {
  state.running.get(state.chat.id)?.controller.abort();
}

/** Answer anew, in a branch beside the old answer. @param {Message} node */
export function regenerate(node) {
  const chat = state.chat;
  const failedEmpty = node.finish === "failed" && !node.content && !node.calls;
  if (failedEmpty) return generate(chat, node); // there is nothing to keep a branch for
  return answer(chat, node);
}

/** Go on with an answer that was stopped, cut or edited. @param {Message} node */
export function goOn(node) {
  return generate(state.chat, node, true);
}

/**
 * Put an edited message in a branch of its own; after the user's the model answers.
 * @param {Message} node
 * @param {string} text
 */
export function edit(node, text) {
  const chat = state.chat;
  const { role, files, callId } = node;
  const edited = add(chat, node.parent, {
    role,
    content: text,
    files,
    callId,
    model: node.model,
    finish: node.finish && "stopped",
  });
  if (role === "user") return answer(chat, edited);
  emit("chat");
  return save(chat);
}

/**
 * Give the results of an answer's calls, in their order, and let the model go on.
 * @param {Message} node
 * @param {string[]} results
 */
export function sendResults(node, results) {
  const chat = state.chat;
  let parent = node;
  for (const [place, call] of (node.calls ?? []).entries())
    parent = add(chat, parent.id, { role: "tool", callId: call.id, content: results[place] });
  return answer(chat, parent);
}

/** Show the branch `step` places on. @param {Message} node @param {number} step */
export function turnBranch(node, step) {
  turn(state.chat, node, step);
  emit("chat");
  return save(state.chat);
}

/** Stream an answer below a message, or beside one of the model's. @param {Chat} chat @param {Message} node */
function answer(chat, node) {
  const parent = node.role === "assistant" ? node.parent : node.id;
  return generate(chat, add(chat, parent, { role: "assistant" }));
}

/**
 * Stream into a message of the model's.
 * @param {Chat} chat
 * @param {Message} node
 * @param {boolean} [continues] behind what it holds
 */
async function generate(chat, node, continues = false) {
  if (state.running.has(chat.id)) return;
  const controller = new AbortController();
  const model = modelOf(chat);
  state.running.set(chat.id, { chat, node, controller });
  Object.assign(node, { model: model.id, error: undefined, finish: undefined, stats: {} });
  node.json = isChat(model) && !continues && Boolean(chat.settings.schemaOn);
  emit("chat");
  try {
    const nodes = pathTo(chat, node);
    const request = requestFor(chat, model, continues ? nodes : nodes.slice(0, -1), { continues });
    await stream(chat, node, request, controller.signal);
  } catch (error) {
    fail(node, /** @type {Error} */ (error), controller.signal);
  }
  state.running.delete(chat.id);
  chat.updated = Date.now();
  emit("done", node);
  await keep(chat);
}

/**
 * @param {Chat} chat
 * @param {Message} node
 * @param {import("./requests.js").Request} request
 * @param {AbortSignal} signal
 */
async function stream(chat, node, request, signal) {
  const began = performance.now();
  let saved = began;
  for await (const delta of deltas(request, signal)) {
    take(node, delta, performance.now() - began);
    emit("grow", node);
    if (performance.now() - saved < SAVE_EVERY) continue;
    saved = performance.now();
    void keep(chat);
  }
}

/**
 * Add what has come to a message.
 * @param {Message} node
 * @param {import("./requests.js").Delta} delta
 * @param {number} elapsed
 */
function take(node, delta, elapsed) {
  const stats = (node.stats ??= {});
  if (delta.text || delta.calls.length) stats.firstToken ??= elapsed;
  node.content += delta.text;
  for (const { index = 0, id, function: part } of delta.calls) {
    const call = ((node.calls ??= [])[index] ??= { id: id ?? "", name: "", arguments: "" });
    call.name ||= part?.name ?? "";
    call.arguments += part?.arguments ?? "";
  }
  node.finish = delta.finish ?? node.finish;
  if (!delta.usage) return;
  const { usage, timings } = delta;
  Object.assign(stats, { tokens: usage.completion_tokens, prompt: usage.prompt_tokens });
  stats.reused = usage.prompt_tokens_details?.cached_tokens ?? timings?.cache_n;
  const seconds = (elapsed - (stats.firstToken ?? elapsed)) / 1000;
  stats.perSecond = timings?.predicted_per_second ?? (seconds ? usage.completion_tokens / seconds : undefined);
  stats.firstToken = timings?.first_token_ms ?? stats.firstToken;
  stats.queued = timings?.queue_ms;
  stats.drafted = timings?.draft_n;
  stats.accepted = timings?.draft_n_accepted;
}

/** Note in a message why it ended early. @param {Message} node @param {Error} error @param {AbortSignal} signal */
function fail(node, error, signal) {
  node.finish = signal.aborted ? "stopped" : "failed";
  if (!signal.aborted) node.error = { message: error.message, hint: error instanceof ApiError ? error.hint : "" };
}

/** Store a chat; say so if the browser cannot. @param {Chat} chat */
async function keep(chat) {
  try {
    await save(chat);
  } catch (error) {
    toast(`The browser could not store this chat: ${/** @type {Error} */ (error).message}. Export it to keep it.`);
  }
}
