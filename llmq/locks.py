"""Files that one process at a time holds; a lock ends with the descriptor, and so with the process."""

import errno
import os
import stat
import sys
from pathlib import Path

from llmq.errors import UsageError, quoted

if sys.platform == "win32":
    import msvcrt
else:
    import fcntl

LOCK_AT = 1 << 62  # Windows locks bytes, and others cannot read those
# Neither links that somebody planted nor pipes that nobody writes to.
FLAGS = os.O_RDWR
for flag in ("O_NOFOLLOW", "O_NONBLOCK", "O_BINARY"):
    FLAGS |= getattr(os, flag, 0)


def hold(path: Path) -> int | None:
    """A descriptor to read and write a file by, made where there is none, locked; None where another process holds it.

    UsageError where something else than a file of one name is there; OSError.
    """
    while True:
        descriptor = os.open(path, FLAGS | os.O_CREAT, 0o666)
        status = os.fstat(descriptor)
        if not is_plain(status):
            os.close(descriptor)
            raise UsageError(f"cannot write {quoted(str(path), 120)}: it is another file; remove it")
        if not lock(descriptor):
            os.close(descriptor)
            return None
        # What was opened may meanwhile have been renamed or removed by the one who held it.
        if is_at(path, status):
            return descriptor
        os.close(descriptor)


def is_held(path: Path) -> bool:
    """Whether a process is writing this file."""
    try:
        descriptor = os.open(path, FLAGS)
    except OSError:
        return False
    try:
        return not lock(descriptor)
    finally:
        os.close(descriptor)


def is_plain(status: os.stat_result) -> bool:
    """A regular file of one name."""
    return stat.S_ISREG(status.st_mode) and status.st_nlink == 1


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
    """Whether an open file, of this status, still has the name it was opened by."""
    try:
        return os.path.samestat(status, path.lstat())
    except OSError:
        return False
