"""What sharing disturbs: how far an answer moves when its documents change places or come out of the cache.

    python -m loadtests.disturbance                     every arm; writes disturbance.md, .json and .svg
    python -m loadtests.disturbance --prompts 8         a quick look; nothing is written

Every arm is compared with a full prefill in the order of relevance, in float32: KL of the next token's distribution
and whether the best token is the same, over the 16 tokens that the full prefill would answer, and where people wrote
an answer how much less likely its first 32 tokens become (NLL, nats a token).  Prompts are those of `loadtests.rag`,
and questions of CLAPnq over the four passages that retrieval finds for each.  Intervals are 95 %, by paired bootstrap.

    reversed, random            another order
    random, best first / last   the most relevant document there, the others in another order
    planned, + hint             the order that the engine plans where three of the documents were served before in
                                another order, with and without the line that tells the ranking
    planned, best first         the same where the most relevant stays ahead, and stood ahead before
    hint                        the order of relevance with that line
    reuse                       each document but the first as it was computed right behind the system prompt
      + first k                 k tokens of each computed again (EPIC's way)
      + value deviation r       the share r of the tokens whose values are furthest off at layer 1 (CacheBlend's way,
                                with the true values known)
      + asked, r                the tokens that the question attends to most
    led, + asked, r             as it was computed behind a lead: what the engine does (engine.segments)
    led alike, + asked, r       the same behind a lead of the set's own documents, from prompts that are not measured
"""

from __future__ import annotations

import argparse
import random
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from inference import Sampling
from inference.engine.lead import MOST, lead_of
from inference.engine.ordering import Document, Parts
from inference.engine.segments import looked_at, side_by_side
from inference.models import Llama, open_checkpoint
from inference.models.tokenizer import PromptEncoder, load_tokenizer
from inference.prompt import ChatPrompt, DocumentOrder, Message, Segment
from kernels import BLOCK_SIZE, AttentionPlan
from loadtests import rag
from loadtests.disturbance_report import TOLD, Measured, line, summary, write
from loadtests.free import Free, core_over
from loadtests.question_sets import CLAPNQ, clapnq_documents, clapnq_questions
from loadtests.run import RESULTS
from retrieval import Library

GOLD = 32  # tokens of an answer that somebody wrote
ROOM = 4096 // BLOCK_SIZE  # blocks of a prompt
PER_REQUEST = 4
FOR_LEAD = 2  # prompts of each set
Runs = list[tuple[int, int]]  # (start, end) of tokens that stand side by side


class Case(NamedTuple):
    """A prompt, and the tokens of the answer that somebody wrote, if anybody did."""

    parts: Parts
    gold: list[int]


