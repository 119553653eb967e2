"""What runs hot, each kernel beside its torch reference."""

from kernels.cache import LayerCache, bytes_per_block
from kernels.elementwise import add_rms_norm, quantize_rows, rotate_and_store, scale_rows, silu_mul
from kernels.few_rows import FewRows
from kernels.gpu import serves as on_gpu
from kernels.multiply import multiply_packed, multiply_rounded
from kernels.paged_attention import attend, store
from kernels.plan import BLOCK_SIZE, FEW_TOKENS, AttentionPlan
from kernels.sampling import SamplingRows, sample
from kernels.segments import SharedPlan, attend_shared
from kernels.splicing import attention_received, copy, splice

__all__ = [
    "BLOCK_SIZE",
    "FEW_TOKENS",
    "AttentionPlan",
    "FewRows",
    "LayerCache",
    "SamplingRows",
    "SharedPlan",
    "add_rms_norm",
    "attend",
    "attend_shared",
    "attention_received",
    "bytes_per_block",
    "copy",
    "multiply_packed",
    "multiply_rounded",
    "on_gpu",
    "quantize_rows",
    "rotate_and_store",
    "sample",
    "scale_rows",
    "silu_mul",
    "splice",
    "store",
]
