"""Prompts in, tokens out: the backend seam, our engine, and remote servers behind the same seam."""

from inference.backend import (
    Backend,
    Capabilities,
    Constraint,
    Finished,
    FinishReason,
    GenerationEvent,
    GenerationRequest,
    Health,
    Priority,
    Sampling,
    TextDelta,
    TokenLogprob,
    Usage,
)
from inference.config import (
    BackendConfig,
    EngineConfig,
    FleetConfig,
    OpenAIConfig,
    ReplicaConfig,
    ScriptedConfig,
    TritonConfig,
)
from inference.errors import (
    BackendError,
    BadUpstream,
    GenerationFailed,
    Overloaded,
    PromptTooLong,
    RequestRefused,
    TimedOut,
    Unavailable,
    UnknownModel,
)
from inference.prompt import ChatPrompt, DocumentOrder, DocumentReuse, Message, Prompt, Segment, TextPrompt

__all__ = [
    "Backend",
    "BackendConfig",
    "BackendError",
    "BadUpstream",
    "Capabilities",
    "ChatPrompt",
    "Constraint",
    "DocumentOrder",
    "DocumentReuse",
    "EngineConfig",
    "FinishReason",
    "Finished",
    "FleetConfig",
    "GenerationEvent",
    "GenerationFailed",
    "GenerationRequest",
    "Health",
    "Message",
    "OpenAIConfig",
    "Overloaded",
    "Priority",
    "Prompt",
    "PromptTooLong",
    "ReplicaConfig",
    "RequestRefused",
    "Sampling",
    "ScriptedConfig",
    "Segment",
    "TextDelta",
    "TextPrompt",
    "TimedOut",
    "TokenLogprob",
    "TritonConfig",
    "Unavailable",
    "UnknownModel",
    "Usage",
    "open_backend",
]


def open_backend(config: BackendConfig) -> Backend:
    """Open the inference core that `config` chooses.  Loads the model: may take seconds; raises
    `inference.models.ModelError` with a message that names what is missing."""
    match config:
        case EngineConfig():
            from inference.embedded import EmbeddedBackend

            return EmbeddedBackend(config)
        case ScriptedConfig():
            from inference.scripted import ScriptedBackend

            return ScriptedBackend(config)
        case FleetConfig():
            from inference.routing import FleetBackend

            return FleetBackend(config, open_backend)
        case OpenAIConfig() | TritonConfig():
            from inference.remote import open_remote

            return open_remote(config)
