"""The model that a name stands for, ready to run."""

from __future__ import annotations

from pathlib import Path

import torch

from inference.models.any_decoder import AnyDecoder
from inference.models.checkpoint import locate, open_checkpoint
from inference.models.config import ModelConfig, ModelError, UnknownFamily
from inference.models.llama import Llama

BITS = {"fp8": 8, "w8a8": 8, "w4a16": 4.5, "mxfp4": 4.25}  # of a weight on a GPU, with its share of the scales


def load_model(
    name: str,
    dtype: torch.dtype,
    quantization: str = "none",
    device: torch.device | str = "cpu",
    kv_dtype: torch.dtype | None = None,
) -> tuple[Llama | AnyDecoder, Path]:
    """(the model, where it lies).  `name` as for `open_checkpoint`, the rest as for `Llama`.  Raises ModelError."""
    path = locate(name)
    try:
        checkpoint = open_checkpoint(name)
        if torch.device(device).type == "cuda" and not checkpoint.rounded:
            check_weights_fit(checkpoint.config, dtype, quantization, torch.cuda.mem_get_info()[0])
        return Llama(checkpoint, dtype, quantization, device, kv_dtype), path
    except UnknownFamily as error:
        if quantization != "none":
            raise ModelError(f"{name}: {error}; others run without quantization only") from None
        return AnyDecoder(path, dtype, device, kv_dtype), path
    except torch.OutOfMemoryError as error:
        raise ModelError(f"{name} does not fit into the GPU's memory: {str(error).partition(chr(10))[0]}") from None


def check_weights_fit(shape: ModelConfig, dtype: torch.dtype, quantization: str, free_bytes: int) -> None:
    """Before anything is loaded.  Raises ModelError that says what would fit."""
    whole = shape.vocab_size * shape.hidden_size * (1 if shape.tied_embeddings else 2) * dtype.itemsize

    def needed(kind: str) -> float:
        return whole + shape.linear_parameters * BITS.get(kind, 8 * dtype.itemsize) / 8

    if needed(quantization) < free_bytes:
        return
    fitting = [kind for kind in ("fp8", "mxfp4") if needed(kind) < free_bytes]
    instead = f'quantization = "{fitting[0]}" would fit' if fitting else "take a smaller model or a larger GPU"
    raise ModelError(
        f"the model's weights take {needed(quantization) / 2**30:.1f} GiB, and {free_bytes / 2**30:.1f} GiB of the "
        f"GPU's memory are free: {instead}"
    )
