"""Prompts to token ids: every segment on its own, the model's template around them."""

from __future__ import annotations

import hashlib
import logging
import os
import tempfile
import threading
from array import array
from collections import OrderedDict
from collections.abc import Sequence
from itertools import takewhile
from pathlib import Path

from tokenizers import Tokenizer

from inference.engine.lookup import TokenText
from inference.engine.ordering import Document, Parts
from inference.models.config import ModelError
from inference.prompt import ChatPrompt, Prompt, TextPrompt

log = logging.getLogger(__name__)

_MARK = "\x02refdesk-message-{}\x03"  # stands for a message's text while the template is rendered
RANKING = "The documents above by relevance, the best first: {}.\n\n"


class PromptEncoder:
    """Encodes prompts for one model.

    The chat template is rendered once per shape of conversation with marks in place of the texts; what lies
    between the marks is the template's own text, where special tokens count.  Message texts are data: special
    tokens written in them are encoded as plain text.  Documents are tokenised once and remembered.  Any thread may
    encode.
    """

    def __init__(self, tokenizer, remember_tokens: int = 500_000, tells_ranking: bool = False):
        """`tokenizer`: a fast Hugging Face tokenizer.  `remember_tokens`: how many tokens of documents are kept,
        about 8 bytes each with their text, and 200 once an answer has looked for itself in them.  `tells_ranking`:
        documents that stand in another order than that of relevance are followed by a line that says so."""
        self.hugging_face = tokenizer
        self.tokenizer: Tokenizer = tokenizer.backend_tokenizer
        self._plain = Tokenizer.from_str(self.tokenizer.to_str())
        self._plain.encode_special_tokens = True
        self._remembered: OrderedDict[str, TokenText] = OrderedDict()
        self._remembered_tokens = 0
        self._remember_tokens = remember_tokens
        self._tells_ranking = tells_ranking
        self._lock = threading.Lock()
        self._glue: dict[tuple[str, ...], list[list[int]]] = {}

    @property
    def has_template(self) -> bool:
        return bool(self.hugging_face.chat_template)

    def encode(self, prompt: Prompt) -> list[int]:
        """The prompt's tokens, its documents by relevance.  Raises ModelError where the model's template can't take
        it."""
        return by_relevance(self.encode_texts(prompt)[0])

    def encode_texts(self, prompt: Prompt) -> tuple[list[int] | Parts, list[TokenText]]:
        """The prompt's tokens, in parts where there are documents to put in order, and those of its texts one by one,
        the last first: what an answer may quote."""
        match prompt:
            case TextPrompt(text=text):
                ids = array("i", self.tokenizer.encode(text).ids)
                return list(ids), [TokenText(ids)]
            case ChatPrompt():
                return self._encode_chat(prompt)

    def _encode_chat(self, prompt: ChatPrompt) -> tuple[list[int] | Parts, list[TokenText]]:
        glue = self._template(tuple(message.role for message in prompt.messages))
        pieces: list[Sequence[int] | TokenText] = [glue[0]]  # a text where it is a document
        texts = []
        for message, after in zip(prompt.messages, glue[1:], strict=True):
            for segment in message.segments:
                text = self._encode_segment(segment.text, remember=segment.kind in ("document", "system"))
                pieces.append(text if segment.kind == "document" else text.tokens)
                if message.role != "system":
                    texts.append(text)
            pieces.append(after)
        if prompt.reply_prefix:
            pieces.append(self._plain.encode(prompt.reply_prefix, add_special_tokens=False).ids)
        return self._in_parts(pieces), texts[::-1]

    def _in_parts(self, pieces: list[Sequence[int] | TokenText]) -> list[int] | Parts:
        """Documents that stand side by side may change places; of several such runs the first one's do."""

        def joined(some: list[Sequence[int] | TokenText]) -> list[int]:
            return [token for piece in some for token in (piece.tokens if isinstance(piece, TokenText) else piece)]

        first = next((i for i, piece in enumerate(pieces) if isinstance(piece, TokenText)), len(pieces))
        documents = list(takewhile(lambda piece: isinstance(piece, TokenText), pieces[first:]))
        if len(documents) < 2:
            return joined(pieces)
        tail = joined(pieces[first + len(documents) :])
        hint = self._ranking if self._tells_ranking else None
        return Parts(joined(pieces[:first]), tuple(Document(d.key, d.tokens) for d in documents), tail, hint)

    def _ranking(self, order: tuple[int, ...]) -> list[int]:
        """A line that says where the documents of most relevance stand, `order` being their ranks."""
        places = ", ".join(str(order.index(rank) + 1) for rank in range(len(order)))
        return self._plain.encode(RANKING.format(places), add_special_tokens=False).ids

    def _encode_segment(self, text: str, remember: bool) -> TokenText:
        with self._lock:
            known = self._remembered.get(text)
            if known is not None:
                self._remembered.move_to_end(text)
                return known
        ids = array("i", self._plain.encode(text, add_special_tokens=False).ids)
        encoded = TokenText(ids)
        # What is longer than a hundredth of the room is no passage: it would only push passages out.
        if remember and len(ids) * 100 <= self._remember_tokens:
            with self._lock:
                if text not in self._remembered:
                    self._remembered[text] = encoded
                    self._remembered_tokens += len(ids)
                while self._remembered_tokens > self._remember_tokens:
                    _, forgotten = self._remembered.popitem(last=False)
                    self._remembered_tokens -= len(forgotten.tokens)
        return encoded

    def _template(self, roles: tuple[str, ...]) -> list[list[int]]:
        """Token ids of the template's own text before, between and after the messages' texts."""
        if roles not in self._glue:
            marks = [_MARK.format(i) for i in range(len(roles))]
            messages = [{"role": role, "content": mark} for role, mark in zip(roles, marks, strict=True)]
            try:
                text = self.hugging_face.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
                pieces = []
                for mark in marks:
                    piece, found, text = text.partition(mark)
                    if not found:
                        raise ModelError("the model's chat template drops or reorders messages: " + ", ".join(roles))
                    pieces.append(piece)
            except ModelError:
                raise
            except Exception as error:  # templates raise whatever they like
                raise ModelError(f"the model's chat template refuses the roles {', '.join(roles)}: {error}") from error
            if len(self._glue) > 256:
                self._glue.clear()
            self._glue[roles] = [
                self.tokenizer.encode(piece, add_special_tokens=False).ids for piece in [*pieces, text]
            ]
        return self._glue[roles]


