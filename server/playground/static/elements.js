// Elements from values. What is shown is always text, never markup.

/** Returns a new element; attributes that are null or false are left out, those named on… are listeners. */
export function el(tag, attributes = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (typeof value === "function") element.addEventListener(name.slice(2), value);
    else if (value === true) element.setAttribute(name, "");
    else if (value !== null && value !== false && value !== undefined) element.setAttribute(name, value);
  }
  element.append(...children);
  return element;
}

/** Returns the element of the page that has this id. */
export function byId(id) {
  return document.getElementById(id);
}

/** Changes the text of an element only where it is another, so that nothing is laid out or announced for nothing. */
export function setText(element, text) {
  if (element.textContent !== text) element.textContent = text;
}

/** Tells who listens instead of looking. */
export function say(text) {
  byId("say").textContent = text;
}
