/** Keeps chats in the browser's IndexedDB, or in memory where a browser refuses it (private windows do). */

/** @typedef {import("./tree.js").Chat} Chat */

const NAME = "llamita";
const CHATS = "chats";
/** @type {IDBDatabase | null} */
let database = null;
/** @type {Map<string, Chat>} */
const memory = new Map();
const otherTabs = new BroadcastChannel("llamita-chats");

/** @template T @param {IDBRequest<T>} request @returns {Promise<T>} */
function done(request) {
  return new Promise((resolve, reject) => {
    request.onsuccess = () => resolve(request.result);
    request.onerror = () => reject(request.error);
  });
}

/** Open the store; tell whether chats will outlive this window. */
export async function open() {
  try {
    const request = indexedDB.open(NAME, 1);
    request.onupgradeneeded = () => request.result.createObjectStore(CHATS, { keyPath: "id" });
    database = await done(request);
    return true;
  } catch {
    return false;
  }
}

/** Call a function when another tab has changed a chat; id null: many. @param {(id: string | null) => void} listener */
export function onChangeElsewhere(listener) {
  otherTabs.onmessage = ({ data }) => listener(data);
}

/**
 * Run a request in a transaction of its own and wait until it is on disk.
 * @template T
 * @param {IDBTransactionMode} mode
 * @param {(chats: IDBObjectStore) => IDBRequest<T>} ask
 */
async function run(mode, ask) {
  const transaction = /** @type {IDBDatabase} */ (database).transaction(CHATS, mode);
  const result = await done(ask(transaction.objectStore(CHATS)));
  if (mode === "readonly") return result;
  return new Promise((/** @type {(value: T) => void} */ resolve, reject) => {
    transaction.oncomplete = () => resolve(result);
    transaction.onabort = () => reject(transaction.error); // the disk is full
  });
}

/** Return all chats, newest first. @returns {Promise<Chat[]>} */
export async function all() {
  const chats = database ? await run("readonly", (store) => store.getAll()) : [...memory.values()];
  return chats.sort((a, b) => b.updated - a.updated);
}

/** @param {string} id @returns {Promise<Chat | undefined>} */
export async function get(id) {
  return database ? run("readonly", (store) => store.get(id)) : memory.get(id);
}

/** @param {Chat} chat */
export async function put(chat) {
  if (database) await run("readwrite", (store) => store.put(chat));
  else memory.set(chat.id, chat);
  otherTabs.postMessage(chat.id);
}

/** @param {string} id */
export async function remove(id) {
  if (database) await run("readwrite", (store) => store.delete(id));
  memory.delete(id);
  otherTabs.postMessage(id);
}

/** Delete every chat. */
export async function clear() {
  if (database) await run("readwrite", (store) => store.clear());
  memory.clear();
  otherTabs.postMessage(null);
}
