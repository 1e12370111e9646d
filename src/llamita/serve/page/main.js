/** Starts the page: its parts, the keys, and what the address names. */

import { onKeyNeeded } from "./api.js";
import * as chatView from "./chat_view.js";
import * as compareView from "./compare_view.js";
import * as composer from "./composer.js";
import * as conversation from "./conversation.js";
import { askKey } from "./dialogs.js";
import { find, h, toast } from "./dom.js";
import * as loadView from "./load_view.js";
import { describe, modelOptions } from "./models.js";
import * as settingsView from "./settings_view.js";
import * as shortcuts from "./shortcuts.js";
import * as sidebar from "./sidebar.js";
import { emit, loadModels, modelOf, on, openChat, openNew, save, state } from "./state.js";
import * as store from "./store.js";

const WIDE = matchMedia("(min-width: 60rem)");
const title = /** @type {HTMLInputElement} */ (find("#title"));
const select = /** @type {HTMLSelectElement} */ (find("#model"));
/** @typedef {"" | "settings" | "load"} Pane */
/** @type {Pane} */
let pane = "";
/** @type {Element | null} */
let paneOpener = null; // gets the focus back

/** Show one of the panes at the right, or none. @param {Pane} name */
function showPane(name) {
  if (name && !pane) paneOpener = document.activeElement;
  pane = name;
  find("#pane").hidden = !name;
  find("#pane-title").textContent = name === "load" ? "Scheduler" : "Settings of this chat";
  for (const id of ["settings", "load"]) {
    find(`#${id}`).hidden = id !== name;
    find(`#show-${id}`).setAttribute("aria-expanded", String(id === name));
  }
  loadView.show(name === "load");
  if (name) find("#pane-close").focus();
  else if (paneOpener instanceof HTMLElement) paneOpener.focus();
}

/** @param {boolean} shown */
function showSidebar(shown) {
  document.body.classList.toggle("with-sidebar", shown);
  find("#sidebar").inert = !shown;
  find("#toggle-sidebar").setAttribute("aria-expanded", String(shown));
}

const sidebarShown = () => document.body.classList.contains("with-sidebar");
const comparing = () => !find("#compare").hidden;

/** @param {boolean} shown */
function showCompare(shown) {
  find("#compare").hidden = !shown;
  find("#chat").hidden = shown;
  for (const id of ["#title", "#model", "#show-settings"]) find(id).hidden = shown;
  find("#bar-title").hidden = !shown;
  find("#show-compare").setAttribute("aria-pressed", String(shown));
  if (shown && pane === "settings") showPane("");
  setAddress();
  find(shown ? "#compare-prompt" : "#prompt").focus();
}

/** Keep what is shown in the address, so that a reload and the back button find it. */
function setAddress() {
  const wanted = comparing() ? "#compare" : Object.keys(state.chat.nodes).length ? `#chat/${state.chat.id}` : "#";
  if ((location.hash || "#") !== wanted) history.pushState(null, "", wanted);
}

