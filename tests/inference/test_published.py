"""Checkpoints that were rounded before they were published, written here as their makers' formats say, one number after
the other, and read by the engine."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from inference.models import Llama, ModelError, open_checkpoint, published
from inference.parity import logits_of
from tests.inference.tiny import save_model

GROUP = 32
AWQ_ORDER = [0, 2, 4, 6, 1, 3, 5, 7]
FP8 = torch.float8_e4m3fn


def words(rows: list[list[int]], order: list[int]) -> torch.Tensor:
    """Eight four-bit numbers of a row in each int32: the i-th place holds the one at order[i]."""
    out = []
    for row in rows:
        out.append([])
        for start in range(0, len(row), 8):
            word = sum(row[start + order[i]] << (4 * i) for i in range(8))
            out[-1].append(word - 2**32 if word >= 2**31 else word)
    return torch.tensor(out, dtype=torch.int32)


def four_bits(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """(q, zeros, scales, what they stand for) of weight [out, in]; a scale for each GROUP inputs."""
    grouped = weight.view(len(weight), -1, GROUP)
    low, high = grouped.aminmax(dim=2)
    scales = ((high - low) / 15).half().float()
    zeros = (-low / scales).round().clamp(1, 15)
    q = (grouped / scales[..., None] + zeros[..., None]).round().clamp(0, 15)
    return q.flatten(1).int(), zeros.int(), scales, ((q - zeros[..., None]) * scales[..., None]).flatten(1)


def awq(weight: torch.Tensor) -> tuple[dict, torch.Tensor]:
    q, zeros, scales, values = four_bits(weight)
    stored = {"qweight": words(q.T.tolist(), AWQ_ORDER), "qzeros": words(zeros.T.tolist(), AWQ_ORDER)}
    return stored | {"scales": scales.T.half().contiguous()}, values


def gptq(weight: torch.Tensor, less: int = 1) -> tuple[dict, torch.Tensor]:
    q, zeros, scales, values = four_bits(weight)
    in_order = list(range(8))
    stored = {"qweight": words(q.tolist(), in_order).T.contiguous()}
    stored |= {"qzeros": words((zeros - less).T.tolist(), in_order), "scales": scales.T.half().contiguous()}
    return stored, values


def packed(weight: torch.Tensor) -> tuple[dict, torch.Tensor]:
    q, zeros, scales, values = four_bits(weight)
    in_order = list(range(8))
    points = words(zeros.T.tolist(), in_order).T.contiguous()
    shape = torch.tensor(weight.shape)
    return {
        "weight_packed": words(q.tolist(), in_order), "weight_scale": scales.half(), "weight_zero_point": points,
        "weight_shape": shape,
    }, values  # fmt: skip


def symmetric(weight: torch.Tensor) -> tuple[dict, torch.Tensor]:
    grouped = weight.view(len(weight), -1, GROUP)
    scales = (grouped.abs().amax(2) / 7).half().float()
    q = (grouped / scales[..., None]).round().clamp(-8, 7)
    stored = {"weight_packed": words((q.flatten(1).int() + 8).tolist(), list(range(8))), "weight_scale": scales.half()}
    return stored, (q * scales[..., None]).flatten(1)


def eight_bits(dtype: torch.dtype, largest: float):
    def rounded(weight: torch.Tensor) -> tuple[dict, torch.Tensor]:
        scales = weight.abs().amax(1, keepdim=True) / largest
        q = weight / scales
        q = (q if dtype == FP8 else q.round()).to(dtype)
        return {"weight": q, "weight_scale": scales}, q.float() * scales

    return rounded


def blocks(weight: torch.Tensor) -> tuple[dict, torch.Tensor]:
    size = 32
    rows, columns = weight.shape[0] // size, weight.shape[1] // size
    tiled = weight.view(rows, size, columns, size)
    scales = tiled.abs().amax((1, 3)) / 448
    q = (tiled / scales[:, None, :, None]).to(FP8)
    values = q.float() * scales[:, None, :, None]
    return {"weight": q.view(weight.shape), "weight_scale_inv": scales}, values.view(weight.shape)


FORMATS = {
    "awq": (awq, {"quant_method": "awq", "bits": 4, "group_size": GROUP, "zero_point": True, "version": "gemm"}),
    "gptq": (gptq, {"quant_method": "gptq", "bits": 4, "group_size": GROUP, "desc_act": False, "sym": False}),
    "gptq v2": (
        lambda w: gptq(w, 0),
        {"quant_method": "gptq", "bits": 4, "group_size": GROUP, "checkpoint_format": "gptq_v2"},
    ),
    "compressed int4": (packed, {"quant_method": "compressed-tensors", "format": "pack-quantized"}),
    "compressed int4, symmetric": (symmetric, {"quant_method": "compressed-tensors", "format": "pack-quantized"}),
    "compressed FP8": (eight_bits(FP8, 448), {"quant_method": "compressed-tensors", "format": "float-quantized"}),
    "compressed int8": (eight_bits(torch.int8, 127), {"quant_method": "compressed-tensors", "format": "int-quantized"}),
    "FP8 in blocks": (blocks, {"quant_method": "fp8", "weight_block_size": [32, 32]}),
}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("whole"), "qwen2 with biases")


def publish(whole: Path, to: Path, form: str) -> tuple[Path, Path]:
    """(a folder in this format, one with the values that its weights stand for)"""
    write, config = FORMATS[form]
    there, plain = {}, {}
    for name, tensor in load_file(whole / "model.safetensors").items():
        plain[name] = there[name] = tensor
        if name.endswith("_proj.weight"):
            stored, plain[name] = write(tensor)
            del there[name]
            there |= {name.removesuffix("weight") + part: value for part, value in stored.items()}
    for folder, tensors, extra in ((to / "a", there, {"quantization_config": config}), (to / "b", plain, {})):
        folder.mkdir()
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "model.safetensors")
        settings = json.loads((whole / "config.json").read_text()) | extra
        (folder / "config.json").write_text(json.dumps(settings))
    return to / "a", to / "b"


@pytest.mark.parametrize("form", FORMATS)
def test_a_published_checkpoint_means_what_its_makers_say(whole: Path, tmp_path: Path, form: str):
    rounded, plain = publish(whole, tmp_path, form)
    ids = torch.arange(3, 40)
    ours = logits_of(Llama(open_checkpoint(str(rounded)), torch.float32), ids, 64)
    theirs = logits_of(Llama(open_checkpoint(str(plain)), torch.float32), ids, 64)
    assert (ours - theirs).abs().max() < 1e-4
    before = logits_of(Llama(open_checkpoint(str(whole)), torch.float32), ids, 64)
    assert (ours - before).abs().max() > 1e-2, "the rounding shows"


@pytest.mark.parametrize("form", ["awq", "compressed FP8"])
def test_rounding_it_again_is_refused(whole: Path, tmp_path: Path, form: str):
    rounded, _ = publish(whole, tmp_path, form)
    with pytest.raises(ModelError, match="rounded already"):
        Llama(open_checkpoint(str(rounded)), torch.float32, "w8a8")


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"quant_method": "bitsandbytes"}, "rounded as bitsandbytes; the engine reads awq and gptq"),
        ({"quant_method": "gptq", "bits": 8}, "gptq with 8 bits"),
        ({"quant_method": "gptq", "bits": 4, "desc_act": True}, "act order"),
        ({"quant_method": "awq", "bits": 4, "version": "gemv"}, "version 'gemv'"),
        ({"quant_method": "compressed-tensors", "format": "marlin-24"}, "compressed-tensors marlin-24"),
    ],
    ids=str,
)
def test_what_the_engine_cannot_read_is_named(config: dict, said: str):
    with pytest.raises(ModelError, match=said):
        published.check(config)
