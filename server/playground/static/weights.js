// The weights of what is picked: by slider, or exactly.

import { byId, el } from "./elements.js";
import { AUTO, cardWeights } from "./mix.js";

const REACH = 2;

/** Shows `mix`, with the hints that the cards in `catalogue` give. */
export class Weights {
  #rows = new Map();

  constructor(catalogue, mix) {
    [this.catalogue, this.mix] = [catalogue, mix];
    for (const news of ["change", "shares"]) mix.addEventListener(news, () => this.#draw());
    catalogue.addEventListener("change", () => this.#hint());
    byId("even").addEventListener("click", () => mix.even());
    byId("merge").addEventListener("change", showOptions);
    showOptions();
    this.#draw();
  }

  #draw() {
    const names = this.mix.names;
    const list = byId("mix");
    for (const name of [...this.#rows.keys()].filter((name) => !names.includes(name))) {
      this.#rows.get(name).remove();
      this.#rows.delete(name);
    }
    for (const name of names) {
      if (!this.#rows.has(name)) this.#rows.set(name, list.appendChild(this.#make(name)));
      if (name !== AUTO) show(this.#rows.get(name), this.mix.weightOf(name), this.mix.isAuto);
    }
    byId("mix-empty").hidden = names.length > 0;
    for (const id of ["even", "merge-row"]) byId(id).hidden = names.length < 2;
    this.#hint();
  }

  #make(name) {
    const weights = name === AUTO ? [el("span", { class: "hint selected" }, "selected by the server")] : this.#inputs(name);
    return el(
      "li",
      { class: "field weight" },
      el("span", { class: "name", title: name }, name),
      ...weights,
      el("button", { type: "button", class: "bare", "aria-label": `Remove ${name}`, onclick: () => this.#remove(name) }, "×"),
    );
  }

  #inputs(name) {
    const weigh = (event) => this.mix.weigh({ [name]: event.target.value === "" ? null : Number(event.target.value) });
    return [
      el("input", {
        type: "range", min: -REACH, max: REACH, step: 0.05, "aria-label": `Weight of ${name}`, oninput: weigh,
      }),
      el("input", {
        type: "number", step: 0.05, inputmode: "decimal", "aria-label": `Exact weight of ${name}`, oninput: weigh,
        onblur: (event) => show(event.target.parentElement, this.mix.weightOf(name), this.mix.isAuto),
      }),
    ];
  }

  #remove(name) {
    const row = this.#rows.get(name);
    const next = row.nextElementSibling ?? row.previousElementSibling;
    (next?.querySelector("button") ?? byId("search")).focus();
    this.mix.drop(name);
  }

  #hint() {
    const hints = cardWeights(this.catalogue.rows, this.mix.names);
    const texts = hints.map(({ by, weights }) => {
      const said = Object.entries(weights).map(([name, weight]) => `${name} ${weight}`);
      return `Weights of ${by}’s card: ${said.join(", ")}`;
    });
    const place = byId("card-weights");
    // Drawn again only where they differ: a button that is focused stays.
    if (texts.join() === [...place.children].map((button) => button.textContent).join()) return;
    const use = (weights) => () => this.mix.weigh(weights);
    place.replaceChildren(
      ...texts.map((text, i) => el("button", { type: "button", class: "hinted", onclick: use(hints[i].weights) }, text)),
    );
  }
}

/** Shows a weight; one that the prompt gives is a share of the whole, and cannot be moved. */
function show(row, exactWeight, isAuto) {
  const weight = Number(exactWeight.toFixed(4));
  const [slider, exact] = row.querySelectorAll("input");
  slider.disabled = exact.disabled = isAuto;
  [slider.min, slider.max] = isAuto ? [0, 1] : [-REACH, REACH];
  slider.value = weight;
  slider.setAttribute("aria-valuetext", String(weight));
  // What is filled lies between nothing and the weight.
  const span = slider.max - slider.min;
  const share = (value) => `${(100 * (Math.max(slider.min, Math.min(slider.max, value)) - slider.min)) / span}%`;
  slider.style.setProperty("--from", share(Math.min(0, weight)));
  slider.style.setProperty("--to", share(Math.max(0, weight)));
  // Not while somebody writes there: "1." is on its way to "1.5".
  if (exact !== document.activeElement) exact.value = weight;
}

function showOptions() {
  const method = byId("merge").value;
  const used = { density: method !== "linear", merge_seed: method.startsWith("dare") };
  for (const field of document.querySelectorAll("#merge-row [data-for]")) field.hidden = !used[field.dataset.for];
}

