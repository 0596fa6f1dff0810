// One answer as it comes: who gives it, its text, how fast it came, how it ended.

import { el, setText } from "./elements.js";
import { render } from "./markdown.js";
import { count, duration, short, signed } from "./numbers.js";

const FIGURES = { first: "First token", speed: "Tokens/s", tokens: "Tokens", end: "Ended", seed: "Seed", queue: "In the queue" };
const ENDS = { stop: "end of text", stop_sequence: "stop text", length: "max tokens" };
/** Milliseconds between two drawings of an answer that comes; a long one is drawn less often. */
const PAUSE = 16;
let numMade = 0;

/** An answer of a turn. Its name and figures stand above its text, so that nothing moves while that comes. */
export class Answer {
  /** "" while it comes; then "ended", "stopped" or "failed". */
  state = "";
  text = "";
  #figures = {};
  #timer = 0;
  #pause = PAUSE;

  /** `side` is "mix" or "base"; `terms` and `method` say who answers, `isAuto` that the prompt says it, `prefix` in which turn. */
  constructor({ side, terms, method, isAuto }, prefix, mode) {
    [this.side, this.method, this.mode] = [side, method, mode];
    const id = `answer-${++numMade}`;
    this.title = el("span", {}, isAuto ? terms.map(({ name }) => name).join(" + ") : titleOf(terms, method));
    this.said = el("div", { class: "said" });
    this.fault = el("p", { class: "fault", hidden: true });
    this.box = el("div", { class: "text", tabindex: "0", role: "region", "aria-labelledby": id }, this.said, this.fault);
    const rows = Object.entries(FIGURES).map(([key, label]) => {
      this.#figures[key] = el("dd", {}, "–");
      return el("div", { class: key }, el("dt", {}, label), this.#figures[key]);
    });
    const heading = el("h3", { id }, el("span", { class: "unseen" }, `${prefix}: `), this.title);
    this.article = el("article", { class: "answer", "data-side": side, "aria-labelledby": id }, heading, el("dl", {}, ...rows), this.box);
    this.draw();
  }

  get name() {
    return this.title.textContent;
  }

  /** Whether it can be sent on as something that was said. */
  get isSaid() {
    return this.state === "ended" || (this.state !== "failed" && this.text !== "");
  }

  /** Shows the events of one request until they end. Throws what they throw. */
  async follow(events) {
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
      this.draw();
      this.box.removeAttribute("aria-busy");
    }
  }

  /** Says why there is no more of it. */
  fail(message) {
    this.state = "failed";
    this.fault.textContent = message;
    this.fault.hidden = false;
    setText(this.#figures.end, "failed");
  }

  stopped() {
    this.state = "stopped";
    setText(this.#figures.end, "stopped");
  }

  /** Draws the text anew, as the mode has it. */
  draw() {
    clearTimeout(this.#timer);
    this.#timer = 0;
    const started = performance.now();
    const { scrollTop, clientHeight, scrollHeight } = this.box;
    this.said.classList.toggle("plain", !this.mode.isMarkdown);
    this.said.replaceChildren(this.mode.isMarkdown ? render(this.text) : this.text);
    // Who has scrolled back goes on reading there.
    if (scrollTop + clientHeight >= scrollHeight - 8) this.box.scrollTop = this.box.scrollHeight;
    this.#pause = Math.max(PAUSE, 8 * (performance.now() - started));
  }

  #token({ text }, watch) {
    watch.token();
    if (watch.count === 1) setText(this.#figures.first, duration(watch.first));
    setText(this.#figures.tokens, count(watch.count));
    if (watch.speed) setText(this.#figures.speed, short(watch.speed));
    this.text += text;
    this.#timer ||= setTimeout(() => this.draw(), this.#pause);
  }

  #done({ adapter, merge, usage, timings, finish_reason: reason, seed }, watch) {
    this.state = "ended";
    const num = usage.completion_tokens;
    const speed = timings?.decode_s && num > 1 ? (num - 1) / timings.decode_s : watch.speed;
    if (timings?.time_to_first_token_s) setText(this.#figures.first, duration(timings.time_to_first_token_s));
    if (timings?.queue_s !== undefined) setText(this.#figures.queue, duration(timings.queue_s));
    if (speed) setText(this.#figures.speed, short(speed));
    setText(this.#figures.tokens, `${count(usage.prompt_tokens)} in, ${count(num)} out`);
    this.#figures.tokens.title = usage.cached_tokens ? `${count(usage.cached_tokens)} of the prompt’s were computed before` : "";
    setText(this.#figures.end, ENDS[reason] ?? reason);
    setText(this.#figures.seed, String(seed));
    this.title.title = adapter.map(({ name, version }) => `${name}@${version}`).join(" + ");
    const share = merge?.base_share;
    if (typeof share === "number") {
      const chosen = titleOf(adapter.filter(({ weight }) => weight), this.method);
      setText(this.title, share && share < 1 ? `${chosen}, base model ${signed(share, 2)}` : chosen);
      // The operator may have added some.
    } else if (adapter.some(({ policy }) => policy)) setText(this.title, titleOf(adapter, this.method));
  }
}

function titleOf(terms, method) {
  const sum = terms.map(({ weight, name, policy }) => `${signed(weight, 2)} ${name}${policy ? " (policy)" : ""}`).join(" + ");
  if (!sum) return "Base model";
  return method === "linear" ? sum : `${method} of ${sum}`;
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
