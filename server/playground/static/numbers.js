// Numbers as people read them.

/** 1340000 -> "1.34 MB". */
export function bytes(count) {
  const units = ["B", "kB", "MB", "GB", "TB"];
  let place = 0;
  while (count >= 1000 && place < units.length - 1) [count, place] = [count / 1000, place + 1];
  return `${short(count)} ${units[place]}`;
}

/** Three digits, no more than are there: 1.34, 13.4, 134, 1340. */
export function short(value) {
  return Number(value.toPrecision(3)).toLocaleString("en", { maximumFractionDigits: 3, useGrouping: false });
}

/** 1234567 -> "1,234,567". */
export function count(value) {
  return value.toLocaleString("en");
}

/** 0.0123 -> "12 ms", 1.5 -> "1.5 s". */
export function duration(seconds) {
  return seconds < 1 ? `${Math.round(seconds * 1000)} ms` : `${short(seconds)} s`;
}

/** 0.1 -> "10%". */
export function percent(share) {
  return `${short(share * 100)}%`;
}

/** -0.004 -> "−0.004": as wide whatever its sign, and never minus nothing. */
export function signed(value, digits) {
  const text = Math.abs(value).toFixed(digits);
  return value < 0 && Number(text) ? `−${text}` : text;
}
