"""Every schedule that hypothesis can think of, in a world small enough for bugs to show.

The real core, scheduler and block pool run the integer model with blocks of two tokens, a pool of a few blocks and
prompts over two tokens, so that prefixes collide, chunks end anywhere and the pool is always short.  After every
rule all invariants hold:

    I1   a block's references are the sequences that hold it        I10  an allocation that fails changes nothing
    I2   the free list is the blocks without references             I11  hits are whole blocks, and leave a token
    I3   the null block is never held, free or written              I12  who shares a block has its tokens and scope
    I4   names and blocks are inverse maps                          I13  free + held + null = all, in mid-step too
    I5   published = full, computed, and of the tokens it claims    I14  a chain is evicted from its end
    I6   computed tokens have blocks; the waiting have neither      I15  within budget, and somebody always advances
    I7   every computed slot holds its own scope and prefix         I16  abort: idempotent, total, and final
    I8   nobody writes to a shared or published block               I17  a failed step publishes nothing
    I9   all blocks come back                                       I18  no block outlives its scope's revocation
"""

from __future__ import annotations

from collections import Counter
from itertools import permutations

from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from inference import GenerationFailed
from inference.engine import sequence as sequences
from inference.engine.blocks import NULL_BLOCK
from inference.engine.cost import StepCost
from inference.engine.ordering import Document, Parts, Weights
from tests.inference.integer_model import UNWRITTEN, IntegerModel, add, chain, expected, make_core, tokens_of

BLOCK = 2
SCOPES = ("A", "B")
LIVE = 5

DOCUMENTS = ((1,), (2, 1), (1, 1, 2), (2, 2, 2, 1))
prompts = st.lists(st.sampled_from([1, 2]), min_size=1, max_size=8)


class Planted(Exception):
    """The error of a step that the machine breaks on purpose."""


