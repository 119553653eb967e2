"""Answers that must be JSON of a schema, or match a regular expression: llguidance says which tokens may come next.

Needs the extra `refdesk[structured]`.
"""

from __future__ import annotations

import json
import threading

import numpy as np
import torch

from inference.backend import Constraint
from inference.errors import RequestRefused

# Small models that may write white space write nothing else; one blank is what they are used to.
COMPACT = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}


class Grammars:
    """Makes matchers over one tokenizer, whose vocabulary is read once, when the first is asked for."""

    def __init__(self, tokenizer, vocab_size: int, eos_token_ids: tuple[int, ...]):
        """`tokenizer`: a fast Hugging Face tokenizer; `vocab_size`: the width of the logits."""
        self._tokenizer = tokenizer
        self._vocab_size = vocab_size
        self._eos_token_ids = eos_token_ids
        self._vocabulary = None
        self._lock = threading.Lock()

    def open(self, constraint: Constraint) -> Matcher:
        """A matcher at its beginning.  Raises RequestRefused where the constraint can't be one; may take a second."""
        try:
            import llguidance
            from llguidance import hf
        except ImportError:
            raise RequestRefused("structured answers need llguidance: pip install 'refdesk[structured]'") from None
        with self._lock:
            if self._vocabulary is None:
                self._vocabulary = hf.from_tokenizer(self._tokenizer, self._vocab_size, list(self._eos_token_ids))
        try:
            match constraint.kind:
                case "regex":
                    grammar = llguidance.LLMatcher.grammar_from_regex(constraint.value)
                case "json_object":
                    grammar = llguidance.LLMatcher.grammar_from_json_schema('{"type": "object"}', COMPACT)
                case "json_schema":
                    json.loads(constraint.value)
                    grammar = llguidance.LLMatcher.grammar_from_json_schema(constraint.value, COMPACT)
            matcher = llguidance.LLMatcher(self._vocabulary, grammar)
        except ValueError as error:
            raise RequestRefused(f"the {constraint.kind} can't be followed: {_first_line(error)}") from None
        if matcher.is_error():
            raise RequestRefused(f"the {constraint.kind} can't be followed: {_first_line(matcher.get_error())}")
        return Matcher(matcher)


class Matcher:
    """How far one answer is along its grammar (`inference.engine.sequence.Grammar`)."""

    def __init__(self, matcher):
        self._matcher = matcher

    def forbid(self, logits: torch.Tensor) -> None:
        bits = np.unpackbits(np.frombuffer(self._matcher.compute_bitmask(), dtype=np.uint8), bitorder="little")
        allowed = torch.from_numpy(bits[: len(logits)].astype(bool))
        logits[: len(allowed)].masked_fill_(~allowed, -torch.inf)
        logits[len(allowed) :] = -torch.inf

    def accept(self, token: int) -> bool:
        if not self._matcher.consume_token(token):
            raise ValueError(f"token {token} breaks the grammar: {_first_line(self._matcher.get_error())}")
        return self._matcher.is_stopped()


def _first_line(error: object) -> str:
    return str(error).strip().partition("\n")[0][:300]
