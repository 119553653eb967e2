"""Logits against `transformers` on the same weights, and models that can't be loaded."""

from __future__ import annotations

import json

import pytest
import torch

from inference.models import Llama, ModelError, open_checkpoint
from inference.parity import logits_of, transformers_model
from tests.inference.tiny import FAMILIES, reference_model, save_model


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_equal_transformers(family, tmp_path):
    reference = reference_model(family)
    reference.save_pretrained(tmp_path)
    model = Llama(open_checkpoint(str(tmp_path)), torch.float32)
    ids = torch.randint(0, 512, (512,), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        wanted = reference(ids[None]).logits[0]
    for chunk in (512, 37, 1):
        assert (logits_of(model, ids, chunk) - wanted).abs().max() < 1e-4
    model.rotary._sin.neg_()
    assert (logits_of(model, ids, 512) - wanted).abs().max() > 100 * 1e-4, "the tolerance would miss a wrong rotation"


@pytest.mark.slow
def test_smollm2_equals_transformers_on_the_same_weights():
    checkpoint = open_checkpoint("smollm2")
    model = Llama(checkpoint, torch.float32)
    reference = transformers_model(checkpoint)
    ids = torch.randint(3, 49000, (512,), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        wanted = reference(ids[None]).logits[0]
    got = logits_of(model, ids, 200)
    assert (got - wanted).abs().max() < 1e-3
    half = logits_of(Llama(checkpoint, torch.bfloat16), ids, 200)
    confident = wanted.topk(2).values.diff(dim=-1).abs().squeeze(-1) > 1.0
    assert (half.argmax(-1) == wanted.argmax(-1))[confident].all()


def test_a_missing_or_broken_model_is_named(tmp_path):
    with pytest.raises(ModelError, match="no model at './nowhere'"):
        open_checkpoint("./nowhere")
    with pytest.raises(ModelError, match=r"config\.json"):
        open_checkpoint(str(tmp_path))
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gpt2"}))
    with pytest.raises(ModelError, match="'gpt2' is not supported"):
        open_checkpoint(str(tmp_path))
    broken = tmp_path / "broken.gguf"
    broken.write_bytes(b"GGUF" + bytes(100))
    with pytest.raises(ModelError, match="GGUF"):
        open_checkpoint(str(broken))


def test_damaged_weights_are_named(tmp_path):
    save_model(tmp_path)
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(ModelError, match="damaged"):
        open_checkpoint(str(tmp_path))
    weights.unlink()
    with pytest.raises(ModelError, match="no safetensors"):
        open_checkpoint(str(tmp_path))
