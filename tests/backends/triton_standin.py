"""A stand-in for a language model, as Triton's Python backend loads it: it takes and gives the tensors of TensorRT-LLM,
of its LLM API or of the vLLM backend, and says words from a list, one token a response.

What is said depends on the prompt alone, in the tokens of the model's own tokenizer.  It ends at a stop string, after
`max_tokens`, when its request is cancelled, and by itself after `OWN_END_TOKENS`.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import threading
import zlib
from dataclasses import dataclass

import numpy as np
import triton_python_backend_utils as pb_utils
from tokenizers import Tokenizer

WORDS = ("Ordnung", "naïve", "漢字", "🙂", "plain", "words", "of", "the", "answer", "flow", "garden", "opens", "nine")
OWN_END_TOKENS = 48
TOKEN_SECONDS = 0.005
SAMPLING_PARAMS = {
    "max_tokens", "temperature", "top_p", "top_k", "min_p", "repetition_penalty", "presence_penalty",
    "frequency_penalty", "seed", "ignore_eos", "stop", "stop_token_ids", "structured_outputs",
}  # fmt: skip
FINAL = pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL


@dataclass
class Asked:
    """`kept_stop`: stop words are matched as tokens and stay in the text, as TensorRT-LLM's ensemble does it."""

    prompt: str
    max_tokens: int
    stop: list[str]
    streams: bool
    endless: bool
    bare: bool  # without the prompt before the answer
    kept_stop: bool = False


@dataclass
class Said:
    """One response: all text so far, what is new, and why this is the last."""

    whole: str
    new: str
    tokens: int
    reason: str | None


