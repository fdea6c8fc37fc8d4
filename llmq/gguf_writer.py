"""GGUF files: the streaming, atomic writer."""

import contextlib
import errno
import io
import math
import os
import re
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import psutil

from llmq.errors import LlmqError, ResourceError, UsageError
from llmq.formats import Format, row_bytes
from llmq.gguf_header import ALIGNMENT, ARRAY, MAGIC, NAME_LIMIT, NUMBERS, STRING, quoted

VERSION = 3
TYPE_IDS = {dtype: type_id for type_id, dtype in NUMBERS.items()}


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """A tensor to be written; `shape` has rows first, as in NumPy, and the last dimension is whole blocks."""

    name: str
    shape: tuple[int, ...]
    format: Format

    @property
    def n_bytes(self) -> int:
        return math.prod(self.shape[:-1]) * row_bytes(self.format, self.shape[-1])


class GGUFWriter:
    """Writes one file, tensor by tensor in the declared order; a context manager.

    The bytes go to `<name>.tmp-<pid>` beside the target, header first and final. Leaving the context flushes that file
    to disk and renames it, so the target is complete or untouched; an error in between removes it. What earlier, killed
    writers of the same target left behind is removed too.

    Metadata types: str; bool; int as u32, float as f32, NumPy scalars and arrays as their own type; lists of str or
    bytes as strings, of int as i32, of float as f32. What the reader yields is written back as it was.

    Raises UsageError where the target cannot be written, ResourceError where the disk is too small.
    """

    def __init__(self, path: str | os.PathLike[str], metadata: dict[str, Any], tensors: Sequence[TensorSpec]) -> None:
        assert len({spec.name for spec in tensors}) == len(tensors), "two tensors of one name"
        self.path = Path(path)
        self._temporary = self.path.with_name(f"{self.path.name}.tmp-{os.getpid()}")
        self._alignment = int(metadata.get("general.alignment", ALIGNMENT))
        self._header = _header(metadata, tensors, self._alignment)
        self._tensors = list(tensors)
        self._left = [spec.n_bytes for spec in tensors]
        self._at = 0
        self._file: io.FileIO

    @property
    def n_bytes(self) -> int:
        """Size of the finished file."""
        return len(self._header) + sum(_padded(spec.n_bytes, self._alignment) for spec in self._tensors)

    def __enter__(self) -> "GGUFWriter":
        with _explained(self.path):
            if self.path.is_dir():
                raise UsageError(f"cannot write {quoted(str(self.path), 120)}: it is a folder; give a file name")
            _remove_leftovers(self.path)
            free = shutil.disk_usage(self.path.parent).free
            if free < self.n_bytes:
                raise ResourceError(
                    f"{quoted(self.path.name)} needs {self.n_bytes / 1e9:.2f} GB of disk and {free / 1e9:.2f} GB is "
                    "free; make room or give another folder"
                )
            self._file = self._temporary.open("wb", buffering=0)
        try:
            self._put(self._header)
        except LlmqError:
            self._discard()
            raise
        return self

    def write(self, name: str, chunk: np.ndarray) -> None:
        """Appends the bytes of `chunk` (any dtype and shape) to the named tensor, which must be the one in turn."""
        spec = self._tensors[self._at]
        assert name == spec.name, f"{spec.name} is in turn, not {name}"
        data = np.ascontiguousarray(chunk).reshape(-1).view(np.uint8)
        self._left[self._at] -= data.size
        assert self._left[self._at] >= 0, f"{-self._left[self._at]} bytes too many for {name}"
        self._put(data.data)
        if self._left[self._at] == 0:
            self._put(bytes(-spec.n_bytes % self._alignment))
            self._at += 1

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        try:
            if kind is None:
                self._publish()
        finally:
            self._discard()

    def _publish(self) -> None:
        assert self._at == len(self._tensors), f"{self._tensors[self._at].name} is not complete"
        with _explained(self.path):
            os.fsync(self._file.fileno())
            self._file.close()
            self._temporary.replace(self.path)
            _sync_folder(self.path.parent)

    def _discard(self) -> None:
        self._file.close()
        self._temporary.unlink(missing_ok=True)

    def _put(self, data: bytes | memoryview) -> None:
        # Unbuffered, so that a full disk shows here and not in close(); a write may then be a short one.
        left = memoryview(data)
        with _explained(self.path):
            while left:
                left = left[self._file.write(left) :]


def _padded(n_bytes: int, alignment: int) -> int:
    return n_bytes + -n_bytes % alignment


@contextlib.contextmanager
def _explained(path: Path) -> Iterator[None]:
    """Turns what the system says about writing `path` into a sentence for the user."""
    try:
        yield
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
        kind: type[LlmqError] = ResourceError if full else UsageError
        advice = "make room or give another folder" if full else "check the path and its permissions"
        raise kind(f"cannot write {quoted(str(path), 120)}: {error.strerror}; {advice}") from error


def _sync_folder(folder: Path) -> None:
    """Makes a rename last through a power cut; Windows has no such call and needs none."""
    if os.name == "nt":
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _remove_leftovers(path: Path) -> None:
    temporary = re.compile(re.escape(path.name) + r"\.tmp-([0-9]{1,9})")
    for other in path.parent.iterdir():
        match = temporary.fullmatch(other.name)
        if match and not psutil.pid_exists(int(match[1])):
            other.unlink()


def _header(metadata: dict[str, Any], tensors: Sequence[TensorSpec], alignment: int) -> bytes:
    """Everything before the tensor data, padded."""
    parts = [MAGIC, _u32(VERSION), _u64(len(tensors)), _u64(len(metadata))]
    for key, value in metadata.items():
        parts += [_string(key), _typed(value)]
    offset = 0
    for spec in tensors:
        assert len(spec.name.encode()) <= NAME_LIMIT, spec.name
        dims = [_u64(dim) for dim in reversed(spec.shape)]
        parts += [_string(spec.name), _u32(len(dims)), *dims, _u32(spec.format.id), _u64(offset)]
        offset += _padded(spec.n_bytes, alignment)
    header = b"".join(parts)
    return header + bytes(-len(header) % alignment)


def _typed(value: Any) -> bytes:
    """A metadata value with its type in front."""
    if isinstance(value, str):
        return _u32(STRING) + _string(value)
    if isinstance(value, list) and (not value or isinstance(value[0], str | bytes)):
        return _u32(ARRAY) + _u32(STRING) + _u64(len(value)) + b"".join(map(_string, value))
    array = _little_endian(value)
    if array.ndim == 0:
        return _u32(TYPE_IDS[array.dtype]) + array.tobytes()
    return _u32(ARRAY) + _u32(TYPE_IDS[array.dtype]) + _u64(array.size) + array.tobytes()


def _little_endian(value: Any) -> np.ndarray:
    # np.float64 is a float too, so NumPy's own types come first.
    if isinstance(value, np.generic | np.ndarray | bool):
        array = np.asarray(value)
    elif isinstance(value, list):
        array = np.asarray(value)
        array = array.astype({"i": np.int32, "f": np.float32}[array.dtype.kind])
    else:
        array = np.asarray(value, {int: np.uint32, float: np.float32}[type(value)])
    return array.astype(array.dtype.newbyteorder("<"))


def _string(text: str | bytes) -> bytes:
    raw = text.encode() if isinstance(text, str) else text
    return _u64(len(raw)) + raw


def _u32(number: int) -> bytes:
    return number.to_bytes(4, "little")


def _u64(number: int) -> bytes:
    return number.to_bytes(8, "little")
