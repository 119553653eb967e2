"""Decoders that the engine runs, their weights and their tokenizers."""

from inference.models.checkpoint import Checkpoint, open_checkpoint
from inference.models.config import ModelConfig, ModelError
from inference.models.llama import Llama

__all__ = ["Checkpoint", "Llama", "ModelConfig", "ModelError", "open_checkpoint"]
