"""Who may read a document: it carries readers, whoever asks is some of them, and without one in common it isn't there.

    public            everybody
    tenant:acme       everybody of that tenant
    group:acme/hr     the members of a tenant's group; group:hr where there are no tenants
    user:acme/ada     one person; user:ada where there are no tenants

A slash within a name is written %2F (and % as %25), so that no name of one kind is ever one of another.  A document
without readers is nobody's: deny when unknown.  Groups and users of a tenant are named with it, so that a name in one
tenant never stands for somebody in another.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

from msgspec import Struct

EVERYBODY = "public"
_READER = re.compile(r"(?:tenant|group|user):[^\s/\0][^\n\0]{0,198}")


class Principal(Struct, frozen=True):
    """Who asks.  `readers`: all that they are; None reads everything, for the operator of this machine.  `name` ("" for
    nobody in particular) is what their documents are known to belong to.  A `steward` may change all that they may
    read."""

    readers: frozenset[str] | None
    name: str = ""
    steward: bool = False

    @classmethod
    def of(cls, user: str = "", groups: Iterable[str] = (), tenant: str = "", steward: bool = False) -> Principal:
        """A person as a sign-in tells of them.  Raises ValueError for a name that can't be one."""
        readers = {EVERYBODY, *(_named("group", group, tenant) for group in groups)}
        if tenant:
            readers.add(checked(f"tenant:{_escaped(tenant)}"))
        name = _named("user", user, tenant) if user else ""
        return cls(frozenset(readers | {name} - {""}), name, steward)

    @property
    def tenant(self) -> str:
        """ "" where there is none."""
        return next((each[7:] for each in sorted(self.readers or ()) if each.startswith("tenant:")), "")

    @property
    def usual_readers(self) -> tuple[str, ...]:
        """Who may read what they add, where they don't say: their tenant, else only they, else everybody."""
        if self.tenant:
            return (f"tenant:{self.tenant}",)
        return (self.name or EVERYBODY,)

    def may_read(self, readers: Iterable[str]) -> bool:
        return self.readers is None or not self.readers.isdisjoint(readers)

    def may_change(self, owner: str) -> bool:
        """A document of `owner`; "" is the operator's."""
        return self.readers is None or self.steward or (owner != "" and owner == self.name)


OPERATOR = Principal(None)
ANYBODY = Principal(frozenset((EVERYBODY,)))


def qualified(reader: str, tenant: str) -> str:
    """A reader as people of `tenant` name it ("group:hr") or as they are shown it ("group:acme/hr"), as it is stored.
    `tenant` as it is stored.  Raises ValueError."""
    kind, _, name = checked(reader).partition(":")
    if kind in ("group", "user"):
        if tenant:
            name = name.removeprefix(f"{tenant}/")
        name = _escaped(name.replace("%2F", "/").replace("%25", "%"))
        return checked(f"{kind}:{tenant}/{name}" if tenant else f"{kind}:{name}")
    if kind == "tenant" and name != tenant:
        raise ValueError(f"{reader!r} is not the tenant {tenant!r}" if tenant else f"{reader!r}: there are no tenants")
    return reader


def _named(kind: str, name: str, tenant: str) -> str:
    return checked(f"{kind}:{_escaped(tenant)}/{_escaped(name)}" if tenant else f"{kind}:{_escaped(name)}")


def _escaped(name: str) -> str:
    return name.replace("%", "%25").replace("/", "%2F")


def checked(reader: str) -> str:
    """Raises ValueError where it is no reader."""
    if reader != EVERYBODY and not _READER.fullmatch(reader):
        raise ValueError(f"{reader!r} is no reader: say public, tenant:NAME, group:NAME or user:NAME")
    return reader
