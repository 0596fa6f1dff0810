// A conversation to be answered, message by message.

import { byId, el } from "./elements.js";

/** Begins with one message, and adds one with each press of the button. */
export function watchMessages() {
  byId("add-message").addEventListener("click", () => {
    const roles = messages().map((message) => message.role);
    add(roles.at(-1) === "user" ? "assistant" : "user").querySelector("textarea").focus();
  });
  add("user");
  for (const input of document.querySelectorAll("input[name=input]")) input.addEventListener("change", showInput);
  showInput();
}

/** Whether messages are asked for, not a text. */
export function isConversation() {
  return document.querySelector("input[name=input]:checked").value === "messages";
}

/** Returns what is written, [{role, content}]. */
export function messages() {
  return [...byId("messages").children].map((item) => ({
    role: item.querySelector("select").value,
    content: item.querySelector("textarea").value,
  }));
}

/** Asks for `text`, whatever was asked for before. */
export function showPrompt(text) {
  byId("prompt").value = text;
  document.querySelector("input[name=input][value=prompt]").checked = true;
  showInput();
}

function showInput() {
  byId("as-prompt").hidden = isConversation();
  byId("as-messages").hidden = !isConversation();
}

function add(role) {
  const item = el(
    "li",
    { class: "field message" },
    el("select", {}, ...["system", "user", "assistant"].map((of) => el("option", { selected: of === role }, of))),
    el("textarea", { rows: 2, spellcheck: "false" }),
    el("button", { type: "button", class: "bare", onclick: () => remove(item) }, "×"),
  );
  byId("messages").append(item);
  number();
  return item;
}

function remove(item) {
  const next = item.nextElementSibling ?? item.previousElementSibling;
  item.remove();
  number();
  (next?.querySelector("button") ?? byId("add-message")).focus();
}

function number() {
  [...byId("messages").children].forEach((item, place) => {
    item.querySelector("select").setAttribute("aria-label", `Role of message ${place + 1}`);
    item.querySelector("textarea").setAttribute("aria-label", `Message ${place + 1}`);
    item.querySelector("button").setAttribute("aria-label", `Remove message ${place + 1}`);
  });
}
