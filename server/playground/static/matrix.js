// How alike adapters are, and what they get on each other's prompts: a table whose colours say what its figures say.

import { PASSING, getJson } from "./api.js";
import { byId, el } from "./elements.js";
import { percent, signed } from "./numbers.js";

const MAX_NAMES = 16;
const NUM_FIRST = 6;
const FEW = 6;
// What each figure is by chance, where its colour is none, and which way is alike.
const FIGURES = {
  cosine: { digits: 3, isAlike: 1, least: 0.02, chance: () => 0, about: "of the deltas. 0 is unrelated, 1 the same direction." },
  overlap: {
    digits: 3, isAlike: 1, least: 0.02, chance: (reply, i, j) => reply.chance_overlap[i][j] ?? 0,
    about: "of the masks: the share of the smaller one that both keep. Coloured by what is above or below chance.",
  },
  sign_conflict: {
    digits: 2, isAlike: -1, least: 0.05, chance: () => 0.5,
    about: "of common entries: the share whose signs differ. Half of them by chance.",
  },
  auto_weight: {
    digits: 2, isAlike: 1, least: 0.1, chance: () => 0, isShare: true,
    about: "on each other's prompts: an estimate of the column's mean weight on prompts of the row, if all are named.",
  },
};
const MOVES = { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1] };

/** The table of what `mix` holds, or of the first adapters; asked for once it can be seen. */
export class Matrix {
  #reply = null;
  #isSeen = false;
  #isAsking = false;
  #asked = "";

