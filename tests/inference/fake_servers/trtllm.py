"""trtllm-serve: refuses fields that it does not know; flat errors; metrics are JSON; any model's name will do."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from tests.inference.fake_servers.openai import Faithful, Refusal, flat
from tests.inference.fake_upstream import Request, Wire

_SAMPLING = {
    "add_special_tokens", "best_of", "detokenize", "disaggregated_params", "early_stopping", "frequency_penalty",
    "ignore_eos", "include_stop_str_in_output", "length_penalty", "logit_bias", "logprobs", "lora_request",
    "max_tokens", "min_p", "min_tokens", "model", "n", "presence_penalty", "priority", "prompt_ignore_length",
    "repetition_penalty", "response_format", "seed", "skip_special_tokens", "spaces_between_special_tokens", "stop",
    "stop_token_ids", "stream", "stream_options", "temperature", "thinking_token_budget", "top_k", "top_p", "top_p_min",
    "truncate_prompt_tokens", "use_beam_search", "user", "conversation_params",
}  # fmt: skip
COMPLETION_FIELDS = _SAMPLING | {"prompt", "echo", "suffix", "return_context_logits"}
CHAT_FIELDS = (_SAMPLING - {"detokenize"}) | {
    "messages", "prompt_token_ids", "max_completion_tokens", "top_logprobs", "tools", "tool_choice", "echo",
    "parallel_tool_calls", "reasoning_effort", "thinking", "add_generation_prompt", "documents", "chat_template",
    "chat_template_kwargs", "media_io_kwargs", "cache_salt", "agent_hierarchy", "mm_processor_kwargs",
}  # fmt: skip
FORMATS = {"text", "json", "json_schema", "json_object", "regex", "ebnf", "structural_tag"}


@dataclass(slots=True, kw_only=True)
class TRTLLM(Faithful):
    salts: list[str | None] = field(default_factory=list)

    async def other(self, wire: Wire, request: Request) -> None:
        match request.path:
            case "/health":
                await wire.reply(200, b"")
            case "/metrics":
                await wire.reply(200, [{"iter": 1, "numActiveRequests": 0, "kvCacheStats": {"usedNumBlocks": 0}}])
            case "/version":
                await wire.reply(200, {"version": "1.3.0"})
            case _:
                await Faithful.other(self, wire, request)

    def card(self) -> dict[str, Any]:
        return {"id": self.model, "object": "model", "created": 1, "owned_by": "tensorrt_llm"}

    def error(self, status: int, message: str, kind: str) -> dict[str, Any]:
        return flat(status, message, kind)

    def refuse(self, body: dict[str, Any], chat: bool, prompt_tokens: int) -> Refusal | None:
        known = CHAT_FIELDS if chat else COMPLETION_FIELDS
        if unknown := sorted(body.keys() - known):
            message = f"[{{'type': 'extra_forbidden', 'loc': ('body', '{unknown[0]}'), 'msg': 'Extra inputs are not "
            return 400, {"error": message + "permitted'}]"}
        priority = body.get("priority")
        if priority is not None and not 0 <= priority <= 1:
            return 400, {"error": "[{'type': 'less_than_equal', 'loc': ('body', 'priority')}]"}
        if body.get("response_format", {"type": "text"})["type"] not in FORMATS:
            return 400, {"error": "[{'type': 'literal_error', 'loc': ('body', 'response_format', 'type')}]"}
        self.salts.append(body.get("cache_salt"))
        return Faithful.refuse(self, body | {"model": self.model}, chat, prompt_tokens)

    def usage(self, prompt_tokens: int, said: int) -> dict[str, Any]:
        details = {"cached_tokens": self.cached_tokens or 0}
        total = prompt_tokens + said
        return {
            "prompt_tokens": prompt_tokens,
            "total_tokens": total,
            "completion_tokens": said,
            "prompt_tokens_details": details,
        }
