// Prometheus's text, as far as this page needs it.

const LINE = /^([a-zA-Z_:][\w:]*)(?:\{.*\})?\s+(\S+)/;

/** Returns the sum of each metric's samples, by name. */
export function readMetrics(text) {
  const sums = new Map();
  for (const line of text.split("\n")) {
    const found = LINE.exec(line);
    if (found) sums.set(found[1], (sums.get(found[1]) ?? 0) + Number(found[2]));
  }
  return sums;
}
