"""What is asked of the file system: files held by one process at a time, made to last, and its errors in words."""

import contextlib
import errno
import os
import stat
import sys
from collections.abc import Iterator
from pathlib import Path

from llmq.errors import LlmqError, ResourceError, UsageError
from llmq.gguf_header import quoted

if sys.platform == "win32":
    import msvcrt
else:
    import fcntl

LOCK_AT = 1 << 62  # Windows locks bytes, and others cannot read those
# Neither links that somebody planted nor pipes that nobody writes to.
FLAGS = os.O_RDWR | os.O_CREAT
for flag in ("O_NOFOLLOW", "O_NONBLOCK", "O_BINARY"):
    FLAGS |= getattr(os, flag, 0)


def hold(path: Path) -> int:
    """Opens a file, made where there is none, to read and write it; -1 where another process holds it.

    The lock ends with the descriptor. UsageError where something else than a file of one name is there.
    """
    while True:
        descriptor = os.open(path, FLAGS, 0o666)
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode) or status.st_nlink > 1:
            os.close(descriptor)
            raise UsageError(f"cannot write {quoted(str(path), 120)}: it is another file; remove it")
        if not lock(descriptor):
            os.close(descriptor)
            return -1
        # What was opened may meanwhile have been renamed or removed by the one who held it.
        if is_at(path, status):
            return descriptor
        os.close(descriptor)


def check_target(target: Path) -> None:
    """UsageError where no file can be written."""
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


@contextlib.contextmanager
def explained(path: Path) -> Iterator[None]:
    """Turns what the system says about writing `path` into a sentence for the user."""
    try:
        yield
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
        kind: type[LlmqError] = ResourceError if full else UsageError
        advice = "make room or give another folder" if full else "check the path and its permissions"
        raise kind(f"cannot write {quoted(str(path), 120)}: {error.strerror}; {advice}") from error


def lock(descriptor: int) -> bool:
    """False where another process holds the file; a file system without locks lets everybody."""
    try:
        if sys.platform == "win32":
            os.lseek(descriptor, LOCK_AT, os.SEEK_SET)
            msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)
        else:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        return error.errno not in (errno.EWOULDBLOCK, errno.EACCES)
    return True


def is_at(path: Path, status: os.stat_result) -> bool:
    try:
        return os.path.samestat(status, path.lstat())
    except FileNotFoundError:
        return False


def sync_data(descriptor: int) -> None:
    """fdatasync, where there is one."""
    getattr(os, "fdatasync", os.fsync)(descriptor)


def sync_folder(folder: Path) -> None:
    """Makes a rename last through a power cut; Windows has no such call and needs none."""
    if os.name == "nt":
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
