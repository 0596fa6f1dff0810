// Weights from the prompt: the server is asked for them while somebody writes.

import { postJson } from "./api.js";
import { byId, setText } from "./elements.js";
import { FieldError } from "./ask.js";
import { short } from "./numbers.js";

/** Milliseconds after the last letter. */
const PAUSE = 400;

/** Lets `mix` take its weights from what `asking` asks for, if all that is picked has statistics of its prompts. */
export class AutoWeights {
  #timer = 0;
  #abort = null;
  #asked = "";

  constructor(catalogue, mix, asking) {
    [this.catalogue, this.mix, this.asking] = [catalogue, mix, asking];
    byId("auto").addEventListener("change", (event) => mix.auto(event.target.checked));
    for (const source of [catalogue, mix, asking.mode]) source.addEventListener("change", () => this.#draw());
    for (const id of ["merge", "template"]) byId(id).addEventListener("change", () => this.#draw());
    byId("prompt").addEventListener("input", () => this.#soon());
    this.#draw();
  }

  #draw() {
    const { names, isAuto } = this.mix;
    const isLinear = names.length < 2 || byId("merge").value === "linear";
    const isPossible = isLinear && names.length > 0 && names.every((name) => this.catalogue.rows.get(name)?.has_prompt_statistics);
    byId("auto-row").hidden = !isPossible;
    byId("auto").checked = isAuto && isPossible;
    byId("base-share").hidden = !isAuto;
    if (isAuto && !isPossible) this.mix.auto(false);
    else this.#soon();
  }

  #soon() {
    clearTimeout(this.#timer);
    if (this.mix.isAuto) {
      this.#timer = setTimeout(() => this.#ask(), PAUSE);
    } else {
      this.#asked = "";
      setText(byId("base-share"), "Write a prompt: it gives the weights.");
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
      setText(byId("base-share"), `Base model: ${short(merge.base_share)}`);
    } catch (error) {
      if (error.name === "AbortError") return;
      setText(byId("base-share"), error.message);
    }
  }
}
