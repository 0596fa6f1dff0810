// Server-sent events out of the body of an answer (the HTML standard, section 9.2.6), comments left out.

/** Cuts text that comes in any pieces into events, [name, data]. */
export class EventCutter {
  #rest = "";
  #name = "";
  #data = [];

  /** Returns the events that end in `text`. */
  push(text) {
    this.#rest += text;
    const found = [];
    for (let line = this.#line(); line !== null; line = this.#line()) {
      const event = this.#read(line);
      if (event) found.push(event);
    }
    return found;
  }

  #line() {
    // A carriage return that is last may be half of a line's end.
    const end = /\r\n|\n|\r(?=[^])/.exec(this.#rest);
    if (!end) return null;
    const line = this.#rest.slice(0, end.index);
    this.#rest = this.#rest.slice(end.index + end[0].length);
    return line;
  }

  #read(line) {
    if (!line) return this.#end();
    const [, field, value] = /^([^:]*):? ?([^]*)$/.exec(line);
    if (field === "event") this.#name = value;
    if (field === "data") this.#data.push(value);
    return null;
  }

  #end() {
    const event = this.#data.length ? [this.#name || "message", this.#data.join("\n")] : null;
    [this.#name, this.#data] = ["", []];
    return event;
  }
}

/** Yields the events of a stream of bytes, [name, parsed data]. */
export async function* events(body) {
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  const cutter = new EventCutter();
  try {
    for (let piece = await reader.read(); !piece.done; piece = await reader.read()) {
      for (const [name, data] of cutter.push(piece.value)) yield [name, JSON.parse(data)];
    }
  } finally {
    await reader.cancel().catch(() => {}); // it was aborted: nothing is left to cancel
  }
}
