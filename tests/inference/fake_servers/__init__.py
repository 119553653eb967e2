"""Servers that keep to the protocols of the real ones, field by field: what those refuse is refused here, what they
ignore is ignored, errors have their shapes.  Each answers with the words of a script; tokens are words."""

from tests.inference.fake_servers.llamacpp import LlamaCpp
from tests.inference.fake_servers.openai import Faithful
from tests.inference.fake_servers.script import WORDS, Script
from tests.inference.fake_servers.sglang import SGLang
from tests.inference.fake_servers.triton import Triton
from tests.inference.fake_servers.trtllm import TRTLLM
from tests.inference.fake_servers.vllm import VLLM

__all__ = ["TRTLLM", "VLLM", "WORDS", "Faithful", "LlamaCpp", "SGLang", "Script", "Triton"]
