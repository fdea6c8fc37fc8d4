"""safetensors files: a header of JSON, read without believing it, and tensors as views into the mapped file.

    u64 N | N bytes of JSON: name -> dtype, shape, data_offsets | data

Offsets count from the start of the data; tensors fill it without gap or overlap. Layout: the safetensors README.
"""

import math
import mmap
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from llmq.errors import UnsupportedError
from llmq.gguf import quoted
from quant.files import damaged, map_file, parse_json

HEADER_LIMIT = 100_000_000
NAME_LIMIT = 512
DTYPES: dict[str, np.dtype[Any]] = {"F32": np.dtype("<f4"), "F16": np.dtype("<f2"), "BF16": np.dtype("<u2")}


@dataclass(frozen=True, slots=True)
class Stored:
    """A tensor as it lies in the file: `data` is a read-only view of the bit patterns, BF16 as u2."""

    dtype: str
    shape: tuple[int, ...]
    data: np.ndarray


def to_float32(dtype: str, data: np.ndarray) -> np.ndarray:
    """A float32 copy of F32, F16 or BF16 bit patterns; exact."""
    if dtype == "BF16":
        return (data.astype(np.uint32) << np.uint32(16)).view(np.float32)
    return data.astype(np.float32)


def open_safetensors(path: Path) -> tuple[mmap.mmap, dict[str, Stored]]:
    """Maps one file and checks its whole header.

    Raises FileFormatError where it is damaged, UnsupportedError where a tensor is not F32, F16 or BF16.
    """
    data = map_file(path)
    n_header = int.from_bytes(data[:8], "little")
    if len(data) < 8 or n_header > min(HEADER_LIMIT, len(data) - 8):
        raise damaged(path.name, f"its header of {n_header} bytes goes past its end or {HEADER_LIMIT} bytes")
    raw = data[8 : 8 + n_header]
    if not raw.startswith(b"{"):
        raise damaged(path.name, "it does not begin with a safetensors header")
    header = parse_json(path.name, raw)
    header.pop("__metadata__", None)
    tensors, spans = {}, []
    for name, entry in header.items():
        tensors[name], span = _entry(path.name, name, entry, data, 8 + n_header)
        spans.append(span)
    end = 0
    for first, last in sorted(spans):
        if first != end:
            raise damaged(path.name, f"its tensors overlap or leave a gap at byte {min(first, end)} of the data")
        end = last
    if end != len(data) - 8 - n_header:
        raise damaged(path.name, f"it holds {len(data) - 8 - n_header} bytes of data and its header tells of {end}")
    return data, tensors


def _entry(file: str, name: str, entry: Any, data: mmap.mmap, start: int) -> tuple[Stored, tuple[int, int]]:
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
    count, n_bytes = math.prod(shape), span[1] - span[0]
    if n_bytes != count * DTYPES[dtype].itemsize or start + span[1] > len(data):
        raise damaged(file, f"{what} has {n_bytes} bytes, which do not match its shape or go past the end of the file")
    array = np.frombuffer(data, DTYPES[dtype], count, start + span[0]) if count else np.empty(0, DTYPES[dtype])
    return Stored(dtype, tuple(shape), array.reshape(shape)), (span[0], span[1])


def _is_sizes(values: Any) -> bool:
    # type(), not isinstance(): True is an int too.
    return isinstance(values, list) and all(type(value) is int and 0 <= value < 2**63 for value in values)
