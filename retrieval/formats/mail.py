"""Mails: EML (RFC 5322) and Outlook's MSG; who wrote to whom and when, the text, and what was attached."""

from __future__ import annotations

import email
import email.policy
import re
from collections.abc import Iterable
from datetime import UTC, datetime, timedelta
from email.message import EmailMessage
from typing import Any

import olefile

from retrieval.errors import UnreadableFile
from retrieval.formats.archive import ReadMember
from retrieval.formats.media_types import EML, MSG
from retrieval.formats.parsed import Parsed, TextBuilder, clean_text
from retrieval.formats.tree import html_tree, write_tree

_HEADERS = ("From", "To", "Cc", "Date")
_BEGINS_AS_MAIL = re.compile(
    rb"(?:[A-Za-z][A-Za-z0-9-]{1,40}:[^\n]*\n(?:[ \t][^\n]*\n)*){2,}", re.MULTILINE
)  # fields of a header
_TELLING_FIELD = re.compile(rb"^(?:received|message-id|mime-version|from|subject):", re.IGNORECASE | re.MULTILINE)

Attached = Iterable[tuple[str, bytes]]


def looks_like_mail(data: bytes) -> bool:
    head = data[:8192]
    found = _BEGINS_AS_MAIL.match(head)
    return found is not None and len({each.lower() for each in _TELLING_FIELD.findall(found[0])}) >= 3


def read_eml(data: bytes, read_member: ReadMember, title: str = "") -> Parsed:
    message: Any = email.message_from_bytes(data, policy=email.policy.default)
    headers = {name: _header(message, name) for name in _HEADERS}
    body = message.get_body(("plain", "html"))
    text = html = ""
    if body is not None and body.get_content_type() == "text/html":
        html = _content(body)
    elif body is not None:
        text = _content(body)
    attached = [(_attached_name(part), _bytes_of(part)) for part in message.iter_attachments()]
    return _mail(headers, _header(message, "Subject"), text, html, attached, read_member, title, EML)


def read_msg(name: str, data: bytes, read_member: ReadMember, title: str = "") -> Parsed:
    """Property streams of [MS-OXMSG]; the text body, else the page.  Raises UnreadableFile where it has neither."""
    with olefile.OleFileIO(data) as ole:

        def prop(tag: str, at: str = "") -> str:
            for kind, encoding in (("001F", "utf-16-le"), ("001E", "cp1252")):
                if ole.exists(path := f"{at}__substg1.0_{tag}{kind}"):
                    return ole.openstream(path).read().decode(encoding, "replace").rstrip("\0")
            return ""

        def binary(tag: str, at: str = "") -> bytes:
            path = f"{at}__substg1.0_{tag}0102"
            return ole.openstream(path).read() if ole.exists(path) else b""

        sender = prop("0C1A") or prop("0042")
        address = prop("5D01") or prop("0C1F")
        headers = {
            "From": f"{sender} <{address}>" if sender and "@" in address else sender or address,
            "To": prop("0E04"),
            "Cc": prop("0E03"),
            "Date": _sent(ole),
        }
        folders = sorted({entry[0] for entry in ole.listdir() if entry[0].startswith("__attach_version1.0_")})
        attached = [
            (prop("3707", f"{at}/") or prop("3704", f"{at}/") or "attachment", binary("3701", f"{at}/"))
            for at in folders
        ]
        html = binary("1013").decode("utf-8", "replace") or prop("1013")
        text, subject = prop("1000"), prop("0037")
    if not (text.strip() or html.strip() or attached or subject):
        raise UnreadableFile(name, "no text: the mail is empty", "no_text")
    return _mail(headers, subject, text, html, attached, read_member, title, MSG)


def _mail(
    headers: dict[str, str],
    subject: str,
    text: str,
    html: str,
    attached: Attached,
    read_member: ReadMember,
    title: str,
    media_type: str,
) -> Parsed:
    builder = TextBuilder()
    subject = " ".join(clean_text(subject).split())
    builder.heading(1, subject)
    lines = [f"{name}: {' '.join(clean_text(value).split())}" for name, value in headers.items() if value.strip()]
    builder.write("".join(f"{line}\n" for line in lines) + "\n")
    if text.strip():
        builder.write(clean_text(text).strip() + "\n\n")
    elif html.strip() and (tree := html_tree(clean_text(html))) is not None:
        write_tree(tree, builder, below=1)
    for name, data in attached:
        name = clean_text(name)
        try:
            builder.embed(read_member(name, data), name)
        except UnreadableFile as error:
            if error.code == "too_large_expanded":
                raise
            builder.write(f"Attached: {name}\n")
            builder.unread.append(f"{name}: {error.reason}")
    return builder.parsed(title or subject, media_type)


def _header(message: EmailMessage, name: str) -> str:
    try:
        return str(message.get(name, ""))
    except Exception:  # the standard library stumbles over some broken addresses and dates, in many ways
        return str(dict(message.raw_items()).get(name, ""))


def _content(part: Any) -> str:
    try:
        return part.get_content()
    except (LookupError, UnicodeError, KeyError, ValueError):  # an encoding that nobody knows
        return (part.get_payload(decode=True) or b"").decode("utf-8", "replace")


def _attached_name(part: Any) -> str:
    return part.get_filename() or f"attached {part.get_content_type()}"


def _bytes_of(part: Any) -> bytes:
    if part.get_content_type() == "message/rfc822":
        inner = part.get_payload(0) if part.is_multipart() else None
        return inner.as_bytes() if inner is not None else b""
    return part.get_payload(decode=True) or b""


def _sent(ole: olefile.OleFileIO) -> str:
    """PR_CLIENT_SUBMIT_TIME, else PR_MESSAGE_DELIVERY_TIME: 100 ns since 1601, in the fixed properties."""
    if not ole.exists("__properties_version1.0"):
        return ""
    data = ole.openstream("__properties_version1.0").read()
    times = {}
    for at in range(32, len(data) - 15, 16):
        tag = int.from_bytes(data[at : at + 4], "little")
        times[tag] = int.from_bytes(data[at + 8 : at + 16], "little")
    ticks = times.get(0x00390040) or times.get(0x0E060040)
    if not ticks or ticks > 0x2000_0000_0000_0000:
        return ""
    return (datetime(1601, 1, 1, tzinfo=UTC) + timedelta(microseconds=ticks // 10)).isoformat(" ", "minutes")
