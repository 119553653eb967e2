"""Bugs planted in the engine, to show that its tests would find them.

    python -m tests.inference.mutants        plant each, run the machine, write mutants.md: what noticed it, and when

A mutant is a piece of a function's source and what stands there instead; one that no longer applies fails loudly.
"""

from __future__ import annotations
import __future__

import inspect
import logging
import textwrap
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from hypothesis import HealthCheck, Phase, settings
from hypothesis.stateful import run_state_machine_as_test

from inference.engine import batch, core, sequence
from inference.engine.blocks import BlockPool
from inference.engine.core import EngineCore
from inference.engine.documents import Documents
from inference.engine.scheduler import Scheduler, _Budget
from kernels import AttentionPlan
from tests.inference.engine_machine import EngineMachine


class Mutant(NamedTuple):
    """`old` in the source of `owner.name` becomes `new`."""

    what: str
    owner: object
    name: str
    old: str
    new: str


MUTANTS = (
    # ---- names ----
    Mutant("scope left out of the name", core, "root_name", "in identity", "in identity[:1]"),
    Mutant("the chain forgets its parent", sequence, "extend_names", "name_behind(parent, ", "name_behind(root, "),
    Mutant("a partial block is named", sequence, "extend_names", "- block_size + 1", "- block_size + 2"),
    Mutant("revocation does nothing", EngineCore, "revoke", "+ 1", "+ 0"),
    # ---- pool ----
    Mutant("a hit stays in the free list", BlockPool, "take", "self._free.remove(block)", "pass"),
    Mutant("a hit takes no reference", BlockPool, "take", "self._references[block] += 1", "pass"),
    Mutant("an evicted block keeps its name", BlockPool, "allocate", "if name is not None", "if False"),
    Mutant(
        "the pool hands out one block too many", BlockPool, "allocate", "return taken", "return taken and taken[:-1]"
    ),
    Mutant(
        "a failed allocation keeps what it got",
        BlockPool,
        "allocate",
        "        return None\n",
        "        self._free.pop()\n        return None\n",
    ),
    Mutant("freed while one still holds it", BlockPool, "release", "== 0:\n", "<= 1:\n"),
    Mutant("blocks are not given back", BlockPool, "release", "self._references[block] -= 1", "pass"),
    Mutant("publishing replaces a block", BlockPool, "publish", "name not in self._block_of and", ""),
    Mutant(
        "forgetting leaves half of the index",
        BlockPool,
        "forget",
        "self._block_of, self._name_of, ",
        "self._block_of, ",
    ),
    Mutant(
        "the null block is handed out",
        BlockPool,
        "__init__",
        "FreeBlocks(range(1, blocks))",
        "FreeBlocks(range(blocks - 1))",
    ),
    # ---- scheduler ----
    Mutant("the whole prompt may be a hit", Scheduler, "_hits", "(len(sequence.tokens) - 1)", "len(sequence.tokens)"),
    Mutant(
        "hits are taken before the room is known",
        Scheduler,
        "_admit",
        "    from_free =",
        "    self.pool.take(hits)\n    from_free =",
    ),
    Mutant("hits in the free list are counted as free", Scheduler, "_admit", "fresh + from_free +", "fresh +"),
    Mutant(
        "hits are computed again in place", Scheduler, "_admit", "start = len(hits) * self._block_size", "start = 0"
    ),
    Mutant("budget not spent by decodes", _Budget, "__init__", "- sum(s.tokens for s in decodes)", ""),
    Mutant(
        "no limit to those who run",
        Scheduler,
        "_admit_some",
        "        if len(self.running) >= self.policy.max_running:\n            break",
        "        pass",
    ),
    Mutant("waiting for oneself", Scheduler, "_comes", "in ahead", "in [*ahead, sequence]"),
    Mutant("a chunk is given past the budget", _Budget, "chunk", "min(pending, self._tokens)", "pending"),
    Mutant(
        "adoption counts a block too many", Scheduler, "_adopt", "computed += len(hits)", "computed += (1 + len(hits))"
    ),
    Mutant("adoption takes no reference", Scheduler, "_adopt", "self.pool.take(hits)", "pass"),
    Mutant("a chunk is not taken off the budget", _Budget, "spend", "self._tokens -= tokens", "pass"),
    Mutant("guesses are kept unseen", EngineCore, "_advance", "rejected=len(drafts) - accepted", "rejected=0"),
    Mutant("a wrong guess is followed", EngineCore, "_advance", "or token != draft", "or draft is None"),
    Mutant("logits of the guess before", EngineCore, "_advance", "token(row + accepted", "token(row"),
    Mutant("guesses are left out of the batch", batch, "build", "tokens += s.drafts", "tokens += [1] * len(s.drafts)"),
    Mutant("no block for the guesses", Scheduler, "_plan_decode", "1 + len(drafts), plan", "1, plan"),
    Mutant("short of blocks, nobody makes way", Scheduler, "_grow", "self._preempt(victim)", "return False"),
    Mutant(
        "one block too few for a chunk",
        Scheduler,
        "_grow",
        "(sequence.computed + tokens)",
        "(sequence.computed + tokens - 1)",
    ),
    Mutant("the preempted keep their progress", Scheduler, "_release", "    sequence.computed = 0\n", ""),
    Mutant("the preempted keep their blocks", Scheduler, "_release", "    sequence.blocks = []\n", ""),
    Mutant("the preempted are forgotten", Scheduler, "_preempt", "self.waiting.appendleft(sequence)", "pass"),
    Mutant(
        "published before it is computed",
        Scheduler,
        "publish",
        "full = sequence.publishable // self._block_size",
        "full = len(sequence.blocks) if len(sequence.block_names(self._block_size)) >= len(sequence.blocks) else 0",
    ),
    Mutant("published under its neighbour's name", Scheduler, "publish", "names[i])", "names[i - 1])"),
    Mutant(
        "a step is counted twice",
        Scheduler,
        "commit",
        "scheduled.end - rejected",
        "scheduled.end - rejected + 1",
    ),
    Mutant("the aborted stay in the queue", Scheduler, "remove", "self.waiting.remove(sequence)", "pass"),
    # ---- core ----
    Mutant(
        "an aborted request may be aborted again", EngineCore, "abort", ".pop(request_id, None)", ".get(request_id)"
    ),
    Mutant(
        "an abort keeps the blocks",
        EngineCore,
        "abort",
        "    self._release(sequence)\n",
        "    self.scheduler.running.pop(request_id, None)\n",
    ),
    Mutant(
        "a failed step publishes what it wrote",
        EngineCore,
        "step",
        "        return outputs + self._fail_all(",
        "        for s in plan:\n            self._runs(s.sequence) and self.scheduler.commit(s)\n"
        "        return outputs + self._fail_all(",
    ),
    Mutant("a failed request keeps its blocks", EngineCore, "_fail", "self._release(sequence)", "pass"),
    Mutant(
        "a failed step fails one request only",
        EngineCore,
        "step",
        "[s.sequence for s in plan]",
        "[s.sequence for s in plan[:1]]",
    ),
    # ---- steps that overlap ----
    Mutant("a token that nobody knows is named", sequence.Sequence, "block_names", "self.known", "len(self.tokens)"),
    Mutant("a token is owed from another's row", EngineCore, "step", "append(-1 - row)", "append(-1)"),
    Mutant(
        "the late token of an ended request is told",
        EngineCore,
        "_land",
        "if self._runs(scheduled.sequence):\n            output =",
        "if True:\n            output =",
    ),
    Mutant(
        "the rows of the ended are not counted",
        EngineCore,
        "_land",
        "        row += 1 + len(scheduled.drafts)",
        "            row += 1 + len(scheduled.drafts)",
    ),
    Mutant("guesses follow a token that nobody knows", Scheduler, "_plan_decode", "and not sequence.owed", ""),
    Mutant("guesses are not waited for", EngineCore, "_host_has_a_say", "or s.drafts\n", "\n"),
    Mutant("the complete go on", Scheduler, "schedule", "if not s.complete", ""),
    Mutant("the complete begin anew", Scheduler, "_admit", "or sequence.complete", ""),
    Mutant("a step in flight is forgotten", EngineCore, "step", "if earlier is not None else []", "if plan else []"),
    Mutant("counted when told, not when launched", EngineCore, "_advance", "if counted", "if False"),
    # ---- batch ----
    Mutant("two blocks of a table are swapped", batch, "build", "= table\n", "= table[::-1]\n"),
    Mutant("a slot too far", AttentionPlan, "of", "+ positions % block_size", "+ (positions + 1) % block_size"),
    Mutant(
        "logits of the token before",
        batch,
        "build",
        "range(ends[i] - 1 - len(s.drafts), ends[i])",
        "[max(0, ends[i] - 2)] * (1 + len(s.drafts))",
    ),
    Mutant(
        "a chunk begins one token late",
        batch,
        "build",
        "s.sequence.tokens[start:known]",
        "([*s.sequence.tokens, 1])[start + 1 : known + 1]",
    ),
    # ---- documents ----
    Mutant("a block's beginning ends a token late", Scheduler, "_begun", "length - start\n", "length - start + 1\n"),
    Mutant("a beginning is told of too early", Scheduler, "publish", "<= sequence.publishable", "<= 10**9"),
    Mutant("a block's beginnings outlive it", BlockPool, "allocate", "self._begins.pop(block, ())", "()"),
    Mutant("names of another order are kept", Documents, "replan", "sequence.names = []", "pass"),
)


