// The server's side of the page: streamed answers, documents, uploads.

/** What went wrong, for people. `lost` means that the connection broke after the answer had begun. */
export class Problem extends Error {
  constructor(message, { retryAfter = null, lost = false, requestId = "" } = {}) {
    super(message);
    this.retryAfter = retryAfter;
    this.lost = lost;
    this.requestId = requestId;
  }
}

/** Cuts a byte stream into server-sent events, wherever the network cut it before. */
export class EventParser {
  #decoder = new TextDecoder();
  #rest = "";
  #name = "";
  #data = [];

  *feed(bytes) {
    this.#rest += this.#decoder.decode(bytes, { stream: true });
    const lines = this.#rest.split(/\r\n|\n|\r(?!$)/);
    this.#rest = lines.pop();
    for (const line of lines) {
      if (line === "") {
        if (this.#data.length) yield { name: this.#name || "message", data: JSON.parse(this.#data.join("\n")) };
        this.#name = "";
        this.#data = [];
      } else if (line.startsWith("event:")) {
        this.#name = line.slice(6).trim();
      } else if (line.startsWith("data:")) {
        this.#data.push(line.slice(5).replace(/^ /, ""));
      }
    }
  }
}

/** The events of an answer: sources, delta…, citations, usage, done. Throws Problem, or AbortError when stopped. */
export async function* ask(question, signal) {
  const response = await reach("/v1/answers", {
    method: "POST",
    headers: { "Content-Type": "application/json" },
    body: JSON.stringify({ question, stream: true }),
    signal,
  });
  const parser = new EventParser();
  const reader = response.body.getReader();
  let done = false;
  try {
    while (!done) {
      const chunk = await reader.read();
      if (chunk.done) break;
      for (const event of parser.feed(chunk.value)) {
        if (event.name === "error") throw problemFrom(event.data, null);
        yield event;
        done ||= event.name === "done";
      }
    }
  } catch (error) {
    if (error instanceof Problem || error.name === "AbortError") throw error;
    throw new Problem("The connection was lost.", { lost: true });
  } finally {
    reader.cancel().catch(() => {});
  }
  if (!done) throw new Problem("The connection was lost.", { lost: true });
}

export const documents = async (limit) => (await reach(`/v1/documents?limit=${limit}`)).json();

export const documentText = async (id) => (await reach(`/v1/documents/${encodeURIComponent(id)}`)).json();

export async function upload(file) {
  const form = new FormData();
  form.append("file", file, file.name);
  return (await reach("/v1/documents", { method: "POST", body: form })).json();
}

/** What the server still waits for; empty when it is ready, null when it can't be reached. */
export async function lacking() {
  try {
    return (await (await fetch("/health/ready")).json()).lacking;
  } catch {
    return null;
  }
}

async function reach(path, options) {
  let response;
  try {
    response = await fetch(path, options);
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Problem("The server can’t be reached.");
  }
  if (response.ok) return response;
  const problem = await response.json().catch(() => ({}));
  throw problemFrom(problem, response.headers.get("Retry-After"));
}

function problemFrom(problem, retryAfter) {
  const text = problem.detail || "The server could not answer.";
  return new Problem(text[0].toUpperCase() + text.slice(1) + (/[.!?]$/.test(text) ? "" : "."), {
    retryAfter: retryAfter && Number(retryAfter),
    requestId: problem.request_id ?? "",
  });
}
