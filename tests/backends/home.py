"""Where the servers lie: `.backends`, with a virtual environment for each and the model in the forms that they read."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from loadtests.peer_models import write_gguf, write_hugging_face

HOME = Path(__file__).parents[2] / ".backends"
MODEL = "smollm2"
TORCH = "torch==2.13.0"
CONTEXT_TOKENS = 2048  # of one request, in every server


class NotInstalled(Exception):
    """A server could not be installed; the message says which, and why."""


class Venv:
    """The virtual environment of one server; pip puts into it what is asked for, once."""

    def __init__(self, name: str):
        self.name = name
        self.folder = HOME / name
        self.python = self.folder / "bin" / "python"
        version = f"python{sys.version_info.major}.{sys.version_info.minor}"
        self.site_packages = self.folder / "lib" / version / "site-packages"
        self.log = HOME / f"{name}.log"

    def command(self, name: str) -> Path:
        return self.folder / "bin" / name

    def once(self, what: str, fill: Callable[[], None]) -> None:
        """Make the environment and fill it, unless that was done for `what`, which names versions."""
        done = self.folder / "installed"
        if done.exists() and done.read_text() == what:
            return
        done.unlink(missing_ok=True)
        print(f"{self.name}: installing {what} into {self.folder}", flush=True)
        self.run(sys.executable, "-m", "venv", self.folder)
        fill()
        done.write_text(what)

    def pip(self, *arguments: str | Path, **environment: str) -> None:
        self.run(self.python, "-m", "pip", "--disable-pip-version-check", "-q", "install", *arguments, **environment)

    def torch(self) -> None:
        """The CPU's: from PyTorch's own index where TORCH_INDEX names it."""
        index = os.environ.get("TORCH_INDEX")
        self.pip(TORCH, *(["--index-url", index] if index else []))

    def run(self, *command: str | Path, **environment: str) -> str:
        """What it prints.  Raises NotInstalled where it fails."""
        done = subprocess.run(command, capture_output=True, text=True, env=os.environ | environment)
        if done.returncode:
            said = "\n".join((done.stdout + done.stderr).splitlines()[-20:])
            raise NotInstalled(f"{self.name} could not be installed: {' '.join(map(str, command))} failed:\n{said}")
        return done.stdout

    def version(self, package: str) -> str:
        asked = f"import importlib.metadata as m; print(m.version({package!r}))"
        return self.run(self.python, "-c", asked).strip()


def hugging_face_folder() -> Path:
    return _written(HOME / "models" / MODEL, write_hugging_face)


def gguf_file() -> Path:
    return _written(HOME / "models" / "f16.gguf", write_gguf)


def _written(target: Path, write: Callable[[Path], None]) -> Path:
    """Written whole or not at all."""
    if not target.exists():
        print(f"writing {target}", flush=True)
        target.parent.mkdir(parents=True, exist_ok=True)
        partly = target.with_name(target.name + ".partly")
        with contextlib.redirect_stderr(None):  # progress bars
            write(partly)
        partly.rename(target)
    return target