class Cache:
    """The caches of one case, each in ROOM blocks: the prompt in 0, the documents that were computed by themselves in
    1 to PER_REQUEST."""

    def __init__(self, model: Llama):
        self.model = model
        self.layers = model.new_cache(1 + ROOM * (1 + PER_REQUEST))

    def table(self, which: int = 0) -> np.ndarray:
        return np.arange(1 + which * ROOM, 1 + (1 + which) * ROOM, dtype=np.int32)

    def compute(self, tokens: list[int], runs: Runs, wanted: list[int], which: int = 0) -> torch.Tensor:
        """Compute the tokens in `runs` over what the cache holds of all others; log-probabilities behind the tokens
        `wanted`, [wanted, vocab]."""
        runs = sorted(runs, key=lambda run: run[1] - run[0] > 8)
        table = np.repeat(self.table(which)[None], len(runs), 0)
        plan = AttentionPlan.of([end - start for start, end in runs], [end for _, end in runs], table)
        positions = [at for start, end in runs for at in range(start, end)]
        row_of = {at: row for row, at in enumerate(positions)}
        logits = self.model.forward(
            torch.tensor([tokens[at] for at in positions]),
            plan,
            self.layers,
            torch.tensor([row_of[at] for at in wanted], dtype=torch.int64),
        )
        return logits.log_softmax(-1)

    def prefill(self, tokens: list[int], start: int = 0, which: int = 0) -> None:
        """In chunks, all from `start` on."""
        for at in range(start, len(tokens), 512):
            self.compute(tokens, [(at, min(at + 512, len(tokens)))], [], which)

    def saved(self, tokens: int) -> Callable[[], None]:
        """How to get back what is there now of the first `tokens` of the prompt."""
        used = self.table()[: -(-tokens // BLOCK_SIZE)]
        kept = [(layer.keys[used], layer.values[used]) for layer in self.layers]

        def restore() -> None:
            for layer, (keys, values) in zip(self.layers, kept, strict=True):
                layer.keys[used], layer.values[used] = keys, values

        return restore

    def values(self, layer: int, count: int) -> torch.Tensor:
        """[count, kv_heads * head_dim] of the prompt's tokens."""
        return self.layers[layer].values[1 : 1 + ROOM].transpose(1, 2).flatten(0, 1)[:count].flatten(1).clone()


class Truth(NamedTuple):
    """A full prefill in the order of relevance: what it tells, the distributions on the way, the gold answer's NLL."""

    told: list[int]
    logprobs: torch.Tensor
    nll: float | None


def follow(cache: Cache, prompt: list[int], answer: list[int]) -> torch.Tensor:
    """Log-probabilities of each token of `answer` behind `prompt`, whose last token is computed again."""
    tokens = prompt + answer
    at = range(len(prompt) - 1, len(tokens) - 1)
    return cache.compute(tokens, [(at[0], at[-1] + 1)], list(at))


def nll_of(logprobs: torch.Tensor, answer: list[int]) -> float:
    return -float(logprobs.gather(1, torch.tensor(answer)[:, None]).mean())


def truth_of(cache: Cache, case: Case) -> Truth:
    prompt = case.parts.tokens(case.parts.ranks)
    cache.prefill(prompt)
    told: list[int] = []
    for _ in range(TOLD):
        told.append(int(follow(cache, prompt, [*told, 0])[-1].argmax()))
    logprobs = follow(cache, prompt, told)
    return Truth(told, logprobs, nll_of(follow(cache, prompt, case.gold), case.gold) if case.gold else None)


def against(cache: Cache, case: Case, truth: Truth, prompt: list[int], recomputed: float) -> Measured:
    """The answers behind what the cache holds of `prompt` now."""
    logprobs = follow(cache, prompt, truth.told)
    rise = None
    if case.gold:
        rise = nll_of(follow(cache, prompt, case.gold), case.gold) - truth.nll
    kl = (truth.logprobs.exp() * (truth.logprobs - logprobs)).sum(-1).mean()
    same = (truth.logprobs.argmax(-1) == logprobs.argmax(-1)).float().mean()
    return Measured(float(kl), float(same), rise, recomputed)


def planned_order(case: Case, seed: int, how: DocumentOrder = "planned") -> tuple[int, ...]:
    """The order that the engine plans where three of the documents, and a stranger, were served before."""
    parts, rng = case.parts, random.Random(f"before/{seed}")
    core = core_over(Free(), 1000, how)
    before = [*rng.sample(parts.documents, 3), Document(b"stranger", [5] * 100)]
    rng.shuffle(before)
    if how == "best_first":
        best = parts.documents[0]
        before = [best, *(each for each in before if each is not best)]
    for name, documents in (("before", tuple(before)), ("now", parts.documents)):
        core.add(name, parts._replace(documents=documents, hint=None), Sampling(max_tokens=1, ignore_eos=True), "", 0)
        order = core._sequences[name].order
        while core.has_work:
            core.step()
    return order


def spans(parts: Parts) -> list[tuple[int, int]]:
    """Where each document stands in the order of relevance."""
    at, found = len(parts.head), []
    for document in parts.documents:
        found.append((at, at + len(document.tokens)))
        at += len(document.tokens)
    return found


def shuffled_from(ranks: tuple[int, ...], rng: random.Random) -> tuple[int, ...]:
    """Another order of `ranks`."""
    shuffled = list(ranks)
    while tuple(shuffled) == ranks:
        rng.shuffle(shuffled)
    return tuple(shuffled)


def arms_of_orders(cache: Cache, case: Case, truth: Truth, seed: int) -> Iterator[tuple[str, Measured]]:
    parts, rng = case.parts, random.Random(f"order/{seed}")
    shuffled = shuffled_from(parts.ranks, rng)
    planned = planned_order(case, seed)
    behind = shuffled_from(parts.ranks[1:], rng)
    orders = {
        "reversed": parts.ranks[::-1],
        "random": shuffled,
        "random, best first": (0, *behind),
        "random, best last": (*behind, 0),
    }
    if planned != parts.ranks:
        orders["planned"] = planned
    kept = planned_order(case, seed, "best_first")
    if kept != parts.ranks:
        orders["planned, best first"] = kept
    for name, order in orders.items():
        for hinted in (False, True):
            prompt = (parts if hinted else parts._replace(hint=None)).tokens(order)
            if hinted and name != "planned":
                continue
            cache.prefill(prompt)
            yield name + (", hint" if hinted else ""), against(cache, case, truth, prompt, 1.0)
    hint = parts.hint(parts.ranks)
    prompt = parts._replace(tail=[*hint, *parts.tail]).tokens(parts.ranks)
    cache.prefill(prompt)
    yield "hint", against(cache, case, truth, prompt, 1.0)


def arms_of_reuse(
    cache: Cache, case: Case, truth: Truth, layers: dict[str, range], behind: dict[str, list[Document]]
) -> Iterator[tuple[str, Measured]]:
    """`behind` which documents those of the case are computed, by the arm's name."""
    parts = case.parts
    prompt = parts.tokens(parts.ranks)
    places = spans(parts)
    reused = [at for start, end in places[1:] for at in range(start, end)]
    ends = places[-1][1]

    def assemble(lead: list[Document]) -> Callable[[], None]:
        """The first document exact, the others as they are computed behind `lead` but for themselves, the rest of the
        prompt not at all; how to get back to that."""
        source, target, by = [], [], []
        for which, (start, end) in enumerate(places[1:], 1):
            document = parts.documents[which]
            others = [token for other in lead if other.key != document.key for token in other.tokens]
            before = [*parts.head, *others[(len(parts.head) + len(others)) % BLOCK_SIZE :]]
            cache.prefill([*before, *document.tokens], 0, which)
            own = int(cache.table(which)[0]) * BLOCK_SIZE + len(before)
            source += range(own, own + end - start)
            target += range(int(cache.table()[0]) * BLOCK_SIZE + start, int(cache.table()[0]) * BLOCK_SIZE + end)
            by += [start - len(before)] * (end - start)
        cache.compute(prompt, [(0, places[0][1])], [])
        cache.model.splice(cache.layers, *(torch.tensor(column) for column in (source, target, by)))
        return cache.saved(ends)

    def arm(name: str, again: list[int]) -> tuple[str, Measured]:
        restore()
        cache.compute(prompt, side_by_side(sorted([*set(again), *range(ends, len(prompt))])), [])
        return name, against(cache, case, truth, prompt, len(set(again)) / len(reused))

    def first(k: int) -> list[int]:
        return [at for start, end in places[1:] for at in range(start, min(start + k, end))]

    def most(scores: torch.Tensor, share: float) -> list[int]:
        among = torch.tensor(reused)
        return among[scores[among].topk(round(share * len(reused))).indices].tolist()

    cache.prefill(prompt)
    true_values = cache.values(1, ends)
    for kind, lead in behind.items():
        restore = assemble(lead)
        deviation = (cache.values(1, ends) - true_values).square().sum(-1)
        received = {}
        for name, which in layers.items():
            restore()
            tail = list(range(ends, len(prompt)))
            plan = AttentionPlan.of([len(tail)], [len(prompt)], cache.table()[None])
            received[name] = cache.model.look(torch.tensor(prompt[ends:]), plan, cache.layers, which)
        yield arm(kind, [])
        for name, scores in received.items():
            for share in (0.12, 0.25, 0.5):
                yield arm(f"{kind} + asked{name}, {share:.0%}", most(scores, share))
        if kind == "reuse":
            yield arm(f"{kind} + all", reused)
            for k in (16, 32, 64):
                yield arm(f"{kind} + first {k}", first(k))
            for share in (0.12, 0.25):
                yield arm(f"{kind} + value deviation {share:.0%}", most(deviation, share))


def rag_cases(encoder: PromptEncoder, count: int, half: str) -> list[Case]:
    cases = []
    for request in rag.workload(rag.corpus(), count, seed={"even": 8, "odd": 7}[half]):
        documents = tuple(Segment(text + "\n\n", kind="document") for text in request.texts)
        cases.append(case_of(encoder, request.system, documents, request.question, ""))
    return cases


def clapnq_cases(encoder: PromptEncoder, count: int, half: str) -> list[Case]:
    """The first answerable questions of one half."""
    system = "You answer questions from the documents that the user gives. Be brief, use only what the documents say."
    cases = []
    with tempfile.TemporaryDirectory() as folder, Library.open(Path(folder)) as library:
        library.ingest_documents(clapnq_documents(CLAPNQ))
        questions = [q for q in clapnq_questions(CLAPNQ) if q.answerable and q.answers][half == "odd" :: 2]
        for question in questions[:count]:
            found = library.whole.search(question.text, top_k=PER_REQUEST).passages
            documents = tuple(Segment(passage.text + "\n\n", kind="document") for passage in found)
            cases.append(case_of(encoder, system, documents, question.text, question.answers[0]))
    return [case for case in cases if len(case.parts.documents) == PER_REQUEST]


def case_of(encoder: PromptEncoder, system: str, documents: tuple[Segment, ...], question: str, answer: str) -> Case:
    prompt = ChatPrompt(
        (
            Message("system", (Segment(system, kind="system"),)),
            Message("user", (*documents, Segment(question, kind="question"))),
        )
    )
    parts, _ = encoder.encode_texts(prompt)
    assert isinstance(parts, Parts)
    gold = encoder.tokenizer.encode(answer, add_special_tokens=False).ids[:GOLD] if answer else []
    return Case(parts, list(gold))


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m loadtests.disturbance",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--prompts", type=int, help="of each set (32, and 73 of CLAPnq)")
    parser.add_argument("--layers", nargs="*", metavar="FROM-TO", help="layers in which the question is followed")
    parser.add_argument("--half", choices=("even", "odd"), default="even", help="odd: to try things on")
    parser.add_argument("--only", choices=("orders", "reuse", "led"), help="these arms alone")
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    checkpoint = open_checkpoint(options.model)
    model = Llama(checkpoint, torch.float32)
    encoder = PromptEncoder(load_tokenizer(checkpoint.path), tells_ranking=True)
    given = options.layers or ["{0.start}-{0.stop}".format(looked_at(len(model.layers)))]
    layers = {f" {each}" if options.layers else "": range(*map(int, each.split("-"))) for each in given}
    cache = Cache(model)

    def encode(text: str) -> list[int]:
        return encoder.tokenizer.encode(text, add_special_tokens=False).ids

    sets = {"rag": rag_cases(encoder, (options.prompts or 32) + FOR_LEAD, options.half)}
    if CLAPNQ.is_dir():
        sets["clapnq"] = clapnq_cases(encoder, (options.prompts or 73) + FOR_LEAD, options.half)
    rows = []
    began = time.monotonic()
    for of, cases in sets.items():
        arms: dict[str, list[Measured]] = {}
        alike: list[Document] = []
        for document in (each for case in cases[-FOR_LEAD:] for each in case.parts.documents):
            if sum(len(other.tokens) for other in alike) < MOST and document not in alike:
                alike.append(document)
        behind = {"reuse": [], "led": [Document(b"", lead_of("", encode))], "led alike": alike}
        if options.only == "led":
            del behind["reuse"]
        cases = cases[:-FOR_LEAD]
        for i, case in enumerate(cases):
            truth = truth_of(cache, case)
            orders = arms_of_orders(cache, case, truth, i) if options.only in (None, "orders") else ()
            reuse = arms_of_reuse(cache, case, truth, layers, behind) if options.only != "orders" else ()
            for name, each in (*orders, *reuse):
                arms.setdefault(name, []).append(each)
            print(f"{of}: {i + 1} of {len(cases)} after {time.monotonic() - began:.0f} s", file=sys.stderr, flush=True)
        for name, found in arms.items():
            rows.append(summary(of, name, found))
            print(line(rows[-1]), flush=True)
    if options.prompts is None and options.half == "even":
        write(rows, options.out, beside_others=options.only is not None)


if __name__ == "__main__":
    main()
