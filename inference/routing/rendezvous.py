"""Who is at home where, without asking anybody: weighted rendezvous hashing.

Every gateway computes the same order of replicas for the same key; a replica that comes or goes moves only the keys
that are its own (Thaler and Ravishankar 1998; weights as -w / ln h, Schindelhauer and Schomaker 2005).
"""

from __future__ import annotations

import math
from hashlib import blake2b

_MOST = 2.0**52  # what a float can tell from 1 when half is added


def claim(key: bytes, name: str, weight: float = 1.0) -> float:
    """How strongly the replica `name` claims `key`; the largest claim is at home.  `weight` is its share of all keys,
    over those of the others."""
    return -weight / math.log(fraction(key + name.encode()))


def fraction(key: bytes) -> float:
    """Evenly in (0, 1)."""
    return ((int.from_bytes(blake2b(key, digest_size=8).digest(), "little") >> 12) + 0.5) / _MOST
