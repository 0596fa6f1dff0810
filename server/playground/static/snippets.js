// The current request as a command, and as a program.

import { key } from "./api.js";
import { byId, say } from "./elements.js";
import { clearFaults, showFault } from "./faults.js";

/** What POST /generate takes where nothing is said; OpenAI's routes take other values. */
const DEFAULTS = { max_tokens: 128, temperature: 0 };
const COMPLETION = ["prompt", "messages", "max_tokens", "temperature", "top_p", "seed", "stop"];

/** Lets the two buttons copy what `asking` asks for. */
export function watchSnippets(catalogue, asking) {
  byId("copy-curl").addEventListener("click", () => copy("copy-curl", () => curl(asking.body(), server(), Boolean(key.get()))));
  byId("copy-python").addEventListener("click", () =>
    copy("copy-python", () => python(asking.body(), server(), catalogue.baseModel, Boolean(key.get()))),
  );
}

/** Returns a command for a POSIX shell. The key itself is never in it. */
export function curl(body, url, needsKey) {
  const data = JSON.stringify(body).replaceAll("'", `'\\''`);
  const bearer = needsKey ? ` \\\n  -H "Authorization: Bearer $LORI_API_KEY"` : "";
  return `curl -s ${url}/generate \\\n  -H 'Content-Type: application/json'${bearer} \\\n  -d '${data}'`;
}

/** Returns a program on the openai package, which sends what it does not know as `extra_body`. */
export function python(body, url, baseModel, needsKey) {
  const { adapter, ...rest } = { ...DEFAULTS, ...body };
  const isOne = typeof adapter === "string" && !body.weights;
  const extra = Object.fromEntries(Object.entries(rest).filter(([name]) => !COMPLETION.includes(name)));
  if (adapter && !isOne) extra.adapters = adapter;
  const lines = [`model=${literal(isOne ? adapter : baseModel)},`];
  for (const name of COMPLETION) if (name in rest) lines.push(`${name}=${literal(rest[name])},`);
  if (Object.keys(extra).length) lines.push(`extra_body=${literal(extra)},`);
  const [method, text] = body.messages ? ["chat.completions", "message.content"] : ["completions", "text"];
  return `${needsKey ? "import os\n\n" : ""}from openai import OpenAI

client = OpenAI(base_url=${literal(`${url}/v1`)}, api_key=${needsKey ? 'os.environ["LORI_API_KEY"]' : '"none"'})
reply = client.${method}.create(
${lines.map((line) => `    ${line}`).join("\n")}
)
print(reply.choices[0].${text})
`;
}

function literal(value) {
  if (value === null) return "None";
  if (typeof value === "boolean") return value ? "True" : "False";
  if (Array.isArray(value)) return `[${value.map(literal).join(", ")}]`;
  if (typeof value !== "object") return JSON.stringify(value);
  return `{${Object.entries(value).map(([name, of]) => `${literal(name)}: ${literal(of)}`).join(", ")}}`;
}

function server() {
  return new URL(".", document.baseURI).href.replace(/\/$/, "");
}

async function copy(id, make) {
  clearFaults();
  let text;
  try {
    text = make();
  } catch (error) {
    showFault(error)?.focus();
    return;
  }
  try {
    await navigator.clipboard.writeText(text);
  } catch {
    show(text); // it is not allowed here, or this page did not come over https
    return;
  }
  say("Copied.");
  const button = byId(id);
  button.classList.add("copied");
  setTimeout(() => button.classList.remove("copied"), 1500);
}

function show(text) {
  byId("snippet-text").value = text;
  byId("snippet").showModal();
  byId("snippet-text").select();
}
