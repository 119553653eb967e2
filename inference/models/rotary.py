"""Rotary position embedding (Su et al. 2021), with any of Hugging Face's static scalings."""

from __future__ import annotations

from types import SimpleNamespace

import torch

from inference.models.config import ModelConfig, ModelError


class Rotary:
    """cos and sin by position, [positions, head_dim], in the model's dtype; `kernels.rotate_and_store` reads them."""

    def __init__(self, config: ModelConfig, dtype: torch.dtype, device: torch.device | str = "cpu"):
        from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

        kind = config.rope.get("rope_type", "default")
        if kind == "default":
            exponents = torch.arange(0, config.head_dim, 2, dtype=torch.float32) / config.head_dim
            frequencies, scale = 1.0 / config.rope["rope_theta"] ** exponents, 1.0
        elif kind in ("linear", "llama3", "yarn"):
            shape = SimpleNamespace(
                rope_parameters=config.rope,
                head_dim=config.head_dim,
                hidden_size=config.hidden_size,
                num_attention_heads=config.heads,
                max_position_embeddings=config.max_context_tokens,
                standardize_rope_params=lambda: None,
            )
            frequencies, scale = ROPE_INIT_FUNCTIONS[kind](shape, torch.device("cpu"))
        else:
            raise ModelError(f"rope type {kind!r} is not supported: the engine knows default, linear, llama3 and yarn")
        if 2 * len(frequencies) != config.head_dim:
            raise ModelError("only a part of each head is rotated in this model: the engine knows whole heads")
        self._frequencies = frequencies.to(device, torch.float32)
        angles = torch.outer(torch.arange(config.max_context_tokens, dtype=torch.float32), frequencies)
        angles = torch.cat((angles, angles), dim=-1)
        self.cos = (angles.cos() * scale).to(device, dtype)
        self.sin = (angles.sin() * scale).to(device, dtype)
        # rotate_half(x) * sin == swap_halves(x) * signed_sin: the sign lives in the table, not in every step
        self.sin[:, : config.head_dim // 2].neg_()

    def turn(self, by: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """cos and sin [n, head_dim] float32 that turn by so many positions [n] int64 more, sin as in the table."""
        angles = by[:, None].float() * self._frequencies
        return angles.cos().repeat(1, 2), torch.cat((-angles.sin(), angles.sin()), dim=-1)
