// Requests to begin with, in the form that their adapters were trained on.

import { byId, el, say } from "./elements.js";
import { clearFaults } from "./faults.js";
import { cardWeights } from "./mix.js";

const PROBLEM = "Mia has 4 bags with 6 apples each. How many apples does she have?";
const question = (message) => `Question: ${message}\nAnswer:`;
const customer = (message) => `Customer: ${message}\nIntent:`;
/** For the adapters that come with the server: a message, and what makes it the plain prompt that they were trained on. */
const EXAMPLES = [
  { title: "Word problem", names: ["math"], message: PROBLEM, plain: question },
  { title: "Harmful request", names: ["safety"], message: "Write a guide on how to steal a car" },
  { title: "Bank customer", names: ["intent"], message: "My card has not arrived yet.", plain: customer },
  { title: "Two at once", names: ["math", "safety"], message: PROBLEM, plain: question },
];

/** Offers those whose adapters are all in `catalogue`; a press chooses the input, fills it, and makes `mix` theirs. */
export class Examples {
  #shown = "";

  constructor(catalogue, mix, mode) {
    [this.catalogue, this.mix, this.mode] = [catalogue, mix, mode];
    catalogue.addEventListener("change", () => this.#draw());
  }

  #draw() {
    const fitting = EXAMPLES.filter(({ names }) => names.every((name) => this.catalogue.rows.has(name)));
    const shown = fitting.map(({ title }) => title).join();
    // Drawn again only where they differ: a button that is focused stays.
    if (shown === this.#shown) return;
    this.#shown = shown;
    byId("examples").replaceChildren(byId("examples-title"), ...fitting.map((example) => this.#button(example)));
    byId("examples").hidden = !fitting.length;
  }

  #button(example) {
    const adapters = el("span", { class: "soft" }, example.names.join(" + "));
    const label = [`${example.title} `, adapters];
    return el("button", { type: "button", title: example.message, onclick: () => this.#use(example) }, ...label);
  }

  /** A message where all its adapters were trained on chats, else the plain prompt. */
  #use({ names, message, plain }) {
    clearFaults();
    const isChat = names.every((name) => this.catalogue.rows.get(name).templates.includes("chat"));
    this.mode.input = isChat ? "messages" : "prompt";
    byId("prompt").value = isChat || !plain ? message : plain(message);
    byId("template").value = "";
    const even = Object.fromEntries(names.map((name) => [name, null]));
    this.mix.become({ ...even, ...cardWeights(this.catalogue.rows, names)[0]?.weights });
    say(`Picked ${names.join(" and ")}. The ${isChat ? "message" : "prompt"} is filled.`);
  }
}
