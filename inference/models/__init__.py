"""Models on disk, and how they run over a paged cache."""

from inference.models.any_decoder import AnyDecoder
from inference.models.checkpoint import Checkpoint, open_checkpoint
from inference.models.config import ModelConfig, ModelError
from inference.models.llama import Llama
from inference.models.loading import load_model

__all__ = ["AnyDecoder", "Checkpoint", "Llama", "ModelConfig", "ModelError", "load_model", "open_checkpoint"]
