"""safetensors files: a header of JSON, read without believing it, and tensors as views into the mapped file.

    u64 N | N bytes of JSON: name -> dtype, shape, data_offsets | data

Offsets count from the start of the data; tensors fill it without gap or overlap. Layout: the safetensors README.
"""

import math
import mmap
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from llmq.errors import UnsupportedError
from llmq.gguf import quoted
from quant.files import damaged, map_file, parse_json

HEADER_LIMIT = 100_000_000
NAME_LIMIT = 512
DTYPES: dict[str, np.dtype[Any]] = {"F32": np.dtype("<f4"), "F16": np.dtype("<f2"), "BF16": np.dtype("<u2")}


class Rows(Protocol):
    """What is asked of a tensor that is not in memory: all columns of some rows."""

    def __getitem__(self, rows: "slice | np.ndarray") -> np.ndarray: ...


@dataclass(frozen=True, slots=True)
class Stored:
    """A tensor as it lies in the file: `data` gives rows, read-only, as bit patterns, BF16 as u2."""

    dtype: str
    shape: tuple[int, ...]
    data: "np.ndarray | Rows"


def to_float32(dtype: str, data: np.ndarray) -> np.ndarray:
    """A float32 copy of F32, F16 or BF16 bit patterns; exact."""
    if dtype == "BF16":
        return (data.astype(np.uint32) << np.uint32(16)).view(np.float32)
    return data.astype(np.float32)


@dataclass(frozen=True, slots=True)
class Entry:
    """A tensor in a file's header: `start` and `end` are bytes counted from the start of the file."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int


def open_safetensors(path: Path) -> tuple[mmap.mmap, dict[str, Stored]]:
    """Maps one file and checks its whole header.

    Raises FileFormatError where it is damaged, UnsupportedError where a tensor is not F32, F16 or BF16.
    """
    data = map_file(path)
    entries = read_header(path.name, data[8 : 8 + header_bytes(path.name, data[:8], len(data))], len(data))
    return data, {name: Stored(entry.dtype, entry.shape, _view(data, entry)) for name, entry in entries.items()}


def header_bytes(file: str, start: bytes, n_bytes: int) -> int:
    """The length of the header, from the first 8 of a file's `n_bytes`."""
    if n_bytes < 8:
        raise damaged(file, f"its {n_bytes} bytes are too few to tell the length of a header")
    n_header = int.from_bytes(start, "little")
    if n_header > min(HEADER_LIMIT, n_bytes - 8):
        raise damaged(file, f"its header of {n_header} bytes goes past its end or {HEADER_LIMIT} bytes")
    return n_header


def read_header(file: str, raw: bytes, n_bytes: int) -> dict[str, Entry]:
    """The tensors of a file of `n_bytes` whose header is `raw`; raises what open_safetensors() does."""
    if not raw.startswith(b"{"):
        raise damaged(file, "it does not begin with a safetensors header")
    header = parse_json(file, raw)
    header.pop("__metadata__", None)
    start = 8 + len(raw)
    entries = {name: _entry(file, name, entry, start, n_bytes) for name, entry in header.items()}
    end = start
    for entry in sorted(entries.values(), key=lambda entry: (entry.start, entry.end)):
        if entry.start != end:
            raise damaged(
                file, f"its tensors overlap or leave a gap at byte {min(entry.start, end) - start} of the data"
            )
        end = entry.end
    if end != n_bytes:
        raise damaged(file, f"it holds {n_bytes - start} bytes of data and its header tells of {end - start}")
    return entries


def _entry(file: str, name: str, entry: Any, start: int, n_bytes: int) -> Entry:
    what = f"tensor {quoted(name)}"
    if len(name) > NAME_LIMIT or not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        raise damaged(file, f"{what} is not described by dtype, shape and data_offsets")
    dtype, shape, span = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not _is_sizes(shape) or len(shape) > 4 or not _is_sizes(span) or len(span) != 2:
        raise damaged(file, f"{what} has a shape or offsets that cannot be")
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise UnsupportedError(
            f"{quoted(file)}: {what} is of type {quoted(str(dtype))}; llmq quantizes F32, F16 and BF16"
        )
    count = span[1] - span[0]
    if count != math.prod(shape) * DTYPES[dtype].itemsize or start + span[1] > n_bytes:
        raise damaged(file, f"{what} has {count} bytes, which do not match its shape or go past the end of the file")
    return Entry(dtype, tuple(shape), start + span[0], start + span[1])


def _view(data: mmap.mmap, entry: Entry) -> np.ndarray:
    dtype, count = DTYPES[entry.dtype], math.prod(entry.shape)
    array = np.frombuffer(data, dtype, count, entry.start) if count else np.empty(0, dtype)
    return array.reshape(entry.shape)


def _is_sizes(values: Any) -> bool:
    # type(), not isinstance(): True is an int too.
    return isinstance(values, list) and all(type(value) is int and 0 <= value < 2**63 for value in values)
