"""What a folder may be after power is lost at any moment of a program's run.

    record    the program runs with `power_loss.c` preloaded, which writes down all that it does to the folder's files
    replay    each moment after which power may be lost, and from it, as often as wanted, a folder as it may be then

A disk keeps what was synced: a file's bytes with the file, its name with its folder.  Of the rest it keeps anything:
nothing, all, or some of the names, of the writes and of their sectors, in whatever order (as SQLite's own crash tests
do, https://sqlite.org/testing.html, section 3.3).
"""

from __future__ import annotations

import os
import random
import shutil
import struct
import subprocess
from collections.abc import Iterator, Sequence
from pathlib import Path

COMPILER = shutil.which("cc")
_SECTOR_BYTES = 512  # written whole or not at all
_HEAD = struct.Struct("<cQQQ")  # kind, inode, offset, length


def record(command: Sequence[str], watched: Path, scratch: Path) -> Path:
    """Run a program that writes to the folder `watched`; the file that tells what it did.  Raises CalledProcessError
    where the program fails."""
    assert COMPILER is not None
    shim, log = scratch / "power_loss.so", scratch / "power_loss.log"
    source = Path(__file__).with_suffix(".c")
    subprocess.run([COMPILER, "-O1", "-shared", "-fPIC", "-o", shim, source, "-ldl", "-lpthread"], check=True)
    watching = {"LD_PRELOAD": str(shim), "WATCHED": str(watched), "WATCH_LOG": str(log)}
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, env=os.environ | watching)
    return log


class _File:
    """A file's bytes as the program sees them, those that are on the disk, and the writes in between."""

    def __init__(self) -> None:
        self.seen, self.kept = bytearray(), b""
        self.pending: list[tuple[int, bytes | None]] = []  # bytes at an offset, or None: cut or grown to it

    def change(self, offset: int, data: bytes | None) -> None:
        _apply(self.seen, offset, data)
        self.pending.append((offset, data))

    def sync(self) -> None:
        self.kept, self.pending = bytes(self.seen), []

    def after_loss(self, rng: random.Random, chance: float) -> bytes:
        """With each pending write kept by this chance, some of them torn."""
        content = bytearray(self.kept)
        for offset, data in self.pending:
            if rng.random() >= chance:
                continue
            if data is None or chance == 1 or rng.random() < 0.8:
                _apply(content, offset, data)
                continue
            for start in range(offset - offset % _SECTOR_BYTES, offset + len(data), _SECTOR_BYTES):
                if rng.random() < 0.5:
                    begin = max(start, offset)
                    _apply(content, begin, data[begin - offset : start + _SECTOR_BYTES - offset])
        return bytes(content)


def _apply(content: bytearray, offset: int, data: bytes | None) -> None:
    end = offset + len(data or b"")
    if len(content) < end:
        content.extend(bytes(end - len(content)))
    if data is None:
        del content[offset:]
    else:
        content[offset:end] = data


class _Folder:
    pass


class Disk:
    """What a program has done to a folder so far, and what of that a loss of power leaves: bytes by path."""

    def __init__(self, folder: Path):
        self.said = b""  # to its standard output
        self._folder = folder
        self._files: dict[int, _File] = {}  # by inode
        self._seen: dict[str, _File | _Folder] = {}  # by path
        self._kept: dict[str, _File | _Folder] = {}
        self._pending: list[dict[str, _File | _Folder | None]] = []  # names given and taken since their folder's sync

    def least(self) -> dict[str, bytes]:
        """Only what was synced."""
        return self._after_loss(random.Random(0), 0, 0)

    def most(self) -> dict[str, bytes]:
        """All that was written, as when the program is killed and the system lives."""
        return self._after_loss(random.Random(0), 1, 1)

    def some(self, rng: random.Random) -> dict[str, bytes]:
        """What was synced, and any of the rest."""
        return self._after_loss(rng, rng.choice((0, 0.5, 1)), rng.choice((0, 0.5, 1)))

    def _after_loss(self, rng: random.Random, names_chance: float, bytes_chance: float) -> dict[str, bytes]:
        names = dict(self._kept)
        for change in self._pending:
            if rng.random() < names_chance:
                _rename(names, change)
        left = {file: file.after_loss(rng, bytes_chance) for file in names.values() if isinstance(file, _File)}
        found = {}
        for path, file in names.items():
            folders = [str(parent) for parent in Path(path).parents if parent.is_relative_to(self._folder)][:-1]
            # The memory map of SQLite's -shm isn't written down, and is nothing after a crash.
            if isinstance(file, _File) and all(each in names for each in folders) and not path.endswith("-shm"):
                found[os.path.relpath(path, self._folder)] = left[file]  # the same by each of its names
        return found

    def follow(self, kind: str, inode: int, offset: int, data: bytes) -> None:
        """One record of `power_loss.c`."""
        match kind:
            case "a":
                self.said += data
            case "w":
                self._files[inode].change(offset, data)
            case "t":
                self._files[inode].change(offset, None)
            case "s":
                self._files[inode].sync()
            case "d":
                self._sync_folder(Path(os.fsdecode(data)))
            case _:
                self._name(kind, inode, [os.fsdecode(path) for path in data.split(b"\0")])

    def _name(self, kind: str, inode: int, paths: list[str]) -> None:
        match kind:
            case "c":
                self._files[inode] = _File()
                change = {paths[0]: self._files[inode]}
            case "m":
                change = {paths[0]: _Folder()}
            case "u":
                change = {paths[0]: None}
            case "l":
                change = {paths[1]: self._seen[paths[0]]}
            case "r":
                change = {paths[0]: None, paths[1]: self._seen[paths[0]]}
        _rename(self._seen, change)
        self._pending.append(change)

    def _sync_folder(self, folder: Path) -> None:
        for change in self._pending:
            if any(Path(path).parent == folder for path in change):
                _rename(self._kept, change)
        self._pending = [each for each in self._pending if not any(Path(path).parent == folder for path in each)]


def _rename(names: dict[str, _File | _Folder], change: dict[str, _File | _Folder | None]) -> None:
    for path, file in change.items():
        if file is None:
            names.pop(path, None)
        else:
            names[path] = file


def replay(log: Path, watched: Path) -> Iterator[tuple[str, Disk]]:
    """The kind of each thing that was done, and the disk after it, always the same object."""
    disk, written, at = Disk(watched), log.read_bytes(), 0
    while at < len(written):
        kind, inode, offset, length = _HEAD.unpack_from(written, at)
        at += _HEAD.size + length
        disk.follow(kind.decode(), inode, offset, written[at - length : at])
        yield kind.decode(), disk


def put(files: dict[str, bytes], folder: Path) -> None:
    """Make the new folder `folder` hold these."""
    folder.mkdir()
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)


def contents(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and not path.name.endswith("-shm")
    }
