"""What every test of the C++ kernels needs."""

from __future__ import annotations

import pytest

from kernels import native


@pytest.fixture(scope="module")
def library():
    found = native.load()
    if found is None:
        pytest.skip("no C++ compiler on this machine")
    return found
