"""What the next step computes: decodes first, then prefills, under a budget of tokens and of time.

A step is one flat batch, so a plan is just how many tokens each sequence gets.  Nothing here knows tensors or
threads.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from itertools import islice

from inference.engine.blocks import BlockPool
from inference.engine.cost import UNKNOWN, StepCost
from inference.engine.segments import Segments
from inference.engine.sequence import Sequence

log = logging.getLogger(__name__)

Urgency = tuple[bool, bool, int, int, float]  # the least goes first


@dataclass(frozen=True, slots=True)
class Policy:
    """`max_tokens` of a step (decodes get theirs even beyond it) and sequences `max_running` at once.

    While anything streams, a step takes no longer than `step_seconds` by `cost`, but a prefill always gets
    `min_chunk` tokens.  Of the first `look_ahead` that wait, the class goes first that is most urgent, in it the one
    with the least to compute, in bands of powers of two that a wait of `ageing_seconds` lifts by one; whoever has
    waited for `age_limit_seconds` goes before all others.  `draft_rows`: the most guessed tokens of a step.
    """

    max_tokens: int = 512
    max_running: int = 64
    step_seconds: float = float("inf")
    cost: StepCost = UNKNOWN
    min_chunk: int = 32
    look_ahead: int = 64
    ageing_seconds: float = 2.0
    age_limit_seconds: float = 30.0
    draft_rows: int = 0
    max_draft: int = 5


@dataclass(frozen=True, slots=True)
class Scheduled:
    """`tokens` of the sequence are computed from `start` on, the last of them guessed: `drafts`."""

    sequence: Sequence
    start: int
    tokens: int
    drafts: tuple[int, ...] = ()

    @property
    def end(self) -> int:
        """The token behind them."""
        return self.sequence.end_of(self.start, self.tokens)


class Scheduler:
    """Owns the queues and hands out blocks.  Admission keeps `watermark` blocks free for running sequences to grow
    into."""

    def __init__(
        self,
        pool: BlockPool,
        policy: Policy,
        replan: Callable[[Sequence], None] = lambda sequence: None,
        segments: Segments | None = None,
        copy: Callable[[int, int, int], None] | None = None,
    ):
        """`replan` may change the tokens of a sequence that is about to be admitted; `segments` where documents are
        reused at other places than they were computed at; `copy(source, target, count)` copies the first tokens of a
        block, where that can be done."""
        self.pool = pool
        self._replan = replan
        self._segments = segments
        self._copy = copy
        self.policy = policy
        self._block_size = pool.block_size
        self.watermark = max(1, pool.capacity // 50)
        self.waiting: deque[Sequence] = deque()
        self.running: dict[str, Sequence] = {}  # in the order of admission
        self.preempted_total = 0

    @property
    def has_work(self) -> bool:
        return bool(self.waiting or self.running)

    def add(self, sequence: Sequence) -> None:
        self.waiting.append(sequence)

    def remove(self, sequence: Sequence) -> None:
        """Take a sequence out, finished or aborted, and give its blocks back."""
        if self.running.pop(sequence.request_id, None) is None:
            self.waiting.remove(sequence)
        self._release(sequence)

    def schedule(self, now: float) -> list[Scheduled]:
        """Plan one step at the time `now`.  Never empty while there is work, unless all of it is in flight: whoever was
        admitted first can always advance, if need be by preempting all others."""
        plan: dict[str, Scheduled] = {}
        preempted_before = self.preempted_total
        going_on = [s for s in self.running.values() if not s.complete]
        decodes = sorted((s for s in going_on if s.decoding), key=lambda s: s.priority)
        prefills = [s for s in going_on if not s.decoding]
        drafts = self.drafts_each(len(decodes))
        for sequence in decodes:
            if sequence.request_id in self.running:  # not preempted for another one in this very loop
                self._plan_decode(sequence, drafts, plan)
        left = _Budget(self.policy, list(plan.values()), self._block_size)
        ahead: list[Sequence] = []
        for sequence in prefills:
            if sequence.request_id not in self.running:
                continue
            self._adopt(sequence)
            if not self._comes(sequence, sequence.computed, ahead):
                chunk = left.chunk(sequence.computed, sequence.pending)
                if chunk > 0 and self._grow(sequence, chunk, plan):
                    plan[sequence.request_id] = Scheduled(sequence, sequence.computed, chunk)
                    left.spend(sequence.computed, chunk)
            ahead.append(sequence)
        # nobody is admitted in a step that had to preempt: it would be thrown out again in the next one
        if self.preempted_total == preempted_before or not plan:
            self._admit_some(now, left, ahead, plan)
        return list(plan.values())

    def drafts_each(self, decodes: int) -> int:
        """The most guesses for each of so many that decode."""
        return min(self.policy.max_draft, self.policy.draft_rows // decodes) if decodes else 0

    def _plan_decode(self, sequence: Sequence, most_drafts: int, plan: dict[str, Scheduled]) -> None:
        drafts: tuple[int, ...] = ()
        if most_drafts and sequence.drafter is not None and not sequence.owed:
            most = min(most_drafts, sequence.sampling.max_tokens - sequence.generated - 1)
            # guesses are worth no preemption
            room = len(sequence.blocks) * self._block_size - sequence.computed - 1
            if self.pool.free_blocks > self.watermark:
                room += self._block_size
            try:
                drafts = tuple(sequence.drafter.propose(sequence.tokens, min(most, room)))
            except Exception:
                log.exception("request %s goes on without guesses", sequence.request_id)
                sequence.drafter = None
        if self._grow(sequence, 1 + len(drafts), plan):
            plan[sequence.request_id] = Scheduled(sequence, sequence.computed, 1 + len(drafts), drafts)

    def _admit_some(self, now: float, left: _Budget, ahead: list[Sequence], plan: dict[str, Scheduled]) -> None:
        """Admit those that wait as long as there is room; behind those `ahead`, which are being prefilled."""
        if len(self.running) >= self.policy.max_running:
            return
        for sequence in self._by_urgency(now):
            if sequence.reuse is not None and sequence.reuse.awaits:
                continue
            if self._comes(sequence, self._cached(sequence), ahead):
                continue
            self._replan(sequence)
            if self._comes(sequence, self._cached(sequence), ahead):
                continue
            admitted = self._admit(sequence, left)
            if admitted is None:
                break
            self.waiting.remove(sequence)
            if not sequence.preemptions and sequence.reuse is None:
                names = sequence.block_names(self._block_size)
                self.pool.asked([*names, *(node.ends for node in sequence.path if node.rest)], now)
            plan[sequence.request_id] = admitted
            left.spend(admitted.start, admitted.tokens)
            ahead.append(sequence)
            if len(self.running) >= self.policy.max_running:
                break

    def _by_urgency(self, now: float) -> list[Sequence]:
        """The first of those that wait, whoever is to be admitted first at the head.  A request that awaits documents
        has them to compute as well, and a document that is computed for others is as urgent as whoever awaits it most:
        so one request after the other gets all that it needs, rather than all of them their documents first."""
        policy = self.policy
        window = list(islice(self.waiting, policy.look_ahead))
        compiling = {s.request_id: s for s in window if s.compiles}
        compiling |= {name: s for name, s in self.running.items() if s.compiles}

        def urgency(sequence: Sequence, more: int = 0) -> Urgency:
            waited = now - sequence.arrived
            if sequence.preemptions or waited >= policy.age_limit_seconds:
                return (False, not sequence.preemptions, 0, 0, sequence.arrived)
            uncached = self._uncached(sequence) + more
            band = (uncached // 64).bit_length() - int(waited / policy.ageing_seconds)
            return (True, True, sequence.priority, band, sequence.arrived)

        own: dict[str, Urgency] = {}
        lent: dict[str, Urgency] = {}  # to the documents, by those who await them
        for sequence in window:
            awaited = sequence.reuse.awaits if sequence.reuse is not None else ()
            documents = [compiling[name] for name in awaited if name in compiling]
            more = sum(s.pending if s.request_id in self.running else self._uncached(s) for s in documents)
            own[sequence.request_id] = urgency(sequence, more)
            for document in documents:
                lent[document.request_id] = min(
                    own[sequence.request_id], lent.get(document.request_id, own[sequence.request_id])
                )

        def key(sequence: Sequence) -> Urgency:
            mine = own[sequence.request_id]
            hurries = not mine[0]  # preempted, or has waited too long
            return mine if hurries else lent.get(sequence.request_id, mine)

        return sorted(window, key=key)

    def _comes(self, sequence: Sequence, start: int, ahead: list[Sequence]) -> bool:
        """Whether the block of `sequence` at token `start` is about to be computed for one of those `ahead`.  They are
        given a step's budget first, so to wait for it is never later than to compute it a second time beside them."""
        at, within = divmod(start, self._block_size)
        if within or at >= (len(sequence.tokens) - 1) // self._block_size:
            return False
        name = sequence.block_names(self._block_size)[at]
        return any(other.reuse is None and other.names[at : at + 1] == [name] for other in ahead)

    def _admit(self, sequence: Sequence, left: _Budget) -> Scheduled | None:
        """Take what the cache holds of a waiting sequence and blocks for its first chunk, or nothing at all."""
        hits = self._hits(sequence)
        start = len(hits) * self._block_size
        begun, more = self._begun(sequence, start)
        chunk = left.chunk(start + more, len(sequence.tokens) - start - more)
        if chunk == 0 or sequence.complete:  # preempted while its last token was in flight
            return None
        segments = self._segments.sources(sequence.reuse, start) if sequence.reuse is not None else []
        end = start + more + chunk if sequence.reuse is None else len(sequence.tokens)
        fresh = -(-end // self._block_size) - len(hits)
        held = set(hits).union(begun, *segments)
        from_free = sum(1 for block in held if not self.pool.in_use(block))
        reserve = self.watermark if self.running else 0
        if fresh + from_free + reserve > self.pool.free_blocks:
            return None
        for blocks in (hits, begun, *segments):
            self.pool.take(blocks)
        sequence.blocks = hits + (self.pool.allocate(fresh) or [])
        assert len(sequence.blocks) == len(hits) + fresh
        for block in begun:
            self._copy(block, sequence.blocks[len(hits)], more)
        self.pool.release(begun)
        sequence.computed = start + more
        sequence.published = len(hits)
        if sequence.preemptions == 0:
            sequence.cached_tokens = sequence.computed
        if sequence.reuse is not None:
            self._reuse(sequence)
            for blocks in segments:
                self.pool.release(blocks)
            chunk = left.chunk(sequence.computed, sequence.pending)
        self.running[sequence.request_id] = sequence
        return Scheduled(sequence, sequence.computed, chunk)

    def _begun(self, sequence: Sequence, start: int) -> tuple[list[int], int]:
        """A block that begins as that of the sequence at `start`, if there is one, as far as a document's end: it, and
        how many tokens."""
        if self._copy is None:
            return [], 0
        for node in reversed(sequence.path):
            if start < node.length < min(start + self._block_size, len(sequence.tokens)):
                block = self.pool.beginning(node.ends)
                if block is not None:
                    return [block], node.length - start
        return [], 0

    def _reuse(self, sequence: Sequence) -> None:
        """Copy the documents into the sequence's blocks; where that fails it computes them itself."""
        try:
            self._segments.splice(sequence.tokens, sequence.blocks, sequence.computed, sequence.reuse)
        except Exception:
            log.exception("request %s computes its documents itself", sequence.request_id)
            sequence.reuse = None
            return
        if sequence.preemptions == 0:
            sequence.cached_tokens = sequence.prompt_tokens - sequence.pending

    def _hits(self, sequence: Sequence) -> list[int]:
        """Published blocks of the sequence's prefix; at least one token is left to compute, for its logits."""
        names = sequence.block_names(self._block_size)
        return self.pool.match(names[: (len(sequence.tokens) - 1) // self._block_size])

    def _cached(self, sequence: Sequence) -> int:
        return len(self._hits(sequence)) * self._block_size

    def _uncached(self, sequence: Sequence) -> int:
        """Tokens that `sequence` has to compute, as far as it can be known."""
        cached, reuse = self._cached(sequence), sequence.reuse
        if reuse is None:
            return len(sequence.tokens) - cached
        copied = max(0, reuse.tail - max(cached, reuse.spans[0].end))
        return round(self._segments.share * copied) + len(sequence.tokens) - reuse.tail

    def _adopt(self, sequence: Sequence) -> None:
        """A running prefill takes over blocks that a sibling with the same documents has published meanwhile."""
        if sequence.computed % self._block_size or sequence.reuse is not None:
            return
        done = sequence.computed // self._block_size
        names = sequence.block_names(self._block_size)[done : (len(sequence.tokens) - 1) // self._block_size]
        hits = self.pool.match(names)
        if not hits:
            return
        self.pool.take(hits)
        sequence.blocks += hits  # a chunk that ends with a block has none in stock beyond it
        sequence.computed += len(hits) * self._block_size
        sequence.published = len(sequence.blocks)
        if sequence.preemptions == 0 and sequence.generated == 0:
            sequence.cached_tokens += len(hits) * self._block_size

    def _grow(self, sequence: Sequence, tokens: int, plan: dict[str, Scheduled]) -> bool:
        """Blocks for the next `tokens`.  Where the pool is empty a sequence goes back to the queue that the step has
        not planned yet, of the least urgent class the newest: another one, or else this one itself."""
        need = -(-(sequence.computed + tokens) // self._block_size) - len(sequence.blocks)
        if need <= 0:
            return True
        while (blocks := self.pool.allocate(need)) is None:
            unplanned = [s for s in self.running.values() if s.request_id not in plan]
            victim = max(reversed(unplanned), key=lambda s: s.priority)
            assert len(self.running) > 1, "a lone sequence outgrew the pool: it should have been refused on arrival"
            self._preempt(victim)
            if victim is sequence:
                return False
        sequence.blocks += blocks
        return True

    def _preempt(self, sequence: Sequence) -> None:
        """Back to the head of the queue; its published blocks stay findable, so most of it comes back as hits."""
        del self.running[sequence.request_id]
        self._release(sequence)
        sequence.preemptions += 1
        self.preempted_total += 1
        self.waiting.appendleft(sequence)

    def _release(self, sequence: Sequence) -> None:
        self.pool.release(sequence.blocks)
        sequence.blocks = []
        sequence.computed = 0
        sequence.published = 0
        if sequence.reuse is not None:
            sequence.reuse.skips = []

    def commit(self, scheduled: Scheduled, rejected: int = 0) -> None:
        """A step succeeded, or is on its way: count its tokens, but for the guesses that were `rejected`, and publish
        the blocks that are now full."""
        scheduled.sequence.computed = scheduled.end - rejected
        self.publish(scheduled.sequence)

    def publish(self, sequence: Sequence) -> None:
        """Make the full blocks of `sequence` findable, as far as their tokens are known."""
        full = sequence.publishable // self._block_size
        before = sequence.published * self._block_size
        if full > sequence.published:
            names = sequence.block_names(self._block_size)[:full]
            for i in range(sequence.published, len(names)):
                self.pool.publish(sequence.blocks[i], names[i])
            sequence.published = len(names)
        for node in sequence.path if before < sequence.prompt_tokens else ():
            if node.rest and before < node.length <= sequence.publishable:
                self.pool.publish_beginning(sequence.blocks[node.length // self._block_size], node.ends)


class _Budget:
    """What a step has left for prefills beside its decodes."""

    def __init__(self, policy: Policy, decodes: list[Scheduled], block_size: int):
        self._policy = policy
        self._block_size = block_size
        self._tokens = policy.max_tokens - sum(s.tokens for s in decodes)
        self._floor = policy.min_chunk
        self._seconds = float("inf")  # without decodes nobody is kept waiting by a long step
        if decodes:
            used = policy.cost.fixed + sum(policy.cost.chunk(s.start, s.tokens) for s in decodes)
            self._seconds = policy.step_seconds - used

    def chunk(self, start: int, pending: int) -> int:
        """How many of the `pending` tokens from `start` go into this step."""
        most = min(pending, self._tokens)
        if most <= 0:
            return 0
        chunk = max(self._policy.cost.tokens_within(self._seconds, start, most), min(self._floor, most))
        if chunk < pending:  # whole blocks, which others can share at once
            chunk = max(chunk - (start + chunk) % self._block_size, min(chunk, self._block_size))
        return chunk

    def spend(self, start: int, tokens: int) -> None:
        self._tokens -= tokens
        self._seconds -= self._policy.cost.chunk(start, tokens)
        self._floor = 0  # one prefill advances in every step, however little time there is
