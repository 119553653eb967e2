"""The Llama family (Llama, Mistral, Qwen2, Qwen3) over a paged cache: one flat batch in, logits out.

Written as the formula reads: no modules, a list of layers, each a few tensors.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

import kernels
from inference.models import published, quantized
from inference.models.checkpoint import Checkpoint
from inference.models.config import ModelError
from inference.models.linear import float32_is_faster
from inference.models.rotary import Rotary
from inference.models.shard import WHOLE, Shard

Multiply = Callable[[torch.Tensor], torch.Tensor]
WIDE_PARAMETERS = 500_000_000  # larger models don't get a float32 copy of their weights (2 GB at this size)


@dataclass(slots=True)
class Layer:
    input_norm: torch.Tensor
    qkv: Multiply
    q_norm: torch.Tensor | None
    k_norm: torch.Tensor | None
    attention_out: Multiply
    mlp_norm: torch.Tensor
    gate_up: Multiply
    down: Multiply
    window: int | None


class Llama:
    """Weights in `dtype` on `device`, QKV and gate/up fused.  `quantization` is one of `quantized.CPU_KINDS` or
    `GPU_KINDS`: it rounds the layers' weights; embedding, head and what is between them stay in `dtype`.  `kv_dtype`,
    that of the cache, is `dtype` where not said otherwise.  `shard`: the part of the model that this process computes;
    `config` is that part's, too."""

    replays = True  # nothing is read back to the host on the way

    def __init__(
        self,
        checkpoint: Checkpoint,
        dtype: torch.dtype,
        quantization: str = "none",
        device: torch.device | str = "cpu",
        kv_dtype: torch.dtype | None = None,
        shard: Shard = WHOLE,
    ):
        self.config = config = shard.of(checkpoint.config)
        self._shard = shard
        self.dtype = dtype
        self.kv_dtype = kv_dtype or dtype
        self.device = torch.device(device)
        self._scale = config.head_dim**-0.5

        small = self.device.type == "cpu" and dtype == torch.bfloat16 and config.linear_parameters <= WIDE_PARAMETERS
        layer_rows = "apart" if small and float32_is_faster() else "any"

        def weight(name: str, kind: str = "weight") -> torch.Tensor | None:
            tensor = checkpoint.tensor(f"{name}.{kind}")
            return None if tensor is None else tensor.to(self.device, dtype)

        def need(name: str) -> torch.Tensor:
            tensor = weight(name)
            if tensor is None:
                raise ModelError(f"{checkpoint.path} lacks the weight {name}.weight")
            return tensor

        def stored(name: str, cut: Callable[[torch.Tensor], torch.Tensor] | None = None) -> published.Stored:
            found = checkpoint.linear(name)
            if found is None:
                raise ModelError(f"{checkpoint.path} lacks the weight {name}.weight")
            if cut is None or shard.size == 1:
                return found
            if not isinstance(found, torch.Tensor):
                raise ModelError(
                    "checkpoints that were published rounded can't be cut into parts yet: take whole weights"
                )
            return cut(found)

        def into(*names: str) -> Multiply:
            """From the hidden width into a block: cut by outputs."""
            biases = [weight(name, "bias") for name in names]
            bias = torch.cat([shard.outputs(b) for b in biases]) if any(b is not None for b in biases) else None
            parts = [published.to(stored(name, shard.outputs), self.device, dtype) for name in names]
            return quantized.linear(quantization, published.join(parts), bias, layer_rows, dtype)

        def out_of(name: str) -> Multiply:
            """From a block back to the hidden width: cut by inputs, one of the parts adds the bias."""
            bias = weight(name, "bias") if shard.rank == 0 else None
            part = published.to(stored(name, shard.inputs), self.device, dtype)
            return quantized.linear(quantization, part, bias, layer_rows, dtype)

        self.embedding = need("model.embed_tokens")
        self.layers = []
        for i in range(config.layers):
            at = f"model.layers.{i}"
            attention = f"{at}.self_attn"
            self.layers.append(
                Layer(
                    input_norm=need(f"{at}.input_layernorm"),
                    qkv=into(f"{attention}.q_proj", f"{attention}.k_proj", f"{attention}.v_proj"),
                    q_norm=need(f"{attention}.q_norm") if config.qk_norm else None,
                    k_norm=need(f"{attention}.k_norm") if config.qk_norm else None,
                    attention_out=out_of(f"{attention}.o_proj"),
                    mlp_norm=need(f"{at}.post_attention_layernorm"),
                    gate_up=into(f"{at}.mlp.gate_proj", f"{at}.mlp.up_proj"),
                    down=out_of(f"{at}.mlp.down_proj"),
                    window=config.window_of(i),
                )
            )
        self.final_norm = need("model.norm")
        # Whole, as others leave it: a quarter of what W8A8 loses would be lost here.
        head = stored("model.embed_tokens" if config.tied_embeddings else "lm_head")
        self.head = quantized.linear("none", published.to(head, self.device, dtype), None, "few", dtype)
        self.rotary = Rotary(config, dtype, self.device)

    def new_cache(self, blocks: int) -> list[kernels.LayerCache]:
        config = self.config
        shape = (blocks, config.kv_heads, config.head_dim)
        return [kernels.LayerCache.empty(*shape, self.kv_dtype, self.device) for _ in self.layers]

    @torch.inference_mode()
    def forward(
        self, tokens: torch.Tensor, plan: kernels.AttentionPlan, cache: list[kernels.LayerCache], wanted: torch.Tensor
    ) -> torch.Tensor:
        """Logits [len(wanted), vocab] at the rows `wanted` of the flat batch tokens [tokens] int64; float32, or float64
        in a float64 model.

        Writes the keys and values of every token into `cache` before a layer attends, so a sequence may read
        what another one writes in the same step.
        """
        hidden, delta = self.embedding[tokens], None
        last = len(self.layers) - 1
        for i, (layer, layer_cache) in enumerate(zip(self.layers, cache, strict=True)):
            delta = self._attention(layer, self._norm(hidden, delta, layer.input_norm), plan, layer_cache)
            if i == last:  # nothing after this looks at other rows
                hidden, delta = hidden[wanted], delta[wanted]
            gate_up = layer.gate_up(self._norm(hidden, delta, layer.mlp_norm))
            delta = self._shard.sum(layer.down(kernels.silu_mul(gate_up)))
        logits = self.head(self._norm(hidden, delta, self.final_norm))
        return logits if logits.dtype == torch.float64 else logits.float()

    @torch.inference_mode()
    def look(
        self, tokens: torch.Tensor, plan: kernels.AttentionPlan, cache: list[kernels.LayerCache], layers: range
    ) -> torch.Tensor:
        """How much each token of one sequence is attended to by its last ones, `tokens` [tokens] int64, in `layers`,
        the last of which is the last that is computed: [context] float32, summed over tokens, heads and layers."""
        hidden, delta = self.embedding[tokens], None
        blocks, context = plan.block_tables[0], int(plan.context_lens[0])
        received = torch.zeros(context, device=self.device)
        for i in range(layers.stop):
            layer = self.layers[i]
            query = self._query(layer, self._norm(hidden, delta, layer.input_norm), plan, cache[i])
            if i in layers:
                received += kernels.attention_received(query, cache[i], blocks, context, self._scale)
            delta = self._attended(layer, query, plan, cache[i])
            gate_up = layer.gate_up(self._norm(hidden, delta, layer.mlp_norm))
            delta = self._shard.sum(layer.down(kernels.silu_mul(gate_up)))
        return received

    @torch.inference_mode()
    def copy(self, cache: list[kernels.LayerCache], source: torch.Tensor, target: torch.Tensor) -> None:
        """Copy what stands in the slots `source` [n] int64 to the slots `target` [n], at the same position."""
        for layer_cache in cache:
            kernels.copy(layer_cache, source.to(self.device), target.to(self.device))

    @torch.inference_mode()
    def splice(
        self, cache: list[kernels.LayerCache], source: torch.Tensor, target: torch.Tensor, by: torch.Tensor
    ) -> None:
        """Copy what stands in the slots `source` [n] int64 to the slots `target` [n], where it stands `by` [n] int64
        positions further on."""
        source, target, by = (x.to(self.device) for x in (source, target, by))
        cos, sin = self.rotary.turn(by)
        for layer_cache in cache:
            kernels.splice(layer_cache, source, target, cos, sin)

    def _attention(self, layer: Layer, x: torch.Tensor, plan: kernels.AttentionPlan, cache: kernels.LayerCache):
        return self._attended(layer, self._query(layer, x, plan, cache), plan, cache)

    def _query(self, layer: Layer, x: torch.Tensor, plan: kernels.AttentionPlan, cache: kernels.LayerCache):
        """The turned queries of x [tokens, width]; its keys and values are in the cache."""
        config = self.config
        qkv = layer.qkv(x).view(len(x), -1, config.head_dim)
        query, keys, values = qkv.split((config.heads, config.kv_heads, config.kv_heads), dim=1)
        if layer.q_norm is not None:
            query, keys = (
                self._norm(query.contiguous(), None, layer.q_norm),
                self._norm(keys.contiguous(), None, layer.k_norm),
            )
        return kernels.rotate_and_store(query, keys, values, self.rotary.cos, self.rotary.sin, cache, plan)

    def _attended(self, layer: Layer, query: torch.Tensor, plan: kernels.AttentionPlan, cache: kernels.LayerCache):
        attended = kernels.attend(query, cache, plan, self._scale, layer.window)
        return self._shard.sum(layer.attention_out(attended.view(len(query), -1)))

    def _norm(self, hidden: torch.Tensor, delta: torch.Tensor | None, weight: torch.Tensor) -> torch.Tensor:
        return kernels.add_rms_norm(hidden, delta, weight, self.config.rms_norm_eps)
