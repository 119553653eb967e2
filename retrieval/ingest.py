"""From files to stored documents: find, read, split, embed, commit; one bad file never stops the rest."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Callable, Iterable, Iterator
from datetime import UTC, datetime
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Literal

from msgspec import Struct

from retrieval.access import EVERYBODY, checked
from retrieval.embedding import Embedded, SharedEmbedder
from retrieval.errors import UnreadableFile
from retrieval.fetching import Fetched
from retrieval.formats import progress as reading
from retrieval.formats.media_types import PARSER_VERSION, is_readable_name
from retrieval.formats.parsed import Parsed
from retrieval.pooling import passage_text
from retrieval.records import IngestReport, ProgressEvent
from retrieval.sandbox import Reader
from retrieval.settings import RetrievalSettings
from retrieval.splitting import SPLITTER_VERSION, split
from retrieval.stored import NewDocument, StoredVersion

_GROUP_PASSAGES = 32  # passages embedded and committed together: few syncs, and little to do again after a crash

# Bytes that are no UTF-8 come from the file system as lone surrogates; the mark for them stands for itself, too.
_NOT_PRINTABLE = re.compile("[\ud800-\udfff\ufffd]")
_PRINTED = re.compile("\ufffd([0-9A-F]{4})")

Progress = Callable[[ProgressEvent], None]


class Into(Struct, frozen=True):
    """Where documents go, who may read them, whose they are.  Where `readers` or `tags` is None a document keeps those
    that it has; a new one gets the `usual` readers and no tags.  An owner reads what is theirs."""

    collection: str
    readers: tuple[str, ...] | None = None
    owner: str = ""
    tags: tuple[str, ...] | None = None
    usual: tuple[str, ...] = (EVERYBODY,)

    def check(self) -> None:
        """Raises ValueError for what is no reader or no tag."""
        for reader in (*(self.readers or ()), *self.usual):
            checked(reader)
        for tag in self.tags or ():
            if not tag.strip() or not tag.isprintable() or len(tag) > 200:
                raise ValueError(f"{tag!r} is no tag: give it 1 to 200 letters that can be seen")

    def readers_after(self, stored: StoredVersion | None) -> tuple[str, ...]:
        """Sorted, each once."""
        readers = self.readers if self.readers is not None else stored.readers if stored else self.usual
        return tuple(sorted({*readers, self.owner} - {""}))

    def tags_after(self, stored: StoredVersion | None) -> tuple[str, ...]:
        tags = self.tags if self.tags is not None else stored.tags if stored else ()
        return tuple(sorted(set(tags)))


class Candidate(Struct):
    """One source to ingest: `read` gives its bytes to hash and parse, `parse` has them turned into text, `modified`
    tells its own date (ISO 8601, None where unknown).  `is_file`: its source is a path on this machine."""

    source: str
    read: Callable[[], bytes]
    parse: Callable[[Reader, bytes], Parsed]
    modified: Callable[[], str | None] = lambda: None
    is_file: bool = False


class Prepared(Struct):
    document: NewDocument
    known: bool  # a version of it is stored already


class Ingestion:
    """One run over many sources.  `stored` looks a version up, `moved` one that a file had under another name,
    `embedder` says whose vectors are wanted, `commit` stores documents with them, unless those of another are wanted by
    then, and hears whether they replace any.  `progress` may end the run by what it raises: what is not committed then
    has not been."""

    def __init__(
        self,
        *,
        into: Into,
        embedder: Callable[[], SharedEmbedder],
        reader: Reader,
        settings: RetrievalSettings,
        stored: Callable[[str, str, str], StoredVersion | None],
        moved: Callable[[Into, str, str], StoredVersion | None],
        commit: Callable[[list[tuple[NewDocument, list[Embedded]]], SharedEmbedder, bool], bool],
        progress: Progress | None,
    ):
        self._into = into
        self._embedder = embedder
        self._reader = reader
        self._settings = settings
        self._stored = stored
        self._moved = moved
        self._commit = commit
        self._progress = progress or (lambda event: None)
        self._recipe = recipe(settings)
        self._report = IngestReport([], [], [], [], 0)
        self._pending: list[Prepared] = []
        self._total = 0
        self._done = 0

    def run(self, candidates: Iterable[Candidate], total: int) -> IngestReport:
        self._total = total
        for candidate in candidates:
            # The same source again is compared with what it has just become.
            if any(each.document.source == candidate.source for each in self._pending):
                self._flush()
            try:
                prepared = self._prepare(candidate)
            except UnreadableFile as error:
                self.fail(candidate.source, error)
                continue
            if not isinstance(prepared, Prepared):
                getattr(self._report, prepared).append(candidate.source)
                self._settle(candidate.source, prepared)
                continue
            self._pending.append(prepared)
            if sum(len(each.document.passages) for each in self._pending) >= _GROUP_PASSAGES:
                self._flush()
        self._flush()
        return self._report

    def fail(self, source: str, error: UnreadableFile) -> None:
        self._report.failed.append((source, error.reason))
        self._report.codes[source] = error.code
        self._settle(source, "failed")

    def skip(self, count: int) -> None:
        self._report.skipped += count

    def _prepare(self, candidate: Candidate) -> Prepared | Literal["unchanged", "moved"]:
        """What to store, or what has become of it where this very content is stored already.  Raises
        UnreadableFile."""
        try:
            data = candidate.read()
        except OSError as error:
            raise UnreadableFile(candidate.source, f"can't be read: {error.strerror or error}") from error
        content_hash = hash_of(data)
        stored = self._stored(self._into.collection, candidate.source, self._into.owner)
        known = stored is not None
        if not known and candidate.is_file:
            stored = self._moved(self._into, candidate.source, content_hash)
        readers, tags = self._into.readers_after(stored), self._into.tags_after(stored)
        if is_current(stored, self._into, content_hash, self._recipe):
            return "unchanged" if known else "moved"
        self._tell(candidate.source, "parsing")
        with reading.listening(partial(self._tell, candidate.source, "parsing")):
            parsed = candidate.parse(self._reader, data)
        settings = self._settings
        passages = split(parsed, self._embedder().count_tokens, settings.passage_tokens, settings.max_passage_tokens)
        if not passages:
            raise UnreadableFile(candidate.source, "no text", "no_text")
        self._report.unread += [(candidate.source, reason) for reason in parsed.unread]
        document = NewDocument(
            collection=self._into.collection,
            source=candidate.source,
            title=parsed.title,
            media_type=parsed.media_type,
            content_hash=content_hash,
            recipe=self._recipe,
            pages=len(parsed.page_starts) if parsed.page_starts else None,
            text=parsed.text,
            passages=passages,
            readers=readers,
            owner=self._into.owner,
            modified_at=candidate.modified(),
            tags=tags,
            boxes=parsed.boxes,
        )
        return Prepared(document, stored is not None)

    def _flush(self) -> None:
        pending, self._pending = self._pending, []
        if not pending:
            return
        texts = [
            passage_text(each.document.title, passage.heading, passage.text)
            for each in pending
            for passage in each.document.passages
        ]
        while True:
            embedder = self._embedder()
            tell = partial(self._tell, pending[-1].document.source, "embedding")
            embedded = iter(embedder.encode_passages(texts, tell))
            batch = [(each.document, list(islice(embedded, len(each.document.passages)))) for each in pending]
            if self._commit(
                batch, embedder, any(each.known for each in pending)
            ):  # else another model has come into its place meanwhile
                break
        for each in pending:
            self._report.passages += len(each.document.passages)
            (self._report.updated if each.known else self._report.added).append(each.document.source)
            self._settle(each.document.source, "updated" if each.known else "added")

    def _settle(self, source: str, state: str) -> None:
        self._done += 1
        self._tell(source, state)

    def _tell(self, source: str, state: str, part: int = 0, parts: int = 0) -> None:
        self._progress(ProgressEvent(self._done, self._total, source, state, part, parts))  # type: ignore[arg-type]


def is_current(stored: StoredVersion | None, into: Into, content_hash: str, recipe: str) -> bool:
    """Whether what is stored is all that reading this content anew would give."""
    if stored is None:
        return False
    return stored == StoredVersion(
        stored.document_id, content_hash, recipe, into.readers_after(stored), into.tags_after(stored)
    )


def recipe(settings: RetrievalSettings) -> str:
    """Names how text and passages are made: when it changes, an unchanged file is ingested anew."""
    return (
        f"parser {PARSER_VERSION}, splitter {SPLITTER_VERSION} {settings.passage_tokens}/{settings.max_passage_tokens}"
    )


def file_candidate(path: Path, max_bytes: int) -> Candidate:
    source = printable(os.path.abspath(path))

    def read() -> bytes:
        # Not by size first: a file may grow, a pipe has none.
        if path.is_dir():
            raise UnreadableFile(source, "the folder can't be listed: check who may read it, or name its files")
        if is_gone(path):
            raise UnreadableFile(source, "does not exist", "file_gone")
        if not path.is_file():
            raise UnreadableFile(source, "does not exist" if not path.exists() else "is not a regular file")
        with open(path, "rb") as file:
            before = os.fstat(file.fileno())
            data = file.read(max_bytes + 1)
            after = os.fstat(file.fileno())
        if (before.st_size, before.st_mtime_ns) != (after.st_size, after.st_mtime_ns):
            raise UnreadableFile(source, "it was being written while it was read", "file_changing")
        return checked_size(source, data, max_bytes)

    def modified() -> str | None:
        try:
            return datetime.fromtimestamp(path.stat().st_mtime, UTC).isoformat(timespec="seconds")
        except (OSError, ValueError, OverflowError):
            return None

    return Candidate(source, read, lambda reader, data: reader.read_file(source, data), modified, is_file=True)


def bytes_candidate(name: str, data: bytes, max_bytes: int) -> Candidate:
    return Candidate(
        name, lambda: checked_size(name, data, max_bytes), lambda reader, data: reader.read_file(name, data)
    )


def url_candidate(url: str, fetched: Fetched) -> Candidate:
    return Candidate(url, lambda: fetched.data, lambda reader, data: reader.read_file(fetched.name, data))


def text_candidate(name: str, title: str, text: str, media_type: str) -> Candidate:
    content = "\0".join((title, media_type, text)).encode("utf-8", "replace")
    return Candidate(name, lambda: content, lambda reader, _: reader.read_source(name, text, media_type, title))


def checked_size(name: str, data: bytes, max_bytes: int) -> bytes:
    if len(data) > max_bytes:
        raise UnreadableFile(name, f"larger than {max_bytes // (1024 * 1024)} MiB, the limit for one file")
    return data


def printable(path: str) -> str:
    """A path as valid Unicode, also where its bytes aren't: no two paths become the same."""
    return _NOT_PRINTABLE.sub(lambda found: f"\ufffd{ord(found[0]):04X}", path)


