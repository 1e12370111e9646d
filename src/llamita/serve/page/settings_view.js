/** The pane of the open chat's settings: system prompt, sampling, JSON schema, tools. */

import { debounced, find, h, iconButton, toast } from "./dom.js";
import { SAMPLERS, makeDefault, schemaFields, toolFields } from "./settings.js";
import { emit, isChat, modelOf, on, save, state } from "./state.js";

const SHOWN_AT_ONCE = 3; // samplers; the others are behind "More"
const SCHEMA_EXAMPLE = {
  type: "object",
  properties: { name: { type: "string" }, age: { type: "integer" } },
  required: ["name", "age"],
  additionalProperties: false,
};
const TOOLS_EXAMPLE = [
  {
    name: "get_weather",
    description: "Get the weather of a city.",
    parameters: { type: "object", properties: { city: { type: "string" } }, required: ["city"] },
  },
];

const pane = find("#settings");
const saveSoon = debounced(() => void save(state.chat), 500);

/** Start the pane. */
export function start() {
  on("chat", ({ opened } = {}) => opened && render());
  on("models", render);
  render();
}

/** @param {Partial<import("./settings.js").Settings>} fields */
function change(fields) {
  Object.assign(state.chat.settings, fields);
  emit("settings");
  saveSoon();
}

function render() {
  const base = !isChat(modelOf());
  const blocks = [systemBlock(), samplingBlock(), answerBlock(), schemaBlock(), toolsBlock()];
  if (base)
    blocks.splice(
      0,
      blocks.length,
      h("p", { class: "muted" }, "This model continues a text: it takes no system prompt, schema or tools."),
      samplingBlock(),
      answerBlock(),
    );
  const keep = h(
    "button",
    {
      type: "button",
      onclick: () => (makeDefault(state.chat.settings), toast("New chats begin with these settings.")),
    },
    "Use for new chats",
  );
  pane.replaceChildren(...blocks, h("div", { class: "row" }, keep));
}

function systemBlock() {
  const area = h("textarea", {
    id: "system",
    rows: 4,
    placeholder: "You are a helpful assistant.",
    oninput: () => change({ system: area.value }),
  });
  area.value = state.chat.settings.system;
  return h("section", {}, h("label", { for: "system" }, "System prompt"), area);
}

function samplingBlock() {
  const rows = SAMPLERS.map(samplerRow);
  return h(
    "section",
    {},
    h("h3", {}, "Sampling"),
    rows.slice(0, SHOWN_AT_ONCE),
    h("details", {}, h("summary", {}, "More"), rows.slice(SHOWN_AT_ONCE)),
  );
}

/** @param {(typeof SAMPLERS)[number]} sampler */
function samplerRow({ key, label, help, min, max, step, neutral }) {
  const given = modelOf().meta?.sampling?.[key] ?? neutral;
  const attributes = { min, max, step };
  const slider = h("input", {
    type: "range",
    ...attributes,
    "aria-label": `${label}, slider`,
    oninput: () => set(Number(slider.value)),
  });
  const box = h("input", {
    id: key,
    type: "number",
    ...attributes,
    placeholder: given,
    "aria-describedby": `${key}-help`,
    oninput: () => set(box.value === "" ? undefined : Number(box.value)),
    onchange: () => (box.value = String(state.chat.settings[key] ?? "")),
  });
  const reset = iconButton("retry", `${label}: back to the model's ${given}`, () => (set(undefined), box.focus()));
  const show = () => {
    const value = state.chat.settings[key];
    slider.value = String(value ?? given);
    if (document.activeElement !== box || value === undefined) box.value = value === undefined ? "" : String(value);
    reset.hidden = value === undefined;
  };
  /** @param {number | undefined} value */
  const set = (value) => {
    change({ [key]: value === undefined ? undefined : Math.min(Math.max(value, min), max) });
    show();
  };
  show();
  return h(
    "div",
    { class: "sampler", title: help },
    h("label", { for: key }, label),
    reset,
    box,
    slider,
    h("span", { id: `${key}-help`, class: "unseen" }, help),
  );
}

function answerBlock() {
  const { settings } = state.chat;
  const number = (
    /** @type {"max_tokens" | "seed"} */ key,
    /** @type {string} */ label,
    /** @type {string} */ placeholder,
  ) => {
    const box = h("input", {
      id: key,
      type: "number",
      min: key === "seed" ? 0 : 1,
      step: 1,
      placeholder,
      oninput: () => change({ [key]: box.value === "" ? undefined : Math.trunc(Number(box.value)) }),
    });
    box.value = settings[key] ?? "";
    return h("div", { class: "field" }, h("label", { for: key }, label), box);
  };
  const stop = h("textarea", {
    id: "stop",
    rows: 2,
    placeholder: "One a line",
    oninput: () => change({ stop: stop.value }),
  });
  stop.value = settings.stop ?? "";
  return h(
    "section",
    {},
    h("h3", {}, "Answer"),
    number("max_tokens", "Most tokens", isChat(modelOf()) ? "what is left" : "256"),
    number("seed", "Seed", "random"),
    h("label", { for: "stop" }, "Stop at these texts"),
    stop,
  );
}

function schemaBlock() {
  return jsonBlock({
    name: "schema",
    flag: "schemaOn",
    title: "JSON schema",
    example: SCHEMA_EXAMPLE,
    check: schemaFields,
    help: "Every answer is JSON of this shape.",
  });
}

function toolsBlock() {
  const choice = h(
    "select",
    { id: "tool-choice", onchange: () => change({ toolChoice: choice.value }) },
    [
      ["auto", "when it sees fit"],
      ["required", "always"],
      ["none", "never"],
    ].map(([value, text]) => h("option", { value }, text)),
  );
  choice.value = state.chat.settings.toolChoice ?? "auto";
  const block = jsonBlock({
    name: "tools",
    flag: "toolsOn",
    title: "Tools",
    example: TOOLS_EXAMPLE,
    check: toolFields,
    help: "The model may call these; you type what they return.",
  });
  block.append(h("div", { class: "field" }, h("label", { for: "tool-choice" }, "Calls a tool"), choice));
  return block;
}

/**
 * Make a switch and a box for JSON that says at once what is wrong with it.
 * @param {{name: "schema" | "tools", flag: "schemaOn" | "toolsOn", title: string, help: string, example: object,
 *   check: (settings: import("./settings.js").Settings) => object}} block
 */
function jsonBlock({ name, flag, title, help, example, check }) {
  const { settings } = state.chat;
  const fault = h("p", { id: `${name}-fault`, class: "fault", role: "status" });
  const box = h("input", {
    type: "checkbox",
    id: flag,
    checked: settings[flag],
    onchange: () => update({ [flag]: box.checked }),
  });
  const area = h("textarea", {
    id: name,
    rows: 7,
    class: "mono",
    spellcheck: "false",
    "aria-label": `${title}, JSON`,
    "aria-describedby": `${name}-fault`,
    oninput: () => update({ [name]: area.value }),
  });
  area.value = settings[name] ?? "";
  const fill = h(
    "button",
    {
      type: "button",
      class: "small",
      onclick: () => update({ [name]: (area.value = JSON.stringify(example, null, 2)), [flag]: (box.checked = true) }),
    },
    "Example",
  );
  /** @param {object} fields */
  const update = (fields) => {
    change(fields);
    try {
      check(settings);
      fault.textContent = "";
    } catch (error) {
      fault.textContent = /** @type {Error} */ (error).message;
    }
  };
  const head = h("div", { class: "row" }, h("label", { class: "switch" }, box, title), fill);
  return h("section", {}, head, h("p", { class: "muted" }, help), area, fault);
}
