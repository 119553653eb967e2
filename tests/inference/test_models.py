"""Logits against `transformers` on the same weights, and models that can't be loaded."""

from __future__ import annotations

import json

import pytest
import torch
import transformers

from inference.models import AnyDecoder, Llama, ModelError, load_model, open_checkpoint, quantized
from inference.parity import logits_of, transformers_model
from tests.inference.tiny import FAMILIES, SHAPE, reference_model, save_model


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
    model.rotary.sin.neg_()
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
    with pytest.raises(ModelError, match="'gpt2' is none of"):
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


OTHERS = {
    "gemma": ("GemmaConfig", {"head_dim": 32}),
    "phi": ("PhiConfig", {"partial_rotary_factor": 0.5}),
    "gpt_neox": ("GPTNeoXConfig", {}),
    "gemma3 with windows": ("Gemma3TextConfig", {"head_dim": 32, "sliding_window": 30}),
}


def other_model(name: str):
    kind, extra = OTHERS[name]
    torch.manual_seed(0)
    shape = SHAPE | ({} if name != "gpt_neox" else {"num_key_value_heads": 4})
    config = getattr(transformers, kind)(**shape, **extra)
    model = transformers.AutoModelForCausalLM.from_config(config).eval().float()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.08) if parameter.dim() > 1 else parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


@pytest.mark.parametrize("name", OTHERS)
def test_any_other_decoder_runs_over_the_same_cache(name, tmp_path):
    reference = other_model(name)
    reference.save_pretrained(tmp_path)
    model, _ = load_model(str(tmp_path), torch.float32)
    assert isinstance(model, AnyDecoder)
    ids = torch.randint(0, 512, (200,), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        wanted = reference(ids[None]).logits[0]
    for chunk in (200, 37, 1):
        assert (logits_of(model, ids, chunk) - wanted).abs().max() < 1e-4


def test_a_decoder_whose_attention_is_another_is_refused(tmp_path):
    kind = transformers.Gemma2Config(**SHAPE, head_dim=32, attn_logit_softcapping=50.0)
    transformers.AutoModelForCausalLM.from_config(kind).save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="soft-cap"):
        load_model(str(tmp_path), torch.float32)
    with pytest.raises(ModelError, match="without quantization"):
        load_model(str(tmp_path), torch.float32, "w8a8")


@pytest.mark.parametrize("family", ["llama", "qwen2 with biases"])
@pytest.mark.parametrize(("kind", "most"), [("w8a8", 5e-4), ("w8a16", 5e-4), ("w4a16", 0.015)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_rounded_weights_are_near_and_not_the_same(family, kind, most, dtype, tmp_path):
    reference_model(family).save_pretrained(tmp_path)
    checkpoint = open_checkpoint(str(tmp_path))
    ids = torch.randint(0, 512, (100,), generator=torch.Generator().manual_seed(1))
    whole = logits_of(Llama(checkpoint, torch.float32), ids, 37).log_softmax(-1)
    for chunk in (37, 1):  # many rows, and one
        rounded = logits_of(Llama(checkpoint, dtype, kind), ids, chunk).log_softmax(-1)
        divergence = (whole.exp() * (whole - rounded)).sum(-1).mean()
        assert 1e-7 < divergence < most


@pytest.mark.parametrize("kind", ["w8a8", "w8a16", "w4a16"])
@pytest.mark.parametrize(("dtype", "near"), [(torch.float32, 1e-3), (torch.bfloat16, 0.3)], ids=str)
def test_few_rows_read_the_same_rounded_weights_as_many(kind, dtype, near):
    generator = torch.Generator().manual_seed(0)
    weight, x = torch.randn(64, 96, generator=generator).to(dtype), torch.randn(40, 96, generator=generator).to(dtype)
    bias = (3 + torch.randn(64, generator=generator)).to(dtype)
    layer = quantized.linear(kind, weight, bias, "any")
    many, exact = layer(x), x.float() @ weight.float().T + bias.float()
    assert (torch.cat([layer(x[i : i + 1]) for i in range(40)]) - many).abs().max() < near
    assert 1e-2 < (many - exact).abs().max() < 3, "rounded, with the bias once"


def test_quantization_that_cannot_be_had_stops_the_start(tmp_path, monkeypatch):
    with pytest.raises(ModelError, match="multiples of 32, not 64 x 40"):
        quantized.linear("w4a16", torch.zeros(64, 40), None, "any")
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    with pytest.raises(ModelError, match="oneDNN"):
        quantized.linear("w8a8", torch.zeros(64, 64), None, "any")
