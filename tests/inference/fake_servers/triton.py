"""Triton: KServe v2 with the generate extension, in front of a model of one of three kinds."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

from tests.inference.fake_servers.script import Script
from tests.inference.fake_upstream import Request, Wire

# Inputs by name; True where the model demands one.
ENSEMBLE = {"text_input": True, "max_tokens": True} | dict.fromkeys(
    (
        "bad_words", "stop_words", "exclude_input_in_output", "end_id", "pad_id", "top_k", "top_p", "temperature",
        "length_penalty", "repetition_penalty", "min_tokens", "presence_penalty", "frequency_penalty", "seed",
        "return_log_probs", "return_num_input_tokens", "return_num_output_tokens", "beam_width", "stream",
        "guided_decoding_guide_type", "guided_decoding_guide",
    ),
    False,
)  # fmt: skip
LLMAPI = {"text_input": True} | dict.fromkeys(
    (
        "streaming", "return_finish_reason", "return_stop_reason", "return_cumulative_logprob", "stop",
        *(
            f"sampling_param_{name}"
            for name in ("best_of", "temperature", "top_k", "top_p", "frequency_penalty", "presence_penalty",
                         "max_tokens", "stop", "seed", "exclude_input_from_output", "return_perf_metrics")
        ),
    ),
    False,
)  # fmt: skip
VLLM_INPUTS = {"text_input": True} | dict.fromkeys(
    (
        "image", "stream", "sampling_parameters", "exclude_input_in_output", "return_finish_reason",
        "return_cumulative_logprob", "return_logprobs", "return_num_input_tokens", "return_num_output_tokens",
    ),
    False,
)  # fmt: skip
SAMPLING_PARAMS = {
    "n", "presence_penalty", "frequency_penalty", "repetition_penalty", "temperature", "top_p", "top_k", "min_p",
    "seed", "stop", "stop_token_ids", "ignore_eos", "max_tokens", "min_tokens", "structured_outputs",
}  # fmt: skip
ARRAYS = {"stop_words", "bad_words", "sampling_param_stop"}
INPUTS = {"trtllm": ENSEMBLE, "llmapi": LLMAPI, "vllm": VLLM_INPUTS}


@dataclass(slots=True, kw_only=True)
class Triton(Script):
    """`count`: tokens of a text, by the tokenizer that the backend has, too.  `parameters` collects the fields that no
    input has the name of: a real model would never have seen them."""

    flavour: Literal["trtllm", "llmapi", "vllm"] = "vllm"
    text_mode: Literal["delta", "cumulative"] = "delta"
    count: Callable[[str], int] = lambda text: len(text.split())
    parameters: set[str] = field(default_factory=set)

    async def __call__(self, wire: Wire, request: Request) -> None:
        model = f"/v2/models/{self.model}"
        match request.path.removeprefix(model) if request.path.startswith(model) else request.path:
            case "/v2/health/ready" | "/v2/health/live" | "/ready":
                await wire.reply(200, b"", "text/plain")
            case "/v2/repository/index":
                await wire.reply(200, [{"name": self.model, "version": "1", "state": "READY"}])
            case "":
                inputs = [{"name": name, "datatype": "BYTES", "shape": [1]} for name in INPUTS[self.flavour]]
                await wire.reply(200, {"name": self.model, "versions": ["1"], "platform": "python", "inputs": inputs})
            case "/generate" | "/generate_stream" as route:
                if request.method != "POST":
                    return await wire.reply(405, b"", "text/plain")
                await self._generate(wire, request.json(), streams=route == "/generate_stream")
            case path if path.startswith("/v2/models/"):
                name = path.split("/")[3]
                await wire.reply(404, {"error": f"Request for unknown model: '{name}' is not found"})
            case _:
                await wire.reply(404, {"error": "Not Found"})

    async def _generate(self, wire: Wire, body: dict[str, Any], streams: bool) -> None:
        inputs = INPUTS[self.flavour]
        self.parameters |= body.keys() - inputs.keys() - {"id", "parameters"}
        if missing := [name for name, demanded in inputs.items() if demanded and name not in body]:
            return await wire.reply(400, {"error": f"expected {missing[0]} input"})
        for name, value in body.items():
            if isinstance(value, list) and (name not in ARRAYS or any(isinstance(each, list) for each in value)):
                return await wire.reply(400, {"error": f"Unable to parse '{name}': attempt to access JSON non-array"})
        problem = self._problem(body, streams)
        if problem is not None and streams:  # the model's own refusal is an event, under the status of an error
            body = b"data: " + json.dumps(problem[1]).encode() + b"\n\n"
            return await wire.reply(problem[0], body, "text/event-stream; charset=utf-8")
        if problem is not None:
            return await wire.reply(*problem)
        responses = self._responses(body)
        if not streams:
            *_, last = responses
            return await wire.reply(200, last)
        await wire.head(Content_Type="text/event-stream; charset=utf-8", Transfer_Encoding="chunked")
        await self.hold_first.wait()
        for said, response in enumerate(responses):
            if said == self.fail_after:
                await wire.event({"error": "engine died"})
                break
            await wire.event(response)
            await self.held(said + 1)
        await wire.end()

    def _problem(self, body: dict[str, Any], streams: bool) -> tuple[int, Any] | None:
        if self.fail_before:
            return 500, {"error": "engine died"}
        if self.flavour == "vllm":
            chosen = json.loads(body.get("sampling_parameters", "{}"))
            if unknown := chosen.keys() - SAMPLING_PARAMS:  # the real one logs it and fails on None
                return 500, {"error": f"Error generating stream: 'NoneType' object has no attribute {unknown}"}
        prompt_tokens = self.count(body["text_input"])
        if prompt_tokens <= self.max_context:
            return None
        says = {
            "trtllm": f"Prompt length ({prompt_tokens}) exceeds maximum input length ({self.max_context}).",
            "llmapi": f"Error generating request: The sum of prompt length ({prompt_tokens}.0), query length (0) "
            f"should not exceed max_num_tokens ({self.max_context})",
            "vllm": f"Error generating stream: The decoder prompt (length {prompt_tokens}) is longer than the maximum "
            f"model length of {self.max_context}.",
        }
        return 500, {"error": says[self.flavour]}

    def _responses(self, body: dict[str, Any]) -> list[dict[str, Any]]:
        said, responses = "", []
        for number, (text, reason) in enumerate(self._answer(body), 1):
            said += text
            shown = said if self.text_mode == "cumulative" else text
            response = {"model_name": self.model, "model_version": "1", "text_output": shown}
            if self.flavour == "trtllm":
                response |= {"sequence_end": False, "sequence_id": 0, "sequence_start": False}
            elif body.get("return_finish_reason"):
                response["finish_reason"] = str(reason)  # "None" while there is none
            if self.flavour != "llmapi" and body.get("return_num_output_tokens"):
                response["num_output_tokens"] = number if self.text_mode == "cumulative" else 1
                response["num_input_tokens"] = self.count(body["text_input"])
            responses.append(response)
        if not body.get("stream", body.get("streaming")):
            whole = said if self.flavour != "vllm" or body.get("exclude_input_in_output") else body["text_input"] + said
            responses = [responses[-1] | {"text_output": whole}]
            if "num_output_tokens" in responses[0]:
                responses[0]["num_output_tokens"] = number
        return responses

    def _answer(self, body: dict[str, Any]):
        match self.flavour:
            case "trtllm":
                stop = body.get("stop_words") or []
                return self.spoken(body["max_tokens"], stop, "min_tokens" in body, keeps_stop=True)
            case "llmapi":
                return self.spoken(
                    body["sampling_param_max_tokens"], body.get("sampling_param_stop") or (), endless=True
                )
            case "vllm":
                chosen = json.loads(body["sampling_parameters"])
                return self.spoken(chosen["max_tokens"], chosen.get("stop") or (), bool(chosen.get("ignore_eos")))