class EngineMachine(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.asked: dict[str, tuple[list[int], int, str]] = {}
        self.outputs: dict[str, list] = {}
        self.ordered: dict[str, sequences.Sequence] = {}  # whose documents the core may put in another order
        self.gone: set[str] = set()  # aborted or failed
        self.born: dict[str, int] = {}  # the scope's epoch when the request came
        self.epochs = dict.fromkeys(SCOPES, 0)
        self.claims: dict[bytes, tuple] = {}  # block name → (scope, epoch, tokens) that it stands for
        self.named: dict[tuple, bytes] = {}

    @initialize(
        blocks=st.integers(6, 12),
        budget=st.integers(1, 12),
        running=st.integers(1, 4),
        guessing=st.sampled_from([(0, False), (4, False), (12, False), (0, True), (1, True), (2, True)]),
        step_seconds=st.sampled_from([0.0, 5.0, float("inf")]),
        eviction=st.sampled_from(["gdsf", "lru"]),
    )
    def start(
        self, blocks: int, budget: int, running: int, guessing: tuple[int, bool], step_seconds: float, eviction: str
    ) -> None:
        draft_rows, overlap = guessing  # steps with guesses don't overlap, so few may guess where any shall
        self.model = IntegerModel(block_size=BLOCK)
        self.core = make_core(
            blocks,
            self.model,
            max_tokens=budget,
            max_running=running,
            draft_rows=draft_rows,
            step_seconds=step_seconds,
            cost=StepCost(1.0, 1.0, 0.1),
            min_chunk=3,
            age_limit_seconds=20.0,
            overlap=overlap,
            eviction=eviction,
        )
        self.core.documents.tree._weights = Weights(displacement=0.0, margin=0)  # whatever saves a block is worth it
        self.model.before_step = self._in_mid_step
        allocate, admit = self.core.pool.allocate, self.core.scheduler._admit

        def allocate_or_nothing(count):
            before = fingerprint(self.core.pool)
            blocks = allocate(count)
            assert blocks is not None or fingerprint(self.core.pool) == before, "I10"
            return blocks

        def admit_or_nothing(*args):
            before = fingerprint(self.core.pool)
            admitted = admit(*args)
            assert admitted is not None or fingerprint(self.core.pool) == before, "I10"
            return admitted

        self.core.pool.allocate = allocate_or_nothing
        self.core.scheduler._admit = admit_or_nothing

    # ---- rules ----------------------------------------------------------------------------------

    @property
    def live(self) -> list[str]:
        return list(self.core._sequences)

    @precondition(lambda self: len(self.live) < LIVE)
    @rule(prompt=prompts, count=st.integers(1, 6), scope=st.sampled_from(SCOPES))
    def add(self, prompt: list[int], count: int, scope: str) -> None:
        capacity = self.core.pool.capacity * BLOCK
        prompt = prompt[: capacity - 1]
        self._ask(prompt, min(count, capacity - len(prompt)), scope)

    @precondition(lambda self: self.asked and len(self.live) < LIVE)
    @rule(which=st.integers(0, 99), suffix=st.lists(st.sampled_from([1, 2]), max_size=3), count=st.integers(1, 4))
    def replay(self, which: int, suffix: list[int], count: int) -> None:
        """A prompt that was asked before, and more of it: what hits are made of."""
        prompt, said, scope = list(self.asked.values())[which % len(self.asked)]
        prompt = (prompt + expected(prompt, said, scope) + suffix)[: self.core.pool.capacity * BLOCK - 1]
        self._ask(prompt, min(count, self.core.pool.capacity * BLOCK - len(prompt)), scope)

    @precondition(lambda self: len(self.live) < LIVE - 1)
    @rule(prompt=st.lists(st.sampled_from([1, 2]), min_size=6, max_size=9), apart=st.integers(0, 1))
    def siblings(self, prompt: list[int], apart: int) -> None:
        """Two with the same documents, one just behind the other: what adoption is made of."""
        self._ask(prompt, 1, "A")
        for _ in range(apart):
            self._step()
        self._ask(prompt, 1, "A")

    @precondition(lambda self: len(self.live) < LIVE)
    @rule(
        head=st.sampled_from([[], [1], [2, 1]]),
        documents=st.lists(st.sampled_from(DOCUMENTS), min_size=2, max_size=3),
        tail=st.sampled_from([[1], [2]]),
        count=st.integers(1, 3),
        scope=st.sampled_from(SCOPES),
    )
    def documents(self, head: list, documents: list[tuple], tail: list, count: int, scope: str) -> None:
        """A prompt of documents, which the core may reorder until it begins: what planning and beginnings live on."""
        room = self.core.pool.capacity * BLOCK - count
        while len(head) + sum(map(len, documents)) + len(tail) > room:
            documents = documents[:-1]
        parts = Parts(head, tuple(Document(bytes(each), each) for each in documents), tail)
        orders = {order: parts.tokens(order) for order in permutations(parts.ranks)}
        self._ask(orders[parts.ranks], count, scope, guesses=False, parts=parts)
        name = f"r{len(self.asked) - 1}"
        self.ordered[name] = self.core._sequences[name]
        for prompt in orders.values():
            self._claim(self.core._sequences[name].root, prompt + expected(prompt, count, scope), scope)

    @precondition(lambda self: len(self.live) < LIVE - 1)
    @rule(counts=st.lists(st.integers(1, 4), min_size=2, max_size=2))
    def together(self, counts: list[int]) -> None:
        """Two that answer in the same steps and end in different ones, which they do not guess at."""
        for count in counts:
            self._ask([1], count, "B", guesses=False)

    @rule(times=st.integers(1, 3))
    def step(self, times: int) -> None:
        for _ in range(times):
            self._step()

    @precondition(lambda self: self.live)
    @rule(which=st.integers(0, 99), twice=st.booleans())
    def abort(self, which: int, twice: bool) -> None:
        name = self.live[which % len(self.live)]
        assert self.core.abort(name) is not None
        self.gone.add(name)
        if twice:
            self._abort_nobody(name)

    @rule()
    def abort_unknown(self) -> None:
        self._abort_nobody("nobody")
        for name in [name for name in self.asked if name not in self.live][-1:]:
            self._abort_nobody(name)

    @precondition(lambda self: self.core.scheduler.running)
    @rule()
    def preempt(self) -> None:
        self.core.scheduler._preempt(list(self.core.scheduler.running.values())[-1])

    @precondition(lambda self: self.core.has_work)
    @rule(after_writing=st.booleans())
    def fail_step(self, after_writing: bool) -> None:
        written: set[int] = set()

        def broken() -> None:
            for s in self.model.planned:
                first, last = s.start // BLOCK, (s.start + s.tokens - 1) // BLOCK
                written.update(s.sequence.blocks[first : last + 1])
            raise Planted

        hook = "after_step" if after_writing else "before_step"
        whole = getattr(self.model, hook)
        setattr(self.model, hook, broken)
        try:
            made = self.core.step()
        finally:
            setattr(self.model, hook, whole)
        ended = {output.request_id for output in made if output.finish == "length"}  # by the step in flight
        failed = [output for output in made if output.error is not None]
        assert {output.request_id for output in failed} == {s.sequence.request_id for s in self.model.planned} - ended
        assert not written & set(self.core.pool._name_of), "I17"
        for output in made:
            self.outputs.setdefault(output.request_id, []).append(output)
        for output in failed:
            assert isinstance(output.error, GenerationFailed)
            self.gone.add(output.request_id)

    @rule(scope=st.sampled_from(SCOPES))
    def revoke(self, scope: str) -> None:
        self.core.revoke(scope)
        self.epochs[scope] += 1

    @rule()
    def forget(self) -> None:
        self.core.pool.forget()

    def teardown(self) -> None:
        if not hasattr(self, "core"):
            return
        for _ in range(10_000):
            if not self.core.has_work:
                break
            self._step()
            self.all_invariants()
        assert not self.core.has_work, "I15"
        assert self.core.pool.free_blocks == self.core.pool.capacity, "I9"
        assert not self.core._sequences, "I9"
        assert not any(self.core.pool._references), "I9"
        for name, (prompt, count, scope) in self.asked.items():
            if name in self.ordered:
                served = self.ordered[name].tokens[: len(prompt)]
                assert sorted(served) == sorted(prompt)
                prompt = served
            said = tokens_of(self.outputs.get(name, []))
            assert said == expected(prompt, count, scope)[: len(said)]
            if name not in self.gone:
                assert len(said) == count
                last = self.outputs[name][-1]
                assert last.finish == "length"
                # documents are shared to the token
                assert name in self.ordered or last.usage.cached_tokens % BLOCK == 0, "I11"
                assert last.usage.cached_tokens < len(prompt), "I11"

    # ---- what rules do --------------------------------------------------------------------------

    def _ask(self, prompt: list[int], count: int, scope: str, guesses: bool = True, parts: Parts | None = None) -> None:
        name = f"r{len(self.asked)}"
        self.asked[name] = (prompt, count, scope)
        self.born[name] = self.epochs[scope]
        tokens = prompt + expected(prompt, count, scope)
        guesser = Guesser(tokens) if guesses else None
        how = {"priority": len(self.asked) % 2, "drafter": guesser}
        add(self.core, name, prompt if parts is None else parts, count, scope, order="planned", **how)
        self._claim(self.core._sequences[name].root, tokens, scope)

    def _claim(self, root: bytes, tokens: list[int], scope: str) -> None:
        """Note what each block of these tokens stands for."""
        names: list[bytes] = []
        sequences.extend_names(names, root, tokens, len(tokens), BLOCK)
        assert len(names) == len(tokens) // BLOCK, "I5: a block is named that is not full"
        for i, block_name in enumerate(names):
            claim = (scope, self.epochs[scope], tuple(tokens[: (i + 1) * BLOCK]))
            assert self.claims.setdefault(block_name, claim) == claim, "I18: one name for two contents"
            assert self.named.setdefault(claim, block_name) == block_name, "two names for one content"

    def _step(self) -> None:
        had_work, before = self.core.has_work, self.core.counters.computed_tokens
        live, in_flight = set(self.live), self.core._in_flight is not None
        outputs = self.core.step()
        assert not self.model.wrong, self.model.wrong
        for output in outputs:
            assert output.error is None, output.error
            assert output.request_id in live, "I16"
            assert output.request_id not in self.gone, "I16"
            self.outputs.setdefault(output.request_id, []).append(output)
        if had_work:
            advanced = self.core.counters.computed_tokens > before or in_flight
            assert advanced, "I15: a step with work advanced nobody"

    def _abort_nobody(self, name: str) -> None:
        before = fingerprint(self.core.pool)
        assert self.core.abort(name) is None, "I16"
        assert fingerprint(self.core.pool) == before, "I16"

    def _in_mid_step(self) -> None:
        """Just before the model writes.  The core turns what a step raises into failed requests, so it is noted."""
        try:
            self._check_writes()
        except AssertionError as error:
            self.model.wrong.append(str(error))
            raise

    def _check_writes(self) -> None:
        pool, scheduler = self.core.pool, self.core.scheduler
        self.accounts()
        decodes = sum(s.tokens for s in self.model.planned if s.sequence.decoding)
        assert sum(s.tokens for s in self.model.planned) <= max(scheduler.policy.max_tokens, decodes), "I15"
        assert len(scheduler.running) <= scheduler.policy.max_running, "I15"
        for s in self.model.planned:
            assert s.start == s.sequence.computed
            last = s.sequence.prompt_tokens + s.sequence.sampling.max_tokens - 1
            assert s.start + s.tokens <= last, "I15: computes what nobody will ask for"
            assert not (s.drafts and s.sequence.owed), "guesses after a token that nobody knows"
            for position in range(s.start, s.start + s.tokens):
                block = s.sequence.blocks[position // BLOCK]
                assert block != NULL_BLOCK, "I3"
                assert pool._references[block] == 1, "I8"
                assert block not in pool._name_of, "I8"

    # ---- invariants -----------------------------------------------------------------------------

    @invariant()
    def all_invariants(self) -> None:
        if hasattr(self, "core"):
            self.accounts()
            self.contents()

    def accounts(self) -> None:
        pool, scheduler = self.core.pool, self.core.scheduler
        held = Counter(block for s in scheduler.running.values() for block in s.blocks)
        for block, references in enumerate(pool._references):
            assert references == held[block], "I1"
        free = list(pool._free)
        assert len(free) == len(set(free)), "I2"
        assert set(free) == {b for b, r in enumerate(pool._references) if b != NULL_BLOCK and r == 0}, "I2"
        assert not held[NULL_BLOCK], "I3"
        assert pool._name_of == {block: name for name, block in pool._block_of.items()}, "I4"
        assert len(pool._name_of) == len(pool._block_of), "I4"
        assert len(free) + len(held) + 1 == len(pool._references), "I13"
        for sequence in scheduler.running.values():
            assert len(sequence.blocks) == len(set(sequence.blocks)), "I6"
            assert sequence.computed <= len(sequence.blocks) * BLOCK, "I6"
            assert sequence.computed <= len(sequence.tokens) - 1, "I11"
        for sequence in scheduler.waiting:
            assert not sequence.blocks, "I6"
            assert sequence.computed == 0, "I6"
        queued = [s.request_id for s in scheduler.waiting] + list(scheduler.running)
        assert sorted(queued) == sorted(self.core._sequences), "I9"

    def contents(self) -> None:
        pool, cache = self.core.pool, self.model.cache
        assert cache[NULL_BLOCK * BLOCK : (NULL_BLOCK + 1) * BLOCK] == [UNWRITTEN] * BLOCK, "I3"
        holders: dict[int, tuple] = {}
        for name, sequence in self.core._sequences.items():
            scope, epoch = self.asked[name][2], self.born[name]
            assert sequence.computed <= sequence.known, "I7: computed what nobody knew"
            seen = chain(scope, sequence.tokens[: sequence.known])
            for position in range(sequence.computed):
                block = sequence.blocks[position // BLOCK]
                assert cache[block * BLOCK + position % BLOCK] == seen[position], "I7"
            for i, block in enumerate(sequence.blocks):
                if pool._references[block] > 1:
                    claim = (scope, epoch, tuple(sequence.tokens[: sequence.known][: (i + 1) * BLOCK]))
                    assert holders.setdefault(block, claim) == claim, "I12"
                    assert len(claim[2]) == (i + 1) * BLOCK, "I12"
        for block_name, block in pool._block_of.items():
            assert block_name in self.claims, "I5: published under a name that no request's tokens have"
            scope, _, tokens = self.claims[block_name]
            assert cache[block * BLOCK : (block + 1) * BLOCK] == chain(scope, list(tokens))[-BLOCK:], "I5"


class Guesser:
    """Knows the answer, and is wrong about every third token of it."""

    def __init__(self, truth: list[int]):
        self.truth = truth

    def propose(self, tokens: list[int], most: int) -> list[int]:
        ahead = range(len(tokens), min(len(tokens) + most, len(self.truth)))
        return [self.truth[i] if (i + len(self.truth)) % 3 else 96 for i in ahead]

    def learn(self, proposed: int, accepted: int) -> None:
        assert 0 <= accepted <= proposed


def fingerprint(pool) -> tuple:
    return (list(pool._references), list(pool._free), dict(pool._block_of), dict(pool._name_of))
