// What is picked, with which weight. Knows no element of the page.

/** The name by which a request lets the server select the adapters. */
export const AUTO = "auto";

/** The picked adapters in their order; says "change" whenever they or their weights are others. */
export class Mix extends EventTarget {
  #weights = new Map();
  /** The weights that the prompt gives, as far as they are known; null if it gives none. */
  #shares = null;
  /** Whether somebody wants weights from the prompt; null until somebody says so. */
  choice = null;

  get names() {
    return [...this.#weights.keys()];
  }

  /** One for each name; 1/n where nobody said another. */
  get weights() {
    return this.names.map((name) => this.weightOf(name));
  }

  /** What is added: [{name, weight}]. */
  get terms() {
    return this.names.map((name) => ({ name, weight: this.weightOf(name) }));
  }

  /** Whether the prompt gives the weights. */
  get isAuto() {
    return this.#shares !== null || this.isSelecting;
  }

  /** Whether the server selects the adapters; nothing else is picked then. */
  get isSelecting() {
    return this.has(AUTO);
  }

  has(name) {
    return this.#weights.has(name);
  }

  weightOf(name) {
    if (this.#shares) return this.#shares.get(name) ?? 0;
    return this.#weights.get(name) ?? 1 / this.#weights.size;
  }

  pick(name) {
    if (name === AUTO) this.#empty();
    else this.#weights.delete(AUTO);
    this.#weights.set(name, null);
    this.#changed();
  }

  drop(name) {
    this.#weights.delete(name);
    if (!this.#weights.size) this.#empty();
    this.#changed();
  }

  /** Sets weights by name; null is 1/n again. */
  weigh(weights) {
    [this.#shares, this.choice] = [null, false];
    for (const [name, weight] of Object.entries(weights)) this.#weights.set(name, weight);
    this.#changed();
  }

  /** Picks these alone, with weights by name. Those that are null are 1/n, or if all are, perhaps from the prompt. */
  become(weights) {
    this.#empty();
    this.#weights = new Map(Object.entries(weights));
    if (Object.values(weights).some((weight) => weight !== null)) this.choice = false;
    this.#changed();
  }

  /** Takes the weights from the prompt, or no longer. */
  auto(isAuto) {
    this.#shares = isAuto ? new Map() : null;
    this.#changed();
  }

  /** Says what the prompt gives, by name; says "shares". */
  share(weights) {
    if (!this.#shares) return;
    this.#shares = new Map(Object.entries(weights));
    this.dispatchEvent(new Event("shares"));
  }

  /** Takes the weights from the prompt, or no longer, as somebody wants it. */
  choose(isAuto) {
    this.choice = isAuto;
    this.auto(isAuto);
  }

  even() {
    this.weigh(Object.fromEntries(this.names.map((name) => [name, null])));
  }

  #empty() {
    [this.#weights, this.#shares, this.choice] = [new Map(), null, null];
  }

  #changed() {
    this.dispatchEvent(new Event("change"));
  }
}

/** Returns what the cards of `rows` say of merges among `names`: [{weights: {name: weight}, by}], each pair once. */
export function cardWeights(rows, names) {
  const found = new Map();
  for (const by of names) {
    for (const [other, [own, its]] of Object.entries(rows.get(by)?.merge_weights ?? {})) {
      const pair = [by, other].sort().join();
      if (names.includes(other) && !found.has(pair)) found.set(pair, { by, weights: { [by]: own, [other]: its } });
    }
  }
  return [...found.values()];
}
