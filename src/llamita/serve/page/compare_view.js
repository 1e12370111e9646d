/** Two models side by side on one prompt: both stream at once, and the first token at which they part is marked. */

import { ApiError } from "./api.js";
import { count, find, h } from "./dom.js";
import { continuedText, deltas, messagesOf } from "./requests.js";
import { isChat, on, state } from "./state.js";
import { TokenView, percent, visible } from "./token_view.js";
import { modelOptions } from "./models.js";
import { path } from "./tree.js";

/** @typedef {import("./requests.js").ScoredToken} ScoredToken */

const ALTERNATIVES = 5; // likeliest tokens that are asked for with each
const form = /** @type {HTMLFormElement} */ (find("#compare-form"));
const prompt = /** @type {HTMLTextAreaElement} */ (find("#compare-prompt"));
const verdict = find("#verdict");
const runButton = /** @type {HTMLButtonElement} */ (find("#compare-run"));
/** @type {Column[]} */
let columns = [];
/** @type {AbortController | null} */
let running = null;
let parting = -1; // place of the first token that differs
let compared = 0; // tokens that are known to be the same

/** Start the view. */
export function start() {
  columns = [0, 1].map((place) => new Column(place));
  find("#columns").replaceChildren(...columns.map((column) => column.element));
  form.addEventListener("submit", (event) => {
    event.preventDefault();
    if (running) running.abort();
    else void run();
  });
  prompt.addEventListener("keydown", (event) => {
    if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
      event.preventDefault();
      if (!running) form.requestSubmit();
    }
  });
  find("#shade").addEventListener("change", shade);
  find("#greedy").addEventListener("change", needSeed);
  on("models", showModels);
  on("chat", showHistory);
  shade();
  needSeed();
}

/** Stop both. */
export function stop() {
  running?.abort();
}

const checked = (/** @type {string} */ id) => /** @type {HTMLInputElement} */ (find(id)).checked;
const number = (/** @type {string} */ id) => /** @type {HTMLInputElement} */ (find(id)).valueAsNumber;

function shade() {
  find("#columns").classList.toggle("shaded", checked("#shade"));
}

/** The likeliest token needs no seed. */
function needSeed() {
  /** @type {HTMLInputElement} */ (find("#compare-seed")).disabled = checked("#greedy");
}

function showModels() {
  columns.forEach((column, place) => column.showModels(state.models[place] ?? state.models[0]));
  find("#one-model").hidden = state.models.length !== 1;
}

function showHistory() {
  find("#history-field").hidden = path(state.chat).length === 0;
}

/** Ask both models at once. */
async function run() {
  if (!prompt.value.trim()) return prompt.focus();
  running = new AbortController();
  parting = -1;
  compared = 0;
  verdict.textContent = "";
  runButton.textContent = "Stop";
  for (const column of columns) column.clear();
  const { signal } = running;
  await Promise.all(columns.map((column) => column.run(signal)));
  running = null;
  runButton.textContent = "Compare";
  draw();
}

/** Find the first difference, as far as both have come. */
function compare() {
  const [a, b] = columns.map((column) => column.tokens);
  while (parting < 0 && compared < Math.min(a.length, b.length)) {
    if (a[compared].key !== b[compared].key) parting = compared;
    else compared += 1;
  }
  const ended = columns.some((column) => column.ended && !column.failed && column.tokens.length === compared);
  // One has ended where the other goes on.
  if (parting < 0 && ended && a.length !== b.length) parting = compared;
}

let frame = 0;
/** Show what is new, once a frame. */
function drawSoon() {
  frame ||= requestAnimationFrame(() => {
    frame = 0;
    draw();
  });
}

function draw() {
  for (const column of columns) column.draw();
  compare();
  for (const column of columns) column.view.mark(parting);
  const done = columns.every((column) => column.ended);
  const sentence = verdictOf(done);
  if (verdict.textContent !== sentence) verdict.textContent = sentence;
}

/** Say in a sentence how the two answers relate. @param {boolean} done */
function verdictOf(done) {
  const [a, b] = columns.map((column) => column.tokens[parting]);
  if (parting >= 0) {
    const same = parting
      ? `The same for ${count(parting)} ${parting === 1 ? "token" : "tokens"}, then `
      : "They differ from the first token on: ";
    const says = (/** @type {ScoredToken | undefined} */ token) =>
      token ? `“${visible(token.text)}” (${percent(token.logprob)})` : "the end";
    return `${same}${says(a)} against ${says(b)}.`;
  }
  if (!done) return "";
  if (columns.some((column) => column.failed)) return "";
  return compared ? `The same to the end: ${count(compared)} ${compared === 1 ? "token" : "tokens"}.` : "";
}