/** Show what the address names. */
async function followAddress() {
  const id = location.hash.match(/^#chat\/(\w+)$/)?.[1];
  const chat = id && id !== state.chat.id ? await store.get(id) : undefined;
  if (chat) openChat(chat);
  else if (!id && location.hash !== "#compare" && Object.keys(state.chat.nodes).length) openNew();
  if (comparing() !== (location.hash === "#compare")) showCompare(location.hash === "#compare");
}

/** @param {{opened?: boolean, asked?: boolean}} [detail] */
function showChat({ opened = false, asked = true } = {}) {
  title.value = state.chat.title;
  document.title = state.chat.title ? `${state.chat.title} · llamita` : "llamita";
  if (state.models.length) select.value = modelOf().id;
  select.title = describe(modelOf());
  if (opened && asked && comparing()) showCompare(false);
  if (opened && asked && !WIDE.matches) showSidebar(false);
  setAddress();
}

/** Turn to the other colours; once they are the system's again, follow it. */
function toggleTheme() {
  const system = matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light";
  const now = document.documentElement.dataset.theme ?? system;
  const next = now === "dark" ? "light" : "dark";
  if (next === system) {
    delete document.documentElement.dataset.theme;
    localStorage.removeItem("llamita-theme");
  } else {
    document.documentElement.dataset.theme = next;
    localStorage.setItem("llamita-theme", next);
  }
}

/** What Escape does: the nearest thing that can end. */
function escape() {
  if (comparing()) compareView.stop();
  else if (state.running.has(state.chat.id)) conversation.stop();
  else if (pane) showPane("");
  else if (sidebarShown() && !WIDE.matches) showSidebar(false);
  else if (!find("#prompt").value) find("#prompt").blur(); // so that the keys of one letter work
}

function focusSearch() {
  showSidebar(true);
  find("#search").focus();
}

function newChat() {
  openNew();
  find("#prompt").focus();
}

const KEYS = [
  { keys: ["Enter"], what: "Send; Shift+Enter makes a new line" },
  { keys: ["Escape"], what: "Stop the answer, close a pane", run: escape },
  { keys: ["n"], what: "New chat", run: newChat },
  { keys: ["/", "Ctrl+k"], what: "Search the chats", run: focusSearch },
  { keys: ["i"], what: "Write a message", run: () => find(comparing() ? "#compare-prompt" : "#prompt").focus() },
  { keys: ["j"], what: "Next message", run: () => chatView.focusMessage(1) },
  { keys: ["k"], what: "Message before", run: () => chatView.focusMessage(-1) },
  { keys: ["e"], what: "Edit the message; Ctrl+Enter keeps the edit", run: () => chatView.act("edit") },
  { keys: ["r"], what: "Answer again", run: () => chatView.act("regenerate") },
  { keys: ["c"], what: "Continue the answer", run: () => chatView.act("continue") },
  { keys: ["["], what: "Branch before", run: () => chatView.act("before") },
  { keys: ["]"], what: "Next branch", run: () => chatView.act("next") },
  { keys: ["m"], what: "Compare two models", run: () => showCompare(!comparing()) },
  { keys: ["←", "→", "↑", "↓"], what: "In a comparison: from token to token; Enter goes to where they part" },
  {
    keys: ["s"],
    what: "Settings of the chat",
    run: () => !comparing() && showPane(pane === "settings" ? "" : "settings"),
  },
  { keys: ["l"], what: "The scheduler at work", run: () => showPane(pane === "load" ? "" : "load") },
  { keys: ["b"], what: "List of chats", run: () => showSidebar(!sidebarShown()) },
  { keys: ["t"], what: "Dark or light", run: toggleTheme },
];

function wire() {
  find("#toggle-sidebar").addEventListener("click", () => showSidebar(!sidebarShown()));
  find("#new-small").addEventListener("click", newChat);
  find("#scrim").addEventListener("click", () => (pane ? showPane("") : showSidebar(false)));
  find("#theme").addEventListener("click", toggleTheme);
  find("#show-compare").addEventListener("click", () => showCompare(!comparing()));
  find("#show-settings").addEventListener("click", () => showPane(pane === "settings" ? "" : "settings"));
  find("#show-load").addEventListener("click", () => showPane(pane === "load" ? "" : "load"));
  find("#pane-close").addEventListener("click", () => showPane(""));
  title.addEventListener("change", () => {
    state.chat.title = title.value.trim();
    showChat();
    void save(state.chat);
  });
  select.addEventListener("change", () => {
    state.chat.model = select.value;
    emit("models"); // everything that depends on the model
    void save(state.chat);
  });
  on("models", () => {
    select.replaceChildren(...modelOptions());
    showChat();
  });
  on("chat", showChat);
  addEventListener("popstate", () => void followAddress());
  WIDE.addEventListener("change", () => showSidebar(WIDE.matches));
}

/** Learn what the server has; until then say so, and let the user try again. */
async function connect() {
  const note = find("#offline");
  try {
    await loadModels();
    note.hidden = true;
  } catch (error) {
    const again = h("button", { type: "button", onclick: connect }, "Try again");
    note.replaceChildren(h("strong", {}, /** @type {Error} */ (error).message), " Is it running? ", again);
    note.hidden = false;
  }
}

async function begin() {
  onKeyNeeded(askKey);
  wire();
  chatView.start();
  chatView.suggest(composer.write);
  composer.start();
  settingsView.start();
  compareView.start();
  shortcuts.start(KEYS);
  showSidebar(WIDE.matches);
  if (!(await store.open())) toast("This browser stores nothing here: chats are lost when the window closes.");
  await followAddress(); // before anything that writes the address
  await Promise.all([sidebar.start(), connect()]);
  // A phone would open its keyboard.
  if (!comparing() && !matchMedia("(pointer: coarse)").matches) find("#prompt").focus();
  document.documentElement.dataset.ready = "yes";
}

void begin();
