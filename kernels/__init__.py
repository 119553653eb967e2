"""What runs hot, each kernel beside its torch reference."""

from kernels.cache import LayerCache, bytes_per_block
from kernels.elementwise import add_rms_norm, quantize_rows, rotate_and_store, scale_rows, silu_mul
from kernels.few_rows import FewRows
from kernels.paged_attention import attend, store
from kernels.plan import BLOCK_SIZE, AttentionPlan

__all__ = [
    "BLOCK_SIZE",
    "AttentionPlan",
    "FewRows",
    "LayerCache",
    "add_rms_norm",
    "attend",
    "bytes_per_block",
    "quantize_rows",
    "rotate_and_store",
    "scale_rows",
    "silu_mul",
    "store",
]
