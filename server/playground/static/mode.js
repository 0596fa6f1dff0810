// Whether a conversation goes on or a text stands alone, and how the answers are shown.

import { byId, setText } from "./elements.js";

const WORDS = {
  messages: {
    title: "Conversation",
    prompt: "Message",
    placeholder: "Message: what was said before is sent with it",
    clear: "New conversation",
    empty: "Write a message below. Its answers come here, each under the adapters that gave it, and the next message is sent with them.",
  },
  prompt: {
    title: "Answer",
    prompt: "Text to continue, as it stands",
    placeholder: "Text to continue, in the form the adapters were trained on:\nQuestion: How many …?\nAnswer:",
    clear: "Clear",
    empty: "Write a text below. It is continued as it stands, and the next run replaces what comes here.",
  },
};

/** The choices of two switches; says "change" when either is another. */
export class Mode extends EventTarget {
  // A continued text is shown verbatim: its line breaks and symbols are content.
  #views = { messages: "markdown", prompt: "plain" };

  constructor() {
    super();
    for (const input of document.querySelectorAll("input[name=input]")) input.addEventListener("change", () => this.#show());
    for (const input of document.querySelectorAll("input[name=view]")) {
      input.addEventListener("change", () => {
        this.#views[this.input] = input.value;
        this.#changed();
      });
    }
    this.#show();
  }

  /** "messages" or "prompt", as the request's field is called. */
  get input() {
    return document.querySelector("input[name=input]:checked").value;
  }

  set input(input) {
    document.querySelector(`input[name=input][value=${input}]`).checked = true;
    this.#show();
  }

  get isConversation() {
    return this.input === "messages";
  }

  get isMarkdown() {
    return this.#views[this.input] === "markdown";
  }

  #show() {
    const words = WORDS[this.input];
    for (const part of document.querySelectorAll("[data-input]")) part.hidden = part.dataset.input !== this.input;
    document.querySelector(`input[name=view][value=${this.#views[this.input]}]`).checked = true;
    setText(byId("talk-title"), words.title);
    setText(byId("prompt-label"), words.prompt);
    setText(byId("new"), words.clear);
    setText(byId("empty"), words.empty);
    byId("prompt").placeholder = words.placeholder;
    this.#changed();
  }

  #changed() {
    this.dispatchEvent(new Event("change"));
  }
}
