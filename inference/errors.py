"""What can go wrong between a prompt and its tokens.

    BackendError
    ├── RequestRefused        the caller's fault; nothing was computed
    │   ├── PromptTooLong     longer than the context, or than the cache can ever hold
    │   └── UnknownModel
    ├── Overloaded            try again later (`retry_after_seconds`)
    ├── Unavailable           the server or engine can't be reached, or is shutting down
    ├── TimedOut              no first token, or no next token, in time
    ├── BadUpstream           a remote server spoke something else than its protocol
    └── GenerationFailed      the step that held this request failed

Each class has a stable `code` that the gateway puts on the wire, and a message that
tells the reader what to do.
"""

from __future__ import annotations


class BackendError(Exception):
    code = "backend_error"
    retry_after_seconds: float | None = None


class RequestRefused(BackendError):
    code = "invalid_request"


class PromptTooLong(RequestRefused):
    code = "prompt_too_long"

    def __init__(self, needed_tokens: int, limit_tokens: int, what: str = "context"):
        self.needed_tokens = needed_tokens
        self.limit_tokens = limit_tokens
        super().__init__(
            f"the prompt with its answer needs {needed_tokens} tokens, but the {what} holds {limit_tokens}: "
            "ask for fewer passages or a shorter answer"
        )


class UnknownModel(RequestRefused):
    code = "unknown_model"


class Overloaded(BackendError):
    code = "overloaded"

    def __init__(self, message: str, retry_after_seconds: float = 1.0):
        super().__init__(message)
        self.retry_after_seconds = retry_after_seconds


class Unavailable(BackendError):
    code = "backend_unavailable"
    retry_after_seconds = 5.0


class TimedOut(BackendError):
    code = "backend_timeout"


class BadUpstream(BackendError):
    code = "bad_upstream"


class GenerationFailed(BackendError):
    code = "generation_failed"
