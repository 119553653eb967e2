"""Inference servers of others, started on this machine and stopped again."""

from __future__ import annotations

import contextlib
import os
import subprocess
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from loadtests.run import RunError, free_port, stop

START_SECONDS = 600


@contextlib.contextmanager
def running(
    name: str, command: Sequence[str], health: str, environment: Mapping[str, str], log: Path | None = None
) -> Iterator[None]:
    """`command` while the block runs, from when the URL `health` answers with 200.  Raises RunError, with the end of
    what the server wrote, which all goes to `log`."""
    with open(log, "w+b") if log else tempfile.TemporaryFile() as output:
        server = subprocess.Popen(
            command, env=environment, stdout=output, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL
        )
        try:
            deadline = time.monotonic() + START_SECONDS
            while not _answers(health):
                if server.poll() is not None or time.monotonic() > deadline:
                    output.seek(0)
                    raise RunError(f"{name} did not start:\n{output.read().decode(errors='replace')[-2000:]}")
                time.sleep(1)
            yield
        finally:
            stop(server)


@contextlib.contextmanager
def vllm_served(
    command: Path | str,
    model: Path,
    preload: Sequence[Path] = (),
    options: Sequence[str] = (),
    context_tokens: int = 4096,
    log: Path | None = None,
) -> Iterator[str]:
    """The URL of vLLM on the CPU, with the weights in the folder `model`.  `preload`: tcmalloc and Intel's OpenMP,
    which vLLM's documentation asks for."""
    port = free_port()
    serve = [str(command), "serve", str(model), "--host", "127.0.0.1", "--port", str(port)]
    serve += ["--dtype", "bfloat16", "--enable-prefix-caching", "--max-model-len", str(context_tokens)]
    serve += ["--max-num-seqs", "32", "--max-num-batched-tokens", "512", *options]
    settings = {"VLLM_CPU_KVCACHE_SPACE": "4", "VLLM_CPU_OMP_THREADS_BIND": "0-1", "VLLM_NO_USAGE_STATS": "1"}
    environment = settings | os.environ
    if preload:
        environment["LD_PRELOAD"] = ":".join(str(path) for path in preload)
    url = f"http://127.0.0.1:{port}"
    with running("vLLM", serve, url + "/health", environment, log):
        yield url


def _answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=5) as response:
            return response.status == 200
    except (urllib.error.URLError, OSError):
        return False
