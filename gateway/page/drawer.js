// A document beside the answer, scrolled to the passage that it was opened for.

import { documentText } from "./events.js";
import { cut, element, marked } from "./text.js";

const $ = (id) => document.getElementById(id);
const SHOWN_CHARACTERS = 60_000; // on each side of the passage: a browser is slow to lay out a whole book

let opened = 0;

export async function openDocument(source, quotes) {
  const own = ++opened;
  const drawer = $("drawer");
  $("drawer-title").textContent = source.title;
  $("drawer-source").textContent = [source.source, source.page && `page ${source.page}`].filter(Boolean).join(" · ");
  $("document").replaceChildren(element("p", { className: "note", text: "Opening…" }));
  if (!drawer.open) drawer.showModal();
  try {
    const { text } = await documentText(source.document_id);
    if (own === opened) show(text, source, quotes);
  } catch (error) {
    if (own === opened) $("document").replaceChildren(element("p", { className: "note", text: error.message }));
  }
}

function show(text, source, quotes) {
  const from = Math.max(0, source.start - SHOWN_CHARACTERS);
  const to = source.end + SHOWN_CHARACTERS;
  const pieces = cut(text, [{ start: 0, end: from, before: true }, { start: from, end: source.start },
    { start: source.start, end: source.end, passage: true }, { start: source.end, end: to }].filter((s) => s.end > s.start));
  const inside = quotes
    .filter((quote) => quote.start >= source.start && quote.end <= source.end)
    .map(({ start, end }) => ({ start: start - source.start, end: end - source.start }));
  const nodes = [];
  for (const [piece, span] of pieces) {
    if (span?.before) nodes.push(element("p", { className: "note", text: "… the beginning is left out" }));
    else if (span?.passage) nodes.push(element("span", { className: "passage", children: marked(piece, inside) }));
    else if (span) nodes.push(document.createTextNode(piece));
    else nodes.push(element("p", { className: "note", text: "… the rest is left out" }));
  }
  $("document").replaceChildren(...nodes);
  const target = $("document").querySelector("mark") ?? $("document").querySelector(".passage");
  target?.scrollIntoView({ block: "center" });
}

$("close").onclick = () => $("drawer").close();
// A click beside the drawer closes it; the dialog itself is only hit there.
$("drawer").onclick = (event) => event.target === $("drawer") && $("drawer").close();
