// One answer as it comes: its text, how fast it came, how it ended.

import { el, setText } from "./elements.js";
import { count, duration, short, signed } from "./numbers.js";

const FIGURES = { first: "First token", speed: "Tokens/s", tokens: "Tokens", end: "Ended", seed: "Seed", queue: "In the queue" };
const ENDS = { stop: "end of text", stop_sequence: "stop text", length: "max tokens" };

/** A pane of the page: small at rest, and from a run's beginning as large as at its end, so that nothing moves while text comes. */
export class Answer {
  #text = new Text();
  #figures = {};
  #waiting = "";
  #frame = 0;

  constructor(article, name) {
    [this.article, this.name] = [article, name];
    this.note = el("p", { class: "note" });
    this.fault = el("p", { class: "fault", hidden: true });
    this.box = el("div", { class: "text", tabindex: "0", role: "region", "aria-label": `${name} answer` }, this.#text, this.fault);
    const rows = Object.entries(FIGURES).map(([key, label]) => {
      this.#figures[key] = el("dd", {}, "–");
      return el("div", { class: key }, el("dt", {}, label), this.#figures[key]);
    });
    article.append(this.note, this.box, el("dl", {}, ...rows));
  }

  get text() {
    return this.#text.data + this.#waiting;
  }

  get isAtRest() {
    return this.article.classList.contains("rest");
  }

  /** Puts the pane at rest, and says what it is for. */
  rest(text) {
    this.clear();
    this.article.classList.add("rest");
    this.note.textContent = text;
  }

  clear() {
    cancelAnimationFrame(this.#frame);
    [this.#text.data, this.#waiting, this.#frame, this.fault.hidden] = ["", "", 0, true];
    for (const figure of Object.values(this.#figures)) setText(figure, "–");
    this.note.textContent = "";
  }

  /** Shows the events of one request until they end. Throws what they throw. */
  async follow(events) {
    this.clear();
    this.article.classList.remove("rest");
    this.box.setAttribute("aria-busy", "true");
    const watch = new Watch();
    try {
      for await (const [name, data] of events) {
        if (name === "token") this.#token(data, watch);
        else if (name === "done") return this.#done(data, watch);
        else if (name === "error") throw Object.assign(new Error(data.error.message), { field: data.error.param });
      }
      throw new Error("The connection ended before the answer did.");
    } finally {
      this.#flush();
      this.box.removeAttribute("aria-busy");
    }
  }

  /** Says why there is no more of it. */
  fail(message) {
    this.fault.textContent = message;
    this.fault.hidden = false;
    setText(this.#figures.end, "failed");
  }

  stopped() {
    setText(this.#figures.end, "stopped");
  }

  #token({ text }, watch) {
    watch.token();
    if (watch.count === 1) setText(this.#figures.first, duration(watch.first));
    setText(this.#figures.tokens, count(watch.count));
    if (watch.speed) setText(this.#figures.speed, short(watch.speed));
    this.#waiting += text;
    this.#frame ||= requestAnimationFrame(() => this.#flush());
  }

  #flush() {
    cancelAnimationFrame(this.#frame);
    this.#frame = 0;
    const { scrollTop, clientHeight, scrollHeight } = this.box;
    this.#text.appendData(this.#waiting);
    this.#waiting = "";
    // Who has scrolled back goes on reading there.
    if (scrollTop + clientHeight >= scrollHeight - 8) this.box.scrollTop = this.box.scrollHeight;
  }

  #done({ adapter, usage, timings, finish_reason: reason, seed }, watch) {
    const num = usage.completion_tokens;
    const speed = timings?.decode_s && num > 1 ? (num - 1) / timings.decode_s : watch.speed;
    if (timings?.time_to_first_token_s) setText(this.#figures.first, duration(timings.time_to_first_token_s));
    if (timings?.queue_s !== undefined) setText(this.#figures.queue, duration(timings.queue_s));
    if (speed) setText(this.#figures.speed, short(speed));
    setText(this.#figures.tokens, `${count(usage.prompt_tokens)} in, ${count(num)} out`);
    this.#figures.tokens.title = usage.cached_tokens ? `${count(usage.cached_tokens)} of the prompt’s were computed before` : "";
    setText(this.#figures.end, ENDS[reason] ?? reason);
    setText(this.#figures.seed, String(seed));
    setText(this.note, adapter.map(term).join(" + ") || "no adapter");
  }
}

function term({ weight, name, policy }) {
  return `${signed(weight, 2)} ${name}${policy ? " (policy)" : ""}`;
}

/** What this side sees of the speed; the server's own timings are better where it gives them. */
class Watch {
  count = 0;
  #started = performance.now();
  #first = 0;
  #last = 0;

  token() {
    this.#last = performance.now();
    if (!this.count++) this.#first = this.#last;
  }

  get first() {
    return (this.#first - this.#started) / 1000;
  }

  get speed() {
    const seconds = (this.#last - this.#first) / 1000;
    return seconds > 0 ? (this.count - 1) / seconds : 0;
  }
}
