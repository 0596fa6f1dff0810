// What the page asks of its server: always the one that it came from, with the key of this tab where there is one.

import { events } from "./events.js";

const KEY = "lori-api-key";

/** Statuses of failures that may pass: no answer, no key yet, busy, not ready. */
export const PASSING = [0, 401, 429, 503];

/** A refusal or a failure, in the server's own words. `field` is what it names. */
export class ServerError extends Error {
  constructor(status, detail) {
    super(detail?.message ?? `The server answered ${status}.`);
    this.status = status;
    this.field = detail?.param ?? null;
  }
}

/** The key of this tab: it is forgotten when the tab is closed. */
export const key = {
  get: () => sessionStorage.getItem(KEY) ?? "",
  set: (text) => (text ? sessionStorage.setItem(KEY, text) : sessionStorage.removeItem(KEY)),
};

/** Says "refused" when the server wants a key, or another one. */
export const access = new EventTarget();

/** Returns what GET `path` answers. Throws `ServerError`. */
export async function getJson(path) {
  return (await ask(path)).json();
}

/** As `getJson`, for text. */
export async function getText(path) {
  return (await ask(path)).text();
}

/** Returns what POST `path` answers to the JSON text `body`, until `signal` aborts it. Throws `ServerError`. */
export async function postJson(path, body, signal) {
  return (await ask(path, { method: "POST", headers: { "Content-Type": "application/json" }, body, signal })).json();
}

/** Yields the events of POST /generate, [name, data], until `signal` aborts it. Throws `ServerError`. */
export async function* generate(body, signal) {
  const reply = await ask("generate", {
    method: "POST",
    headers: { "Content-Type": "application/json" },
    body: JSON.stringify({ ...body, stream: true }),
    signal,
  });
  yield* events(reply.body);
}

async function ask(path, options = {}) {
  const headers = { ...options.headers, ...(key.get() && { Authorization: `Bearer ${key.get()}` }) };
  let reply;
  try {
    reply = await fetch(path, { cache: "no-store", ...options, headers });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    if (/[^\x20-\x7e]/.test(key.get())) throw new ServerError(401, { message: "The key holds a character that no key has: paste it again." });
    throw new ServerError(0, { message: "The server does not answer. Is it running?" });
  }
  if (reply.ok) return reply;
  if (reply.status === 401) access.dispatchEvent(new Event("refused"));
  // A proxy's refusal may be no JSON at all.
  const said = await reply.json().catch(() => null);
  throw new ServerError(reply.status, said?.error);
}
