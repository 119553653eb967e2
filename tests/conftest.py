"""Where there is no GPU, the tests of the Triton kernels run in Triton's interpreter, which has to be chosen before
anything imports Triton.  What users run looks at KERNELS_TRITON, so nothing else is changed by this."""

from __future__ import annotations

import os

import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
