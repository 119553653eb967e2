"""Which request is this?  Ids are ours; a client's own X-Request-Id only goes to the log."""

from __future__ import annotations

from typing import Any
from uuid import uuid4


def request_id(scope: Any) -> str:
    """The id of a request, made at first sight."""
    state = scope.setdefault("state", {})
    known = state.get("refdesk_request_id")
    if known is None:
        known = state["refdesk_request_id"] = uuid4().hex
    return known
