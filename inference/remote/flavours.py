"""Which tensors a model behind Triton takes and gives: one value for each of the usual ones.

Triton makes an input of each field that the model has one for, and passes the others on as parameters, which nobody
reads: what a flavour has no field for is therefore refused, never sent.  Read from TensorRT-LLM's
`triton_backend/all_models/{inflight_batcher_llm/ensemble,llmapi/tensorrt_llm}/config.pbtxt` and from the vLLM backend's
`src/model.py` and `src/utils/request.py`, all of 2026.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import msgspec

from inference.backend import Constraint, Sampling
from inference.config import FlavourName
from inference.errors import RequestRefused

_UNSENT = Sampling()


class Flavour(msgspec.Struct, frozen=True, kw_only=True):
    """`fields` beside the text: of the sampling, and whether it streams.  `text_mode`: whether an event's text is the
    whole answer so far.  `needs`: inputs by which the model is recognised.  `tells_reason`: why an answer ended is
    told; `tells_counts`, how many tokens there were.  `keeps_stop`: stop strings stay in the text.  `lacks`: fields of
    `Sampling` that the model has no input for."""

    fields: Callable[[Sampling, bool], dict[str, Any]]
    text_mode: Literal["delta", "cumulative"]
    needs: tuple[str, ...]
    tells_reason: bool
    tells_counts: bool
    keeps_stop: bool = False
    lacks: frozenset[str] = frozenset()


def check(flavour: Flavour, sampling: Sampling) -> None:
    """Raises RequestRefused for what the model has no input for."""
    if sampling.logprobs is not None:
        raise RequestRefused("logprobs are not read from remote servers")
    for name in flavour.lacks:
        if getattr(sampling, name) != getattr(_UNSENT, name):
            raise RequestRefused(f"this inference server's model has no input for {name}: leave it out")


def _ensemble(sampling: Sampling, streams: bool) -> dict[str, Any]:
    fields: dict[str, Any] = {
        "max_tokens": sampling.max_tokens,
        "stream": streams,
        "exclude_input_in_output": True,
        "bad_words": "",
        "stop_words": list(sampling.stop) or "",
        "return_num_input_tokens": True,
        "return_num_output_tokens": True,
        **_choice(sampling),
    }
    for name in ("repetition_penalty", "presence_penalty", "frequency_penalty", "seed"):
        if (value := getattr(sampling, name)) != getattr(_UNSENT, name):
            fields[name] = value
    if sampling.ignore_eos:
        fields["min_tokens"] = sampling.max_tokens
    if sampling.constraint is not None:
        guide = {"json_object": "json", "json_schema": "json_schema", "regex": "regex"}[sampling.constraint.kind]
        fields |= {"guided_decoding_guide_type": guide, "guided_decoding_guide": sampling.constraint.value}
    return fields


def _llmapi(sampling: Sampling, streams: bool) -> dict[str, Any]:
    chosen: dict[str, Any] = {"max_tokens": sampling.max_tokens, "exclude_input_from_output": True, **_choice(sampling)}
    for name in ("presence_penalty", "frequency_penalty", "seed"):
        if (value := getattr(sampling, name)) != getattr(_UNSENT, name):
            chosen[name] = value
    if sampling.stop:
        chosen["stop"] = list(sampling.stop)
    fields = {f"sampling_param_{name}": value for name, value in chosen.items()}
    return {**fields, "streaming": streams, "return_finish_reason": True}


def _choice(sampling: Sampling) -> dict[str, Any]:
    """TensorRT-LLM's way to be greedy, in all of its versions, is to keep one token; 0 is no temperature to it."""
    if sampling.temperature == 0:
        return {"top_k": 1}
    fields: dict[str, Any] = {"temperature": float(sampling.temperature), "top_p": float(sampling.top_p)}
    return fields | ({"top_k": sampling.top_k} if sampling.top_k else {})


def _vllm(sampling: Sampling, streams: bool) -> dict[str, Any]:
    """vLLM's own SamplingParams, as a string of JSON: a name that they lack fails the request."""
    chosen: dict[str, Any] = {"max_tokens": sampling.max_tokens, "temperature": float(sampling.temperature)}
    names = ("top_p", "top_k", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty", "seed")
    for name in (*names, "ignore_eos"):
        if (value := getattr(sampling, name)) != getattr(_UNSENT, name):
            chosen[name] = value
    if sampling.stop:
        chosen["stop"] = list(sampling.stop)
    if sampling.stop_token_ids:
        chosen["stop_token_ids"] = list(sampling.stop_token_ids)
    if sampling.constraint is not None:
        chosen["structured_outputs"] = msgspec.json.encode(_structured(sampling.constraint)).decode()
    return {
        "stream": streams,
        "sampling_parameters": msgspec.json.encode(chosen).decode(),
        "exclude_input_in_output": True,
        "return_finish_reason": True,
        "return_num_input_tokens": True,
        "return_num_output_tokens": True,
    }


def _structured(constraint: Constraint) -> dict[str, Any]:
    match constraint.kind:
        case "json_schema":
            return {"json": msgspec.json.decode(constraint.value)}
        case "json_object":
            return {"json_object": True}
        case "regex":
            return {"regex": constraint.value}


FLAVOURS: dict[FlavourName, Flavour] = {
    # Stop words are matched as tokens and stay in the text.
    "trtllm": Flavour(
        fields=_ensemble,
        text_mode="delta",
        needs=("text_input", "max_tokens", "stop_words"),
        tells_reason=False,
        tells_counts=True,
        keeps_stop=True,
        lacks=frozenset({"min_p", "logit_bias", "stop_token_ids"}),
    ),
    "llmapi": Flavour(
        fields=_llmapi,
        text_mode="cumulative",
        needs=("text_input", "sampling_param_max_tokens"),
        tells_reason=True,
        tells_counts=False,
        lacks=frozenset({"min_p", "repetition_penalty", "logit_bias", "stop_token_ids", "ignore_eos", "constraint"}),
    ),
    "vllm": Flavour(
        fields=_vllm,
        text_mode="delta",
        needs=("text_input", "sampling_parameters"),
        tells_reason=True,
        tells_counts=True,
        lacks=frozenset({"logit_bias"}),
    ),
}
