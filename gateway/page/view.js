// What an answer looks like. Knows nothing of how it arrives.

import { cut, element, flat, marked } from "./text.js";

const $ = (id) => document.getElementById(id);

/** Shows one answer as it grows. `open(source, quotes)` opens a source's document. */
export class AnswerView {
  #text = "";
  #live = null;
  #sources = [];
  #quotes = [];
  #frame = 0;

  constructor(open) {
    this.open = open;
  }

  get text() {
    return this.#text;
  }

  get sourceCount() {
    return this.#sources.length;
  }

  begin(question) {
    this.#text = "";
    this.#live = null;
    this.#sources = [];
    this.#quotes = [];
    $("results").hidden = false;
    $("asked").textContent = question;
    $("sources-title").textContent = "Sources";
    for (const id of ["notice", "quotes", "reply", "footer"]) {
      $(id).hidden = true;
      if (id !== "reply") $(id).replaceChildren();
    }
    $("text").replaceChildren();
    $("sources").replaceChildren(
      ...[0, 1, 2].map(() => element("li", { className: "waiting", ariaHidden: "true" })),
    );
  }

  sources({ refused, quotes, sources }) {
    this.#sources = sources;
    this.#quotes = quotes;
    if (refused) {
      $("sources-title").textContent = sources.length ? "Nearest passages, which may be unrelated" : "Sources";
    } else {
      $("quotes").hidden = !quotes.length;
      $("quotes").replaceChildren(...quotes.map((quote) => this.#quote(quote)));
    }
    $("sources").replaceChildren(...sources.map((source, index) => this.#source(source, index + 1)));
    if (refused) return;
    $("reply").hidden = false;
    this.#live = document.createTextNode("");
    $("text").replaceChildren(this.#live, element("span", { className: "caret", ariaHidden: "true" }));
  }

  delta(text) {
    this.#text += text;
    // Tokens may come faster than frames.
    this.#frame ||= requestAnimationFrame(() => this.#paint());
  }

  refuse() {
    this.notice("refusal", this.#text);
  }

  /** The finished text, a chip after each sentence that a source supports. */
  grounds({ citations, unsupported }) {
    const spans = [
      ...citations.map((citation) => ({ start: citation.answer_start, end: citation.answer_end, citation })),
      ...unsupported.map(({ start, end }) => ({ start, end })),
    ];
    const nodes = cut(this.#text, spans).flatMap(([piece, span]) => {
      if (!span) return this.#withMarkers(piece);
      if (!span.citation) {
        const title = "No source given to the model says this";
        return [element("span", { className: "unsupported", title, children: this.#withMarkers(piece) })];
      }
      return [...this.#withMarkers(piece), this.#chip(span.citation.marker, span.citation)];
    });
    $("text").replaceChildren(...nodes);
    if (unsupported.length) {
      const text = "Underlined sentences are the model’s own: no source above supports them.";
      $("text").append(element("p", { className: "legend", text }));
    }
    const cited = new Set(citations.map((citation) => citation.marker));
    $("sources").childNodes.forEach((item, index) => item.classList.toggle("cited", cited.has(index + 1)));
  }

  /** The answer ended at the limit of its length. */
  cut() {
    $("text").append(element("p", { className: "legend", text: "Cut here: the answer reached its length limit." }));
  }

  footer({ usage, timings }) {
    const parts = [];
    if (timings.retrieval_ms !== null) parts.push(`retrieval ${Math.round(timings.retrieval_ms)} ms`);
    if (timings.first_token_ms !== null) parts.push(`first token ${Math.round(timings.first_token_ms)} ms`);
    if (timings.tokens_per_second !== null) parts.push(`${Math.round(timings.tokens_per_second)} tok/s`);
    if (usage.cached_tokens !== null && usage.prompt_tokens) {
      const share = Math.round((100 * usage.cached_tokens) / usage.prompt_tokens);
      parts.push(`${share} % of the prompt from cache`);
    }
    $("footer").textContent = parts.join(" · ");
    $("footer").hidden = !parts.length;
  }

  /** A box above the text: refusal, error, lost, stopped. `actions` are [label, function]. */
  notice(kind, text, actions = []) {
    const notice = $("notice");
    notice.className = `notice ${kind}`;
    notice.hidden = false;
    const buttons = actions.map(([label, onclick]) => element("button", { type: "button", text: label, onclick }));
    notice.replaceChildren(element("p", { text }), ...buttons);
    // What is still waited for will not come.
    $("sources").querySelectorAll(".waiting").forEach((item) => item.remove());
  }

  /** No more text will come. */
  settle() {
    this.#paint();
    $("text").querySelector(".caret")?.remove();
    $("reply").hidden = !this.#text || !this.#live;
    $("sources-title").parentElement.hidden = !$("sources").childNodes.length;
  }

  #paint() {
    this.#frame = 0;
    if (!this.#live?.isConnected) return;
    const following = innerHeight + scrollY >= document.body.scrollHeight - 40;
    this.#live.data = this.#text;
    if (following) scrollTo({ top: document.body.scrollHeight });
  }

  #quote(quote) {
    const index = this.#sources.findIndex((source) => source.passage_id === quote.passage_id);
    const source = this.#sources[index];
    const where = [source.title, source.page && `page ${source.page}`].filter(Boolean).join(", ");
    return element("figure", {
      children: [
        element("blockquote", { text: flat(quote.text) }),
        element("figcaption", { children: [this.#chip(index + 1, quote), element("span", { text: where })] }),
      ],
    });
  }

  #source(source, number) {
    const spans = this.#quotes
      .filter((quote) => quote.passage_id === source.passage_id)
      .map(({ start, end }) => ({ start: start - source.start, end: end - source.start }));
    const where = [source.heading !== source.title && source.heading, source.page && `page ${source.page}`];
    const button = element("button", {
      type: "button",
      title: source.source,
      onclick: () => this.open(source, this.#quotesOf(source)),
      children: [
        element("span", { className: "number", text: String(number) }),
        element("span", {
          className: "about",
          children: [
            element("strong", { text: source.title }),
            element("small", { text: where.filter(Boolean).join(" · ") }),
            element("span", { className: "snippet", children: marked(source.text, spans) }),
          ],
        }),
      ],
    });
    return element("li", { children: [button] });
  }

  #quotesOf(source) {
    return this.#quotes.filter((quote) => quote.passage_id === source.passage_id);
  }

  #chip(number, span) {
    const source = this.#sources[number - 1];
    return element("button", {
      type: "button",
      className: "chip",
      text: String(number),
      title: source.title,
      ariaLabel: `Source ${number}: ${source.title}`,
      onclick: () => this.open(source, span ? [span] : this.#quotesOf(source)),
    });
  }

  /** Markers that the model wrote itself, such as [2], become chips too. */
  #withMarkers(text) {
    return text.split(/(\[\d+(?:, ?\d+)*\])/).flatMap((piece) => {
      const numbers = /^\[[\d, ]+\]$/.test(piece) ? piece.slice(1, -1).split(",").map(Number) : [];
      const known = numbers.filter((number) => number >= 1 && number <= this.#sources.length);
      return known.length ? known.map((number) => this.#chip(number, null)) : [document.createTextNode(piece)];
    });
  }
}
