// The list of the server's adapters and named merges: searched, picked from, and kept as it is now. Of thousands only some are drawn.

import { getJson } from "./api.js";
import { byId, el, setText } from "./elements.js";
import { AUTO } from "./mix.js";
import { bytes, count, percent } from "./numbers.js";

const STEP = 50;
const TIERS = { disk: "read when a request names it", loaded: "in memory, packed", resident: "in the kernels’ operands" };

/** What stands for the adapters that the server selects. */
const SELECTION = { name: AUTO, detail: "the server selects adapters for each prompt" };

/** The rows of GET /adapters; says "change" when they were asked for again. */
export class Catalogue extends EventTarget {
  rows = new Map();
  merges = [];
  faulty = [];
  baseModel = "";
  /** Whether several adapters without weights get automatic ones, where they can. */
  weighsByDefault = false;
  fault = "";

  /** Whether the server can select adapters by the prompt. */
  get canSelect() {
    return [...this.rows.values()].some((row) => row.has_prompt_statistics);
  }

  /** Asks for them; what goes wrong is told in `fault`. */
  async refresh() {
    try {
      const reply = await getJson("adapters");
      this.rows = new Map(reply.adapters.map((row) => [row.name, row]));
      [this.merges, this.faulty, this.baseModel, this.fault] = [reply.merges ?? [], reply.faulty ?? [], reply.base_model, ""];
      this.weighsByDefault = reply.default_merge === "auto";
    } catch (error) {
      this.fault = error.message;
      // What another key may see is none of this one's business.
      if (error.status === 401 || error.status === 403) [this.rows, this.merges, this.faulty] = [new Map(), [], []];
    }
    this.dispatchEvent(new Event("change"));
  }
}

/** Shows `catalogue`, and lets one pick for `mix`. */
export class AdapterList {
  #items = new Map();
  #limit = STEP;
  #faulty = "[]";

  constructor(catalogue, mix) {
    [this.catalogue, this.mix] = [catalogue, mix];
    const draw = () => this.#draw();
    catalogue.addEventListener("change", draw);
    mix.addEventListener("change", draw);
    byId("search").addEventListener("input", () => {
      this.#limit = STEP;
      byId("adapters").scrollTop = 0;
      this.#draw();
    });
    byId("adapters-more").addEventListener("click", () => this.#more());
  }

  #draw() {
    const words = byId("search").value.toLowerCase().split(/\s+/).filter(Boolean);
    const { merges, rows } = this.catalogue;
    const found = inOrder([...rows.values()], merges).filter((row) => hasAll(words, row));
    const shown = found.slice(0, this.#limit);
    const choice = this.catalogue.canSelect && hasAll(words, SELECTION) ? [SELECTION] : [];
    const items = [...choice, ...shown].map((row) => this.#item(row));
    const list = byId("adapters");
    if (items.length !== list.children.length || items.some((item, place) => item !== list.children[place])) {
      keepFocus(list, () => list.replaceChildren(...items));
    }
    byId("adapters-more").hidden = shown.length === found.length;
    const isAlone = choice.length && !found.length;
    const note = isAlone ? "" : told(shown.length, found.length, rows.size, merges.length);
    setText(byId("adapters-note"), this.catalogue.fault || note);
    this.#drawFaulty(words);
    byId("adapters-note").classList.toggle("fault", Boolean(this.catalogue.fault));
  }

  /** Those that are damaged are no choice, but nobody shall look for them in vain. */
  #drawFaulty(words) {
    const found = this.catalogue.faulty.filter((row) => hasAll(words, row));
    const shown = JSON.stringify(found);
    if (shown === this.#faulty) return;
    this.#faulty = shown;
    byId("faulty").replaceChildren(...found.map(faultyItem));
    byId("faulty").hidden = !found.length;
  }

  #item(row) {
    let item = this.#items.get(row.name);
    if (!item) this.#items.set(row.name, (item = this.#make(row)));
    const tier = item.querySelector(".tier");
    setText(tier, row.tier ?? "");
    tier.dataset.tier = row.tier ?? "";
    tier.title = TIERS[row.tier] ?? "";
    item.querySelector("label").title = row.adapters ? mergeTitle(row) : row.version ? `${row.name}@${row.version}` : "";
    setText(item.querySelector(".detail"), row.detail ?? (row.adapters ? mergeDetails(row) : details(row)));
    item.querySelector("input").disabled = Boolean(row.missing?.length) && !this.mix.has(row.name);
    item.querySelector("input").checked = this.mix.has(row.name);
    return item;
  }

  #make({ name }) {
    const id = `adapter-${this.#items.size}`;
    const box = el("input", {
      type: "checkbox",
      "aria-labelledby": `${id}-name`,
      "aria-describedby": `${id}-tier ${id}-detail`,
      onchange: () => (box.checked ? this.mix.pick(name) : this.mix.drop(name)),
    });
    return el(
      "li",
      {},
      el(
        "label",
        { class: "pick" },
        box,
        el("span", { class: "name", id: `${id}-name` }, name),
        el("span", { class: "tier", id: `${id}-tier` }),
        el("span", { class: "detail", id: `${id}-detail` }),
      ),
    );
  }

