"""What lies within a ZIP file, and how much of it may come out: some kilobytes can unfold to gigabytes."""

from __future__ import annotations

import io
import zipfile
import zlib
from collections.abc import Callable

from retrieval.errors import UnreadableFile
from retrieval.formats import progress
from retrieval.formats.media_types import ZIP
from retrieval.formats.parsed import Parsed, TextBuilder, clean_text

MAX_MEMBERS = 10_000
MAX_EXPANDED = 512 * 1024 * 1024  # bytes of all members together
_PIECE = 1024 * 1024
_NOT_MEANT = ("__macosx/", "thumbs.db", "desktop.ini")

ReadMember = Callable[[str, bytes], Parsed]


class Archive:
    """An open ZIP of which at most MAX_EXPANDED bytes come out, counted as they come: what its directory says of sizes
    is the word of whoever made it."""

    def __init__(self, name: str, data: bytes):
        """Raises UnreadableFile: damaged, or of too many members."""
        self._name = name
        self._left = MAX_EXPANDED
        try:
            self._zip = zipfile.ZipFile(io.BytesIO(data))
        except (zipfile.BadZipFile, ValueError, NotImplementedError, EOFError) as error:
            raise UnreadableFile(name, f"the archive is damaged ({error})") from error
        self.names = [info.filename for info in self._zip.infolist() if not info.is_dir()]
        if len(self.names) > MAX_MEMBERS:
            raise UnreadableFile(name, f"it holds more than {MAX_MEMBERS} files", "too_large_expanded")

    def read(self, member: str) -> bytes:
        """Raises UnreadableFile: too large, locked, damaged, or not there."""
        pieces: list[bytes] = []
        self._pieces(member, pieces.append)
        return b"".join(pieces)

    def _pieces(self, member: str, take: Callable[[bytes], None]) -> None:
        try:
            with self._zip.open(member) as file:
                while piece := file.read(_PIECE):
                    self._count(len(piece))
                    take(piece)
        except KeyError as error:
            raise UnreadableFile(self._name, f"it lacks {member}") from error
        except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, RuntimeError, OSError) as error:
            if isinstance(error, RuntimeError) and "password" in str(error):
                raise UnreadableFile(self._name, "it is protected by a password") from error
            raise UnreadableFile(self._name, f"{member} in it is damaged ({error})") from error

    def check(self) -> None:
        """Unfold everything once and keep nothing, before any reader trusts what the archive says of itself."""
        for member in self.names:
            self._pieces(member, lambda piece: None)
        self._left = MAX_EXPANDED

    def _count(self, more: int) -> None:
        self._left -= more
        if self._left < 0:
            raise UnreadableFile(
                self._name, f"it unfolds to more than {MAX_EXPANDED // 2**20} MiB", "too_large_expanded"
            )


def read_archive(name: str, archive: Archive, read_member: ReadMember, title: str = "") -> Parsed:
    """Every file that can be read, by name, each a section; the others are `unread`."""
    builder = TextBuilder()
    for member in progress.each(sorted(archive.names)):
        shown = clean_text(member.replace("\\", "/"))
        parts = shown.lower().split("/")
        if any(part.startswith(".") and part.strip(".") for part in parts) or shown.lower().startswith(_NOT_MEANT):
            continue
        try:
            builder.embed(read_member(shown, archive.read(member)), shown)
        except UnreadableFile as error:
            if error.code == "too_large_expanded":
                raise
            builder.unread.append(f"{shown}: {error.reason}")
    if not builder.sections[-1].start and not any(section.path for section in builder.sections):
        why = f": {'; '.join(builder.unread[:3])}" if builder.unread else ""
        raise UnreadableFile(name, f"no text in any of its files{why}", "no_text")
    parsed = builder.parsed(title, ZIP)
    if not title:
        parsed.title = ""  # the name of its first file names no archive
    return parsed
