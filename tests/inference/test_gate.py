"""Whether a model may reuse documents at other places is asked of the model itself."""

from __future__ import annotations

import re

import pytest
import torch

from inference.engine import EngineOptions
from inference.engine.gate import SHARES, allowed_reuse
from inference.engine.lead import lead_of
from inference.engine.segments import Segments
from inference.models import Llama, open_checkpoint
from inference.models.config import ModelError
from tests.inference.integer_model import TokensAsText
from tests.inference.tiny import save_model

BLOCKS = 100


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return Llama(open_checkpoint(str(save_model(tmp_path_factory.mktemp("model")))), torch.float32)


def encode(text: str) -> list[int]:
    return [3 + sum(map(ord, word)) % 500 for word in re.findall(r"\w+|\W", text)]


def ask(model, context: int = 1024, blocks: int = BLOCKS):
    options = EngineOptions(
        identity="tiny", blocks=blocks, max_context_tokens=context, eos_token_ids=frozenset({0}), order="planned"
    )
    lead = lead_of("", encode, 200)
    return allowed_reuse(model, model.new_cache(blocks), options, encode, TokensAsText, len(model.layers), lead)


def test_a_model_that_bears_it(model):
    allowed = ask(model)
    assert allowed.share in SHARES
    assert 0 < allowed.layers.stop <= len(model.layers)


def test_copies_that_are_wrong_are_noticed(model, monkeypatch):
    cache = model.new_cache(BLOCKS)
    for layer in cache:
        for tensor in layer[:2]:
            tensor.normal_()
    monkeypatch.setattr(model, "new_cache", lambda blocks: cache)
    monkeypatch.setattr(model, "splice", lambda cache, source, target, by: None)
    with pytest.raises(ModelError, match="document_reuse"):
        ask(model)


def test_more_computed_again_must_differ_less(model, monkeypatch):
    """As where what is computed again ends up at other places than it should."""
    splice = Segments.splice

    def off(self, tokens, blocks, computed, reuse):
        splice(self, tokens, blocks, computed, reuse)
        reuse.skips = [(a, b) for a, b in reuse.skips if (a + b) % 2] if self.share < 1 else [(computed, reuse.tail)]

    monkeypatch.setattr(Segments, "splice", off)
    with pytest.raises(ModelError, match="does not work with this model"):
        ask(model)


def test_who_can_not_do_it_is_told_so(model):
    class Other:
        layers = model.layers
        new_cache = model.new_cache

    with pytest.raises(ModelError, match="own models"):
        ask(Other())
    with pytest.raises(ModelError, match="too short"):
        ask(model, context=200)


def test_a_cache_that_is_too_small_is_told_of_and_waited_for_by_nobody(model):
    for blocks in (40, 50, 60, 70):
        with pytest.raises(ModelError, match="too small"):
            ask(model, blocks=blocks)


def test_a_lead_of_the_operators_own(tmp_path):
    path = tmp_path / "pages.txt"
    path.write_text("These are pages. " * 200, encoding="utf-8")
    lead = lead_of(str(path), encode)
    assert list(lead) == encode(path.read_text(encoding="utf-8").rstrip() + "\n\n")[-len(lead) :]
    assert len(lead_of("", encode, 100)) == 100
    path.write_text("Too little.", encoding="utf-8")
    with pytest.raises(ModelError, match="document_lead.*tokens at least"):
        lead_of(str(path), encode)
    with pytest.raises(ModelError, match="document_lead.*can't be read"):
        lead_of(str(tmp_path / "nothing"), encode)
