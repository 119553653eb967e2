"""Servers elsewhere as backends: one client, and a protocol for each kind of server.  See inference/BACKENDS.md."""

from inference.config import OpenAIConfig, TritonConfig
from inference.remote.client import RemoteBackend

__all__ = ["RemoteBackend", "open_remote"]


def open_remote(config: OpenAIConfig | TritonConfig) -> RemoteBackend:
    """Raises Unavailable for settings that can't work, before anything is sent."""
    if isinstance(config, TritonConfig):
        from inference.remote.triton import TritonWire

        return RemoteBackend(config, TritonWire(config))
    from inference.remote.openai import OpenAIWire

    return RemoteBackend(config, OpenAIWire(config))