  #more() {
    const first = byId("adapters").children.length;
    this.#limit += STEP;
    this.#draw();
    // The button may be gone now; reading goes on where it was.
    byId("adapters").children[first]?.querySelector("input").focus();
  }
}

function hasAll(words, { name }) {
  return words.every((word) => name.toLowerCase().includes(word));
}

function faultyItem({ name, faults }) {
  const more = faults.length > 1 ? ` (and ${count(faults.length - 1)} more)` : "";
  return el(
    "li",
    { title: faults.join("\n") },
    el("span", { class: "name" }, name),
    el("span", { class: "badge" }, "damaged"),
    el("span", { class: "fault" }, `${faults[0] ?? "It cannot be served."}${more}`),
  );
}

function details(row) {
  const density = row.density ?? (row.sparsity === undefined ? undefined : 1 - row.sparsity);
  return [
    row.bytes_on_disk && bytes(row.bytes_on_disk),
    row.rank && `r ${row.rank}`,
    density !== undefined && `${percent(density)} kept`,
    row.num_requests != null && `${count(row.num_requests)} ${row.num_requests === 1 ? "request" : "requests"}`,
  ]
    .filter(Boolean)
    .join(" · ");
}

/** Both in one list by name; the server sends each in order. */
function inOrder(rows, merges) {
  if (!merges.length) return rows;
  return [...rows, ...merges].sort((one, other) => (one.name < other.name ? -1 : 1));
}

/** The sum, such as "named merge: 0.75 math − 0.5 safety"; weights that depend on the layer are counted. */
function mergeDetails({ adapters, missing }) {
  const numBlocks = Math.max(...adapters.map(({ block_weights: blocks }) => blocks?.length ?? 0));
  const terms = adapters.map(({ name, weight }, i) => {
    const sign = i ? ` ${weight < 0 ? "−" : "+"} ` : weight < 0 ? "−" : "";
    return `${sign}${Number(Math.abs(weight).toPrecision(3))} ${name}`;
  });
  const absent = missing?.length ? ` · needs ${missing.join(", ")}, which the server cannot serve` : "";
  return `named merge: ${terms.join("")}${numBlocks ? ` · times weights in ${count(numBlocks)} blocks` : ""}${absent}`;
}

function mergeTitle({ adapters, about }) {
  return [adapters.map(({ name, version }) => `${name}@${version}`).join(" + "), about].filter(Boolean).join("\n");
}

function told(numShown, numFound, numAdapters, numMerges) {
  const numAll = numAdapters + numMerges;
  if (!numAll) return "This server has no adapters.";
  if (!numFound) return "None is called so.";
  if (numShown < numFound) return `The first ${numShown} of ${count(numFound)}: search for the others.`;
  if (numFound < numAll) return `${count(numFound)} of ${count(numAll)} adapters${numMerges ? " and merges" : ""}`;
  const adapters = `${count(numAdapters)} ${numAdapters === 1 ? "adapter" : "adapters"}`;
  return numMerges ? `${adapters}, ${count(numMerges)} ${numMerges === 1 ? "merge" : "merges"}` : adapters;
}

function keepFocus(list, change) {
  const focused = list.contains(document.activeElement) ? document.activeElement : null;
  change();
  if (focused?.isConnected) focused.focus({ preventScroll: true });
}
