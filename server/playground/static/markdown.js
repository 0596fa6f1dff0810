// Markdown as elements. markdown-it reads it; no text of a model is ever parsed as HTML, which the page's policy forbids
// (trusted-types 'none'). So a tag is text, and an element is one of those below.

const parser = globalThis.markdownit({ html: false, linkify: false, breaks: true });

// Models write 4*3: an asterisk inside a word is not emphasis.
parser.inline.ruler.before("emphasis", "product", (state, isSilent) => {
  if (!/\w\*\w/.test(state.src.slice(state.pos - 1, state.pos + 2))) return false;
  if (!isSilent) state.pending += "*";
  state.pos += 1;
  return true;
});

/** The element of each pair of tokens; what is not here adds none, and its text stays. */
const ELEMENTS = {
  paragraph: "p", blockquote: "blockquote", bullet_list: "ul", ordered_list: "ol", list_item: "li",
  table: "table", thead: "thead", tbody: "tbody", tr: "tr", th: "th", td: "td",
  strong: "strong", em: "em", s: "s",
};
/** The page's own headings end at the third level. */
const HEADINGS = { h1: "h4", h2: "h5" };
const SCHEMES = ["http:", "https:", "mailto:"];

/** Returns what `text` is in Markdown, as a fragment of the document. */
export function render(text) {
  const fragment = document.createDocumentFragment();
  append(fragment, parser.parse(text, {}));
  return fragment;
}

function append(root, tokens) {
  const open = [root];
  for (const token of tokens) {
    // The paragraphs of a tight list.
    if (token.hidden) continue;
    if (token.nesting === -1) {
      open.pop();
      continue;
    }
    const parent = open.at(-1);
    if (token.type === "inline") append(parent, token.children);
    else if (token.nesting === 0) parent.append(leaf(token));
    else open.push(parent.appendChild(pair(token)));
  }
}

function pair(token) {
  const name = token.type.replace(/_open$/, "");
  if (name === "heading") return document.createElement(HEADINGS[token.tag] ?? "h6");
  if (name === "link") return link(token.attrGet("href"));
  const element = document.createElement(ELEMENTS[name] ?? "span");
  if (name === "ordered_list" && token.attrGet("start")) element.start = Number(token.attrGet("start"));
  if (token.attrGet("style") === "text-align:right") element.className = "right";
  return element;
}

function leaf(token) {
  if (token.type === "softbreak" || token.type === "hardbreak") return document.createElement("br");
  if (token.type === "hr") return document.createElement("hr");
  if (token.type === "code_inline") return code(token.content);
  if (token.type === "fence" || token.type === "code_block") {
    const block = document.createElement("pre");
    block.append(code(token.content));
    return block;
  }
  // A picture is not loaded: its text stands for it.
  return document.createTextNode(token.content);
}

function code(text) {
  const element = document.createElement("code");
  element.textContent = text;
  return element;
}

/** A link to an address on the web or of a mailbox; any other, one of this server among them, is text. */
function link(href) {
  if (!SCHEMES.some((scheme) => href.toLowerCase().startsWith(scheme))) return document.createElement("span");
  const element = document.createElement("a");
  Object.assign(element, { href, target: "_blank", rel: "noopener noreferrer nofollow", title: href });
  return element;
}