def path_of(source: str) -> Path:
    """The path that became this source by `printable`."""
    return Path(_PRINTED.sub(lambda found: chr(int(found[1], 16)), source))


def is_gone(path: Path) -> bool:
    """Whether nothing is there, which is more than that it can't be seen."""
    try:
        path.lstat()
    except (FileNotFoundError, NotADirectoryError):
        return True
    except (OSError, ValueError):
        pass
    return False


def hash_of(data: bytes) -> str:
    """By which the same content is known, wherever it lies."""
    return hashlib.sha256(data).hexdigest()


def find_files(paths: Iterable[Path | str]) -> tuple[list[Path], int]:
    """(files to read, files in folders whose format isn't read), sorted, each once.

    Folders are walked all the way down, links followed but never in a circle; hidden files and folders are left out.
    A path that was named itself is always kept, whatever it is, and so is a folder that can't be listed: reading
    it gives the reason.
    """
    found: dict[str, Path] = {}
    skipped: set[str] = set()
    for path in sorted({Path(path) for path in paths}):
        if not os.path.isdir(path):
            found.setdefault(os.path.abspath(path), path)
            continue
        unlisted: list[Path] = []
        for file in walk(path, unlisted):
            if is_readable_name(file.name):
                found.setdefault(os.path.abspath(file), file)
            else:
                skipped.add(os.path.abspath(file))
        found.update((os.path.abspath(folder), folder) for folder in unlisted)
    return [found[key] for key in sorted(found)], len(skipped)


def walk(folder: Path, unlisted: list[Path]) -> Iterator[Path]:
    """The files in a folder and below it, without hidden ones; adds the folders that can't be listed to `unlisted`."""
    seen: set[tuple[int, int]] = set()
    for here, folders, files in os.walk(
        folder, onerror=lambda error: unlisted.append(Path(error.filename)), followlinks=True
    ):
        try:
            status = os.stat(here)
        except OSError:  # gone since it was listed
            unlisted.append(Path(here))
            folders.clear()
            continue
        if (status.st_dev, status.st_ino) in seen:
            folders.clear()
            continue
        seen.add((status.st_dev, status.st_ino))
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        yield from (Path(here, name) for name in sorted(files) if not name.startswith("."))
