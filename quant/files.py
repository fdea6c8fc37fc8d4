"""Files of a checkpoint folder, opened without trust: names that stay inside, regular files only, strict JSON."""

import json
import mmap
import os
import re
import stat
from collections.abc import Hashable
from pathlib import Path
from typing import IO, Any

from llmq.errors import FileFormatError, UsageError
from llmq.gguf import quoted

SAFE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,254}")
LFS_POINTER = b"version https://git-lfs"


def damaged(name: str, what: str) -> FileFormatError:
    return FileFormatError(f"{quoted(name)} is damaged: {what}; download or make it again")


def check_name(owner: str, name: str) -> None:
    """Whether a name that `owner` gives for one of its files can be nothing else."""
    if not SAFE_NAME.fullmatch(name):
        raise FileFormatError(f"{quoted(owner)} asks for a file named {quoted(name)}, which is not a plain file name")


def locate(folder: Path, name: str) -> Path:
    """The real path of a file in `folder`, which no separator and no link leads out of.

    A Hugging Face cache keeps a snapshot's files as links into its `blobs`; those are followed.
    """
    check_name(folder.name, name)
    folder = folder.resolve()
    try:
        real = (folder / name).resolve(strict=True)
    except (OSError, RuntimeError) as error:
        raise FileFormatError(f"{quoted(folder.name)} has no {quoted(name)}; complete the checkpoint") from error
    homes = {folder}
    if folder.parent.name == "snapshots":
        homes.add(folder.parent.parent / "blobs")
    if real.parent not in homes:
        raise FileFormatError(
            f"{quoted(name)} in {quoted(folder.name)} is a link that leads out of the folder; copy the file"
        )
    return real


def _open(path: Path) -> IO[bytes]:
    # O_NONBLOCK: opening a named pipe must not wait for a writer.
    flags = os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
    try:
        descriptor = os.open(path, flags)
    except OSError as error:
        raise UsageError(f"cannot open {quoted(str(path), 120)}: {error.strerror}; check its permissions") from error
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise FileFormatError(f"{quoted(path.name)} is not a regular file; get the checkpoint's own one")
    return os.fdopen(descriptor, "rb")


def read_file(path: Path, limit: int) -> bytes:
    """All of a small file; refused above `limit` bytes."""
    with _open(path) as file:
        data = file.read(limit + 1)
    if len(data) > limit:
        raise damaged(path.name, f"it is larger than {limit >> 20} MiB")
    _refuse_pointer(path.name, data)
    return data


def map_file(path: Path) -> mmap.mmap:
    """A read-only map of a file that is not empty."""
    with _open(path) as file:
        if os.fstat(file.fileno()).st_size == 0:
            raise damaged(path.name, "it is empty")
        mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    _refuse_pointer(path.name, mapped[: len(LFS_POINTER)])
    return mapped


def _refuse_pointer(name: str, data: bytes) -> None:
    if data.startswith(LFS_POINTER):
        raise FileFormatError(
            f"{quoted(name)} is a git-lfs pointer, not the file; run `git lfs pull` or download it again"
        )


def parse_json(name: str, data: bytes) -> dict[str, Any]:
    """A JSON object in UTF-8, without duplicate keys, NaN or infinities."""

    def unique(pairs: list[tuple[Hashable, Any]]) -> dict[Any, Any]:
        found = dict(pairs)
        if len(found) != len(pairs):
            raise ValueError("a key occurs twice")
        return found

    def refuse(constant: str) -> None:
        raise ValueError(f"{constant} is not JSON")

    try:
        parsed = json.loads(data.decode(), object_pairs_hook=unique, parse_constant=refuse)
    except RecursionError as error:
        raise damaged(name, "its JSON is nested too deeply") from error
    except ValueError as error:
        raise damaged(name, f"its JSON does not parse ({quoted(str(error))})") from error
    if not isinstance(parsed, dict):
        raise damaged(name, "it does not hold a JSON object")
    return parsed