class TritonPythonModel:
    def initialize(self, args: dict[str, str]) -> None:
        parameters = json.loads(args["model_config"])["parameters"]
        settings = {name: value["string_value"] for name, value in parameters.items()}
        self.flavour = settings["flavour"]
        self.context_tokens = int(settings["context_tokens"])
        self.tokenizer = Tokenizer.from_file(settings["tokenizer"])
        self.loop = asyncio.new_event_loop()  # as in the models that it stands for, one thread gives the answers
        threading.Thread(target=self.loop.run_forever, daemon=True).start()
        labels = {"model": args["model_name"]}
        gauge, counter = pb_utils.MetricFamily.GAUGE, pb_utils.MetricFamily.COUNTER
        self.families = [  # a metric lives no longer than its family
            pb_utils.MetricFamily(name="standin_running", description="requests", kind=gauge),
            pb_utils.MetricFamily(name="standin_generated_total", description="tokens", kind=counter),
        ]
        self.running, self.generated = (family.Metric(labels=labels) for family in self.families)

    def execute(self, requests: list) -> None:
        for request in requests:
            asyncio.run_coroutine_threadsafe(self.answer(request, request.get_response_sender()), self.loop)

    async def answer(self, request, sender) -> None:
        self.running.increment(1)
        try:
            await self.speak(request, sender)
        except Exception as error:
            self.refuse(sender, f"Error generating stream: {error}")
        finally:
            self.running.increment(-1)

    def refuse(self, sender, message: str, code: str = "INTERNAL") -> None:
        error = pb_utils.TritonError(message, getattr(pb_utils.TritonError, code))
        sender.send(pb_utils.InferenceResponse(error=error), flags=FINAL)

    # ---- one request ---------------------------------------------------------------------------

    async def speak(self, request, sender) -> None:
        if unread := json.loads(request.parameters() or "{}").keys() - {"id"}:  # what nobody reads must not be sent
            return self.refuse(sender, f"no input has the name of {sorted(unread)}", "INVALID_ARG")
        asked = self.read(request)
        prompt_tokens = len(self.tokenizer.encode(asked.prompt).ids)
        if prompt_tokens > self.context_tokens:
            return self.refuse(sender, self.too_long(prompt_tokens))
        for said in self.answers(asked):
            if sender.is_cancelled():
                return self.refuse(sender, "Request was cancelled", "CANCELLED")
            self.generated.increment(1)
            last = said.reason is not None
            if asked.streams or last:
                sender.send(self.response(request, asked, said, prompt_tokens), flags=FINAL if last else 0)
            await asyncio.sleep(TOKEN_SECONDS)

    def read(self, request) -> Asked:
        prompt = scalar(request, "text_input").decode()
        match self.flavour:
            case "trtllm":
                return Asked(
                    prompt,
                    max_tokens=scalar(request, "max_tokens"),
                    stop=texts(request, "stop_words"),
                    streams=bool(scalar(request, "stream")),
                    endless=bool(scalar(request, "min_tokens")),
                    bare=bool(scalar(request, "exclude_input_in_output")),
                    kept_stop=True,
                )
            case "llmapi":
                return Asked(
                    prompt,
                    max_tokens=scalar(request, "sampling_param_max_tokens"),
                    stop=texts(request, "sampling_param_stop"),
                    streams=bool(scalar(request, "streaming")),
                    endless=True,  # it has no input to ask for that
                    bare=bool(scalar(request, "sampling_param_exclude_input_from_output")),
                )
        chosen = json.loads(scalar(request, "sampling_parameters"))
        if unknown := chosen.keys() - SAMPLING_PARAMS:
            raise TypeError(f"Unexpected keyword argument {unknown}")
        return Asked(
            prompt,
            max_tokens=chosen["max_tokens"],
            stop=chosen.get("stop", []),
            streams=bool(scalar(request, "stream")),
            endless=chosen.get("ignore_eos", False),
            bare=bool(scalar(request, "exclude_input_in_output")),
        )

    def answers(self, asked: Asked):
        """A `Said` for each token."""
        start = zlib.crc32(asked.prompt.encode()) % len(WORDS)
        text = "".join(" " + word for word in (*WORDS[start:], *WORDS[:start]))
        spoken = self.tokenizer.encode(text.lstrip()).ids + self.tokenizer.encode(text).ids * (asked.max_tokens // 8)
        limit = asked.max_tokens if asked.endless else min(asked.max_tokens, OWN_END_TOKENS)
        stop_tokens = [self.tokenizer.encode(each).ids for each in asked.stop]
        held = 0 if asked.kept_stop else max((len(each) - 1 for each in asked.stop), default=0)
        shown = ""
        for tokens in itertools.count(1):
            whole = self.tokenizer.decode(spoken[:tokens], skip_special_tokens=False)
            reason = None
            if tokens == limit:
                reason = "length" if tokens == asked.max_tokens else "stop"
            if asked.kept_stop:
                if any(spoken[:tokens][-len(each) :] == each for each in stop_tokens):
                    reason = "stop"
            elif found := [at for each in asked.stop if (at := whole.find(each)) >= 0]:
                whole, reason = whole[: min(found)], "stop"
            if reason is None:
                # Half a character is not said before the other half; the LLM API's whole texts do show it.
                whole = whole if self.flavour == "llmapi" else whole.rstrip("\ufffd")
                whole = whole[: max(0, len(whole) - held)]
            new = whole[len(shown) :]
            shown += new
            yield Said(whole, new, tokens, reason)
            if reason is not None:
                return

    def response(self, request, asked: Asked, said: Said, prompt_tokens: int):
        """With a batch dimension where the model has one."""
        text = said.new if asked.streams and self.flavour != "llmapi" else said.whole
        if not asked.streams and not asked.bare:
            text = asked.prompt + text
        outputs = [tensor("text_output", text)]
        if self.flavour != "trtllm" and scalar(request, "return_finish_reason"):
            outputs.append(tensor("finish_reason", str(said.reason)))
        if self.flavour != "llmapi":
            counts = {"num_input_tokens": prompt_tokens, "num_output_tokens": 1 if asked.streams else said.tokens}
            kind = np.int32 if self.flavour == "trtllm" else np.uint32
            outputs += [number(name, n, kind) for name, n in counts.items() if scalar(request, f"return_{name}")]
        if self.flavour == "trtllm":
            outputs = [pb_utils.Tensor(each.name(), each.as_numpy().reshape(1, 1)) for each in outputs]
        return pb_utils.InferenceResponse(output_tensors=outputs)

    def too_long(self, prompt_tokens: int) -> str:
        """As the three say it."""
        match self.flavour:
            case "trtllm":
                return f"Prompt length ({prompt_tokens}) exceeds maximum input length ({self.context_tokens})."
            case "llmapi":
                return (
                    f"Error generating request: The sum of prompt length ({prompt_tokens}.0), query length (0) should "
                    f"not exceed max_num_tokens ({self.context_tokens})"
                )
        return (
            f"Error generating stream: The decoder prompt (length {prompt_tokens}) is longer than the maximum model "
            f"length of {self.context_tokens}."
        )


def scalar(request, name: str):
    """A Python value; None where the request has no such input."""
    found = pb_utils.get_input_tensor_by_name(request, name)
    return None if found is None else found.as_numpy().reshape(-1).tolist()[0]


def texts(request, name: str) -> list[str]:
    found = pb_utils.get_input_tensor_by_name(request, name)
    return [] if found is None else [each.decode() for each in found.as_numpy().reshape(-1) if each]


def tensor(name: str, text: str):
    return pb_utils.Tensor(name, np.array([text.encode()], dtype=np.object_))


def number(name: str, value: int, kind):
    return pb_utils.Tensor(name, np.array([value], dtype=kind))
