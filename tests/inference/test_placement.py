"""Where the engine runs, and what is said where it can't."""

from __future__ import annotations

import pytest
import torch

from inference.models import ModelError
from inference.models.loading import check_weights_fit
from loadtests.gpu_engine import llama
from tests.inference.test_embedded import open_tiny
from tests.inference.tiny import save_model


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    return str(save_model(tmp_path_factory.mktemp("model")))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"device": "cuda"}, 'device = "cuda", but .*: use device = "cpu"'),
        ({"kv_cache_dtype": "fp8"}, "needs a GPU"),
        ({"quantization": "mxfp4"}, "does not run on a CPU: choose one of none, w8a8, w8a16, w4a16"),
    ],
    ids=str,
)
def test_what_only_a_gpu_has_is_refused_without_one(model_folder, options, said):
    with pytest.raises(ModelError, match=said):
        open_tiny(model_folder, **options)


@pytest.mark.parametrize(
    ("free_gib", "said"),
    [(20, None), (12, 'quantization = "fp8" would fit'), (7, 'quantization = "mxfp4" would fit'), (4, "a larger GPU")],
)
def test_a_model_that_a_gpu_does_not_hold_is_refused_with_what_would_fit(free_gib, said):
    shape = llama("8B")  # 15.0 GiB in bf16
    if said is None:
        check_weights_fit(shape, torch.bfloat16, "none", free_gib * 2**30)
        return
    with pytest.raises(ModelError, match=said):
        check_weights_fit(shape, torch.bfloat16, "none", free_gib * 2**30)
