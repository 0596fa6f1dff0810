// What was asked and answered: the turns of a conversation, or the last text alone.

import { Answer } from "./answers.js";
import { byId, el } from "./elements.js";

/** One request, and the answers to it side by side. */
export class Turn {
  /** `asked` says who answers, [{side, terms, method}]; `edit` is called to write it anew, where that can be. */
  constructor(number, text, asked, { mode, edit }) {
    this.text = text;
    const prefix = mode.isConversation ? `Answer ${number}` : "Answer";
    this.answers = asked.map((who) => new Answer(who, prefix, mode));
    const button = edit && el("button", { type: "button", class: "edit", "aria-label": `Edit message ${number}`, onclick: edit }, "Edit");
    this.item = el(
      "li",
      { class: "turn" },
      el("div", { class: "asked" }, el("p", { class: "message", tabindex: "0" }, text), ...(button ? [button] : [])),
      el("div", { class: "answers", "data-number": asked.length }, ...this.answers.map((answer) => answer.article)),
    );
  }

  /** Whether anybody said something that can be sent on. */
  get isAnswered() {
    return this.answers.some((answer) => answer.isSaid);
  }

  /** Returns what was said on this side, or on the other one where nothing was said on this. */
  said(side) {
    const said = this.answers.filter((answer) => answer.isSaid);
    return (said.find((answer) => answer.side === side) ?? said[0]).text;
  }

  /** No more the last one: it is as long as its text, and the tab key passes it. */
  settle() {
    for (const part of this.item.querySelectorAll(".text, .message")) part.removeAttribute("tabindex");
  }
}

/** Keeps the end of `log` in sight while `lists` within it grow, until somebody scrolls back. */
class End {
  #isKept = true;
  #top = 0;

  constructor(log, lists) {
    this.log = log;
    log.addEventListener("scroll", () => this.#scrolled());
    const observer = new ResizeObserver(() => this.#isKept && this.show());
    for (const list of lists) observer.observe(list);
  }

  show() {
    this.#isKept = true;
    this.log.scrollTop = this.log.scrollHeight;
  }

  #scrolled() {
    const { scrollTop, clientHeight, scrollHeight } = this.log;
    const isBack = scrollTop < this.#top;
    // By the time show()'s own scroll event arrives the log may have grown; keep following.
    this.#isKept = scrollTop + clientHeight >= scrollHeight - 8 || (this.#isKept && !isBack);
    this.#top = scrollTop;
  }
}

/** The turns of both inputs: a conversation's are kept, a text's give way to the next. */
export class Turns {
  #turns = { messages: [], prompt: [] };
  #lists = { messages: byId("turns"), prompt: byId("runs") };

  constructor(mode) {
    this.mode = mode;
    mode.addEventListener("change", () => this.#show());
    this.end = new End(byId("log"), Object.values(this.#lists));
    this.#show();
  }

  /** Those of the input that is chosen. */
  get all() {
    return this.#turns[this.mode.input];
  }

  /** Returns the messages that ask for an answer to `text` on `side`, after what was said there. Without a text: the last request. */
  messages(side, text) {
    const before = this.all.filter((turn) => turn.isAnswered);
    const asked = text || before.pop()?.text || text;
    const system = byId("system").value;
    return [
      ...(system ? [{ role: "system", content: system }] : []),
      ...before.flatMap((turn) => [
        { role: "user", content: turn.text },
        { role: "assistant", content: turn.said(side) },
      ]),
      { role: "user", content: asked },
    ];
  }

  /** Begins a turn and returns it; `edited` is called with its text when somebody goes back to it. */
  begin(text, asked, edited) {
    if (!this.mode.isConversation) this.clear();
    // An unanswered turn was not sent on: drop it.
    if (this.all.length && !this.all.at(-1).isAnswered) this.#cut(this.all.length - 1);
    this.all.at(-1)?.settle();
    const [mode, place] = [this.mode, this.all.length];
    const edit = mode.isConversation ? () => edited(this.#cut(place)) : null;
    const turn = new Turn(place + 1, text, asked, { mode, edit });
    this.all.push(turn);
    this.#lists[mode.input].append(turn.item);
    byId("empty").hidden = true;
    this.end.show();
    return turn;
  }

  clear() {
    this.#cut(0);
  }

  /** Removes the turns from `place` on, and returns the text of the first of them. */
  #cut(place) {
    const cut = this.all.splice(place);
    for (const turn of cut) turn.item.remove();
    byId("empty").hidden = this.all.length > 0;
    return cut[0]?.text ?? "";
  }

  #show() {
    for (const [input, list] of Object.entries(this.#lists)) list.hidden = input !== this.mode.input;
    byId("empty").hidden = this.all.length > 0;
    for (const answer of this.all.flatMap((turn) => turn.answers)) answer.draw();
  }
}
