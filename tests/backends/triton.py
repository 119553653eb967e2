"""NVIDIA's Triton Inference Server, from the wheel `nvidia-pytriton`, with stand-ins (`triton_standin.py`) for the
three kinds of models that we know.

The tensors are those of TensorRT-LLM's `triton_backend/all_models/inflight_batcher_llm/ensemble/config.pbtxt` (without
those for images, prompt tables and adapters), of its `llmapi/tensorrt_llm/config.pbtxt`, and of the vLLM backend's
`src/model.py`.  As in TensorRT-LLM, the first is an ensemble around a decoupled model and has a batch dimension.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from loadtests.peer_servers import running
from loadtests.run import free_port
from tests.backends.home import CONTEXT_TOKENS, HOME, NotInstalled, Venv, hugging_face_folder

VERSION = "0.7.0"  # of nvidia-pytriton; the server in it is 2.51.0
TOKENIZERS = "tokenizers==0.23.3"  # for the stand-ins
STANDIN = Path(__file__).with_name("triton_standin.py")

# Name, type, dimension; all inputs but the first ones may be left out.
TRTLLM = """
text_input STRING 1, max_tokens INT32 1; num_return_sequences INT32 1, bad_words STRING -1, stop_words STRING -1,
exclude_input_in_output BOOL 1, end_id INT32 1, pad_id INT32 1, top_k INT32 1, top_p FP32 1, temperature FP32 1,
length_penalty FP32 1, repetition_penalty FP32 1, min_tokens INT32 1, presence_penalty FP32 1,
frequency_penalty FP32 1, seed UINT64 1, return_log_probs BOOL 1, return_context_logits BOOL 1,
return_generation_logits BOOL 1, return_perf_metrics BOOL 1, return_num_input_tokens BOOL 1,
return_num_output_tokens BOOL 1, beam_width INT32 1, stream BOOL 1, embedding_bias_words STRING -1,
embedding_bias_weights FP32 -1, guided_decoding_guide_type STRING 1, guided_decoding_guide STRING 1
"""
TRTLLM_OUTPUTS = "text_output STRING -1, num_input_tokens INT32 1, num_output_tokens INT32 1"
LLMAPI = """
text_input STRING -1; image_url STRING -1, streaming BOOL 1, sampling_param_best_of INT32 1,
sampling_param_temperature FP32 1, sampling_param_top_k INT32 1, sampling_param_top_p FP32 1,
sampling_param_frequency_penalty FP32 1, sampling_param_presence_penalty FP32 1, sampling_param_max_tokens INT32 1,
sampling_param_stop STRING -1, sampling_param_seed UINT64 1, sampling_param_exclude_input_from_output BOOL 1,
sampling_param_return_perf_metrics BOOL 1, return_finish_reason BOOL 1, return_stop_reason BOOL 1,
return_cumulative_logprob BOOL 1, stop BOOL 1
"""
LLMAPI_OUTPUTS = "text_output STRING -1, finish_reason STRING -1, stop_reason STRING -1, cumulative_logprob FP32 -1"
VLLM = """
text_input STRING 1; image STRING -1, stream BOOL 1, sampling_parameters STRING 1, exclude_input_in_output BOOL 1,
return_finish_reason BOOL 1, return_cumulative_logprob BOOL 1, return_logprobs BOOL 1, return_num_input_tokens BOOL 1,
return_num_output_tokens BOOL 1
"""
VLLM_OUTPUTS = """
text_output STRING -1, finish_reason STRING -1, cumulative_logprob FP32 -1, logprobs STRING -1,
num_input_tokens UINT32 1, num_output_tokens UINT32 -1
"""

SUBJECTS: list[dict[str, Any]] = [
    {
        "flavour": "trtllm",
        "model": "ensemble",
        "keeps_going": "Triton tells the steps of an ensemble nothing of a cancellation (its issue 6739)",
    },
    {"flavour": "trtllm", "model": "trtllm"},  # without an ensemble, as TensorRT-LLM's `tensorrt_llm_bls`
    {"flavour": "llmapi", "model": "llmapi", "lacks": ["ignore_eos"]},
    {"flavour": "vllm", "model": "vllm"},
]

venv = Venv("triton")


def install() -> None:
    venv.once(f"nvidia-pytriton=={VERSION}, {TOKENIZERS}", lambda: venv.pip(f"nvidia-pytriton=={VERSION}", TOKENIZERS))
    if not sysconfig.get_config_var("Py_ENABLE_SHARED"):
        raise NotInstalled("triton: its Python backend needs a Python with a shared library (libpython3.x.so)")


@contextlib.contextmanager
def served() -> Iterator[list[dict[str, Any]]]:
    port, metrics_port = free_port(), free_port()
    url = f"http://127.0.0.1:{port}"
    server = venv.site_packages / "pytriton" / "tritonserver"
    command = [str(server / "bin" / "tritonserver"), "--model-repository", str(_models())]
    command += ["--backend-directory", str(_backends(server)), "--allow-grpc=false", "--allow-gpu-metrics=false"]
    command += ["--http-address", "127.0.0.1", "--http-port", str(port), "--metrics-port", str(metrics_port)]
    libraries = [str(venv.site_packages / "nvidia_pytriton.libs"), sysconfig.get_config_var("LIBDIR")]
    # The Python inside the backend finds its packages by the first python on the path, and by nothing else.
    path = f"{venv.folder / 'bin'}:{os.environ['PATH']}"
    environment = os.environ | {"LD_LIBRARY_PATH": ":".join(libraries), "PATH": path}
    common = {
        "kind": "triton",
        "base_url": url,
        "tokenizer": str(hugging_face_folder()),
        "max_context_tokens": CONTEXT_TOKENS,
        "every": 1,
        "gauges": {
            "url": f"http://127.0.0.1:{metrics_port}/metrics",
            "running": "standin_running",
            "generated": "standin_generated_total",
        },
    }
    with running("triton", command, url + "/v2/health/ready", environment, venv.log):
        yield [common | subject for subject in SUBJECTS]


def version() -> str:
    return f"Triton Inference Server 2.51.0 (nvidia-pytriton {VERSION}) with stand-ins for models"


def _backends(server: Path) -> Path:
    """The Python backend, with the stub for this Python beside it."""
    folder = HOME / "triton" / "backends"
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    stub = server / "python_backend_stubs" / version / "triton_python_backend_stub"
    if not stub.exists():
        raise NotInstalled(f"triton: its Python backend has no stub for Python {version}")
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(server / "backends" / "python", folder / "python")
    shutil.copy(stub, folder / "python")
    return folder


def _models() -> Path:
    folder = HOME / "triton" / "models"
    shutil.rmtree(folder, ignore_errors=True)
    _model(folder, "trtllm", TRTLLM, TRTLLM_OUTPUTS, batch=8)
    _model(folder, "llmapi", LLMAPI, LLMAPI_OUTPUTS)
    _model(folder, "vllm", VLLM, VLLM_OUTPUTS)
    _ensemble(folder, "ensemble", TRTLLM, TRTLLM_OUTPUTS, batch=8, around="trtllm")
    return folder


def _model(folder: Path, flavour: str, inputs: str, outputs: str, batch: int = 0) -> None:
    settings = {
        "flavour": flavour,
        "tokenizer": str(hugging_face_folder() / "tokenizer.json"),
        "context_tokens": str(CONTEXT_TOKENS),
    }
    config = [_tensors(flavour, inputs, outputs, batch), 'backend: "python"']
    config += ["model_transaction_policy { decoupled: true }", "instance_group [ { kind: KIND_CPU } ]"]
    config += [f'parameters {{ key: "{name}" value {{ string_value: "{s}" }} }}' for name, s in settings.items()]
    (folder / flavour / "1").mkdir(parents=True)
    (folder / flavour / "config.pbtxt").write_text("\n".join(config) + "\n")
    shutil.copy(STANDIN, folder / flavour / "1" / "model.py")


def _ensemble(folder: Path, name: str, inputs: str, outputs: str, batch: int, around: str) -> None:
    maps = [f'input_map {{ key: "{each}" value: "{each}" }}' for each, *_ in _parsed(inputs)]
    maps += [f'output_map {{ key: "{each}" value: "{each}" }}' for each, *_ in _parsed(outputs)]
    step = f'ensemble_scheduling {{ step [ {{ model_name: "{around}" model_version: -1 {" ".join(maps)} }} ] }}'
    (folder / name / "1").mkdir(parents=True)
    (folder / name / "config.pbtxt").write_text(
        "\n".join([_tensors(name, inputs, outputs, batch), 'platform: "ensemble"', step]) + "\n"
    )


def _tensors(name: str, inputs: str, outputs: str, batch: int) -> str:
    lines = [f'name: "{name}"', f"max_batch_size: {batch}"]
    for kind, table in (("input", inputs), ("output", outputs)):
        for tensor, datatype, dimension, optional in _parsed(table):
            option = " optional: true" if optional and kind == "input" else ""
            lines.append(f'{kind} {{ name: "{tensor}" data_type: TYPE_{datatype} dims: [ {dimension} ]{option} }}')
    return "\n".join(lines)


def _parsed(table: str) -> list[tuple[str, str, str, bool]]:
    """Name, type, dimension, and whether it stands behind the semicolon."""
    demanded, _, optional = table.partition(";")
    return [
        (*each.split(), part is optional) for part in (demanded, optional) for each in part.split(",") if each.strip()
    ]
