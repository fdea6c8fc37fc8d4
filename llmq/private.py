"""The cache folder: what is kept there belongs to the user alone, appears whole or not at all, and may be deleted."""

import os
import stat
import tempfile
from pathlib import Path

from platformdirs import user_cache_path


def cache_root() -> Path:
    """Where compiled kernels are kept: $LLMQ_CACHE_DIR or the user's cache folder."""
    configured = os.environ.get("LLMQ_CACHE_DIR")
    return (Path(configured) if configured else user_cache_path("llmq")) / "kernels"


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


def write_atomically(path: Path, content: bytes) -> None:
    """Write a cache file under a temporary name and rename it; a full or read-only disk only means no cache."""
    try:
        fd, temporary = tempfile.mkstemp(dir=path.parent, prefix=".new-")
        try:
            with os.fdopen(fd, "wb") as file:
                file.write(content)
            Path(temporary).replace(path)
        except OSError:
            Path(temporary).unlink(missing_ok=True)
    except OSError:
        return
