"""How servers with OpenAI's API differ in what they take: one value for each.  BACKENDS.md tells the same in words.

Read from vLLM's `entrypoints/openai/*/protocol.py`, TensorRT-LLM's `serve/openai_protocol.py`, SGLang's
`entrypoints/openai/protocol.py` and llama.cpp's `tools/server/README.md`, all of 2026.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import msgspec

from inference.backend import Constraint, Priority, Sampling
from inference.config import DialectName
from inference.errors import RequestRefused

CHAT, COMPLETIONS = "/chat/completions", "/completions"
_FILTERS: dict[str, float] = {
    "top_p": 1.0,
    "top_k": 0,
    "min_p": 0.0,
    "repetition_penalty": 1.0,
    "presence_penalty": 0.0,
    "frequency_penalty": 0.0,
}
_UNSENT = Sampling()


class Dialect(msgspec.Struct, frozen=True, kw_only=True):
    """What one kind of server takes beyond OpenAI's own fields.

    `off`: the value that switches a filter off, for those that servers fill in themselves where it is missing (from
    the model's generation_config.json, or from defaults of their own).  `names`: fields that are called differently.
    `lacks`: fields of `Sampling` that are ignored without a word, so that we refuse them.  `regex`: the fields that ask
    for a regular expression.  `priorities`: of a server that schedules by them.  `salted`: routes that take
    `cache_salt`.  `continues`: the fields that have a reply continued, None where none do.  `health`: a route beside
    the API.  `knows_model`: it refuses models that it hasn't.  `counts`: the route that counts the tokens of a prompt,
    "tokenize" for a prompt or messages, "template" for text after "/apply-template".
    """

    off: dict[str, float] = {}
    names: dict[str, str] = {}
    lacks: frozenset[str] = frozenset()
    regex: Callable[[str], dict[str, Any]] | None = None
    priorities: dict[Priority, float] | None = None
    salted: frozenset[str] = frozenset()
    continues: dict[str, Any] | None = None
    health: str | None = None
    knows_model: bool = True
    counts: str | None = None


DIALECTS: dict[DialectName, Dialect] = {
    # Only what the request needs, since strict servers refuse fields that they don't know.
    "generic": Dialect(
        regex=lambda value: {"structured_outputs": {"regex": value}},
        continues={"add_generation_prompt": False, "continue_final_message": True},
    ),
    # Lower priorities go first, and any but 0 is an error unless the server schedules by them.
    "vllm": Dialect(
        off={"top_p": 1.0, "top_k": 0, "min_p": 0.0, "repetition_penalty": 1.0},
        regex=lambda value: {"structured_outputs": {"regex": value}},
        priorities={"interactive": 0, "batch": 1},
        salted=frozenset({CHAT, COMPLETIONS}),
        continues={"add_generation_prompt": False, "continue_final_message": True},
        health="/health",
        counts="tokenize",
    ),
    # Refuses any field that it doesn't know.  Higher priorities go first, from 0 to 1, 0.5 where none is given.
    "trtllm": Dialect(
        off={"top_p": 1.0, "top_k": 0, "min_p": 0.0, "repetition_penalty": 1.0},
        regex=lambda value: {"response_format": {"type": "regex", "regex": value}},
        priorities={"interactive": 0.5, "batch": 0.0},
        salted=frozenset({CHAT}),
        health="/health",
        knows_model=False,
    ),
    # Higher priorities go first; those without one come last.
    "sglang": Dialect(
        off={"top_p": 1.0, "top_k": -1, "min_p": 0.0, "repetition_penalty": 1.0},
        regex=lambda value: {"regex": value},
        priorities={"interactive": 1, "batch": 0},
        salted=frozenset({CHAT, COMPLETIONS}),
        continues={"continue_final_message": True},
        health="/health",
        knows_model=False,
        counts="tokenize",
    ),
    # Continues a last message of the assistant's by itself, too, but then repeats it.
    "llamacpp": Dialect(
        off={"top_p": 1.0, "top_k": 0, "min_p": 0.0, "repetition_penalty": 1.0},
        names={"repetition_penalty": "repeat_penalty"},
        lacks=frozenset({"stop_token_ids"}),
        continues={"add_generation_prompt": False, "continue_final_message": True},
        health="/health",
        knows_model=False,
        counts="template",
    ),
}


def sampling_fields(dialect: Dialect, sampling: Sampling) -> dict[str, Any]:
    """The fields that choose tokens.  Raises RequestRefused for what the server can't do."""
    if sampling.logprobs is not None:
        raise RequestRefused("logprobs are not read from remote servers")
    for name in dialect.lacks:
        if getattr(sampling, name) != getattr(_UNSENT, name):
            raise RequestRefused(f"this inference server has no {name}: leave it out")
    fields: dict[str, Any] = {"max_tokens": sampling.max_tokens, "temperature": sampling.temperature}
    for name, off in _FILTERS.items():
        value = getattr(sampling, name)
        if value != off or name in dialect.off:
            fields[dialect.names.get(name, name)] = value if value != off else dialect.off[name]
    if sampling.logit_bias:
        fields["logit_bias"] = {str(token): bias for token, bias in sampling.logit_bias.items()}
    if sampling.stop_token_ids:
        fields["stop_token_ids"] = list(sampling.stop_token_ids)
    if sampling.seed is not None:
        fields["seed"] = sampling.seed
    if sampling.stop:
        fields["stop"] = list(sampling.stop)
    if sampling.ignore_eos:
        fields["ignore_eos"] = True
    return fields | (_format(dialect, sampling.constraint) if sampling.constraint else {})


def _format(dialect: Dialect, constraint: Constraint) -> dict[str, Any]:
    match constraint.kind:
        case "json_object":
            return {"response_format": {"type": "json_object"}}
        case "json_schema":
            schema = {"name": "answer", "schema": msgspec.json.decode(constraint.value)}
            return {"response_format": {"type": "json_schema", "json_schema": schema}}
        case "regex" if dialect.regex is not None:
            return dialect.regex(constraint.value)
    raise RequestRefused("this inference server follows no regular expressions: ask for a JSON schema")
