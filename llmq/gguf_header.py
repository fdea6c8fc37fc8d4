"""The header of a GGUF file, read without believing it.

    magic, version, counts | key-value pairs | tensor directory | padding | tensor data

Every count, length, dimension, type and offset is compared as a Python integer with the bytes that are really there,
before anything is allocated or viewed. Layout: ggml, `docs/gguf.md`, versions 2 and 3, little-endian.
"""

import itertools
import math
import mmap
from dataclasses import dataclass
from typing import Any

import numpy as np

from llmq.errors import FileFormatError, UnsupportedError, quoted
from llmq.formats import FORMATS, GGML_NAMES, Format, row_bytes

# Types of metadata values.
NUMBERS: dict[int, np.dtype[Any]] = {
    0: np.dtype("<u1"), 1: np.dtype("<i1"), 2: np.dtype("<u2"), 3: np.dtype("<i2"), 4: np.dtype("<u4"),
    5: np.dtype("<i4"), 6: np.dtype("<f4"), 7: np.dtype("?"), 10: np.dtype("<u8"), 11: np.dtype("<i8"),
    12: np.dtype("<f8"),
}  # fmt: skip
STRING, ARRAY = 8, 9
# Read as Python's own int, float and bool; the other numbers keep their NumPy type, so that a copy of the file can too.
PLAIN = {4, 6, 7}

MAGIC = b"GGUF"
ALIGNMENT = 32
HEADER_LIMIT = 64 << 20
COUNT_LIMIT = 65_536
STRING_LIMIT = 16 << 20
KEY_LIMIT = 65_535
NAME_LIMIT = 64
# The smallest possible key-value pair and directory entry.
PAIR_BYTES, ENTRY_BYTES = 14, 33


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """One directory entry: `shape` has rows first, as in NumPy; `offset` counts from the start of the file."""

    name: str
    shape: tuple[int, ...]
    format: Format
    offset: int
    n_bytes: int


class CutShortError(FileFormatError):
    """Only the first bytes of a file were given, and its header goes on behind them."""


class Header:
    """A cursor over the part of the file before the tensor data; it refuses to pass the end.

    `data` is the file, or, where `n_bytes` tells how long that is, its first bytes.
    """

    __slots__ = ("data", "end", "file", "n_bytes", "pos")

    def __init__(self, data: mmap.mmap | bytes, file: str, n_bytes: int | None = None) -> None:
        self.data = data
        self.n_bytes = len(data) if n_bytes is None else n_bytes
        self.end = min(len(data), HEADER_LIMIT)
        self.file = file
        self.pos = len(MAGIC)

    def damaged(self, what: str) -> FileFormatError:
        return FileFormatError(f"{self.file} is damaged: {what}; download or make it again")

    def need(self, n_bytes: int, what: str) -> None:
        if n_bytes > self.end - self.pos:
            self.refuse_cut(self.pos + n_bytes)
            limit = "the file ends" if self.end == self.n_bytes else f"{HEADER_LIMIT >> 20} MiB"
            raise self.damaged(f"{what} at byte {self.pos} would go past where {limit}")

    def refuse_cut(self, pos: int) -> None:
        """CutShortError where the file has this position, and what was given of it does not."""
        if len(self.data) < pos <= min(self.n_bytes, HEADER_LIMIT):
            raise CutShortError(f"{self.file}: its header is longer than {len(self.data)} bytes")

    def take(self, n_bytes: int, what: str) -> bytes:
        self.need(n_bytes, what)
        self.pos += n_bytes
        return self.data[self.pos - n_bytes : self.pos]

    def integer(self, n_bytes: int, what: str) -> int:
        return int.from_bytes(self.take(n_bytes, what), "little")

    def text(self, what: str, shortest: int, longest: int) -> str:
        n_bytes = self.integer(8, f"the length of {what}")
        if not shortest <= n_bytes <= longest:
            raise self.damaged(f"{what} is {n_bytes} bytes long, not {shortest} to {longest}")
        raw = self.take(n_bytes, what)
        try:
            return raw.decode()
        except UnicodeDecodeError as error:
            raise self.damaged(f"{what} is not UTF-8") from error

    def strings(self, count: int, what: str) -> list[bytes]:
        # The one long loop of a header (131,072 tokens and more): local names, and no call per string but the slice.
        self.need(8 * count, what)
        data, pos, end = self.data, self.pos, self.end
        found = []
        for _ in range(count):
            start = pos + 8
            n_bytes = int.from_bytes(data[pos:start], "little")
            pos = start + n_bytes
            if n_bytes > STRING_LIMIT or pos > end:
                self.refuse_cut(pos)
                raise self.damaged(f"a string of {what} is {n_bytes} bytes long, more than there are or may be")
            found.append(data[start:pos])
        self.pos = pos
        return found


def read_header(header: Header) -> tuple[dict[str, Any], dict[str, TensorInfo]]:
    """Reads everything after the magic number: the metadata and the tensor directory, both in file order.

    Raises FileFormatError or UnsupportedError; open_gguf says when.
    """
    n_tensors, n_pairs = _read_counts(header)
    metadata = _read_metadata(header, n_pairs)
    _refuse_split(header, metadata)
    return metadata, _read_directory(header, n_tensors, _alignment(header, metadata))


