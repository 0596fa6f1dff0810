// Asks again and again, as long as somebody looks.

/** Calls `work` now, then every `seconds`, or more rarely where it takes long; never twice at once, nor while the page is hidden. */
export function poll(work, seconds) {
  let timer = 0;
  let isRunning = false;
  let isWanted = false;

  async function turn() {
    clearTimeout(timer);
    if (isRunning) {
      isWanted = true;
      return;
    }
    isRunning = true;
    const started = performance.now();
    try {
      await work();
    } finally {
      isRunning = false;
      // A list of thousands is not asked for as often as one of four.
      const pause = Math.max(seconds * 1000, 20 * (performance.now() - started));
      timer = setTimeout(turn, isWanted ? 0 : pause);
      isWanted = false;
      if (document.hidden) clearTimeout(timer);
    }
  }

  document.addEventListener("visibilitychange", () => document.hidden || turn());
  turn();
  return turn;
}
