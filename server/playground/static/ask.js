// What the form asks for, as a body of POST /generate.

import { byId } from "./elements.js";
import { isConversation, messages } from "./messages.js";

const ESCAPES = { n: "\n", t: "\t", r: "\r", "\\": "\\" };

/** A field whose text cannot be sent at all. */
export class FieldError extends Error {
  constructor(field, message) {
    super(message);
    this.field = field;
  }
}

/** Returns the body for the base model alone. What is left at its default is left out. Throws `FieldError`. */
export function baseBody() {
  const body = isConversation() ? conversation() : { prompt: byId("prompt").value };
  body.max_tokens = number("max_tokens");
  const [temperature, topP] = [number("temperature"), number("top_p")];
  if (temperature !== 0) body.temperature = temperature;
  if (topP !== 1) body.top_p = topP;
  body.seed = number("seed");
  const stops = byId("stop").value.split("\n").filter(Boolean).map(unescape);
  if (stops.length) body.stop = stops.length === 1 ? stops[0] : stops;
  // As JSON has it: what is undefined is not there.
  return JSON.parse(JSON.stringify(body));
}

/** Returns the body for what `mix` holds, which is something. Throws `FieldError`. */
export function mergedBody(mix) {
  const { names, weights, isEven } = mix;
  const body = { ...baseBody(), adapter: names.length === 1 ? names[0] : names };
  if (!isEven) body.weights = weights;
  const method = byId("merge").value;
  if (names.length > 1 && method !== "linear") {
    body.merge = method;
    body.density = number("density");
    if (method.startsWith("dare")) body.merge_seed = number("merge_seed");
  }
  return JSON.parse(JSON.stringify(body));
}

function conversation() {
  const template = byId("template").value;
  return { messages: messages(), ...(template && { template }) };
}

function number(id) {
  const input = byId(id);
  if (input.validity.badInput) throw new FieldError(id, "is no number");
  return input.value === "" ? undefined : Number(input.value);
}

function unescape(text) {
  return text.replace(/\\([ntr\\])/g, (_, letter) => ESCAPES[letter]);
}
