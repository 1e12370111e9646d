/** The scheduler at work: what runs, what waits, how full the memory is. Asked for once a second while it is shown. */

import { quietJson } from "./api.js";
import { count, find, h, svg } from "./dom.js";

const EVERY = 1000; // milliseconds
const HISTORY = 60; // rates that the curve shows
const WIDTH = 240,
  HEIGHT = 36; // of the curve, in its own units

const pane = find("#load");
/** @type {Map<string, number[]>} */
const rates = new Map(); // tokens a second of each model, newest last
/** @type {ReturnType<typeof setTimeout> | undefined} */
let timer;
let open = false;

/** Show the view, or stop it. @param {boolean} shown */
export function show(shown) {
  const begins = shown && !open;
  open = shown;
  clearTimeout(timer);
  if (shown && (begins || !timer)) void poll();
}

async function poll() {
  try {
    render(await quietJson("/v1/load"));
  } catch (error) {
    pane.replaceChildren(h("p", { class: "error" }, /** @type {Error} */ (error).message));
  }
  clearTimeout(timer);
  if (open) timer = setTimeout(poll, EVERY);
}

/** @param {{models: any[], uptime_s: number}} load */
function render({ models, uptime_s: uptime }) {
  pane.replaceChildren(
    ...models.map(card),
    h("p", { class: "muted" }, `The server has been up for ${duration(uptime)}.`),
  );
}

/** @param {any} model */
function card(model) {
  const history = rates.get(model.id) ?? [];
  rates.set(model.id, [...history, model.decode_rate ?? 0].slice(-HISTORY));
  const { running, waiting, waiting_tokens: tokens } = model;
  const longest = Math.max(...running.map((/** @type {any} */ run) => Math.max(run.tokens, run.prompt_tokens)));
  const state = [
    `${running.length} running`,
    waiting ? `${waiting} waiting (${count(tokens)} tokens)` : "none waiting",
  ];
  return h(
    "section",
    {},
    h("h3", {}, model.id),
    h("p", {}, state.join(", ")),
    h(
      "ul",
      { class: "running-list" },
      running.map((/** @type {any} */ run) => runningRow(run, longest)),
    ),
    h(
      "p",
      { class: "figure" },
      h("strong", {}, (model.decode_rate ?? 0).toFixed(1)),
      " tok/s written, ",
      h("strong", {}, count(model.prefill_rate ?? 0)),
      " tok/s read",
    ),
    curve(rates.get(model.id) ?? []),
    memory(model),
  );
}

/**
 * Show what of a request is read, unread and written, on the scale of the longest.
 * @param {{tokens: number, prompt_tokens: number, state: "prefill" | "decode"}} run
 * @param {number} longest
 */
function runningRow({ tokens, prompt_tokens: prompt, state }, longest) {
  const read = state === "prefill" ? Math.min(tokens, prompt) : prompt;
  const written = Math.max(tokens - prompt, 0);
  const text =
    state === "prefill"
      ? `reading ${count(read)} of ${count(prompt)}`
      : `writing, ${count(written)} after ${count(prompt)}`;
  const parts = [
    segment("read", read, longest),
    segment("unread", prompt - read, longest),
    segment("written", written, longest),
  ];
  return h("li", {}, h("span", { class: "track", "aria-hidden": "true" }, parts), text);
}

/** @param {string} name @param {number} value @param {number} whole */
function segment(name, value, whole) {
  const bar = h("span", { class: name });
  bar.style.width = `${(100 * value) / Math.max(whole, 1)}%`;
  return bar;
}

/** @param {{used: number, kept: number, room: number}} memory in positions of the cache */
function memory({ used, kept, room }) {
  const text = `Memory of contexts: ${count(used)} of ${count(room)} positions in use, ${count(kept)} kept for reuse`;
  return h(
    "div",
    { class: "memory" },
    h("div", { class: "track", "aria-hidden": "true" }, segment("used", used, room), segment("kept", kept, room)),
    h("p", {}, text),
  );
}

/** Draw the rates of the last minute. @param {number[]} values */
function curve(values) {
  const top = Math.max(...values, 1);
  const x = (/** @type {number} */ place) => ((place + HISTORY - values.length) * WIDTH) / (HISTORY - 1);
  const points = values.map(
    (value, place) => `${x(place).toFixed(1)},${(HEIGHT - 2 - (value / top) * (HEIGHT - 4)).toFixed(1)}`,
  );
  const label = `Tokens a second over the last minute, at most ${top.toFixed(1)}`;
  return svg(
    "svg",
    {
      class: "curve",
      viewBox: `0 0 ${WIDTH} ${HEIGHT}`,
      preserveAspectRatio: "none",
      role: "img",
      "aria-label": label,
    },
    svg("polyline", { points: points.join(" ") }),
  );
}

/** @param {number} seconds */
function duration(seconds) {
  if (seconds < 120) return `${Math.round(seconds)} seconds`;
  return seconds < 7200 ? `${Math.round(seconds / 60)} minutes` : `${Math.round(seconds / 3600)} hours`;
}
