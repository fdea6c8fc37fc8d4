"""Files that are there whole or not at all, folders of the user's own, and a file's sha256."""

import contextlib
import errno
import hashlib
import os
import re
import stat
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

from llmq.errors import LlmqError, ResourceError, UsageError, quoted

if sys.platform != "win32":
    import fcntl

FULL_SYNC = getattr(fcntl, "F_FULLFSYNC", None) if sys.platform != "win32" else None
BLOCK = 1 << 20  # bytes that are read at a time
SHA256 = re.compile("[0-9a-f]{64}")
PART_SUFFIXES = (".part", ".part.journal", ".part.journal.new")  # of a file in the making, as llmq.part says
SPARE_SHARE, MOST_SPARE = 0.02, 256 << 20


def write_atomically(path: Path, content: bytes, *, lasting: bool = False) -> None:
    """Writes under a temporary name and renames; `lasting` also through a power cut. Readable by this user alone.

    Raises OSError; nothing is left behind then.
    """
    descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=".new-")
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(content)
            if lasting:
                file.flush()
                sync(file.fileno())
        Path(temporary).replace(path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
    if lasting:
        sync_folder(path.parent)


def sync(descriptor: int) -> None:
    """What was written lasts through a power cut: macOS's fsync leaves it with the drive, which may still lose it."""
    if FULL_SYNC is not None:
        # Not every file system can.
        with contextlib.suppress(OSError):
            fcntl.fcntl(descriptor, FULL_SYNC)
            return
    os.fsync(descriptor)


def sync_folder(folder: Path) -> None:
    """Makes a rename last through a power cut; Windows has no such call and needs none."""
    if os.name == "nt":
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        sync(handle)
    finally:
        os.close(handle)


def open_private(folder: Path) -> Path | None:
    """The folder, made if need be; None where it cannot be made or others can write to it."""
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        return folder if is_private(folder) else None
    except OSError:
        return None


def is_private(folder: Path) -> bool:
    """A real folder that only this user can write to (on systems that have such owners)."""
    info = folder.lstat()
    if not hasattr(os, "getuid"):
        return stat.S_ISDIR(info.st_mode)
    return stat.S_ISDIR(info.st_mode) and info.st_uid == os.getuid() and not info.st_mode & 0o022


def open_regular(path: Path, *, follow: bool) -> int:
    """A descriptor to read a regular file by, through a link only with `follow`. OSError for anything else."""
    # O_NONBLOCK: opening a named pipe must not wait for a writer.
    flags = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
    descriptor = os.open(path, flags if follow else flags | getattr(os, "O_NOFOLLOW", 0))
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(errno.EINVAL, "it is not a regular file", str(path))
    return descriptor


def read_blocks(descriptor: int) -> Iterator[memoryview]:
    """The rest of an open file; a block is good until the next one."""
    buffer = memoryview(bytearray(BLOCK))
    with os.fdopen(descriptor, "rb", buffering=0, closefd=False) as file:
        while n_read := file.readinto(buffer):
            yield buffer[:n_read]


def write_all(descriptor: int, data: bytes | memoryview) -> None:
    """Writes where the descriptor stands."""
    # Unbuffered, so that a full disk shows here; a write may then be a short one.
    left = memoryview(data)
    while left:
        left = left[os.write(descriptor, left) :]


def sha256_of(path: Path, on_bytes: Callable[[int], None] | None = None, *, follow: bool = True) -> str:
    """Of a file's content, in hex; `on_bytes` is told how many were read each time.

    Raises UsageError where it cannot be read, or changes meanwhile.
    """
    digest = hashlib.sha256()
    with explained(path, "read"):
        descriptor = open_regular(path, follow=follow)
        try:
            before = os.fstat(descriptor)
            for block in read_blocks(descriptor):
                digest.update(block)
                if on_bytes:
                    on_bytes(len(block))
            after = os.fstat(descriptor)
        finally:
            os.close(descriptor)
    if (before.st_size, before.st_mtime_ns) != (after.st_size, after.st_mtime_ns):
        raise UsageError(f"{quoted(path.name)} is being written; wait for that to end")
    return digest.hexdigest()


def check_target(target: Path) -> None:
    """UsageError where no file can be written, or one would lie where another is in the making."""
    if target.name.lower().endswith(PART_SUFFIXES):
        raise UsageError(
            f"cannot write {quoted(str(target), 120)}: names that end so are those of files in the making; give another"
        )
    with explained(target):
        if target.is_dir():
            what = "it is a folder"
        elif target.exists() and not target.is_file():
            what = "it is not a regular file"
        elif not target.parent.is_dir():
            what = "its folder is not there"
        else:
            return
    raise UsageError(f"cannot write {quoted(str(target), 120)}: {what}; give the path of a file")


def allocated_bytes(path: Path) -> int:
    """What a file takes on disk, which is less than its size where it has holes; 0 where there is none."""
    try:
        status = path.lstat()
    except OSError:
        return 0
    # Windows does not tell, and makes no holes by itself.
    return min(status.st_blocks * 512, status.st_size) if hasattr(status, "st_blocks") else status.st_size


def spare_bytes(n_bytes: int) -> int:
    """What a disk must have free beyond a file of `n_bytes`: file systems round up, and others write too."""
    return min(int(SPARE_SHARE * n_bytes), MOST_SPARE)


@contextlib.contextmanager
def explained(path: Path, doing: str = "write") -> Iterator[None]:
    """Turns what the system says about writing or reading `path` into a sentence for the user."""
    try:
        yield
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
        kind: type[LlmqError] = ResourceError if full else UsageError
        advice = "make room or give another folder" if full else "check the path and its permissions"
        raise kind(f"cannot {doing} {quoted(str(path), 120)}: {error.strerror}; {advice}") from error