def _read_counts(header: Header) -> tuple[int, int]:
    """Checks the version; returns the numbers of tensors and of key-value pairs."""
    version = header.integer(4, "the version")
    if version & 0xFFFF == 0 and version:
        raise UnsupportedError(f"{header.file} is a big-endian GGUF file; llmq reads little-endian ones: convert it")
    if version not in (2, 3):
        raise UnsupportedError(f"{header.file} is GGUF version {version}; llmq reads versions 2 and 3")
    n_tensors = header.integer(8, "the number of tensors")
    n_pairs = header.integer(8, "the number of metadata entries")
    what = f"a header of {n_tensors} tensors and {n_pairs} metadata entries"
    if max(n_tensors, n_pairs) > COUNT_LIMIT:
        raise header.damaged(f"{what} is more than there can be")
    header.need(n_tensors * ENTRY_BYTES + n_pairs * PAIR_BYTES, what)
    return n_tensors, n_pairs


def _read_metadata(header: Header, n_pairs: int) -> dict[str, Any]:
    metadata: dict[str, Any] = {}
    for _ in range(n_pairs):
        key = header.text("a metadata key", 1, KEY_LIMIT)
        if key in metadata:
            raise header.damaged(f"metadata key {quoted(key)} occurs twice")
        what = f"the value of {quoted(key)}"
        type_id = header.integer(4, what)
        if type_id == STRING:
            metadata[key] = header.text(what, 0, STRING_LIMIT)
        elif type_id == ARRAY:
            metadata[key] = _read_array(header, what)
        else:
            number = _read_numbers(header, type_id, 1, what)[0]
            metadata[key] = number.item() if type_id in PLAIN else number
    return metadata


def _read_array(header: Header, what: str) -> np.ndarray | list[bytes]:
    type_id = header.integer(4, what)
    count = header.integer(8, what)
    if type_id == ARRAY:
        raise UnsupportedError(f"{header.file}: {what} is an array of arrays, which llmq does not read")
    if type_id == STRING:
        return header.strings(count, what)
    return _read_numbers(header, type_id, count, what)


def _read_numbers(header: Header, type_id: int, count: int, what: str) -> np.ndarray:
    if type_id not in NUMBERS:
        raise header.damaged(f"{what} has the unknown type {type_id}")
    dtype = NUMBERS[type_id]
    raw = np.frombuffer(header.take(count * dtype.itemsize, what), np.uint8)
    if dtype == np.bool_ and raw.max(initial=0) > 1:
        raise header.damaged(f"{what} is a boolean other than 0 and 1")
    return raw.view(dtype)


def _refuse_split(header: Header, metadata: dict[str, Any]) -> None:
    parts = metadata.get("split.count", 0)
    if not isinstance(parts, int | np.integer):
        raise header.damaged("split.count is not a number")
    if parts > 1:
        raise UnsupportedError(
            f"{header.file} is one of the {parts} files of a split model; llmq reads models in one file: "
            "join them with `llama-gguf-split --merge`"
        )


def _alignment(header: Header, metadata: dict[str, Any]) -> int:
    alignment = metadata.get("general.alignment", ALIGNMENT)
    # type(), not isinstance(): True is an int too, and only a u32 is read as one.
    if type(alignment) is not int or not 8 <= alignment <= 65_536 or alignment & (alignment - 1):
        raise header.damaged("general.alignment is not a power of two from 8 to 65536, or not a u32")
    return alignment


def _read_directory(header: Header, n_tensors: int, alignment: int) -> dict[str, TensorInfo]:
    entries = [_read_entry(header, alignment) for _ in range(n_tensors)]
    start = header.pos + -header.pos % alignment
    tensors: dict[str, TensorInfo] = {}
    for entry in entries:
        if entry.name in tensors:
            raise header.damaged(f"tensor {quoted(entry.name)} occurs twice")
        tensors[entry.name] = _placed(header, entry, start)
    by_offset = sorted(tensors.values(), key=lambda info: info.offset)
    for before, after in itertools.pairwise(by_offset):
        if after.offset < before.offset + before.n_bytes:
            raise header.damaged(f"tensors {quoted(before.name)} and {quoted(after.name)} overlap")
    return tensors


def _placed(header: Header, entry: TensorInfo, start: int) -> TensorInfo:
    """The entry with its offset counted from the start of the file, and inside it."""
    offset = start + entry.offset
    if offset + entry.n_bytes > header.n_bytes:
        raise header.damaged(f"it is cut short: tensor {quoted(entry.name)} ends at byte {offset + entry.n_bytes}")
    return TensorInfo(entry.name, entry.shape, entry.format, offset, entry.n_bytes)


def _read_entry(header: Header, alignment: int) -> TensorInfo:
    name = header.text("a tensor name", 1, NAME_LIMIT)
    what = f"tensor {quoted(name)}"
    n_dims = header.integer(4, what)
    if not 1 <= n_dims <= 4:
        raise header.damaged(f"{what} has {n_dims} dimensions, not 1 to 4")
    dims = [header.integer(8, what) for _ in range(n_dims)]
    if not all(1 <= dim < 2**31 for dim in dims):
        raise header.damaged(f"{what} has a dimension that is 0 or 2^31 or more")
    type_id = header.integer(4, what)
    offset = header.integer(8, what)
    if type_id not in FORMATS:
        known = GGML_NAMES.get(type_id, f"number {type_id}")
        raise UnsupportedError(f"{header.file}: {what} is of type {known}, which llmq does not read")
    fmt = FORMATS[type_id]
    if dims[0] % fmt.block_size:
        raise header.damaged(f"{what} has rows of {dims[0]} weights, not whole {fmt.name} blocks of {fmt.block_size}")
    if offset % alignment:
        raise header.damaged(f"{what} is at offset {offset}, not a multiple of {alignment}")
    return TensorInfo(name, tuple(reversed(dims)), fmt, offset, math.prod(dims[1:]) * row_bytes(fmt, dims[0]))
