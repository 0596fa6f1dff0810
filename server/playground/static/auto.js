// Weights from the prompt: the server is asked for them while somebody writes.

import { PASSING, postJson } from "./api.js";
import { byId, setText } from "./elements.js";
import { FieldError } from "./ask.js";
import { short } from "./numbers.js";

/** Milliseconds after the last letter. */
const PAUSE = 400;
const HINT = "Write a prompt: it gives the weights.";

/**
 * The weights that the prompt in `asking` gives to what is picked in `mix`, if all of it has statistics of its prompts or is `auto`.
 * Several adapters get them unless somebody gives others, or the server's default is another.
 */
export class AutoWeights {
  #timer = 0;
  #abort = null;
  #asked = "";

  constructor(catalogue, mix, asking) {
    [this.catalogue, this.mix, this.asking] = [catalogue, mix, asking];
    byId("auto").addEventListener("change", (event) => mix.choose(event.target.checked));
    for (const source of [catalogue, mix, asking.mode]) source.addEventListener("change", () => this.#draw());
    for (const id of ["merge", "template"]) byId(id).addEventListener("change", () => this.#draw());
    byId("prompt").addEventListener("input", () => this.#soon());
    this.#draw();
  }

  #draw() {
    const { names, isAuto, isSelecting, choice } = this.mix;
    const obstacle = this.#obstacle();
    const isPossible = this.catalogue.canSelect && !obstacle;
    const isNext = isPossible && (choice ?? (names.length > 1 && this.catalogue.weighsByDefault));
    if (!isSelecting && isNext !== isAuto) {
      this.#asked = "";
      this.mix.auto(isNext); // and draws again
      return;
    }
    byId("auto-row").hidden = !this.catalogue.canSelect || !names.length || isSelecting;
    byId("auto").disabled = Boolean(obstacle);
    byId("auto").checked = isAuto;
    setText(byId("auto-obstacle"), obstacle);
    byId("base-share").hidden = !isAuto;
    this.#soon();
  }

  /** Returns why the prompt cannot give the weights of what is picked; nothing if it can. */
  #obstacle() {
    const { names, isSelecting } = this.mix;
    if (isSelecting) return "";
    const merge = names.find((name) => this.catalogue.merges.some((one) => one.name === name));
    if (merge) return `${merge} has weights of its own`;
    const other = names.find((name) => !this.catalogue.rows.get(name)?.has_prompt_statistics);
    if (other) return `${other} has no statistics of its prompts`;
    return names.length > 1 && byId("merge").value !== "linear" ? `not for ${byId("merge").value}` : "";
  }

  #soon() {
    clearTimeout(this.#timer);
    if (this.mix.isAuto) {
      this.#timer = setTimeout(() => this.#ask(), PAUSE);
    } else {
      this.#asked = "";
      setText(byId("base-share"), HINT);
    }
  }

  async #ask() {
    let asked;
    try {
      asked = JSON.stringify({ ...this.asking.body(), max_tokens: 1 });
    } catch (error) {
      if (error instanceof FieldError) return; // the request itself will say so
      throw error;
    }
    if (!this.asking.text || asked === this.#asked) return;
    this.#asked = asked;
    this.#abort?.abort();
    this.#abort = new AbortController();
    try {
      const { adapter, merge } = await postJson("generate", asked, this.#abort.signal);
      const own = adapter.filter(({ policy }) => !policy);
      this.mix.share(Object.fromEntries(own.map(({ name, weight }) => [name, weight])));
      const selected = this.mix.isSelecting ? own.map(({ name, weight }) => `${name}: ${short(weight)}`) : [];
      setText(byId("base-share"), [...selected, `Base model: ${short(merge.base_share)}`].join(" · "));
    } catch (error) {
      if (error.name === "AbortError") return;
      if (PASSING.includes(error.status)) this.#asked = ""; // asked again, at the next change
      setText(byId("base-share"), error.message);
    }
  }
}
