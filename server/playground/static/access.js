// The key that a server may ask for. It is kept by this tab alone.

import { access, key } from "./api.js";
import { byId } from "./elements.js";

const IN_USE = "In use, until this tab is closed.";

/** Shows the field when the server refuses, and calls `retry` when there is another key. */
export function watchAccess(retry) {
  const form = byId("key");
  access.addEventListener("refused", () => tell("The server does not know this key.", "This server wants a key. It stays in this tab."));
  form.addEventListener("submit", (event) => {
    event.preventDefault();
    use(byId("key-text").value.trim());
  });
  byId("key-forget").addEventListener("click", () => use(""));
  if (key.get()) tell(IN_USE);

  function use(text) {
    key.set(text);
    byId("key-text").value = "";
    tell(IN_USE, "Forgotten.");
    retry();
  }
}

function tell(withKey, without) {
  byId("key-hint").textContent = key.get() ? withKey : without;
  byId("key-forget").hidden = !key.get();
  byId("key").hidden = false;
}
