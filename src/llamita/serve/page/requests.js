/** A chat as the body of a request, and the events of either endpoint as one form. */

import { events } from "./api.js";
import { isChat } from "./state.js";
import { samplingFields, schemaFields, toolFields } from "./settings.js";

/**
 * @typedef {import("./tree.js").Chat} Chat
 * @typedef {import("./tree.js").Message} Message
 * @typedef {{path: string, body: Record<string, any>}} Request
 * @typedef {{text: string, key: string, logprob: number, top: {text: string, logprob: number}[]}} ScoredToken
 * @typedef {{text: string, calls: any[], tokens: ScoredToken[], finish: string | null, usage: any, timings: any}} Delta
 */

const STREAM = { stream: true, stream_options: { include_usage: true } };

/**
 * Return a message's text as the model reads it: its files, each under its name, then what was typed.
 * @param {Message} node
 */
export function wireText(node) {
  const files = (node.files ?? []).map(({ name, text }) => {
    const runs = (text.match(/`{3,}/g) ?? []).map((run) => run.length + 1);
    const fence = "`".repeat(Math.max(3, ...runs)); // longer than any in the file
    return `File: ${name}\n${fence}\n${text}\n${fence}\n`;
  });
  return [...files, node.content].join("\n").trimEnd();
}

/** Return messages in OpenAI's form. @param {string} system @param {Message[]} nodes */
export function messagesOf(system, nodes) {
  const messages = nodes
    .filter((node) => node.content || node.calls || node.files)
    .map((node) => {
      if (node.role === "tool") return { role: "tool", tool_call_id: node.callId, content: node.content };
      if (!node.calls?.length)
        return { role: node.role, content: node.role === "user" ? wireText(node) : node.content };
      const tool_calls = node.calls.map(({ id, name, arguments: text }) => ({
        id,
        type: "function",
        function: { name, arguments: text },
      }));
      return { role: "assistant", content: node.content || null, tool_calls };
    });
  return system.trim() ? [{ role: "system", content: system }, ...messages] : messages;
}

/**
 * Return the request for the answer to these messages. Throws an Error if the schema or the tools cannot be read.
 * @param {Chat} chat
 * @param {import("./state.js").Model} model
 * @param {Message[]} nodes
 * @param {{continues?: boolean}} [options] the last message, the model's own, goes on
 * @returns {Request}
 */
export function requestFor(chat, model, nodes, { continues = false } = {}) {
  /** @type {Record<string, any>} */
  const fields = { model: model.id, ...STREAM, ...samplingFields(chat.settings) };
  if (!isChat(model)) {
    const body = { ...fields, prompt: continuedText(nodes), max_tokens: fields.max_tokens ?? 256 };
    return { path: "/v1/completions", body };
  }
  /** @type {Record<string, any>} */
  const body = { ...fields, messages: messagesOf(chat.settings.system, nodes) };
  if (continues) body.continue_final_message = true;
  else Object.assign(body, schemaFields(chat.settings), toolFields(chat.settings)); // a grammar begins at the beginning
  return { path: "/v1/chat/completions", body };
}

/**
 * Return messages as one text, with its blanks at the end: a model that has no chat format goes on with it.
 * @param {Message[]} nodes
 */
export function continuedText(nodes) {
  return nodes.map((node) => (node.files ?? []).map((file) => file.text).join("") + node.content).join("");
}

/**
 * Send a request and yield what comes, whichever endpoint it is.
 * @param {Request} request
 * @param {AbortSignal} signal
 * @returns {AsyncGenerator<Delta>}
 */
export async function* deltas(request, signal) {
  for await (const event of events(request.path, request.body, signal)) {
    const choice = event.choices?.[0] ?? {};
    yield {
      text: choice.delta?.content ?? choice.text ?? "",
      calls: choice.delta?.tool_calls ?? [],
      tokens: scoredTokens(choice.logprobs),
      finish: choice.finish_reason ?? null,
      usage: event.usage ?? null,
      timings: event.timings ?? null,
    };
  }
}

/** Read the logprobs of either endpoint. @param {any} logprobs @returns {ScoredToken[]} */
function scoredTokens(logprobs) {
  if (!logprobs) return [];
  if (logprobs.content) return logprobs.content.map(chatToken);
  return (logprobs.tokens ?? []).map((/** @type {string} */ text, /** @type {number} */ place) => {
    const top = Object.entries(logprobs.top_logprobs?.[place] ?? {}).map(([text, logprob]) => ({
      text,
      logprob: Number(logprob),
    }));
    return {
      text,
      key: new TextEncoder().encode(text).join(),
      logprob: logprobs.token_logprobs[place] ?? 0,
      top: top.sort((a, b) => b.logprob - a.logprob),
    };
  });
}

/** @param {any} entry */
function chatToken({ token, bytes, logprob, top_logprobs: top = [] }) {
  // Two tokens that are parts of one character have the same text; their bytes differ.
  const key = bytes ? bytes.join() : token;
  return {
    text: token,
    key,
    logprob,
    top: top.map((/** @type {any} */ other) => ({ text: other.token, logprob: other.logprob })),
  };
}
