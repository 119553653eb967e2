"""Any decoder that `transformers` runs, over our paged cache: slower than `Llama`, and there for every family.

Its attention goes through transformers' attention interface to `kernels`; everything else is the library's own.
"""

from __future__ import annotations

import threading
from pathlib import Path

import numpy as np
import torch

import kernels
from inference.models.config import ModelConfig, ModelError

INTERFACE = "refdesk_paged"
_step = threading.local()  # .plan, .cache, .layers: of the forward that runs in this thread


class AnyDecoder:
    """Weights in `dtype` on `device`, the cache in `kv_dtype`.  Raises ModelError for a model whose attention is not
    plain causal softmax attention in every layer: logits soft-caps, attention sinks, recurrent layers."""

    replays = False  # transformers reads values back to the host, which a CUDA graph can't hold

    def __init__(
        self,
        path: Path,
        dtype: torch.dtype,
        device: torch.device | str = "cpu",
        kv_dtype: torch.dtype | None = None,
    ):
        from transformers import AttentionInterface, AutoModelForCausalLM
        from transformers.masking_utils import AttentionMaskInterface

        AttentionInterface.register(INTERFACE, _attend)
        AttentionMaskInterface.register(INTERFACE, lambda *args, **kwargs: None)  # causality follows from the plan
        try:
            model = AutoModelForCausalLM.from_pretrained(path, dtype=dtype, attn_implementation=INTERFACE)
            self._model = model.eval().to(device)
        except (ValueError, OSError, KeyError) as error:
            raise ModelError(f"the model in {path} can't be loaded: {str(error).partition(chr(10))[0]}") from error
        self.dtype = dtype
        self.kv_dtype = kv_dtype or dtype
        self.device = torch.device(device)
        self.config = _shape_of(self._model.config.get_text_config())
        self._check(path)

    def new_cache(self, blocks: int) -> list[kernels.LayerCache]:
        config = self.config
        shape = (blocks, config.kv_heads, config.head_dim)
        return [kernels.LayerCache.empty(*shape, self.kv_dtype, self.device) for _ in range(config.layers)]

    @torch.inference_mode()
    def forward(
        self, tokens: torch.Tensor, plan: kernels.AttentionPlan, cache: list[kernels.LayerCache], wanted: torch.Tensor
    ) -> torch.Tensor:
        """As `Llama.forward`."""
        _step.plan, _step.cache, _step.layers = plan, cache, set()
        try:
            logits = self._model(
                input_ids=tokens[None], position_ids=plan.positions[None], use_cache=False, logits_to_keep=wanted
            ).logits[0]
        finally:
            self._attended = _step.layers
            del _step.plan, _step.cache, _step.layers
        return logits if logits.dtype == torch.float64 else logits.float()

    def _check(self, path: Path) -> None:
        """Two tokens, to see that every layer attends through us."""
        plan = kernels.AttentionPlan.of([2], [2], np.array([[1]], dtype=np.int32)).to(self.device)
        try:
            tokens, wanted = torch.zeros(2, dtype=torch.int64), torch.tensor([1])
            self.forward(tokens.to(self.device), plan, self.new_cache(2), wanted.to(self.device))
        except Exception as error:
            raise ModelError(f"the model in {path} does not run over a paged cache: {error}") from error
        missing = set(range(self.config.layers)) - self._attended
        if missing:
            raise ModelError(f"the model in {path} has layers without attention ({sorted(missing)[:5]} …)")


def _attend(module, query, key, value, attention_mask, scaling=None, dropout=0.0, sliding_window=None, **kwargs):
    """query [1, heads, tokens, dim], key and value [1, kv_heads, tokens, dim] → [1, tokens, heads, dim]."""
    if kwargs.get("softcap") or getattr(module, "sinks", None) is not None or kwargs.get("s_aux") is not None:
        raise ModelError("its attention has a soft-cap or sinks, which the kernels don't know")
    if getattr(module, "is_causal", True) is False:
        raise ModelError("its attention is not causal")
    window = sliding_window or getattr(module, "sliding_window", None)
    scale = query.shape[-1] ** -0.5 if scaling is None else float(scaling)
    cache = _step.cache[module.layer_idx]
    _step.layers.add(module.layer_idx)
    keys, values = (tensor[0].transpose(0, 1).contiguous() for tensor in (key, value))
    kernels.store(cache, keys, values, _step.plan)
    attended = kernels.attend(query[0].transpose(0, 1).contiguous(), cache, _step.plan, scale, window)
    return attended[None], None


def _shape_of(config) -> ModelConfig:
    heads = config.num_attention_heads
    eos = config.eos_token_id
    return ModelConfig(
        family=config.model_type,
        vocab_size=config.vocab_size,
        hidden_size=config.hidden_size,
        intermediate_size=getattr(config, "intermediate_size", 0),
        layers=config.num_hidden_layers,
        heads=heads,
        kv_heads=getattr(config, "num_key_value_heads", None) or heads,
        head_dim=getattr(config, "head_dim", None) or config.hidden_size // heads,
        rms_norm_eps=getattr(config, "rms_norm_eps", 0.0),
        rope={},
        max_context_tokens=config.max_position_embeddings,
        tied_embeddings=bool(config.tie_word_embeddings),
        eos_token_ids=tuple(eos) if isinstance(eos, list | tuple) else (eos,) if eos is not None else (),
    )
