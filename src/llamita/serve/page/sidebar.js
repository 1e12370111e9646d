/** The list of chats: search, open, export, import, delete. */

import { confirmed } from "./dialogs.js";
import { debounced, find, h, iconButton, toast } from "./dom.js";
import { emit, on, openChat, openNew, state } from "./state.js";
import * as store from "./store.js";
import { download, fresh, parse } from "./transfer.js";
import { holds } from "./tree.js";

/** @typedef {import("./tree.js").Chat} Chat */

const DAY = 24 * 3600 * 1000;
const list = find("#chats");
const search = /** @type {HTMLInputElement} */ (find("#search"));
const picker = /** @type {HTMLInputElement} */ (find("#import"));
/** @type {Chat[]} */
let chats = [];
let shown = ""; // what the list shows

/** Start the list. */
export function start() {
  search.addEventListener("input", debounced(show, 150));
  find("#new").addEventListener("click", () => {
    openNew();
    find("#prompt").focus();
  });
  find("#export-all").addEventListener("click", async () =>
    download(await store.all(), `llamita-chats-${today()}.json`),
  );
  find("#import-button").addEventListener("click", () => picker.click());
  picker.addEventListener("change", importFiles);
  find("#delete-all").addEventListener("click", deleteAll);
  on("chats", update);
  on("chat", ({ opened } = {}) => opened && mark());
  store.onChangeElsewhere(changedElsewhere);
  return reload();
}

const today = () => new Date().toISOString().slice(0, 10);

/** Read all chats anew. */
async function reload() {
  chats = await store.all();
  show();
}

/** Take a chat as it was stored, all of them if none is given. @param {Chat} [chat] */
function update(chat) {
  if (!chat) return reload();
  chats = [chat, ...chats.filter((other) => other.id !== chat.id)].sort((a, b) => b.updated - a.updated);
  show();
}

/** Show the chats that hold what is searched for. */
function show() {
  const needle = search.value.trim().toLowerCase();
  const midnight = new Date().setHours(0, 0, 0, 0);
  const found = chats.filter((chat) => !needle || holds(chat, needle));
  const groups = Object.entries(Object.groupBy(found, (chat) => groupOf(chat, midnight)));
  const state = JSON.stringify([
    needle,
    groups.map(([name, members = []]) => [name, members.map((chat) => [chat.id, chat.title])]),
  ]);
  if (state === shown) return; // the focus may be in the list: it is made anew only if it differs
  shown = state;
  const parts = groups.map(([name, members = []]) =>
    h("section", {}, h("h2", {}, name), h("ul", {}, members.map(row))),
  );
  const none = h(
    "p",
    { class: "muted" },
    needle ? "No chat holds this." : "Chats appear here. They stay in this browser.",
  );
  list.replaceChildren(...(parts.length ? parts : [none]));
  mark();
}

/** @param {Chat} chat @param {number} midnight */
function groupOf(chat, midnight) {
  if (chat.updated >= midnight) return "Today";
  if (chat.updated >= midnight - DAY) return "Yesterday";
  return chat.updated >= midnight - 7 * DAY ? "Last seven days" : "Earlier";
}

/** @param {Chat} chat */
function row(chat) {
  const title = chat.title || "Untitled";
  const newest = () => chats.find((other) => other.id === chat.id) ?? chat; // the row may be older than the chat
  const open = h(
    "button",
    { type: "button", class: "open", "data-id": chat.id, title, onclick: () => openChat(newest()) },
    title,
  );
  return h(
    "li",
    {},
    open,
    iconButton("download", `Export “${title}”`, () => download([newest()], `${fileName(title)}.json`)),
    iconButton("trash", `Delete “${title}”`, () => deleteOne(chat, title)),
  );
}

/** @param {string} title */
const fileName = (title) =>
  title
    .replace(/[^\p{L}\p{N}]+/gu, "-")
    .replace(/^-|-$/g, "")
    .slice(0, 40)
    .toLowerCase() || "chat";

/** Mark the open chat. */
function mark() {
  for (const button of list.querySelectorAll(".open"))
    if (button.getAttribute("data-id") === state.chat.id) button.setAttribute("aria-current", "page");
    else button.removeAttribute("aria-current");
}

/** @param {Chat} chat @param {string} title */
async function deleteOne(chat, title) {
  if (!(await confirmed(`Delete the chat “${title}”?`, "Delete"))) return;
  state.running.get(chat.id)?.controller.abort();
  await settled(chat.id);
  await store.remove(chat.id);
  if (state.chat.id === chat.id) openNew();
  emit("chats");
}

async function deleteAll() {
  if (!chats.length || !(await confirmed(`Delete all ${chats.length} chats? This cannot be undone.`, "Delete all")))
    return;
  for (const [id, { controller }] of state.running) {
    controller.abort();
    await settled(id);
  }
  await store.clear();
  openNew();
  emit("chats");
}

/** Wait until an answer that was stopped has been stored for the last time. @param {string} id */
async function settled(id) {
  while (state.running.has(id)) await new Promise((resolve) => setTimeout(resolve, 10));
}

/** @param {number} number */
const many = (number) => (number === 1 ? "1 chat" : `${number} chats`);

async function importFiles() {
  try {
    for (const file of picker.files ?? []) {
      const given = parse(await file.text());
      const added = fresh(given, await store.all());
      for (const chat of added) await store.put(chat);
      const known = given.length - added.length;
      toast(`Imported ${many(added.length)}${known ? `; ${known} were here already` : ""}.`);
    }
  } catch (error) {
    toast(/** @type {Error} */ (error).message);
  }
  picker.value = "";
  emit("chats");
}

/** Follow what another tab did. @param {string | null} id */
async function changedElsewhere(id) {
  await reload();
  if (id !== state.chat.id || state.running.has(id) || document.querySelector(".editor")) return;
  const chat = await store.get(id);
  if (chat) openChat(chat, false);
}
