// Text into elements. Data only ever becomes text nodes, so markup in it stays inert.

export function element(tag, { text, children = [], ...properties } = {}) {
  const made = Object.assign(document.createElement(tag), properties);
  if (text !== undefined) made.textContent = text;
  made.append(...children);
  return made;
}

/** The server counts characters, JavaScript counts UTF-16 units: `offsets` of the one as the other, ascending. */
export function unitOffsets(text, offsets) {
  if (!/[\ud800-\udfff]/.test(text)) return offsets;
  const found = [];
  let characters = 0;
  let units = 0;
  for (const offset of offsets) {
    while (characters < offset && units < text.length) {
      units += text.codePointAt(units) > 0xffff ? 2 : 1;
      characters += 1;
    }
    found.push(units);
  }
  return found;
}

/** `text` cut at the characters where one of `spans` ({start, end}, in order) begins or ends: [piece, span or null]. */
export function cut(text, spans) {
  const apart = [];
  for (const span of [...spans].sort((a, b) => a.start - b.start)) {
    if (!apart.length || span.start >= apart.at(-1).end) apart.push(span);
  }
  const units = unitOffsets(text, apart.flatMap((span) => [span.start, span.end]));
  const pieces = [];
  let at = 0;
  apart.forEach((span, index) => {
    const [start, end] = [units[2 * index], units[2 * index + 1]];
    if (start > at) pieces.push([text.slice(at, start), null]);
    pieces.push([text.slice(start, end), span]);
    at = end;
  });
  if (at < text.length) pieces.push([text.slice(at), null]);
  return pieces;
}

/** `text` with `spans` marked; returns nodes. */
export function marked(text, spans) {
  return cut(text, spans).map(([piece, span]) =>
    span ? element("mark", { text: piece }) : document.createTextNode(piece),
  );
}

/** One line: runs of white space become a blank. */
export const flat = (text) => text.replace(/\s+/g, " ").trim();