@contextmanager
def planted(mutant: Mutant) -> Iterator[None]:
    """The engine with this bug in it.  Raises LookupError when the source has changed under the mutant."""
    whole = inspect.getattr_static(mutant.owner, mutant.name)
    source = textwrap.dedent(inspect.getsource(whole))
    if source.count(mutant.old) != 1:
        raise LookupError(f"mutant {mutant.what!r}: {mutant.old!r} occurs {source.count(mutant.old)} times")
    found: dict[str, Callable] = {}
    code = compile(
        source.replace(mutant.old, mutant.new), f"<mutant: {mutant.what}>", "exec", __future__.annotations.compiler_flag
    )
    exec(code, inspect.unwrap(whole).__globals__, found)
    setattr(mutant.owner, mutant.name, found[mutant.name])
    try:
        yield
    finally:
        setattr(mutant.owner, mutant.name, whole)


def noticed(mutant: Mutant, examples: int = 5000) -> str:
    """What the machine says of the bug; "" if it does not notice it."""
    with planted(mutant):
        try:
            run_state_machine_as_test(
                EngineMachine,
                settings=settings(
                    max_examples=examples,
                    stateful_step_count=40,
                    deadline=None,
                    derandomize=True,
                    phases=[Phase.generate],
                    suppress_health_check=list(HealthCheck),
                ),
            )
        except Exception as error:  # it may notice in many ways
            while error.__context__ is not None:  # the first thing that went wrong
                error = error.__context__
            return f"{type(error).__name__}: {error}".splitlines()[0][:80]
    return ""


def main() -> None:
    logging.disable(logging.CRITICAL)
    lines = [
        "# Planted bugs",
        "",
        "`python -m tests.inference.mutants`: each bug alone in the engine, and what the state machine says of it.",
        "",
        "| planted in | bug | noticed by | after |",
        "|---|---|---|---|",
    ]
    alive = []
    for mutant in MUTANTS:
        started = time.perf_counter()
        said = noticed(mutant)
        seconds = time.perf_counter() - started
        alive += [mutant.what] * (not said)
        where = getattr(mutant.owner, "__name__", "").removeprefix("inference.engine.")
        lines.append(f"| `{where}.{mutant.name}` | {mutant.what} | {said or '**nobody**'} | {seconds:.1f} s |")
        print(lines[-1], flush=True)
    lines += ["", f"{len(MUTANTS) - len(alive)} of {len(MUTANTS)} are noticed."]
    Path(__file__).with_suffix(".md").write_text("\n".join(lines) + "\n", encoding="utf-8")
    print(lines[-1], *alive, sep="\n")


if __name__ == "__main__":
    main()
