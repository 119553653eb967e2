"""Our engine: `EngineCore` is the pure heart, `EngineThread` runs it beside an event loop."""

from inference.engine.core import EngineCore, EngineOptions, Output
from inference.engine.scheduler import Policy
from inference.engine.thread import EngineThread

__all__ = ["EngineCore", "EngineOptions", "EngineThread", "Output", "Policy"]
