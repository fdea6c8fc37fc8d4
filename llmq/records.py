"""What is known of an installed file: its sha256, where it came from, and when it was last loaded.

A model of the store has its record in the state folder as `models/<name>.json`, a file elsewhere as `files/<sha256 of
its real path>.json`; the date of an empty file beside it, `.used`, is that of the last use. What a record says is read
like anything from outside: one that is not what was written is as none.
"""

import contextlib
import hashlib
import json
import os
import stat
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llmq.errors import UsageError, quoted
from llmq.files import SHA256, explained, is_private, open_regular, write_atomically
from llmq.store import BUNDLED, BUNDLED_PATH, NAME, SUFFIX, make_private, models_dir, state_dir

RECORD_LIMIT = 128 << 10
TEXT_LIMIT = 4096
ABANDONED = 3600.0  # seconds after which a temporary file is nobody's


@dataclass(frozen=True, slots=True)
class Record:
    """A file when it was added: `origin` is "org/repo@commit/file", a URL or a path, `added` seconds since 1970."""

    sha256: str
    n_bytes: int
    mtime_ns: int
    origin: str
    added: float

    def fits(self, path: Path) -> bool:
        """Whether size and date of the file are still those of the record; else it is stale."""
        try:
            status = path.stat()
        except OSError:
            return False
        return (status.st_size, status.st_mtime_ns) == (self.n_bytes, self.mtime_ns)


def read_record(path: Path) -> Record | None:
    """The record of a file, None where there is none or it is not what was written. It may be stale."""
    content = _read(_record_path(path))
    return _checked(content) if content else None


def current_record(path: Path) -> Record | None:
    """The record of a file that has the size and date that it had then, else None."""
    record = read_record(path)
    return record if record and record.fits(path) else None


def write_record(path: Path, sha256: str, origin: str, added: float | None = None) -> None:
    """Remembers a file that is in place; `added` is now unless given. Raises UsageError or ResourceError."""
    status = path.stat()
    record = {
        "sha256": sha256,
        "n_bytes": status.st_size,
        "mtime_ns": status.st_mtime_ns,
        "origin": origin[:TEXT_LIMIT],
        "added": time.time() if added is None else added,
        "file": os.path.realpath(path),
    }
    target = _record_path(path)
    check_record(path)
    with explained(target):
        write_atomically(target, json.dumps(record).encode(), lasting=True)


def check_record(path: Path) -> None:
    """Raises what write_record() would, where that is known before there is a file; makes the folder for its record."""
    target = _record_path(path)
    with explained(target):
        make_private(state_dir())
        if not is_private(make_private(target.parent)):
            raise UsageError(
                f"cannot remember {quoted(path.name)}: others may write to {quoted(str(target.parent), 120)}; "
                "`chmod 700` it"
            )
        # Whether a file can be made there, only making one tells.
        tempfile.TemporaryFile(dir=target.parent).close()


def drop_record(path: Path) -> None:
    """Forgets a file, and when it was used. Raises UsageError where the state folder cannot be written."""
    for known in (_record_path(path), _used_path(path)):
        with explained(known), contextlib.suppress(FileNotFoundError, NotADirectoryError):
            known.unlink()


def mark_used(path: Path) -> None:
    """Dates the last use of a model of the store, or of a file that has a record; a folder that cannot be written
    to is no reason to fail.
    """
    used = _used_path(path)
    with contextlib.suppress(OSError):
        if used.parent.name == "files" and not _record_path(path).exists():
            return
        make_private(state_dir())
        make_private(used.parent)
        flags = os.O_WRONLY | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0)
        os.close(os.open(used, flags, 0o600))
        os.utime(used)


def last_used(path: Path) -> float | None:
    """When a model was last loaded, in seconds since 1970; None where that is not known."""
    try:
        status = _used_path(path).lstat()
    except OSError:
        return None
    return status.st_mtime if stat.S_ISREG(status.st_mode) else None


def lost_records() -> list[Path]:
    """Records and dates of files that are gone, and temporary files of records; never of a file whose whole folder
    is away, as on a disk that is not there now.
    """
    models, files = state_dir() / "models", state_dir() / "files"
    lost = [
        known
        for known in (*models.glob("*.json"), *models.glob("*.used"))
        if known.stem != BUNDLED and not os.path.lexists(models_dir() / (known.stem + SUFFIX))
    ]
    for known in files.glob("*.json"):
        file = (_read(known) or {}).get("file")
        if isinstance(file, str) and Path(file).parent.is_dir() and not os.path.lexists(file):
            lost += [path for path in (known, known.with_suffix(".used")) if os.path.lexists(path)]
    for temporary in (*models.glob(".new-*"), *files.glob(".new-*")):
        with contextlib.suppress(FileNotFoundError):
            if time.time() - temporary.lstat().st_mtime > ABANDONED:
                lost.append(temporary)
    return sorted(lost)


def _record_path(path: Path) -> Path:
    return _place(path, ".json")


def _used_path(path: Path) -> Path:
    return _place(path, ".used")


def _place(path: Path, suffix: str) -> Path:
    # The model itself may be a link; it is the name in the store that counts.
    in_store = os.path.realpath(path.parent) == os.path.realpath(models_dir()) and path.stem != BUNDLED
    if path == BUNDLED_PATH or (in_store and path.suffix == SUFFIX and NAME.fullmatch(path.stem)):
        return state_dir() / "models" / (path.stem + suffix)
    real = os.fsencode(os.path.realpath(path))
    return state_dir() / "files" / (hashlib.sha256(real).hexdigest() + suffix)


def _read(record: Path) -> dict[str, Any] | None:
    """The JSON object of a record file, with whatever is in it."""
    try:
        descriptor = open_regular(record, follow=False)
    except OSError:
        return None
    with os.fdopen(descriptor, "rb") as file:
        text = file.read(RECORD_LIMIT + 1)
    try:
        content = json.loads(text) if len(text) <= RECORD_LIMIT else None
    except (ValueError, RecursionError):
        return None
    return content if isinstance(content, dict) else None


def _checked(content: dict[str, Any]) -> Record | None:
    sha256, origin, added = content.get("sha256"), content.get("origin"), content.get("added")
    n_bytes, mtime_ns = content.get("n_bytes"), content.get("mtime_ns")
    if not isinstance(sha256, str) or not SHA256.fullmatch(sha256):
        return None
    if not isinstance(origin, str) or len(origin) > TEXT_LIMIT:
        return None
    # type(), not isinstance(): True is an int too.
    if type(n_bytes) is not int or type(mtime_ns) is not int or type(added) is not float:
        return None
    if not (0 <= n_bytes < 2**63 and 0 <= mtime_ns < 2**63 and 0 <= added < 2**40):
        return None
    return Record(sha256, n_bytes, mtime_ns, origin, added)
