"""The command that measures a GPU works where there is none, as far as it can: it may be the first time in months that
it finds one."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch


@pytest.mark.slow
def test_the_rehearsal_goes_through():
    command = [sys.executable, "-m", "loadtests.gpu_check", "--rehearse", "--kinds", "FP8 cache"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    assert "tiny FP8 cache" in done.stdout
    assert "decode attention" in done.stdout


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_without_a_gpu_it_says_so():
    done = subprocess.run(
        [sys.executable, "-m", "loadtests.gpu_check"], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 2
    assert "sees no GPU" in done.stdout
