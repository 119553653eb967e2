"""What runs hot, each kernel beside its torch reference."""

from kernels.cache import LayerCache, bytes_per_block
from kernels.paged_attention import attend, store
from kernels.plan import BLOCK_SIZE, AttentionPlan

__all__ = ["BLOCK_SIZE", "AttentionPlan", "LayerCache", "attend", "bytes_per_block", "store"]
