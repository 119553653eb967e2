// The page: one box, one answer at a time.

import { ask, documents, lacking, Problem, upload } from "./events.js";
import { openDocument } from "./drawer.js";
import { element } from "./text.js";
import { AnswerView } from "./view.js";

const $ = (id) => document.getElementById(id);
const view = new AnswerView(openDocument);
const SAMPLE_QUESTIONS = [
  "What does the with statement do?",
  "How does a class get its attributes?",
  "When is the else clause of a loop executed?",
  "How are exceptions raised?",
];
let running = null;

// ---------------------------------------------------------------- asking

async function submit(question, { push = true } = {}) {
  question = question.trim();
  if (!question) return $("question").focus();
  running?.abort();
  const controller = (running = new AbortController());
  if (push) history.pushState(null, "", `/?q=${encodeURIComponent(question)}`);
  document.title = `${question} · refdesk`;
  document.body.dataset.state = "asked";
  $("question").value = question;
  fit();
  view.begin(question);
  busy(true);
  say("Searching the documents");
  const retry = [["Ask again", () => submit(question, { push: false })]];
  let refused = false;
  try {
    for await (const { name, data } of ask(question, controller.signal)) {
      if (controller !== running) return;
      if (name === "sources") {
        refused = data.refused;
        view.sources(data);
        say(refused ? "Nothing relevant found" : `Answering from ${data.sources.length} passages`);
      } else if (name === "delta") {
        view.delta(data.text);
        if (refused) view.refuse();
      } else if (name === "citations" && !refused) view.grounds(data);
      else if (name === "usage") view.footer(data);
      else if (name === "done" && data.finish_reason === "length") view.cut();
    }
    say(refused ? view.text : `Answer: ${view.text}`);
  } catch (error) {
    if (controller !== running) return;
    if (error.name === "AbortError") {
      view.notice("stopped", "Stopped.", retry);
      say("Stopped");
    } else {
      fail(error, retry);
    }
  } finally {
    if (controller === running) {
      running = null;
      view.settle();
      busy(false);
    }
  }
}

function fail(error, retry) {
  if (!(error instanceof Problem)) console.error(error);
  const text = error instanceof Problem ? error.message : "Something on this page went wrong.";
  const kept = error.lost && view.text ? " What had arrived is kept below." : "";
  const wait = error.retryAfter ? ` Try again in ${error.retryAfter} s.` : "";
  const id = error.requestId ? ` (request ${error.requestId.slice(0, 8)})` : "";
  view.notice(error.lost ? "lost" : "error", text + kept + wait + id, retry);
  say(text);
}

function busy(on) {
  $("send").hidden = on;
  $("stop").hidden = !on;
  $("results").ariaBusy = String(on);
}

const say = (text) => ($("status").textContent = text);

// ---------------------------------------------------------------- the box

function fit() {
  const box = $("question");
  box.style.height = "auto";
  box.style.height = `${Math.min(box.scrollHeight, 180)}px`;
}

$("form").onsubmit = (event) => {
  event.preventDefault();
  submit($("question").value);
};
$("question").oninput = fit;
$("question").onkeydown = (event) => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
    event.preventDefault();
    submit($("question").value);
  }
};
$("stop").onclick = () => running?.abort();

addEventListener("keydown", (event) => {
  if (event.key === "/" && !event.ctrlKey && !event.metaKey && !/^(INPUT|TEXTAREA)$/.test(event.target.tagName)) {
    if ($("drawer").open) return;
    event.preventDefault();
    $("question").focus();
    $("question").select();
  } else if (event.key === "Escape" && !$("drawer").open) {
    running?.abort();
  }
});

// ---------------------------------------------------------------- where we are

function arrive() {
  const question = new URLSearchParams(location.search).get("q");
  if (question) return void submit(question, { push: false });
  running?.abort();
  running = null;
  busy(false);
  document.title = "refdesk";
  document.body.dataset.state = "empty";
  $("results").hidden = true;
  $("question").value = "";
  fit();
  $("question").focus();
}

addEventListener("popstate", arrive);
document.querySelector(".wordmark").onclick = (event) => {
  if (event.ctrlKey || event.metaKey || event.shiftKey) return;
  event.preventDefault();
  history.pushState(null, "", "/");
  arrive();
};

// ---------------------------------------------------------------- the library

async function describe() {
  const missing = await lacking();
  if (missing === null || missing.length) {
    $("facts").textContent = missing === null ? "The server can’t be reached." : `Getting ready: ${missing.join(", ")}`;
    $("facts").hidden = false;
    setTimeout(describe, 1000);
    return;
  }
  const { documents: some, total } = await documents(50);
  const count = `${total.toLocaleString()} document${total === 1 ? "" : "s"}`;
  $("facts").textContent = total ? count : "No documents yet. Add one to begin.";
  $("facts").hidden = false;
  $("examples").replaceChildren(
    ...examplesFor(some).map((question) =>
      element("li", { children: [element("button", { type: "button", text: question, onclick: () => submit(question) })] }),
    ),
  );
}

/** Questions that the sample corpus answers, or ones about some of the titles. */
function examplesFor(some) {
  if (some.length && some.every((document) => document.collection === "python")) return SAMPLE_QUESTIONS;
  const titles = [...new Set(some.map((document) => document.title))].filter((title) => title.length < 60);
  const step = Math.max(1, Math.floor(titles.length / 3));
  return titles.filter((_, index) => index % step === 0).slice(0, 3).map((title) => `What is “${title}” about?`);
}

$("add").onclick = () => $("files").click();
$("files").onchange = async () => {
  const files = [...$("files").files];
  $("files").value = "";
  for (const file of files) {
    const line = element("p", { text: `Adding ${file.name}…` });
    $("uploads").append(line);
    try {
      const added = await upload(file);
      line.textContent = `Added “${added.title}”, ${added.passages} passages`;
      line.className = "good";
    } catch (error) {
      line.textContent = error.message;
      line.className = "bad";
    }
    setTimeout(() => line.remove(), line.className === "bad" ? 15_000 : 6_000);
  }
  describe().catch(() => {});
};

describe().catch(() => {});
arrive();
