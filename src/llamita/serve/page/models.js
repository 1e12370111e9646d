/** The models in lists to choose from. */

import { h } from "./dom.js";
import { state } from "./state.js";

/** Return an option for each model, adapters behind their base. @returns {HTMLOptionElement[]} */
export function modelOptions() {
  return state.models.map((model) =>
    h("option", { value: model.id, title: describe(model) }, model.parent ? `↳ ${model.id}` : model.id),
  );
}

/** Say what a model is, in a line. @param {import("./state.js").Model} model */
export function describe({ meta = {}, max_model_len: room, parent }) {
  const millions = meta.n_params && meta.n_params / 1e6;
  const size =
    millions &&
    (millions < 1000
      ? `${millions.toPrecision(3)} million weights`
      : `${(millions / 1000).toPrecision(3)} billion weights`);
  const parts = [
    parent && `adapter of ${parent}`,
    size,
    meta.scheme,
    meta.size && `${(meta.size / 1e6).toFixed(0)} MB`,
    room && `context of ${room.toLocaleString("en")}`,
  ];
  return parts.filter(Boolean).join(" · ");
}
