// How busy the server is, from /metrics, drawn by uPlot over the last minutes.

import { getText, key } from "./api.js";
import { byId, el, setText } from "./elements.js";
import { readMetrics } from "./metrics.js";
import { duration, percent, short } from "./numbers.js";

/** Seconds that a chart shows. */
const SPAN_S = 300;
/** Seconds after which a sample's line does not lead to the next: nobody looked in between. */
const GAP_S = 15;
/** Height of a chart, in CSS pixels. */
const HEIGHT = 52;
// Tokens are counted as they come: vllm:generation_tokens counts those of an answer when it has ended.
const TOKENS = ["vllm:time_to_first_token_seconds_count", "vllm:inter_token_latency_seconds_count"];
/** `minTop` is the smallest top of a scale. */
const CHARTS = [
  { title: "Tokens/s", minTop: 10, show: short, read: tokenRate },
  { title: "Running", minTop: 4, show: short, read: ({ sums }) => sums.get("vllm:num_requests_running") },
  { title: "Waiting", minTop: 4, show: short, read: ({ sums }) => sums.get("vllm:num_requests_waiting") },
  { title: "KV cache", minTop: 0.1, show: (share) => percent(Number(share.toPrecision(2))), read: ({ sums }) => sums.get("vllm:kv_cache_usage_perc") },
];

/** Four charts, with a sample each time that `refresh` is called. */
export class Charts {
  #before = null;

  constructor() {
    this.charts = CHARTS.map((chart) => new Chart(chart));
    byId("charts").append(...this.charts.map((chart) => chart.element));
    const redraw = () => this.charts.forEach((chart) => chart.redraw());
    matchMedia("(prefers-color-scheme: dark)").addEventListener("change", redraw);
  }

  /** Asks once. Who may not see it is told so, and sees no charts. */
  async refresh() {
    let text = "";
    try {
      text = await getText("metrics");
    } catch (error) {
      const isRefused = error.status === 401 || error.status === 403;
      if (isRefused) byId("metrics-link").hidden = true;
      this.#note(isRefused ? "Charts need a key that may read /metrics." : error.message, !isRefused);
      return;
    }
    this.#note("", true);
    // A link sends no key.
    byId("metrics-link").hidden = Boolean(key.get());
    const now = { at: performance.now() / 1000, sums: readMetrics(text) };
    for (const chart of this.charts) chart.add(now, this.#before);
    this.#before = now;
  }

  #note(text, hasCharts) {
    setText(byId("live-note"), text);
    byId("live-note").hidden = !text;
    byId("charts").hidden = !hasCharts;
  }
}

class Chart {
  #times = [];
  #values = [];

  constructor({ title, minTop, show, read }) {
    [this.title, this.show, this.read] = [title, show, read];
    this.value = el("output", { "aria-live": "off" }, "–");
    this.hint = el("span", { class: "hint" });
    this.box = el("div", { class: "plot", role: "img", "aria-label": title });
    this.element = el("div", { class: "chart" }, el("span", { class: "title" }, title), this.hint, this.value, this.box);
    this.plot = new globalThis.uPlot(options(minTop, () => this.#tell()), [[], []], this.box);
    new ResizeObserver(([{ contentRect }]) => this.plot.setSize({ width: contentRect.width, height: HEIGHT })).observe(this.box);
  }

  /** Adds what the metrics of `now` say, and forgets what is too old. */
  add(now, before) {
    const value = this.read(now, before);
    if (value === undefined) return;
    if (now.at - this.#times.at(-1) > GAP_S) this.#push(now.at - GAP_S, null);
    this.#push(now.at, value);
    while (this.#times[0] < now.at - SPAN_S) [this.#times, this.#values] = [this.#times.slice(1), this.#values.slice(1)];
    this.plot.setData([this.#times, this.#values]);
    this.#tell();
  }

  redraw() {
    this.plot.redraw(false);
  }

  #push(time, value) {
    this.#times.push(time);
    this.#values.push(value);
  }

  /** Shows the last value and the highest, or the one that is pointed at. */
  #tell() {
    const last = this.#values.length - 1;
    if (last < 0) return;
    const place = this.plot.cursor.idx ?? last;
    const value = this.#values[place] ?? null;
    const highest = this.show(Math.max(...this.#values));
    setText(this.value, value === null ? "–" : this.show(value));
    setText(this.hint, place === last ? `max ${highest}` : `${duration(this.#times[last] - this.#times[place])} ago`);
    this.box.setAttribute("aria-label", `${this.title} over the last 5 minutes: now ${this.show(this.#values[last])}, at most ${highest}`);
  }
}

function options(minTop, pointed) {
  return {
    width: 120,
    height: HEIGHT,
    padding: [3, 0, 0, 0],
    legend: { show: false },
    axes: [{ show: false }, { show: false }],
    scales: {
      x: { time: false, range: (_, __, last) => [(last ?? SPAN_S) - SPAN_S, last ?? SPAN_S] },
      y: { range: (_, __, top) => [0, Math.max(minTop, top ?? 0)] },
    },
    series: [{}, { stroke: () => colour(), fill: () => `${colour()}22`, width: 1.5, points: { show: false } }],
    cursor: { y: false, points: { size: 6 }, drag: { x: false, y: false }, sync: { key: "server" } },
    hooks: { setCursor: [pointed] },
  };
}

function colour() {
  return getComputedStyle(document.documentElement).getPropertyValue("--accent").trim();
}

function tokenRate(now, before) {
  // A rate needs two samples.
  if (!before || !TOKENS.every((name) => now.sums.has(name))) return undefined;
  const total = ({ sums }) => TOKENS.reduce((sum, name) => sum + sums.get(name), 0);
  // A counter that went back belongs to a server that was started again.
  return Math.max(0, (total(now) - total(before)) / (now.at - before.at));
}
