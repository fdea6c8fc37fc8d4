"""A file in the making: `<name>.part` beside its target, which a later run of the same job continues.

It is held by one process at a time. `<name>.part.journal` tells what is in it: the sha256 of all that follows in hex,
a line break, and JSON with the job, the process at work, and a sha256 and a note for every finished piece.
"""

import contextlib
import hashlib
import json
import os
import shutil
import stat
import sys
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

from llmq.errors import BusyError, FileFormatError, LlmqError, ResourceError, UnsupportedError, UsageError, quoted
from llmq.files import (
    BLOCK,
    PART_SUFFIXES,
    allocated_bytes,
    check_target,
    explained,
    open_regular,
    sync,
    sync_folder,
    write_all,
)
from llmq.locks import hold, is_at, is_plain

Note = dict[str, Any]  # of what JSON gives back as it was

# How much may be lost when the power goes: what was finished since the last save.
SAVE_BYTES = 64 << 20
SAVE_SECONDS = 1.0


def nothing_to_check() -> None:
    """For those who hold a file and have nothing to look at first."""


def part_paths(target: Path) -> tuple[Path, Path, Path]:
    """The files written beside `target`: the part, its journal, and the journal's next version."""
    part, journal, new = (target.with_name(target.name + suffix) for suffix in PART_SUFFIXES)
    return part, journal, new


