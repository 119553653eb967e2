"""The model that a name stands for, ready to run."""

from __future__ import annotations

from pathlib import Path

import torch

from inference.models.any_decoder import AnyDecoder
from inference.models.checkpoint import locate, open_checkpoint
from inference.models.config import ModelError, UnknownFamily
from inference.models.llama import Llama


def load_model(name: str, dtype: torch.dtype, quantization: str = "none") -> tuple[Llama | AnyDecoder, Path]:
    """(the model, where it lies).  `name` as for `open_checkpoint`.  Raises ModelError."""
    path = locate(name)
    try:
        return Llama(open_checkpoint(name), dtype, quantization), path
    except UnknownFamily as error:
        if quantization != "none":
            raise ModelError(f"{name}: {error}; others run without quantization only") from None
        return AnyDecoder(path, dtype), path
