/** The box in which a message is written: files, the meter of the context, send and stop. */

import { ApiError, quietJson } from "./api.js";
import * as conversation from "./conversation.js";
import { count, debounced, find, h, icon, iconButton } from "./dom.js";
import { continuedText, messagesOf } from "./requests.js";
import { toolFields } from "./settings.js";
import { isChat, modelOf, on, state } from "./state.js";
import { path } from "./tree.js";

/** @typedef {import("./tree.js").TextFile} TextFile */

const LARGEST = 2_000_000; // bytes of a file: four times what a context of 131,072 tokens holds
const TYPING = 400; // milliseconds without a key before the server is asked to count

const area = /** @type {HTMLTextAreaElement} */ (find("#prompt"));
const chips = find("#files");
const note = find("#note");
const meter = find("#meter");
const button = /** @type {HTMLButtonElement} */ (find("#send"));
/** @type {TextFile[]} */
let files = [];
/** @type {AbortController | null} */
let counting = null;
const measureSoon = debounced(measure, TYPING);

/** Start the box. */
export function start() {
  find("#composer").addEventListener("submit", submit);
  area.addEventListener("input", changed);
  area.addEventListener("keydown", onKey);
  const picker = /** @type {HTMLInputElement} */ (find("#file"));
  find("#attach").addEventListener("click", () => picker.click());
  picker.addEventListener("change", async () => {
    await addFiles([...(picker.files ?? [])]);
    picker.value = ""; // so that the same file can be chosen again
  });
  acceptDrops();
  for (const event of ["chat", "models", "settings", "done"]) on(event, refresh);
  refresh();
}

/** Write a text into the box. @param {string} text */
export function write(text) {
  area.value = text;
  area.focus();
  changed();
}

/** @param {KeyboardEvent} event */
function onKey(event) {
  // On a touch keyboard Enter makes a line: there the button sends. While a word is being composed, Enter takes it.
  if (event.key !== "Enter" || event.shiftKey || event.isComposing || matchMedia("(pointer: coarse)").matches) return;
  submit(event);
}

/** @param {Event} event */
function submit(event) {
  event.preventDefault();
  if (state.running.has(state.chat.id)) {
    if (event.type === "submit") conversation.stop(); // the button; Enter in the box must not stop by accident
    return;
  }
  const continues = !isChat(modelOf()) && path(state.chat).length > 0;
  const text = isChat(modelOf()) ? area.value.trim() : area.value;
  if (!text && !files.length && !continues) return;
  const sent = files;
  files = [];
  area.value = "";
  void conversation.send(text, sent);
  changed();
}

function changed() {
  area.style.height = "auto";
  area.style.height = `${area.scrollHeight}px`; // CSS limits it
  refresh();
}

function refresh() {
  const busy = state.running.has(state.chat.id);
  const base = !isChat(modelOf());
  button.replaceChildren(icon(busy ? "stop" : "send"));
  button.title = busy ? "Stop (Esc)" : "Send (Enter)";
  button.setAttribute("aria-label", busy ? "Stop" : "Send");
  button.classList.toggle("stop", busy);
  const empty = !area.value.trim() && !files.length;
  button.disabled = !busy && empty && !(base && path(state.chat).length);
  area.placeholder = base ? "Begin a text; the model goes on" : "Write a message";
  area.setAttribute("aria-label", base ? "Text to continue" : "Message");
  find("#base-note").hidden = !base;
  chips.replaceChildren(...files.map(chip));
  measureSoon();
}

/** @param {TextFile} file */
function chip(file) {
  const remove = () => {
    files = files.filter((other) => other !== file);
    refresh();
    area.focus();
  };
  return h("span", { class: "chip" }, icon("file"), file.name, iconButton("x", `Remove ${file.name}`, remove));
}

/** Take files that are text. @param {File[]} given */
async function addFiles(given) {
  const refused = [];
  for (const file of given) {
    const text = file.size > LARGEST ? null : await textOf(file);
    if (text === null)
      refused.push(`${file.name} ${file.size > LARGEST ? "is larger than 2 MB" : "is not a text file"}`);
    else files.push({ name: file.name, text });
  }
  note.textContent = refused.length ? `${refused.join("; ")}.` : "";
  refresh();
  area.focus();
}

/** Return a file's text, null if it is none. @param {File} file */
async function textOf(file) {
  try {
    const text = new TextDecoder("utf-8", { fatal: true }).decode(await file.arrayBuffer());
    return text.includes("\0") ? null : text;
  } catch {
    return null;
  }
}

/** Take files that are dropped anywhere: beside the page's own places a browser would open them instead. */
function acceptDrops() {
  const place = find("main");
  const isFile = (/** @type {DragEvent} */ event) => event.dataTransfer?.types.includes("Files");
  document.addEventListener("dragover", (event) => {
    if (!isFile(event)) return;
    event.preventDefault();
    place.classList.toggle("dropping", !find("#chat").hidden);
  });
  document.addEventListener("dragleave", (event) => {
    if (!event.relatedTarget) place.classList.remove("dropping"); // it has left the window
  });
  document.addEventListener("drop", (event) => {
    if (!isFile(event)) return;
    event.preventDefault();
    place.classList.remove("dropping");
    if (!find("#chat").hidden) void addFiles([...(event.dataTransfer?.files ?? [])]);
  });
}

/** Ask the server how much of the context the message would take, and show it. */
async function measure() {
  const model = modelOf();
  const room = model.max_model_len;
  counting?.abort();
  if (!room || state.running.has(state.chat.id)) return;
  counting = new AbortController();
  try {
    showMeter(await tokensOf(model, counting.signal), room, state.chat.settings.max_tokens ?? 0);
  } catch (error) {
    if (!(error instanceof ApiError)) return; // a newer count has begun
    meter.hidden = true;
    if (error.code === "context_length_exceeded") showTooLong(error.message);
  }
}

/** @param {import("./state.js").Model} model @param {AbortSignal} signal @returns {Promise<number>} */
async function tokensOf(model, signal) {
  const draft = /** @type {any} */ ({ role: "user", content: area.value, files: files.length ? files : undefined });
  const nodes = [...path(state.chat), ...(area.value || files.length ? [draft] : [])];
  if (!isChat(model)) {
    const prompt = continuedText(nodes);
    return prompt ? (await quietJson("/tokenize", { model: model.id, prompt }, signal)).count : 0;
  }
  const messages = messagesOf(state.chat.settings.system, nodes);
  if (!messages.some((message) => message.role !== "system")) return 0;
  const body = { model: model.id, messages, ...quietly(() => toolFields(state.chat.settings)) };
  return (await quietJson("/v1/chat/completions/input_tokens", body, signal)).input_tokens;
}

/** Return fields, or none if the user is still writing them. @param {() => object} make */
function quietly(make) {
  try {
    return make();
  } catch {
    return {};
  }
}

/** @param {number} used @param {number} room @param {number} answer tokens that the answer may take, 0: what is left */
function showMeter(used, room, answer) {
  const share = Math.min(used / room, 1);
  meter.hidden = used === 0;
  meter.classList.toggle("full", used + Math.max(answer, 1) > room);
  find(".fill", meter).style.width = `${100 * share}%`;
  find(".text", meter).textContent = `${count(used)} of ${count(room)} tokens`;
  const left = Math.max(room - used, 0);
  meter.title = `The prompt takes ${count(used)} tokens; ${count(left)} are left for the answer.`;
  note.textContent =
    used >= room ? `Too long by ${count(used - room + 1)} tokens: shorten it or begin a new chat.` : "";
}

/** @param {string} message */
function showTooLong(message) {
  note.textContent = message;
}
