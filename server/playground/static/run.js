// Asks the mix and the base model the same, at once.

import { generate } from "./api.js";
import { byId, say } from "./elements.js";
import { clearFaults, showFault } from "./faults.js";

const SAID = 600;
/** Pixels that stay free above the answers, or below them. */
const MARGIN = 12;

/** The requests of the form; `ended` is called after each run. */
export class Run {
  #abort = null;
  #running = Promise.resolve();

  constructor(asking, ended) {
    [this.asking, this.ended] = [asking, ended];
    byId("ask").addEventListener("submit", (event) => {
      event.preventDefault();
      this.start();
    });
    document.querySelector("main").addEventListener("keydown", (event) => {
      if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) byId("ask").requestSubmit();
    });
    byId("stop-run").addEventListener("click", () => this.stop());
    byId("new").addEventListener("click", () => this.#clear());
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
      const asked = this.asking.requests();
      const turn = this.#begin(asked);
      await Promise.all(asked.map(({ body }, i) => follow(turn.answers[i], body, abort.signal)));
      // What nobody has answered can be sent again.
      if (!turn.isAnswered && turn.item.isConnected) byId("prompt").value ||= turn.text;
    } catch (error) {
      showFault(error)?.focus();
      say(error.message);
    }
    if (abort !== this.#abort) return;
    this.stop();
    this.ended();
  }

  /** Ends all answers where they are. */
  stop() {
    this.#abort?.abort();
    this.#abort = null;
    byId("stop-run").setAttribute("aria-disabled", "true");
  }

  #begin(asked) {
    const { turns, mode, text } = this.asking;
    const turn = turns.begin(text, asked, (again) => this.#edit(again));
    if (mode.isConversation) byId("prompt").value = "";
    byId("stop-run").setAttribute("aria-disabled", "false");
    say("Running.");
    show(turn.item);
    return turn;
  }

  #edit(text) {
    this.stop();
    byId("prompt").value = text;
    byId("prompt").focus();
    say("The conversation goes on from here.");
  }

  #clear() {
    this.stop();
    clearFaults();
    this.asking.turns.clear();
    byId("prompt").focus();
    say(this.asking.mode.isConversation ? "A new conversation." : "Cleared.");
  }
}

/** Scrolls the page as far as the whole turn needs, and never so far that its beginning is out of sight. */
function show(turn) {
  const form = byId("ask");
  // On a narrow page the form covers what is at the foot.
  const isCovered = getComputedStyle(form).position === "sticky";
  const box = (isCovered ? turn : byId("log")).getBoundingClientRect();
  const foot = innerHeight - (isCovered ? form.offsetHeight : 0) - MARGIN;
  const top = Math.min(Math.max(0, box.bottom - foot), box.top - MARGIN);
  const isCalm = matchMedia("(prefers-reduced-motion: reduce)").matches;
  if (top) scrollBy({ top, behavior: isCalm ? "instant" : "smooth" });
}

async function follow(answer, body, signal) {
  try {
    await answer.follow(generate(body, signal));
    say(`${answer.name} answers: ${answer.text.slice(0, SAID) || "nothing"}`);
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
