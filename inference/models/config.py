"""The shape of a Llama-family decoder, read from a Hugging Face config or from GGUF metadata."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

FAMILIES = ("llama", "mistral", "qwen2", "qwen3")


class ModelError(Exception):
    """A model that can't be loaded; the message names what is missing and what would do."""

    code = "model_error"


class UnknownFamily(ModelError):
    """Not one of the families that `Llama` runs; perhaps `AnyDecoder` does."""


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """`rope` holds Hugging Face's rope parameters (`rope_theta`, `rope_type`, factors).

    `sliding_window` applies to layer i where `windowed_layers[i]`; None means no window anywhere.
    """

    family: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    rms_norm_eps: float
    rope: dict[str, Any]
    max_context_tokens: int
    tied_embeddings: bool
    qk_norm: bool = False
    sliding_window: int | None = None
    windowed_layers: tuple[bool, ...] = ()
    eos_token_ids: tuple[int, ...] = field(default=())

    @property
    def linear_parameters(self) -> int:
        """Weights of all layers' projections, embeddings and head not counted."""
        attention = (2 * self.heads + 2 * self.kv_heads) * self.head_dim
        return self.layers * self.hidden_size * (attention + 3 * self.intermediate_size)

    def window_of(self, layer: int) -> int | None:
        if self.sliding_window is None or (self.windowed_layers and not self.windowed_layers[layer]):
            return None
        return self.sliding_window


def from_hugging_face(config: Any) -> ModelConfig:
    """From a `transformers` config object, which has already been normalised across versions."""
    family = config.model_type
    if family not in FAMILIES:
        raise UnknownFamily(f"model type {family!r} is none of {', '.join(FAMILIES)}")
    if config.hidden_act not in ("silu", "swish"):
        raise UnknownFamily(f"activation {config.hidden_act!r} is not gated SiLU")
    window = getattr(config, "sliding_window", None) if getattr(config, "use_sliding_window", True) else None
    kinds = getattr(config, "layer_types", None) or []
    eos = config.eos_token_id
    return ModelConfig(
        family=family,
        vocab_size=config.vocab_size,
        hidden_size=config.hidden_size,
        intermediate_size=config.intermediate_size,
        layers=config.num_hidden_layers,
        heads=config.num_attention_heads,
        kv_heads=config.num_key_value_heads,
        head_dim=getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads,
        rms_norm_eps=config.rms_norm_eps,
        rope=dict(config.rope_parameters),
        max_context_tokens=config.max_position_embeddings,
        tied_embeddings=bool(config.tie_word_embeddings),
        qk_norm=family == "qwen3",
        sliding_window=window,
        windowed_layers=tuple(kind == "sliding_attention" for kind in kinds) if window else (),
        eos_token_ids=tuple(eos) if isinstance(eos, list | tuple) else (eos,) if eos is not None else (),
    )


def from_gguf(fields: dict[str, Any], tied: bool) -> ModelConfig:
    """From GGUF metadata (`general.architecture` and its keys)."""
    family = fields["general.architecture"]
    if family not in FAMILIES:
        raise ModelError(f"GGUF architecture {family!r} is not supported by the engine: it runs {', '.join(FAMILIES)}")

    def get(key: str, default: Any = None) -> Any:
        return fields.get(f"{family}.{key}", default)

    if get("rope.scaling.type", "none") not in ("none", None):
        raise ModelError("GGUF files with rope scaling are not supported: use the model's safetensors folder")
    heads, hidden = get("attention.head_count"), get("embedding_length")
    return ModelConfig(
        family=family,
        vocab_size=get("vocab_size") or len(fields["tokenizer.ggml.tokens"]),
        hidden_size=hidden,
        intermediate_size=get("feed_forward_length"),
        layers=get("block_count"),
        heads=heads,
        kv_heads=get("attention.head_count_kv", heads),
        head_dim=get("attention.key_length", hidden // heads),
        rms_norm_eps=get("attention.layer_norm_rms_epsilon"),
        rope={"rope_type": "default", "rope_theta": get("rope.freq_base", 10000.0)},
        max_context_tokens=get("context_length"),
        tied_embeddings=tied,
        qk_norm=family == "qwen3",
        sliding_window=get("attention.sliding_window"),
        eos_token_ids=(fields["tokenizer.ggml.eos_token_id"],),
    )