def by_relevance(encoded: list[int] | Parts) -> list[int]:
    """The tokens of a prompt whose documents stand in the order in which they were given."""
    return encoded.tokens(encoded.ranks) if isinstance(encoded, Parts) else encoded


def load_tokenizer(path: Path):
    """The fast Hugging Face tokenizer of a model folder or GGUF file.

    Converting a GGUF vocabulary takes seconds, so the result is kept in the user's cache, named by the file's
    identity.
    """
    from transformers import AutoTokenizer

    try:
        if path.suffix != ".gguf":
            return AutoTokenizer.from_pretrained(path)
        kept = _cache_of(path)
        if (kept / "tokenizer.json").exists():
            return AutoTokenizer.from_pretrained(kept)
        tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    except (OSError, ValueError, KeyError) as error:
        raise ModelError(f"the tokenizer of {path} can't be loaded: {error}") from error
    try:
        kept.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=kept.parent) as folder:
            tokenizer.save_pretrained(Path(folder) / "tokenizer")
            os.rename(Path(folder) / "tokenizer", kept)
    except OSError as error:
        log.info("the converted tokenizer is not kept: %s", error)
    return tokenizer


def _cache_of(path: Path) -> Path:
    from transformers import __version__

    stat = path.stat()
    identity = f"{path.resolve()}\0{stat.st_size}\0{stat.st_mtime_ns}\0{__version__}"
    base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "refdesk" / "tokenizers"
    return base / hashlib.sha256(identity.encode()).hexdigest()[:16]
