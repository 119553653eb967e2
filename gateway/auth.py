"""Who asks: the principal of a request, which every route that touches documents needs.

    open       nobody signs in: all may read what is public, and add and change it (the default, for one's own machine)
    headers    a proxy in front signs people in and says who they are in headers; who comes without is anybody, who may
               read what is public and change nothing

A sign-in of refdesk's own would be one more function here.
"""

from __future__ import annotations

import hmac
import secrets
from collections.abc import Callable
from typing import Annotated, Any

from litestar.params import Dependency

from gateway.config import AccessConfig
from gateway.errors import ApiError
from retrieval import ANYBODY, EVERYBODY, Principal, View

OPEN = Principal(frozenset((EVERYBODY,)), steward=True)
PUBLIC_SCOPE = "public"

Asker = Annotated[Principal, Dependency(skip_validation=True)]


def principals(config: AccessConfig) -> Callable[[Any], Principal]:
    """What tells the principal of a connection."""
    if config.mode == "open":
        return lambda connection: OPEN
    return lambda connection: _by_headers(config, connection.headers)


def _by_headers(config: AccessConfig, headers: Any) -> Principal:
    user = headers.get(config.user_header, "").strip()
    if not user:
        return ANYBODY
    groups = [name for each in headers.get(config.groups_header, "").split(",") if (name := each.strip())]
    try:
        return Principal.of(
            user,
            groups,
            headers.get(config.tenant_header, "").strip(),
            steward=not set(groups).isdisjoint(config.stewards),
        )
    except ValueError as error:
        raise ApiError(400, "invalid_identity", f"the sign-in's headers make no sense: {error}") from error


class Scopes:
    """Who shares computed documents with whom: those who may read the same.  The names can't be guessed, and are others
    after each start."""

    def __init__(self) -> None:
        self._key = secrets.token_bytes(32)

    def of(self, view: View) -> str:
        """For prompts made of documents of the library."""
        return self._named("library", view.reads) if view.reads else PUBLIC_SCOPE

    def own(self, principal: Principal) -> str:
        """For prompts that somebody wrote themselves."""
        return self._named("own", principal.name) if principal.name else PUBLIC_SCOPE

    def _named(self, kind: str, who: str) -> str:
        return hmac.digest(self._key, f"{kind} {who}".encode(), "sha256").hex()