  constructor(catalogue, mix) {
    [this.catalogue, this.mix] = [catalogue, mix];
    mix.addEventListener("change", () => this.refresh());
    catalogue.addEventListener("change", () => this.refresh());
    for (const input of document.querySelectorAll("input[name=figure]")) input.addEventListener("change", () => this.#draw());
    const isSeen = ([entry]) => {
      this.#isSeen = entry.isIntersecting;
      this.refresh();
    };
    // Its title alone is no reason.
    new IntersectionObserver(isSeen, { rootMargin: "0px 0px -80px" }).observe(byId("compare"));
    // Who comes by keyboard, or chooses a figure where the title alone is in sight, wants all of it. Not while a mouse button is
    // down: what is pressed would move away below it.
    const show = () => byId("compare").scrollIntoView({ block: "nearest" });
    byId("compare").addEventListener("focusin", (event) => event.target.matches(":focus-visible") && show());
    byId("compare").addEventListener("change", show);
    byId("matrix").addEventListener("keydown", (event) => this.#move(event));
    byId("matrix").addEventListener("focusin", (event) => this.#tell(event.target));
    byId("matrix").addEventListener("mouseover", (event) => this.#tell(event.target));
  }

  get #names() {
    const { rows } = this.catalogue;
    const picked = this.mix.names.filter((name) => rows.has(name)); // others are named merges, or gone
    return picked.length > 1 ? picked.slice(0, MAX_NAMES) : [...rows.keys()].slice(0, NUM_FIRST);
  }

  /** Asks for what is not shown yet. One request at a time: the server reads every adapter for it. */
  async refresh() {
    const names = this.#names;
    const asked = names.map((name) => `${name}@${this.catalogue.rows.get(name).version}`).join();
    if (names.length < 2 && !this.#reply) this.#hint("Two adapters or more are compared here.");
    if (!this.#isSeen || this.#isAsking || names.length < 2 || asked === this.#asked) return;
    [this.#isAsking, this.#asked] = [true, asked];
    this.#hint(`Comparing ${names.length} adapters…`);
    try {
      this.#reply = await getJson(`adapters/compare?names=${names.map(encodeURIComponent).join()}`);
      this.#draw();
    } catch (error) {
      this.#hint(error.status === 404 ? "This server does not compare adapters." : error.message);
      if (PASSING.includes(error.status)) setTimeout(() => this.#again(), 5000);
    }
    this.#isAsking = false;
    if (names.join() !== this.#names.join()) this.refresh();
  }

  #again() {
    this.#asked = "";
    this.refresh();
  }

  #hint(text) {
    byId("compare-hint").textContent = text;
  }

  get #figure() {
    return document.querySelector("input[name=figure]:checked");
  }

  #draw() {
    if (!this.#reply) return;
    const name = this.#figure.value;
    const label = this.#figure.parentElement.textContent.trim();
    const figure = FIGURES[name];
    this.#hint(`${label} ${figure.about}`);
    const focused = byId("matrix").contains(document.activeElement) ? document.activeElement : null;
    byId("matrix").replaceChildren(this.#table(name, label, figure), legend(this.#reach(name, figure), figure));
    byId("compare-detail").textContent = "";
    if (focused) goTo(cellAt(focused.dataset.row, focused.dataset.column) ?? cellAt(0, 0));
  }

  #table(name, label, figure) {
    const { names } = this.#reply;
    const reach = this.#reach(name, figure);
    const head = el("tr", {}, el("td", {}), ...names.map((of) => el("th", { scope: "col", title: of }, el("span", {}, of))));
    const rows = names.map((of, i) =>
      el("tr", {}, el("th", { scope: "row", title: of }, el("span", {}, of)), ...names.map((_, j) => this.#cell(name, figure, reach, i, j))),
    );
    rows[0].querySelector("td").tabIndex = 0;
    const caption = el("caption", { class: "unseen" }, `${label}. The arrow keys go from pair to pair.`);
    return el("table", { role: "grid", class: names.length > FEW ? "many" : null }, caption, el("thead", {}, head), el("tbody", {}, ...rows));
  }

  #cell(name, figure, reach, i, j) {
    const value = this.#reply[name][i][j];
    const text = value === null ? "–" : figure.isShare ? value.toFixed(figure.digits) : signed(value, figure.digits);
    const cell = el("td", { tabindex: "-1", "data-row": i, "data-column": j, class: i === j ? "self" : null }, text);
    if (value === null || i === j) return cell;
    const away = figure.isAlike * (value - figure.chance(this.#reply, i, j));
    cell.dataset.side = away < 0 ? "apart" : "alike";
    paint(cell, Math.min(1, Math.abs(away) / reach));
    return cell;
  }

  /** The largest distance from chance, of different adapters: where the colours end. */
  #reach(name, figure) {
    const far = this.#reply[name].flatMap((row, i) =>
      row.map((value, j) => (i === j || value === null ? 0 : Math.abs(value - figure.chance(this.#reply, i, j)))),
    );
    return Math.max(figure.least, ...far);
  }

  #move(event) {
    const move = MOVES[event.key];
    const { row, column } = event.target.dataset;
    if (!move || row === undefined) return;
    event.preventDefault();
    const next = cellAt(Number(row) + move[0], Number(column) + move[1]);
    if (next) goTo(next);
  }

  #tell(cell) {
    const { row: i, column: j } = cell.dataset ?? {};
    if (i === undefined) return;
    const { names, cosine, overlap, chance_overlap: chance, sign_conflict: conflict, auto_weight: weight } = this.#reply;
    const said = [
      cosine[i][j] !== null && `cosine ${signed(cosine[i][j], 4)}`,
      overlap[i][j] !== null && `${percent(overlap[i][j])} of the smaller mask in common, ${percent(chance[i][j])} by chance`,
      conflict[i][j] !== null && `${percent(conflict[i][j])} of the common entries differ in sign`,
      overlap[i][j] === null && "on two bases, so their entries cannot be compared",
      weight[i][j] !== null && `on prompts of ${names[i]}, ${names[j]} gets ${percent(weight[i][j])} of the automatic weights`,
    ];
    byId("compare-detail").textContent = `${names[i]} and ${names[j]}: ${said.filter(Boolean).join("; ")}.`;
  }
}

function cellAt(row, column) {
  return byId("matrix").querySelector(`[data-row="${row}"][data-column="${column}"]`);
}

/** Of all cells the tab key finds one alone: where somebody was. */
function goTo(cell) {
  byId("matrix").querySelector("[tabindex='0']").tabIndex = -1;
  cell.tabIndex = 0;
  cell.focus();
}

function legend(reach, { isAlike, digits, isShare }) {
  const steps = (isShare ? [0, 0.25, 0.5, 0.75, 1] : [-1, -0.5, 0, 0.5, 1]).map((share) => {
    const step = el("span", { "data-side": share < 0 ? "apart" : "alike" });
    paint(step, Math.abs(share));
    return step;
  });
  const ramp = el("span", { class: "ramp", "aria-hidden": "true" }, ...steps);
  if (isShare) return el("p", { class: "legend" }, el("span", {}, "0"), ramp, el("span", {}, `${reach.toFixed(digits)} on another's prompts`));
  const end = (side) => `${side * isAlike > 0 ? "+" : "−"}${reach.toFixed(digits)}`;
  return el("p", { class: "legend" }, el("span", {}, `apart ${end(-1)}`), ramp, el("span", {}, `${end(1)} alike`));
}

function paint(element, share) {
  element.style.setProperty("--share", `${(100 * share).toFixed(1)}%`);
}
