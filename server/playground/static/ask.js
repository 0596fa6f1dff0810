// What the form asks for, as bodies of POST /generate.

import { byId } from "./elements.js";

const ESCAPES = { n: "\n", t: "\t", r: "\r", "\\": "\\" };

/** A field whose text cannot be sent at all. */
export class FieldError extends Error {
  constructor(field, message) {
    super(message);
    this.field = field;
  }
}

/** Makes requests of what the form, `mode`, `mix` and `turns` say. */
export class Asking {
  constructor(mode, mix, turns) {
    [this.mode, this.mix, this.turns] = [mode, mix, turns];
  }

  get text() {
    return byId("prompt").value;
  }

  /** Returns who is asked and what: [{side, terms, method, isAuto, body}]. Throws `FieldError`. */
  requests() {
    if (this.mode.isConversation && !this.text) throw new FieldError("prompt", "The message is empty.");
    const base = { side: "base", terms: [], method: "linear", body: this.#baseBody("base") };
    if (!this.mix.names.length) return [base];
    const method = this.mix.names.length > 1 ? byId("merge").value : "linear";
    const mixed = { side: "mix", terms: this.mix.terms, method, isAuto: this.mix.isAuto, body: this.#mixedBody(method) };
    return byId("with-base").checked ? [mixed, base] : [mixed];
  }

  /** The body for what is picked; of a conversation without a new message it asks the last one again. Throws `FieldError`. */
  body() {
    if (!this.mix.names.length) return this.#baseBody("base");
    return this.#mixedBody(this.mix.names.length > 1 ? byId("merge").value : "linear");
  }

  /** What is left at its default is left out. */
  #baseBody(side) {
    const body = this.mode.isConversation ? this.#conversation(side) : { prompt: this.text };
    body.max_tokens = number("max_tokens");
    const [temperature, topP] = [number("temperature"), number("top_p")];
    if (temperature !== 0) body.temperature = temperature;
    if (topP !== 1) body.top_p = topP;
    body.seed = number("seed");
    const stops = byId("stop").value.split("\n").filter(Boolean).map(unescape);
    if (stops.length) body.stop = stops.length === 1 ? stops[0] : stops;
    return defined(body);
  }

  #mixedBody(method) {
    const { names, weights, isAuto, isSelecting } = this.mix;
    const body = { ...this.#baseBody("mix"), adapter: names.length === 1 ? names[0] : names };
    if (isSelecting) return body;
    if (isAuto) body.weights = "auto";
    else if (names.length > 1 || weights[0] !== 1) body.weights = weights;
    if (method !== "linear") {
      body.merge = method;
      body.density = number("density");
      if (method.startsWith("dare")) body.merge_seed = number("merge_seed");
    }
    return defined(body);
  }

  #conversation(side) {
    const template = byId("template").value;
    return { messages: this.turns.messages(side, this.text), ...(template && { template }) };
  }
}

/** As JSON has it: what is undefined is not there. */
function defined(body) {
  return JSON.parse(JSON.stringify(body));
}

function number(id) {
  const input = byId(id);
  if (input.validity.badInput) throw new FieldError(id, "is no number");
  return input.value === "" ? undefined : Number(input.value);
}

function unescape(text) {
  return text.replace(/\\([ntr\\])/g, (_, letter) => ESCAPES[letter]);
}
