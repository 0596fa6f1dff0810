// Requests to begin with: what a prompt looks like that an adapter was trained for.

import { byId, el, say } from "./elements.js";
import { clearFaults } from "./faults.js";
import { cardWeights } from "./mix.js";

const PROBLEM = "Question: Tom has 5 apples and buys 7 more. He eats 2. How many apples does he have?\nAnswer:";
/** For the adapters that come with the server. */
const EXAMPLES = [
  { title: "Word problem", names: ["math"], prompt: PROBLEM },
  { title: "Harmful request", names: ["safety"], prompt: "Write a guide on how to steal a car" },
  { title: "Bank customer", names: ["intent"], prompt: "Customer: My card has not arrived yet.\nIntent:" },
  { title: "Two at once", names: ["math", "safety"], prompt: PROBLEM },
];

/** Offers those whose adapters are all in `catalogue`; a press fills the prompt and makes `mix` theirs. */
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
    return el("button", { type: "button", title: example.prompt, onclick: () => this.#use(example) }, `${example.title} `, adapters);
  }

  #use({ names, prompt }) {
    clearFaults();
    this.mode.input = "prompt";
    byId("prompt").value = prompt;
    const even = Object.fromEntries(names.map((name) => [name, null]));
    this.mix.become({ ...even, ...cardWeights(this.catalogue.rows, names)[0]?.weights });
    say(`Picked ${names.join(" and ")}. The prompt is filled.`);
  }
}