class PartFile:
    """A head, written anew by every run, and pieces behind it; open() first, and publish() or leave() last. A target
    that is a link is followed, unless `follow` is False: then the link is replaced. `held` is called once no other
    process writes the file, before this one does; what it raises is passed on, and what an earlier run left is kept.

    A piece is either taken over from an earlier run of the same `job` or written and recorded, in the same order as
    there; it lies behind the one before, or where goto() says. What is recorded is flushed to disk and told in the
    journal by a thread, after SAVE_SECONDS or SAVE_BYTES, whichever comes first. Without a job nothing is kept.

    Raises UsageError where the target cannot be written, BusyError where another process is at it, ResourceError for a
    full disk.
    """

    def __init__(
        self, target: Path, job: str = "", *, follow: bool = True, held: Callable[[], None] = nothing_to_check
    ) -> None:
        self.target = Path(os.path.realpath(target)) if follow else target
        self._job, self._held = job, held
        self._path, self._journal, self._new = part_paths(self.target)
        self._descriptor = -1
        self._earlier: deque[dict[str, Any]] = deque()  # pieces of an earlier run, not yet checked
        self._pieces: list[dict[str, Any]] = []
        self._digest = hashlib.sha256()
        self._unsaved, self._saved_at = 0, 0.0
        self._saver: ThreadPoolExecutor | None = None
        self._saving: Future[None] | None = None

    def open(self, head: bytes, n_bytes: int) -> None:
        """Begins a file of `n_bytes`, or continues one."""
        check_target(self.target)
        with explained(self.target):
            self._check_space(n_bytes)
            self._drop_second_name()
        with explained(self._path):  # which is what may lie in the way
            descriptor = hold(self._path)
        if descriptor is None:
            raise BusyError(f"cannot write {quoted(str(self.target), 120)}", self._read_journal().get("pid", 0))
        self._descriptor = descriptor
        try:
            self._read_earlier()
            self._held()
            with explained(self.target):
                self._begin(n_bytes)
            self.write(head)
            self._digest = hashlib.sha256()
            self._saver = ThreadPoolExecutor(1)
            self._save()
            self._wait()
        except BaseException as error:
            self.leave(error)
            raise

    def goto(self, at: int) -> None:
        """What comes next is for the bytes from `at` on."""
        os.lseek(self._descriptor, at, os.SEEK_SET)

    def take_over(self, n_bytes: int) -> Note | None:
        """The note of the next piece where an earlier run left its `n_bytes` whole, else None, then and ever after."""
        if not self._earlier:
            return None
        start = os.lseek(self._descriptor, 0, os.SEEK_CUR)
        piece, digest, left = self._earlier[0], hashlib.sha256(), n_bytes
        with explained(self.target):
            while left and (block := os.read(self._descriptor, min(left, BLOCK))):
                digest.update(block)
                left -= len(block)
            if left or digest.hexdigest() != piece["sha256"]:
                self._earlier.clear()
                self.goto(start)
                return None
        self._pieces.append(self._earlier.popleft())
        return piece["note"]

    def write(self, data: bytes | memoryview) -> None:
        self._digest.update(data)
        self._unsaved += len(data)
        with explained(self.target):
            write_all(self._descriptor, data)

    def record(self, note: Note) -> None:
        """Ends a piece: what was written since the one before."""
        assert not self._earlier, "a piece was written over"
        self._pieces.append({"sha256": self._digest.hexdigest(), "note": note})
        self._digest = hashlib.sha256()
        if self._unsaved >= SAVE_BYTES or time.monotonic() - self._saved_at >= SAVE_SECONDS:
            self._save()

    def keep(self, n_pieces: int) -> None:
        """Only the first of those taken over and recorded: the others are not right, and are to be written again."""
        del self._pieces[n_pieces:]
        self._earlier.clear()
        self._save()

    def amend(self, at: int, data: bytes) -> None:
        """Replaces bytes of the head, just before publish()."""
        with explained(self.target):
            self.goto(at)
            self.write(data)

    @property
    def sha256(self) -> str:
        """Of what was written since the last piece, or since the head."""
        return self._digest.hexdigest()

    def publish(self, *, new: bool = False) -> None:
        """Gives the file its name; it is on disk whole before it has it. `new`: UsageError where the name is taken.

        UsageError too where something else has taken the part's place, which is left.
        """
        try:
            self._wait()
            with explained(self.target):
                self._check_is_ours()
                sync(self._descriptor)
                # The journal goes first: once the part has its name, another run may begin one.
                self._remove_journal()
                if sys.platform == "win32":  # where an open file cannot be renamed
                    self._close()
                if new:
                    self._name_new()
                else:
                    self._path.replace(self.target)
                sync_folder(self.target.parent)
        except BaseException as error:
            self.leave(error)
            raise
        self._close()

    def leave(self, error: BaseException | None) -> None:
        """Stops before the end: keeps finished pieces for a later run, unless there is no job or the source is bad."""
        pieces, is_ours = self._pieces or self._earlier, self._is_ours()
        if self._job and pieces and is_ours and not isinstance(error, FileFormatError | UnsupportedError):
            # A disk that is full may have no room for a journal either; then the one before holds.
            with contextlib.suppress(LlmqError):
                self._save()
                self._wait()
        else:
            # A journal that is still being written would come back.
            with contextlib.suppress(LlmqError):
                self._wait()
            for path in (self._new, self._journal, *([self._path] if is_ours else [])):
                with contextlib.suppress(OSError):  # which must not hide `error`
                    path.unlink(missing_ok=True)
        self._close()

    def _check_space(self, n_bytes: int) -> None:
        free = shutil.disk_usage(self.target.parent).free
        there = sum(map(allocated_bytes, part_paths(self.target)))
        if free + there < n_bytes:
            raise ResourceError(
                f"{quoted(self.target.name)} needs {(n_bytes - there) / 1e6:,.0f} MB of disk and {free / 1e6:,.0f} MB "
                "is free; make room or give another folder"
            )

    def _read_earlier(self) -> None:
        journal = self._read_journal()
        if self._job and journal.get("job") == self._job:
            self._earlier.extend(journal["pieces"])

    def _begin(self, n_bytes: int) -> None:
        size = os.fstat(self._descriptor).st_size
        os.ftruncate(self._descriptor, min(size, n_bytes) if self._earlier else 0)
        os.lseek(self._descriptor, 0, os.SEEK_SET)

    def _read_journal(self) -> dict[str, Any]:
        """Empty where there is none, or not what was written."""
        try:
            descriptor = open_regular(self._journal, follow=False)
        except OSError:
            return {}
        with os.fdopen(descriptor, "rb") as file:
            digest, _, text = file.read().partition(b"\n")
        return json.loads(text) if hashlib.sha256(text).hexdigest().encode() == digest else {}

    def _save(self) -> None:
        """Lets the thread flush what was written and then tell of it in the journal."""
        self._wait()
        if self._job and self._saver:
            journal = {"job": self._job, "pid": os.getpid(), "pieces": [*self._pieces, *self._earlier]}
            self._saving = self._saver.submit(self._flush, json.dumps(journal).encode())
        self._unsaved, self._saved_at = 0, time.monotonic()

    def _flush(self, journal: bytes) -> None:
        _sync_data(self._descriptor)
        self._new.unlink(missing_ok=True)
        with self._new.open("xb") as file:
            file.write(hashlib.sha256(journal).hexdigest().encode() + b"\n" + journal)
            file.flush()
            sync(file.fileno())
        with explained(self._journal):
            self._new.replace(self._journal)

    def _wait(self) -> None:
        if self._saving:
            with explained(self.target):
                self._saving.result()
            self._saving = None

    def _is_ours(self) -> bool:
        """Whether the part is still the file that is open; a lock keeps nobody from renaming another over it."""
        return self._descriptor < 0 or is_at(self._path, os.fstat(self._descriptor))

    def _check_is_ours(self) -> None:
        if not self._is_ours():
            raise UsageError(
                f"cannot write {quoted(str(self.target), 120)}: {quoted(self._path.name)} was removed or replaced "
                "meanwhile; do it again"
            )

    def _name_new(self) -> None:
        try:
            os.link(self._path, self.target)
        except OSError:  # taken, or a file system without hard links
            if os.path.lexists(self.target):
                raise UsageError(f"there is a file {quoted(str(self.target), 120)} already; it was left") from None
            self._path.replace(self.target)
        else:
            self._path.unlink(missing_ok=True)

    def _drop_second_name(self) -> None:
        """A run killed in _name_new() leaves a part that is the finished file."""
        if os.path.lexists(self._path) and os.path.lexists(self.target):
            part, finished = self._path.lstat(), self.target.lstat()
            if stat.S_ISREG(part.st_mode) and os.path.samestat(part, finished):
                self._path.unlink(missing_ok=True)

    def _remove_journal(self) -> None:
        for path in (self._new, self._journal):
            path.unlink(missing_ok=True)

    def _close(self) -> None:
        if self._saver:
            self._saver.shutdown()
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1


def discard(target: Path) -> None:
    """Removes what an interrupted run left beside `target`, links and not what they lead to.

    Raises UsageError where another process is at it, or something cannot be removed.
    """
    part, *journals = part_paths(target)
    with explained(part):
        if os.path.lexists(part) and not is_plain(part.lstat()):
            part.unlink()
        descriptor = hold(part)
        if descriptor is None:
            raise UsageError(f"cannot remove {quoted(str(part), 120)}: a process is writing it; wait for it to end")
        try:
            for path in (*journals, part):
                path.unlink(missing_ok=True)
        finally:
            os.close(descriptor)


def _sync_data(descriptor: int) -> None:
    """fdatasync, where there is one."""
    getattr(os, "fdatasync", os.fsync)(descriptor)
