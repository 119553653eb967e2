"""The block pool: who holds which cache block, and which blocks can be found again by their content.

    free, unpublished      holds nothing of use
    free, published        content kept and findable; taken back by a hit, or overwritten when its turn comes
    in use                 reference count > 0; published once full and computed, then immutable

The name of a published block is a hash chain: H(name of the block before it, its 16 tokens), rooted in the
model, the dtype and the request's access scope, so equal names mean equal tokens at equal positions that the
same people may read (vLLM's prefix caching; blake2b, 16 bytes, so collisions can't be crafted).  Where a document ends
within a block, the block's beginning has a name as well: others copy it, whatever the block goes on with.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from hashlib import blake2b

from inference.config import Eviction
from inference.engine.eviction import NOTHING_TO_FIND, FreeBlocks, Popularity
from kernels import BLOCK_SIZE

NULL_BLOCK = 0
BlockName = bytes


def root_name(*identity: str) -> BlockName:
    """The name that a chain starts from.  The parts are length-prefixed, so ("ab", "c") is not ("a", "bc")."""
    digest = blake2b(digest_size=16)
    for part in identity:
        data = part.encode()
        digest.update(len(data).to_bytes(4, "little") + data)
    return digest.digest()


def name_behind(parent: BlockName, tokens: Sequence[int]) -> BlockName:
    """The name of `tokens`, a whole block or less, behind the block `parent`."""
    return blake2b(parent + array("i", tokens).tobytes(), digest_size=16).digest()


def extend_names(names: list[BlockName], root: BlockName, tokens: Sequence[int], known: int, block_size: int) -> None:
    """Append to `names` until every full block of the first `known` tokens has one."""
    parent = names[-1] if names else root
    for start in range(len(names) * block_size, known - block_size + 1, block_size):
        parent = name_behind(parent, tokens[start : start + block_size])
        names.append(parent)


class BlockPool:
    """Reference counts, the free blocks in the order of eviction, and the index of published blocks.

    `per_pair`: what a token costs more to compute for each one before it, over what it costs alone.
    """

    def __init__(self, blocks: int, block_size: int = BLOCK_SIZE, eviction: Eviction = "gdsf", per_pair: float = 0.0):
        if blocks < 2:
            raise ValueError(f"a pool needs at least 2 blocks (one is the null block), got {blocks}")
        self.capacity = blocks - 1
        self.block_size = block_size  # tokens
        self._references = [0] * blocks
        self._free = FreeBlocks(range(1, blocks))
        self._popularity = Popularity(8 * blocks)
        self._keeps_popular = eviction == "gdsf"
        self._priority = [0.0] * blocks
        self._clock = 0.0  # the priority of what was evicted last
        self._block_cost = block_size * per_pair
        self._block_of: dict[BlockName, int] = {}
        self._name_of: dict[int, BlockName] = {}
        self._begun: dict[BlockName, int] = {}  # blocks by what they begin with
        self._begins: dict[int, list[BlockName]] = {}
        self.evicted_total = 0

    @property
    def free_blocks(self) -> int:
        return len(self._free)

    @property
    def published_blocks(self) -> int:
        return len(self._block_of)

    def in_use(self, block: int) -> bool:
        return self._references[block] > 0

    def match(self, names: Sequence[BlockName]) -> list[int]:
        """The blocks of the longest published prefix of `names`; nothing is taken."""
        found = []
        for name in names:
            block = self._block_of.get(name)
            if block is None:
                break
            found.append(block)
        return found

    def take(self, blocks: Sequence[int]) -> None:
        """Hold blocks that `match` found, from the free list if need be."""
        for block in blocks:
            if self._references[block] == 0:
                self._free.remove(block)
            self._references[block] += 1

    def asked(self, names: Sequence[BlockName], now: float) -> None:
        """A request asks for the blocks of these names at the time `now`, in seconds."""
        self._popularity.note(names, now)

    def popularity(self, name: BlockName) -> float:
        """How often it was asked for, the longer ago the less; 0 for never, resident or not."""
        return self._popularity.of(name)

    def allocate(self, count: int) -> list[int] | None:
        """`count` blocks to write into, the least worth keeping first; None, and nothing changed, if too few."""
        if count > len(self._free):
            return None
        taken = []
        for _ in range(count):
            block, priority = self._free.pop()
            name = self._name_of.pop(block, None)
            if name is not None:
                del self._block_of[name]
                self.evicted_total += 1
            self._clock = max(self._clock, priority)
            for begun in self._begins.pop(block, ()):
                del self._begun[begun]
            self._references[block] = 1
            self._priority[block] = 0.0
            taken.append(block)
        return taken

    def publish(self, block: int, name: BlockName) -> None:
        """Make a full, computed block findable.  If another block has the name already, that one stays."""
        assert self._references[block] > 0, f"block {block} published while free"
        if name not in self._block_of and block not in self._name_of:
            self._block_of[name] = block
            self._name_of[block] = name

    def publish_beginning(self, block: int, name: BlockName) -> None:
        """Make the computed beginning of a block findable, for who copies it: it may go on otherwise for others."""
        assert self._references[block] > 0, f"block {block} published while free"
        if name not in self._begun:
            self._begun[name] = block
            self._begins.setdefault(block, []).append(name)

    def beginning(self, name: BlockName) -> int | None:
        """A block that begins with the tokens of this name; nothing is taken."""
        return self._begun.get(name)

    def release(self, blocks: Sequence[int]) -> None:
        """Give the blocks of a sequence back.  No block is worth less than those that were computed on top of it, and
        among equals a sequence's last go first, so that chains are evicted from their ends."""
        worth = 0.0
        for at in reversed(range(len(blocks))):
            block = blocks[at]
            assert self._references[block] > 0, f"block {block} released twice"
            name = self._name_of.get(block) or next(iter(self._begins.get(block, ())), None)
            if name is not None:
                worth = self._priority[block] = max(worth, self._priority[block], self._worth(name, at))
            self._references[block] -= 1
            if self._references[block] == 0:
                self._free.add(block, NOTHING_TO_FIND if name is None else self._priority[block])

    def _worth(self, name: BlockName, at: int) -> float:
        """The priority of a sequence's block number `at`; the least where nobody asked for it, as for an answer."""
        frequency = self._popularity.of(name) if self._keeps_popular else 0.0
        return self._clock + frequency * (1 + self._block_cost * at) if frequency else 0.0

    def forget(self) -> None:
        """Un-publish everything: after a failed step, or when what is stored can't be trusted."""
        for index in (self._block_of, self._name_of, self._begun, self._begins):
            index.clear()

    def check(self) -> None:
        """Raise AssertionError if the pool contradicts itself (for tests and idle moments)."""
        for block, references in enumerate(self._references):
            if block != NULL_BLOCK:
                assert references >= 0
                assert (references == 0) == (block in self._free), f"block {block}: {references} references"
        assert NULL_BLOCK not in self._free
        assert self._references[NULL_BLOCK] == 0
        assert self._name_of == {block: name for name, block in self._block_of.items()}
        assert self._begun == {name: block for block, names in self._begins.items() for name in names}
