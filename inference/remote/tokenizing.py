"""The model's own tokenizer beside a remote server: counts prompts, and writes conversations out as text."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import TypeVar

from inference.errors import RequestRefused, Unavailable
from inference.prompt import ChatPrompt, Prompt, length_of

LONG_PROMPT_CHARACTERS = 20_000  # tokenising more than this takes milliseconds that the event loop has not got
Result = TypeVar("Result")


class ModelTokenizer:
    """`source`: a Hugging Face folder or id, or a `.gguf` file.  Raises Unavailable if there is none."""

    def __init__(self, source: str):
        from inference.models import ModelError
        from inference.models.tokenizer import load_tokenizer

        try:
            self._tokenizer = load_tokenizer(Path(source).expanduser())
        except ModelError as error:
            raise Unavailable(f"the backend's tokenizer can't be loaded: {error}") from error

    async def render(self, prompt: Prompt) -> str:
        return await _aside(prompt, self._render)

    async def count(self, prompt: Prompt) -> int:
        """Tokens of the prompt as the server makes them of `render`'s text."""
        return await _aside(prompt, lambda prompt: len(self._encode(self._render(prompt))))

    def count_text(self, text: str) -> int:
        return len(self._tokenizer.backend_tokenizer.encode(text, add_special_tokens=False).ids)

    def _render(self, prompt: Prompt) -> str:
        """The text of a prompt for a server that knows no messages.

        A server can't tell the template's special tokens from such as are written in a text, so those of the texts
        are broken up by a space.  The template's first token is left out where the server's tokenizer adds it.
        """
        if not isinstance(prompt, ChatPrompt):
            return prompt.text
        messages = [{"role": each.role, "content": self._broken_up(each.text)} for each in prompt.messages]
        try:
            text = self._tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        except Exception as error:  # templates raise whatever they like
            raise RequestRefused(f"the model's chat template refuses the conversation: {error}") from error
        first = self._tokenizer.bos_token
        if first and self._encode("")[:1] == [self._tokenizer.bos_token_id]:
            text = text.removeprefix(first)
        return text + self._broken_up(prompt.reply_prefix)

    def _encode(self, text: str) -> list[int]:
        return self._tokenizer.backend_tokenizer.encode(text).ids

    def _broken_up(self, text: str) -> str:
        return self._special.sub(lambda found: f"{found[0][0]} {found[0][1:]}", text)

    @cached_property
    def _special(self) -> re.Pattern[str]:
        special = [str(token) for token in self._tokenizer.added_tokens_decoder.values() if token.special]
        return re.compile("|".join(map(re.escape, sorted(special, key=len, reverse=True))) or r"(?!)")


async def _aside(prompt: Prompt, work: Callable[[Prompt], Result]) -> Result:
    if length_of(prompt) < LONG_PROMPT_CHARACTERS:
        return work(prompt)
    return await asyncio.to_thread(work, prompt)
