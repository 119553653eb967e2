"""One document from an address somebody names, and nothing from inside the house.

Whoever may name an address could have this machine ask others for them that they can't reach: its own services, the
cloud's metadata, a printer.  So each host is resolved once, every address that it has must be one of the public
internet, the connection goes to the very address that was checked (a second look-up could give another one), and each
redirect is checked in the same way.  (Server-side request forgery: OWASP API7:2023.)
"""

from __future__ import annotations

import ipaddress
import socket
import time
from collections.abc import Callable
from pathlib import PurePosixPath
from typing import NamedTuple
from urllib.parse import unquote

import httpx

from retrieval.errors import UnreadableFile

PORTS = frozenset((80, 443))
MAX_REDIRECTS = 5
Address = ipaddress.IPv4Address | ipaddress.IPv6Address
Resolve = Callable[[str, int], list[str]]

_NAT64 = ipaddress.ip_network("64:ff9b::/96")
_AGENT = "refdesk"
_FOR_GOOD = frozenset(range(400, 500)) - {408, 425, 429}  # what asking again won't change


class Fetched(NamedTuple):
    """`url` after redirects; `name` ends in a suffix where the address or the type has one."""

    url: str
    name: str
    data: bytes


def fetch(
    url: str,
    max_bytes: int,
    seconds: float,
    *,
    ports: frozenset[int] = PORTS,
    resolve: Resolve | None = None,
    public: Callable[[Address], bool] | None = None,
) -> Fetched:
    """Download `url`.  Raises UnreadableFile: url_forbidden for what must not be asked, else why it gave nothing."""
    deadline = time.monotonic() + seconds
    with httpx.Client(trust_env=False, follow_redirects=False, headers={"User-Agent": _AGENT}) as client:
        at = url
        for _ in range(MAX_REDIRECTS + 1):
            target = _checked(at, ports, resolve or _resolved, public or is_public)
            left = deadline - time.monotonic()
            if left <= 0:
                break
            try:
                with client.stream(
                    "GET",
                    target.direct,
                    headers={"Host": target.host},
                    extensions={"sni_hostname": target.name},
                    timeout=min(10.0, left),
                ) as response:
                    if response.is_redirect:
                        at = str(httpx.URL(at).join(response.headers["Location"]))
                        continue
                    if response.status_code != 200:
                        code = "url_refused" if response.status_code in _FOR_GOOD else "url_failed"
                        raise UnreadableFile(url, f"its server answers {response.status_code}", code)
                    return Fetched(at, _name(at, response), _body(url, response, max_bytes, deadline))
            except httpx.InvalidURL as error:
                raise UnreadableFile(url, f"it leads to what is no address ({error})", "url_forbidden") from error
            except httpx.HTTPError as error:
                raise UnreadableFile(
                    url, f"can't be fetched ({type(error).__name__}: {error})", "url_failed"
                ) from error
        else:
            raise UnreadableFile(url, f"it is redirected more than {MAX_REDIRECTS} times", "url_failed")
    raise UnreadableFile(url, f"fetching it took longer than {seconds:g} s", "url_failed")


def is_public(address: Address) -> bool:
    """Whether it is one of the public internet, also within the addresses that stand for others."""
    if isinstance(address, ipaddress.IPv6Address):
        if address in _NAT64:
            return is_public(ipaddress.IPv4Address(int(address) & 0xFFFFFFFF))
        inner = address.ipv4_mapped or address.sixtofour
        if inner is not None:
            return is_public(inner)
    return address.is_global and not (address.is_multicast or address.is_reserved)


class _Target(NamedTuple):
    direct: str  # the address with the host's number in its place
    host: str  # the Host header
    name: str  # what a certificate must be for


def _checked(url: str, ports: frozenset[int], resolve: Resolve, public: Callable[[Address], bool]) -> _Target:
    def forbidden(why: str) -> UnreadableFile:
        return UnreadableFile(url, why, "url_forbidden")

    try:
        parsed = httpx.URL(url)
    except (httpx.InvalidURL, TypeError, ValueError) as error:
        raise forbidden(f"it is no address ({error})") from error
    if parsed.scheme not in ("http", "https") or not parsed.host:
        raise forbidden("only http and https addresses are fetched")
    if parsed.userinfo:
        raise forbidden("an address with a user name or a password in it is not fetched")
    port = parsed.port or {"http": 80, "https": 443}[parsed.scheme]
    if port not in ports:
        raise forbidden(f"port {port} is not asked")
    try:
        numbers = [ipaddress.ip_address(found.split("%", 1)[0]) for found in resolve(parsed.host, port)]
    except (OSError, UnicodeError, ValueError) as error:
        raise UnreadableFile(url, f"its host is not known ({error})", "url_failed") from error
    if not numbers or not all(public(number) for number in numbers):
        raise forbidden("its host is not one of the public internet")
    direct = parsed.copy_with(host=str(numbers[0]), fragment=None)
    host = parsed.netloc.decode("ascii")
    return _Target(str(direct), host, parsed.raw_host.decode("ascii"))


def _resolved(host: str, port: int) -> list[str]:
    return [str(each[4][0]) for each in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)]


def _body(url: str, response: httpx.Response, max_bytes: int, deadline: float) -> bytes:
    pieces, size = [], 0
    for piece in response.iter_bytes():
        size += len(piece)
        if size > max_bytes:
            raise UnreadableFile(url, f"larger than {max_bytes // 2**20} MiB, the limit for one file", "too_large")
        if time.monotonic() > deadline:
            raise UnreadableFile(url, "its server sends too slowly", "url_failed")
        pieces.append(piece)
    return b"".join(pieces)


def _name(url: str, response: httpx.Response) -> str:
    """The last part of the path, with the suffix of the type where it has none."""
    path = PurePosixPath(unquote(httpx.URL(url).path))
    kind = response.headers.get("Content-Type", "").split(";")[0].strip().lower()
    suffix = {"text/html": ".html", "text/markdown": ".md", "application/pdf": ".pdf", "text/csv": ".csv"}.get(kind, "")
    return path.name if path.suffix else (path.name or httpx.URL(url).host) + suffix
