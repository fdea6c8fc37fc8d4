"""A download in the making: `<name>.part` beside its target, and in `<name>.part.journal` what of it is there.

    {"key": ..., "n_bytes": ..., "chunk": 1048576}      what is being fetched
    ffffffff 00001a2b                                    a process that fetches it, in hex; the last one is at it
    00000003 8c1f22d0                                    a chunk that is there, in the order they came: number, CRC-32

A chunk is written before its line is, so what the journal tells of is there after a kill. After a power cut it may not
be, and then the CRC differs. Whether the whole is right, only its sha256 tells. One process at a time holds both files,
by locks that die with it.
"""

import contextlib
import hashlib
import io
import json
import os
import secrets
import shutil
import zlib
from collections.abc import Sequence
from pathlib import Path

from llmq.errors import ResourceError, quoted
from llmq.fetcher import CHUNK, Remote
from llmq.files import allocated_bytes, check_target, explained, spare_bytes, sync, sync_folder, write_all
from llmq.locks import hold
from llmq.part import part_paths

LINE = len("00000000 00000000\n")
PROCESS = 0xFFFFFFFF


class Ledger:
    """The open files of one download: try_open() and then reserve(); at the end publish(), discard(), or close(), which
    leaves what is there to a later run. put() wants to be called by one thread at a time.

    Raises UsageError where files cannot be written, ResourceError where the disk is full.
    """

    def __init__(self, target: Path, remote: Remote) -> None:
        self.target = target
        self._remote = remote
        self._head = (
            json.dumps({"key": content_key(remote), "n_bytes": remote.n_bytes, "chunk": CHUNK}).encode() + b"\n"
        )
        self._part, self._journal, _ = part_paths(self.target)
        self._data = self._log = -1
        self._reader = io.FileIO(os.devnull)

    def try_open(self) -> dict[int, int] | None:
        """The CRC-32 of each chunk that an earlier run left; None where another process is at it."""
        try:
            check_target(self.target)
            with explained(self.target):
                log = hold(self._journal)
                self._log = -1 if log is None else log
                data = None if log is None else hold(self._part)
                if data is None:
                    self.close()
                    return None
                self._data = data
                found = self._read()
                self._reader.close()
                self._reader = io.FileIO(self._part)
                return found
        except BaseException:
            # An empty journal tells of nothing; what is beside it goes too, unless it is not ours.
            empty = self._log >= 0 and not os.fstat(self._log).st_size
            held = [path for path, file in ((self._part, self._data), (self._journal, self._log)) if file >= 0]
            self.close(remove=held if empty else [])
            raise

    def reserve(self) -> None:
        """Makes the part as long as the file. ResourceError where the disk has no room for it."""
        with explained(self.target):
            self._check_space()
            os.ftruncate(self._data, self._remote.n_bytes)

    def holder(self) -> int:
        """The process that is at it, as far as it says; 0 where it does not."""
        with contextlib.suppress(OSError, ValueError):
            lines = self._journal.read_bytes().splitlines()[1:]
            return next((number for index, number in map(_parse, reversed(lines)) if index == PROCESS), 0)
        return 0

    def put(self, index: int, data: memoryview) -> None:
        """Writes a whole chunk, and then its line."""
        with explained(self.target):
            os.lseek(self._data, index * CHUNK, os.SEEK_SET)
            write_all(self._data, data)
            self._append(_line(index, zlib.crc32(data)))

    def read(self, index: int, space: memoryview) -> memoryview:
        """A chunk, in the first bytes of `space`; shorter than it should be where the file is."""
        view, got = space[: self._remote.chunk_bytes(index)], 0
        with explained(self.target):
            self._reader.seek(index * CHUNK)
            while got < len(view) and (n := self._reader.readinto(view[got:])):
                got += n
        return view[:got]

    def forget(self) -> None:
        """Begins again: what is there is not what it should be."""
        with explained(self.target):
            os.ftruncate(self._log, len(self._head))
            self._append(_line(PROCESS, os.getpid()))

    def publish(self) -> None:
        """Gives the file its name, whole and on disk. The journal goes last: until then it holds others off."""
        with explained(self.target):
            sync(self._data)
            self._reader.close()
            if os.name == "nt":  # where an open file cannot be renamed
                os.close(self._data)
                self._data = -1
            self._part.replace(self.target)
            sync_folder(self.target.parent)
        self.close(remove=[self._journal])

    def discard(self) -> None:
        self.close(remove=[self._part, self._journal])

    def close(self, *, remove: Sequence[Path] = ()) -> None:
        with explained(self.target):
            # Before others can take hold of them; Windows does not remove open files.
            if os.name != "nt":
                _unlink(remove)
            self._reader.close()
            for descriptor in (self._data, self._log):
                if descriptor >= 0:
                    os.close(descriptor)
            self._data = self._log = -1
            if os.name == "nt":
                _unlink(remove)

    def _read(self) -> dict[int, int]:
        """What an earlier run of the same download left; what another one left goes."""
        with open(self._log, "rb", closefd=False) as file:
            head, rest = file.read(len(self._head)), file.read()
        found = {}
        if head == self._head:
            there = os.fstat(self._data).st_size
            # A line that was cut off would shift all that come after it.
            os.ftruncate(self._log, len(head) + len(rest) // LINE * LINE)
            for at in range(0, len(rest) - LINE + 1, LINE):
                index, crc = _parse(rest[at : at + LINE])
                if 0 <= index < self._remote.n_chunks and index * CHUNK + self._remote.chunk_bytes(index) <= there:
                    found[index] = crc
        else:
            os.ftruncate(self._data, 0)
            os.ftruncate(self._log, 0)
            self._append(self._head)
        self._append(_line(PROCESS, os.getpid()))
        return found

    def _append(self, data: bytes) -> None:
        os.lseek(self._log, 0, os.SEEK_END)
        write_all(self._log, data)

    def _check_space(self) -> None:
        missing = self._remote.n_bytes - min(allocated_bytes(self._part), self._remote.n_bytes)
        needed = missing + spare_bytes(self._remote.n_bytes)
        free = shutil.disk_usage(self.target.parent).free
        if free < needed:
            raise ResourceError(
                f"{quoted(self.target.name)} needs {needed / 1e6:,.1f} MB more of disk, and {free / 1e6:,.1f} MB is "
                "free; make room or give another folder"
            )


def content_key(remote: Remote) -> str:
    """The same for two downloads whose parts belong together; of what nothing vouches for, no two do."""
    if remote.sha256 or not remote.etag:
        return remote.sha256 or secrets.token_hex(32)
    return hashlib.sha256(f"{remote.request.url} {remote.etag}".encode()).hexdigest()


def _line(index: int, number: int) -> bytes:
    return f"{index:08x} {number:08x}\n".encode()


def _parse(line: bytes) -> tuple[int, int]:
    """What _line() was given; (PROCESS, 0) for anything else."""
    try:
        index, number = line.split()
        return int(index, 16), int(number, 16)
    except ValueError:
        return PROCESS, 0


def _unlink(paths: Sequence[Path]) -> None:
    for path in paths:
        path.unlink(missing_ok=True)
