// Asks the base model and the mix the same, at once.

import { generate } from "./api.js";
import { baseBody, mergedBody } from "./ask.js";
import { Answer } from "./answers.js";
import { byId, say } from "./elements.js";
import { clearFaults, showFault } from "./faults.js";

const SAID = 600;

/** The two answers of `mix`'s request; `ended` is called after each run. */
export class Run {
  #abort = null;
  #running = Promise.resolve();

  constructor(mix, ended) {
    [this.mix, this.ended] = [mix, ended];
    this.base = new Answer(byId("answer-base"), "Base");
    this.merged = new Answer(byId("answer-merged"), "Merged");
    byId("ask").addEventListener("submit", (event) => {
      event.preventDefault();
      this.start();
    });
    byId("ask").addEventListener("keydown", (event) => {
      if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) byId("ask").requestSubmit();
    });
    byId("stop-run").addEventListener("click", () => this.stop());
    mix.addEventListener("change", () => this.merged.text || this.#hint());
    this.#hint();
  }

  /** Begins when what still runs has ended, and ends that. */
  start() {
    this.stop();
    const [abort, before] = [new AbortController(), this.#running];
    this.#abort = abort;
    this.#running = before.then(() => abort.signal.aborted || this.#run(abort));
  }

  async #run(abort) {
    clearFaults();
    try {
      const asked = this.#asked();
      if (asked.length === 1) this.#hint();
      byId("stop-run").setAttribute("aria-disabled", "false");
      say("Running.");
      await Promise.all(asked.map(([answer, body]) => follow(answer, body, abort.signal)));
    } catch (error) {
      showFault(error)?.focus();
      say(error.message);
    }
    if (abort !== this.#abort) return;
    this.stop();
    this.ended();
  }

  /** Ends both answers where they are. */
  stop() {
    this.#abort?.abort();
    this.#abort = null;
    byId("stop-run").setAttribute("aria-disabled", "true");
  }

  #asked() {
    const asked = [[this.base, baseBody()]];
    if (this.mix.names.length) asked.push([this.merged, mergedBody(this.mix)]);
    return asked;
  }

  #hint() {
    this.merged.hint(this.mix.names.length ? "" : "Pick an adapter to see its answer here.");
  }
}

async function follow(answer, body, signal) {
  try {
    await answer.follow(generate(body, signal));
    say(`${answer.name} answer: ${answer.text.slice(0, SAID) || "nothing"}`);
  } catch (error) {
    if (signal.aborted) {
      answer.stopped();
      return;
    }
    answer.fail(error.message);
    showFault(error);
    say(`${answer.name}: ${error.message}`);
  }
}
