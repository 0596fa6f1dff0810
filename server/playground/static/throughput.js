// How busy the server is, from /metrics, drawn as small curves.

import { getText, key } from "./api.js";
import { byId, el, setText } from "./elements.js";
import { readMetrics } from "./metrics.js";
import { percent, short } from "./numbers.js";

const NUM_SAMPLES = 60;
const [WIDTH, HEIGHT] = [120, 32];
const SVG = "http://www.w3.org/2000/svg";
const GENERATED = "vllm:generation_tokens_total";
const GAUGES = [
  { title: "Tokens/s", least: 10, show: short, read: (now, before) => rate(now, before, GENERATED) },
  { title: "Running", least: 4, show: short, read: (now) => now.sums.get("vllm:num_requests_running") },
  { title: "Waiting", least: 4, show: short, read: (now) => now.sums.get("vllm:num_requests_waiting") },
  { title: "KV memory", least: 0.1, show: percent, read: (now) => now.sums.get("vllm:kv_cache_usage_perc") },
];

/** Four gauges, of the last `NUM_SAMPLES` times that `refresh` was called. */
export class Throughput {
  #before = null;

  constructor() {
    this.gauges = GAUGES.map((gauge) => new Gauge(gauge));
    byId("gauges").append(...this.gauges.map((gauge) => gauge.element));
  }

  /** Asks once. Who may not see it is told so, and sees no gauges. */
  async refresh() {
    let text = "";
    try {
      text = await getText("metrics");
    } catch (error) {
      const isRefused = error.status === 401 || error.status === 403;
      if (isRefused) byId("metrics-link").hidden = true;
      this.#note(isRefused ? "Throughput is for keys that may read /metrics." : error.message, !isRefused);
      return;
    }
    this.#note("", true);
    // A link sends no key.
    byId("metrics-link").hidden = Boolean(key.get());
    const now = { at: performance.now(), sums: readMetrics(text) };
    for (const gauge of this.gauges) gauge.add(now, this.#before);
    this.#before = now;
  }

  #note(text, hasGauges) {
    setText(byId("live-note"), text);
    byId("live-note").hidden = !text;
    byId("gauges").hidden = !hasGauges;
  }
}

class Gauge {
  #values = [];

  constructor({ title, least, show, read }) {
    [this.least, this.show, this.read] = [least, show, read];
    this.value = el("output", { "aria-live": "off" }, "–");
    const drawing = document.createElementNS(SVG, "svg");
    drawing.setAttribute("viewBox", `0 0 ${WIDTH} ${HEIGHT}`);
    drawing.setAttribute("preserveAspectRatio", "none");
    drawing.setAttribute("aria-hidden", "true");
    [this.area, this.line] = ["area", "line"].map((name) => {
      const path = drawing.appendChild(document.createElementNS(SVG, "path"));
      path.setAttribute("class", name);
      return path;
    });
    this.element = el("div", { class: "gauge" }, el("span", { class: "title" }, title), this.value, drawing);
  }

  add(now, before) {
    const value = this.read(now, before);
    if (value === undefined) return;
    this.#values = [...this.#values, value].slice(-NUM_SAMPLES);
    setText(this.value, this.show(value));
    const top = Math.max(this.least, ...this.#values);
    const x = (i) => (WIDTH * (NUM_SAMPLES - this.#values.length + i)) / (NUM_SAMPLES - 1);
    const points = this.#values.map((of, i) => `${x(i).toFixed(1)} ${(HEIGHT - 1 - (of / top) * (HEIGHT - 2)).toFixed(1)}`);
    this.line.setAttribute("d", `M${points.join("L")}`);
    this.area.setAttribute("d", `M${points.join("L")}V${HEIGHT}H${x(0).toFixed(1)}Z`);
  }
}

function rate(now, before, name) {
  if (!now.sums.has(name)) return undefined;
  // A counter that went back belongs to a server that was started again.
  return before ? Math.max(0, (1000 * (now.sums.get(name) - before.sums.get(name))) / (now.at - before.at)) : 0;
}
