// What is wrong, beside the field that it is about.

import { byId, el } from "./elements.js";

/** Shows `error` beside the field that it names, else above the buttons. Returns the control, or null. */
export function showFault(error) {
  const control = controlOf(error.field);
  if (!control) {
    byId("fault").textContent = error.message;
    byId("fault").hidden = false;
    return null;
  }
  if (control.hasAttribute("aria-invalid")) return control;
  const id = `fault-${error.field.replaceAll(".", "-")}`;
  // A narrow field has no room for it: below its row there is.
  (control.closest(".numbers, #merge-row") ?? control.closest(".field")).append(el("p", { class: "fault", id }, error.message));
  control.setAttribute("aria-invalid", "true");
  control.setAttribute("aria-describedby", id);
  control.addEventListener("input", () => clear(control), { once: true });
  return control;
}

/** Takes all of them away. */
export function clearFaults() {
  byId("fault").hidden = true;
  for (const control of document.querySelectorAll("main [aria-invalid]")) clear(control);
}

function clear(control) {
  byId(control.getAttribute("aria-describedby"))?.remove();
  control.removeAttribute("aria-invalid");
  control.removeAttribute("aria-describedby");
}

function controlOf(field) {
  if (!field) return null;
  const [name, place] = field.split(".");
  if (name === "messages") return byId("prompt");
  if (name === "adapter" || name === "weights") return byId("mix").children[place ?? 0]?.querySelector("input[type=number]");
  const control = byId("ask").elements.namedItem(name);
  return control?.closest(".field") && !control.closest("[hidden]") ? control : null;
}