/** One of the two models and what it wrote. */
class Column {
  /** @param {number} place 0: left, 1: right */
  constructor(place) {
    this.place = place;
    this.select = h("select", { id: `compare-model-${place}`, "aria-label": place ? "Right model" : "Left model" });
    this.figures = h("p", { class: "stats" });
    this.text = h("div", {
      class: "tokens",
      "aria-label": place ? "Tokens of the right model" : "Tokens of the left model",
    });
    this.error = h("p", { class: "error", hidden: true });
    this.element = h(
      "section",
      { class: "column", "aria-label": place ? "Right" : "Left" },
      this.select,
      this.text,
      this.error,
      this.figures,
    );
    this.view = new TokenView(this.text, (at) => this.#beside(at));
    /** @type {ScoredToken[]} */
    this.tokens = [];
    this.ended = this.failed = false;
  }

  clear() {
    this.tokens = [];
    this.ended = this.failed = false;
    this.view.clear();
    this.error.hidden = true;
    this.figures.textContent = "";
  }

  /** @param {import("./state.js").Model | undefined} first what is chosen at the start */
  showModels(first) {
    const before = this.select.value;
    this.select.replaceChildren(...modelOptions());
    this.select.value = state.models.some((model) => model.id === before) ? before : (first?.id ?? "");
  }

  /** Return the other model's token in a place that both reached by the same tokens. @param {number} at */
  #beside(at) {
    const other = columns[1 - this.place];
    const token = other.tokens[at];
    return token && (parting < 0 || at <= parting) ? { name: other.select.value, token } : null;
  }

  /** Show what came since the last frame. */
  draw() {
    this.view.append(this.tokens.slice(this.view.tokens.length));
  }

  /** Stream the answer. @param {AbortSignal} signal */
  async run(signal) {
    const began = performance.now();
    let firstToken = 0;
    try {
      for await (const delta of deltas(this.#request(), signal)) {
        if (delta.tokens.length) firstToken ||= performance.now() - began;
        this.tokens.push(...delta.tokens);
        if (delta.usage) this.#showFigures(delta, firstToken);
        drawSoon();
      }
    } catch (error) {
      this.failed = true;
      if (!signal.aborted) this.#fail(/** @type {Error} */ (error));
    }
    this.ended = true;
    drawSoon();
  }

  #request() {
    const model = state.models.find((one) => one.id === this.select.value) ?? state.models[0];
    const nodes = checked("#history") && path(state.chat).length ? path(state.chat) : [];
    const system = nodes.length ? state.chat.settings.system : "";
    /** @type {Record<string, any>} */
    const body = { model: model.id, stream: true, stream_options: { include_usage: true } };
    if (checked("#greedy")) body.temperature = 0;
    else body.seed = number("#compare-seed") || 0;
    body.max_tokens = number("#compare-tokens") || 200;
    if (!isChat(model)) {
      return {
        path: "/v1/completions",
        body: { ...body, prompt: continuedText(nodes) + prompt.value, logprobs: ALTERNATIVES },
      };
    }
    const draft = /** @type {any} */ ({ role: "user", content: prompt.value });
    const messages = messagesOf(system, [...nodes, draft]);
    return { path: "/v1/chat/completions", body: { ...body, messages, logprobs: true, top_logprobs: ALTERNATIVES } };
  }

  /** @param {import("./requests.js").Delta} delta @param {number} firstToken */
  #showFigures({ usage, timings }, firstToken) {
    const mean = this.tokens.reduce((sum, token) => sum + token.logprob, 0) / Math.max(this.tokens.length, 1);
    const rate = timings?.predicted_per_second;
    const first = timings?.first_token_ms ?? firstToken;
    const parts = [
      rate && `${rate.toFixed(1)} tok/s`,
      first && `first token ${Math.round(first)} ms`,
      `${count(usage.completion_tokens)} tokens`,
      `own perplexity ${Math.exp(-mean).toFixed(2)}`,
    ];
    this.figures.textContent = parts.filter(Boolean).join(" · ");
  }

  /** @param {Error} error */
  #fail(error) {
    this.error.textContent = `${error.message} ${error instanceof ApiError ? error.hint : ""}`;
    this.error.hidden = false;
  }
}
