"""What the next step computes: decodes first, then prefills in the order of arrival, under a token budget.

A step is one flat batch, so a plan is just how many tokens each sequence gets.  Nothing here knows tensors,
time or threads.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

from inference.engine.blocks import BlockPool
from inference.engine.sequence import Sequence


@dataclass(frozen=True, slots=True)
class Scheduled:
    """`tokens` of the sequence from `start` on; `samples` when its last token is among them."""

    sequence: Sequence
    start: int
    tokens: int

    @property
    def samples(self) -> bool:
        return self.start + self.tokens == len(self.sequence.tokens)


class Scheduler:
    """Owns the queues and hands out blocks.

    `budget` is the most tokens of a step; every decode gets its one even beyond it, so that a full house of
    streams never stalls.  Admission keeps `watermark` blocks free for running sequences to grow into.
    """

    def __init__(self, pool: BlockPool, budget: int, max_running: int):
        self.pool = pool
        self._block_size = pool.block_size
        self.budget = budget
        self.max_running = max_running
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

    def schedule(self) -> list[Scheduled]:
        """Plan one step.  Never empty while there is work: whoever was admitted first can always advance,
        if need be by preempting all others."""
        plan: dict[str, Scheduled] = {}
        budget = self.budget
        preempted_before = self.preempted_total
        running = list(self.running.values())
        for sequence in [s for s in running if s.decoding] + [s for s in running if not s.decoding]:
            if sequence.request_id not in self.running:  # preempted for an older one in this very loop
                continue
            if not sequence.decoding:
                self._adopt(sequence)
            tokens = sequence.pending if sequence.decoding else min(sequence.pending, budget)
            if tokens > 0 and self._grow(sequence, tokens, plan):
                plan[sequence.request_id] = Scheduled(sequence, sequence.computed, tokens)
                budget -= tokens
        # nobody is admitted in a step that had to preempt: it would be thrown out again in the next one
        while budget > 0 and self.waiting and len(self.running) < self.max_running:
            if self.preempted_total > preempted_before and plan:
                break
            admitted = self._admit(self.waiting[0], budget)
            if admitted is None:
                break
            self.waiting.popleft()
            plan[admitted.sequence.request_id] = admitted
            budget -= admitted.tokens
        return list(plan.values())

    def _admit(self, sequence: Sequence, budget: int) -> Scheduled | None:
        """Take what the cache holds of a waiting sequence and blocks for its first chunk, or nothing at all."""
        hits = self._hits(sequence)
        from_free = sum(1 for block in hits if not self.pool.in_use(block))
        start = len(hits) * self._block_size
        tokens = min(len(sequence.tokens) - start, budget)
        fresh = -(-(start + tokens) // self._block_size) - len(hits)
        reserve = self.watermark if self.running else 0
        if fresh + from_free + reserve > self.pool.free_blocks:
            return None
        self.pool.take(hits)
        blocks = self.pool.allocate(fresh)
        assert blocks is not None
        sequence.blocks = hits + blocks
        sequence.computed = start
        sequence.published = len(hits)
        if sequence.preemptions == 0:
            sequence.cached_tokens = start
        self.running[sequence.request_id] = sequence
        return Scheduled(sequence, start, tokens)

    def _hits(self, sequence: Sequence) -> list[int]:
        """Published blocks of the sequence's prefix; at least one token is left to compute, for its logits."""
        return self.pool.match(sequence.block_names(self._block_size)[: (len(sequence.tokens) - 1) // self._block_size])

    def _adopt(self, sequence: Sequence) -> None:
        """A running prefill takes over blocks that a sibling with the same documents has published meanwhile."""
        if sequence.computed % self._block_size:
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
        """Blocks for the next `tokens`.  Where the pool is empty the newest sequence goes back to the queue:
        one after this that the step has not planned yet, else this one itself."""
        need = -(-(sequence.computed + tokens) // self._block_size) - len(sequence.blocks)
        while (blocks := self.pool.allocate(max(need, 0))) is None:
            victim = next(s for s in reversed(self.running.values()) if s.request_id not in plan)
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

    def commit(self, scheduled: Scheduled) -> None:
        """A step succeeded: count its tokens and publish the blocks that are now full."""
        sequence = scheduled.sequence
        sequence.computed = scheduled.start + scheduled.tokens
        names = sequence.block_names(self._block_size)
        for i in range(sequence.published, sequence.computed // self._block_size):
            self.pool.publish(sequence.blocks[i], names[i])
        sequence.published = sequence.computed // self._block_size
