// Asks the base model and the mix the same, at once.

import { generate } from "./api.js";
import { baseBody, mergedBody } from "./ask.js";
import { Answer } from "./answers.js";
import { byId, say } from "./elements.js";
import { clearFaults, showFault } from "./faults.js";

const SAID = 600;
/** Pixels that stay free above the buttons, or below the answers. */
const MARGIN = 12;

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
    mix.addEventListener("change", () => this.merged.isAtRest && this.#rest());
    this.base.rest("Run shows the base model’s own answer here.");
    this.#rest();
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
      if (asked.length === 1) this.#rest();
      byId("stop-run").setAttribute("aria-disabled", "false");
      say("Running.");
      const answered = asked.map(([answer, body]) => follow(answer, body, abort.signal));
      showAnswers();
      await Promise.all(answered);
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

  #rest() {
    const isPicked = this.mix.names.length > 0;
    this.merged.rest(isPicked ? "Run shows the answer with your adapters here." : "Pick an adapter to see its answer here.");
  }
}

/** Scrolls as far down as the answers need, and never so far that the buttons which run and stop are out of sight. */
function showAnswers() {
  const [buttons, answers] = ["run", "answers"].map((id) => byId(id).getBoundingClientRect());
  const top = Math.min(buttons.top - MARGIN, answers.bottom - innerHeight + MARGIN);
  const isCalm = matchMedia("(prefers-reduced-motion: reduce)").matches;
  if (top > 0) scrollBy({ top, behavior: isCalm ? "instant" : "smooth" });
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
