"""GGUF files: the streaming, atomic writer."""

import hashlib
import itertools
import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from llmq.formats import Format, row_bytes
from llmq.gguf_header import ALIGNMENT, ARRAY, MAGIC, NAME_LIMIT, NUMBERS, STRING
from llmq.part import Note, PartFile, nothing_to_check

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
    """Writes one file, tensor by tensor; a context manager.

    The bytes go to `<name>.part` beside the target. Leaving the context flushes that file to disk and renames it, so
    the target is complete or untouched. An error in between removes it; or, given a `job` (a text that stands for all
    that the data depends on), keeps finished pieces for the next writer of the same job: see `llmq.part`.

    Metadata types: str; bool; int as u32, float as f32, NumPy scalars and arrays as their own type; lists of str or
    bytes as strings, of int as i32, of float as f32. What the reader yields is written back as it was.

    A target that is a link is followed, unless `follow` is False: then the link is replaced. `held` is called once
    nobody else writes the target, and before anything of it is written; what it raises is passed on.

    Raises UsageError where the target cannot be written, BusyError where it is being written, ResourceError where the
    disk is too small.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        metadata: dict[str, Any],
        tensors: Sequence[TensorSpec],
        job: str = "",
        *,
        follow: bool = True,
        held: Callable[[], None] = nothing_to_check,
    ) -> None:
        assert len({spec.name for spec in tensors}) == len(tensors), "two tensors of one name"
        self._metadata = metadata
        self._alignment = int(metadata.get("general.alignment", ALIGNMENT))
        self._header = _header(metadata, tensors, self._alignment)
        self._specs = {spec.name: spec for spec in tensors}
        starts = itertools.accumulate((_padded(spec.n_bytes, self._alignment) for spec in tensors), initial=0)
        self._starts = {spec.name: len(self._header) + start for spec, start in zip(tensors, starts, strict=False)}
        self._left = {spec.name: spec.n_bytes for spec in tensors}
        self._name, self._at = "", 0
        self._pieces: list[tuple[str, int]] = []  # tensor and bytes of each
        self._piece = 0  # bytes of the one being written
        job = job and hashlib.sha256(job.encode() + self._header).hexdigest()
        self._part = PartFile(Path(path), job, follow=follow, held=held)

    @property
    def n_bytes(self) -> int:
        """Size of the finished file."""
        return len(self._header) + sum(_padded(spec.n_bytes, self._alignment) for spec in self._specs.values())

    def __enter__(self) -> "GGUFWriter":
        self._part.open(self._header, self.n_bytes)
        return self

    def turn_to(self, name: str, start: int = 0) -> None:
        """What is written next is for the tensor's bytes from `start` on."""
        assert name in self._specs, f"{name} is not among the tensors"
        self._name, self._at = name, start
        self._part.goto(self._starts[name] + start)

    def take_over(self, n_bytes: int) -> Note | None:
        """What record() was given for the next piece, where an earlier writer of this job left it whole on disk.

        It has `n_bytes` of the tensor that was turned to. Else None: it and all after it are to be written.
        """
        note = self._part.take_over(n_bytes + self._padding(n_bytes))
        if note is not None:
            self._advance(n_bytes)
            self._end_piece()
        return note

    def write(self, name: str, chunk: np.ndarray) -> None:
        """Appends the bytes of `chunk` (any dtype and shape) to the named tensor."""
        if name != self._name:
            self.turn_to(name)
        data = np.ascontiguousarray(chunk).reshape(-1).view(np.uint8)
        padding = self._padding(data.size)
        self._advance(data.size)
        self._part.write(data.data)
        self._part.write(bytes(padding))

    def record(self, note: Note) -> None:
        """Ends a piece, and keeps it, and `note` with it, for a later writer of the same job."""
        self._part.record(note)
        self._end_piece()

    def keep(self, n_pieces: int) -> None:
        """Of the pieces so far only the first are right: all others are to be written again."""
        self._end_piece()
        for name, n_bytes in self._pieces[n_pieces:]:
            self._left[name] += n_bytes
        del self._pieces[n_pieces:]
        self._part.keep(n_pieces)

    def amend(self, key: str, value: Any) -> None:
        """Gives a number or text in the metadata another value of the same type and size, after the last tensor."""
        self._check_complete()
        before = dict(itertools.takewhile(lambda pair: pair[0] != key, self._metadata.items()))
        at = len(_header(before, [], 1)) + len(_string(key))
        assert len(_typed(value)) == len(_typed(self._metadata[key])), key
        self._part.amend(at, _typed(value))

    def _padding(self, n_bytes: int) -> int:
        """Zeros behind the next `n_bytes`, where those are the tensor's last."""
        spec = self._specs[self._name]
        return -spec.n_bytes % self._alignment if self._at + n_bytes == spec.n_bytes else 0

    def _advance(self, n_bytes: int) -> None:
        self._at += n_bytes
        self._piece += n_bytes
        self._left[self._name] -= n_bytes
        left = self._left[self._name]
        assert left >= 0, f"{-left} bytes too many for {self._name}"

    def _end_piece(self) -> None:
        self._pieces.append((self._name, self._piece))
        self._piece = 0

    def _check_complete(self) -> None:
        short = [name for name, left in self._left.items() if left]
        assert not short, f"{short[0]} is not complete"

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if error is None and not any(self._left.values()):
            self._part.publish()
        else:
            self._part.leave(error)
            if error is None:
                self._check_complete()


def _padded(n_bytes: int, alignment: int) -> int:
    return n_bytes + -n_bytes % alignment


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
