/** The settings of a chat, and what of them goes into a request. */

/**
 * @typedef {object} Settings a number that is absent is left to the model's own default
 * @property {string} system
 * @property {number} [temperature]
 * @property {number} [top_p]
 * @property {number} [top_k]
 * @property {number} [min_p]
 * @property {number} [repetition_penalty]
 * @property {number} [frequency_penalty]
 * @property {number} [presence_penalty]
 * @property {number} [max_tokens]
 * @property {number} [seed]
 * @property {string} [stop] one string a line
 * @property {boolean} [schemaOn]
 * @property {string} [schema] JSON text
 * @property {boolean} [toolsOn]
 * @property {string} [tools] JSON text
 * @property {"auto" | "required" | "none"} [toolChoice]
 *
 * @typedef {"temperature" | "top_p" | "top_k" | "min_p" | "repetition_penalty" | "frequency_penalty" |
 *   "presence_penalty"} Sampler
 * @typedef {{key: Sampler, label: string, help: string, min: number, max: number, step: number, neutral: number}} Row
 */

const KEY = "llamita-settings";

/** Numbers that shape the draw: how each is named, its range, and its default where the model names none. */
export const SAMPLERS = /** @type {Row[]} */ ([
  {
    key: "temperature",
    label: "Temperature",
    help: "0 always takes the likeliest token.",
    min: 0,
    max: 2,
    step: 0.05,
    neutral: 1,
  },
  {
    key: "top_p",
    label: "Top p",
    help: "Draw among the likeliest tokens that make up this share.",
    min: 0.01,
    max: 1,
    step: 0.01,
    neutral: 1,
  },
  {
    key: "top_k",
    label: "Top k",
    help: "Draw among this many tokens; 0: all.",
    min: 0,
    max: 200,
    step: 1,
    neutral: 0,
  },
  {
    key: "min_p",
    label: "Min p",
    help: "Leave out tokens below this share of the likeliest one's probability.",
    min: 0,
    max: 1,
    step: 0.01,
    neutral: 0,
  },
  {
    key: "repetition_penalty",
    label: "Repetition penalty",
    help: "Above 1: tokens that were there become less likely.",
    min: 1,
    max: 2,
    step: 0.05,
    neutral: 1,
  },
  {
    key: "frequency_penalty",
    label: "Frequency penalty",
    help: "Each use makes a token less likely.",
    min: -2,
    max: 2,
    step: 0.1,
    neutral: 0,
  },
  {
    key: "presence_penalty",
    label: "Presence penalty",
    help: "The first use makes a token less likely.",
    min: -2,
    max: 2,
    step: 0.1,
    neutral: 0,
  },
]);

/** Return the settings of a new chat: what the user has made the default. @returns {Settings} */
export function defaults() {
  try {
    return { system: "", ...JSON.parse(localStorage.getItem(KEY) ?? "{}") };
  } catch {
    return { system: "" };
  }
}

/** Make settings those of new chats. @param {Settings} settings */
export function makeDefault(settings) {
  localStorage.setItem(KEY, JSON.stringify(settings));
}

/** Return the numbers and stop strings as fields of a request. @param {Settings} settings */
export function samplingFields(settings) {
  /** @type {Record<string, any>} */
  const fields = {};
  for (const key of [...SAMPLERS.map((sampler) => sampler.key), "max_tokens", "seed"]) {
    const value = /** @type {any} */ (settings)[key];
    if (Number.isFinite(value)) fields[key] = value;
  }
  const stop = (settings.stop ?? "").split("\n").filter((line) => line !== "");
  if (stop.length) fields.stop = stop;
  return fields;
}

/** Return `response_format`, or throw an Error that says what is wrong with the schema. @param {Settings} settings */
export function schemaFields(settings) {
  if (!settings.schemaOn) return {};
  const schema = parsed(settings.schema ?? "", "The JSON schema");
  if (schema === null || typeof schema !== "object" || Array.isArray(schema))
    throw new Error('The JSON schema must be an object, such as {"type": "object", "properties": {…}}.');
  return { response_format: { type: "json_schema", json_schema: { name: "answer", strict: true, schema } } };
}

/** Return `tools` and `tool_choice`, or throw an Error that says what is wrong with them. @param {Settings} settings */
export function toolFields(settings) {
  if (!settings.toolsOn) return {};
  const given = parsed(settings.tools ?? "", "The tools");
  const list = Array.isArray(given) ? given : [given];
  const tools = list.map((tool) => (tool?.function ? tool : { type: "function", function: tool }));
  if (!tools.length || !tools.every((tool) => typeof tool.function?.name === "string"))
    throw new Error('The tools must be a list of functions, each with a "name".');
  return { tools, tool_choice: settings.toolChoice ?? "auto" };
}

/** @param {string} text @param {string} what */
function parsed(text, what) {
  try {
    return JSON.parse(text);
  } catch (error) {
    if (!text.trim()) throw new Error(`${what}: nothing is written there yet.`);
    throw new Error(`${what}: not JSON (${/** @type {Error} */ (error).message}).`);
  }
}
