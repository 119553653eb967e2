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
from typing import Any

from msgspec.structs import replace

from gateway.config import AccessConfig, ConfigError
from gateway.errors import ApiError
from retrieval import ANYBODY, EVERYBODY, Principal, View
from retrieval.access import checked

OPEN = Principal(frozenset((EVERYBODY,)), steward=True)
PUBLIC_SCOPE = "public"


def principals(config: AccessConfig) -> Callable[[Any], Principal]:
    """What tells the principal of a connection.  Raises ConfigError for stewards that are no readers."""
    try:
        stewards = frozenset(map(checked, config.stewards))
    except ValueError as error:
        raise ConfigError(f"access.stewards: {error}") from error
    if config.mode == "open":
        return lambda connection: OPEN
    return lambda connection: _by_headers(config, stewards, connection.headers)


def _by_headers(config: AccessConfig, stewards: frozenset[str], headers: Any) -> Principal:
    user = _only(headers, config.user_header)
    if not user:
        return ANYBODY
    groups = [name for each in _only(headers, config.groups_header).split(",") if (name := each.strip())]
    try:
        principal = Principal.of(user, groups, _only(headers, config.tenant_header))
    except ValueError as error:
        raise ApiError(400, "invalid_identity", f"the sign-in's headers make no sense: {error}") from error
    return replace(principal, steward=not stewards.isdisjoint(principal.readers or ()))


def _only(headers: Any, name: str) -> str:
    """The header's text.  Two of a kind are refused: one of them may be the client's own."""
    values = headers.getall(name, [])
    if len(values) > 1:
        raise ApiError(400, "invalid_identity", f"the header {name} comes more than once")
    text = values[0].strip() if values else ""
    try:
        return text.encode("latin-1").decode("utf-8")  # as proxies write names; the server read it as latin-1
    except UnicodeError:
        return text


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
