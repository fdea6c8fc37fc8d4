"""The quantizer: every tensor of a source, a few rows at a time, through recipe and encoder into one GGUF file."""

import math
import os
import stat
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np

from llmq.errors import UsageError
from llmq.formats import Format
from llmq.gguf import GGUFWriter, TensorSpec, quoted
from quant.encode import check_range, encode, squared_error
from quant.recipe import PRESETS, Override, assign
from quant.source import Source, Weights, open_source

Job = TypeVar("Job")
Result = TypeVar("Result")

# Weights that are read, encoded and written together, and how many such chunks of a tensor the error is measured on.
CHUNK = 1 << 18
MEASURED_CHUNKS = 8
QUANTIZATION_VERSION = 2


@dataclass(frozen=True, slots=True)
class TensorReport:
    """One tensor as it was written: `shape` has rows first, `source` is the type it came in, `n_bytes` its new size.

    `rms_error` is the root mean square difference to the source's weights over their root mean square; of a large
    tensor it is measured on an even sample of at least 8 chunks of rows. `index` counts from 0 to `total` - 1.
    """

    name: str
    shape: tuple[int, ...]
    source: str
    format: Format
    n_bytes: int
    index: int
    total: int
    rms_error: float


@dataclass(frozen=True, slots=True)
class _Chunk:
    weights: Weights
    format: Format
    start: int
    stop: int
    measured: bool


@dataclass(frozen=True, slots=True)
class _Encoded:
    packed: np.ndarray
    squared_error: float
    squared_size: float


def quantize(
    src: Path, out: Path, preset: str, *, threads: int | None = None, overrides: Sequence[Override] = ()
) -> Iterator[TensorReport]:
    """Write `src`, a checkpoint folder or a GGUF file, as the GGUF file `out`; yields a report after each tensor.

    `out` appears, complete, when the iterator is exhausted; closing it early leaves nothing behind. The bytes do not
    depend on `threads` (default: one per available processor). A tensor that already has the wanted format is copied.
    `overrides` give the tensors that they match another format than the preset does.

    Raises UsageError (unknown preset, an override that fits no tensor, `out` is a source, a folder or no regular file),
    ResourceError (disk space), FileFormatError and UnsupportedError (the source).
    """
    if preset not in PRESETS:
        raise UsageError(f"there is no type {quoted(preset)}; choose from {', '.join(PRESETS)}")
    source = open_source(src)
    out = _check_target(out, source.files)
    shapes = {weights.name: weights.shape for weights in source.weights}
    formats = assign(PRESETS[preset], shapes, overrides=overrides)
    specs = [TensorSpec(weights.name, weights.shape, formats[weights.name]) for weights in source.weights]
    metadata = source.metadata | {
        "general.file_type": PRESETS[preset].file_type,
        "general.quantization_version": QUANTIZATION_VERSION,
    }
    n_threads = threads or _available()
    with ThreadPoolExecutor(n_threads) as pool, GGUFWriter(out, metadata, specs) as writer:
        yield from _write(source, specs, writer, pool, n_threads)


def _write(
    source: Source, specs: list[TensorSpec], writer: GGUFWriter, pool: ThreadPoolExecutor, n_threads: int
) -> Iterator[TensorReport]:
    tensors = list(zip(source.weights, specs, strict=True))
    chunks = [_chunks(weights, spec.format) for weights, spec in tensors]
    results = in_order(pool, _encode, (chunk for group in chunks for chunk in group), 2 * n_threads)
    for index, ((weights, spec), group) in enumerate(zip(tensors, chunks, strict=True)):
        error = size = 0.0
        for _chunk in group:
            result = next(results)
            writer.write(spec.name, result.packed)
            error += result.squared_error
            size += result.squared_size
        source.release()
        relative = math.sqrt(error / size) if size else 0.0
        yield TensorReport(
            spec.name, spec.shape, weights.source, spec.format, spec.n_bytes, index, len(tensors), relative
        )


def _chunks(weights: Weights, fmt: Format) -> list[_Chunk]:
    step = max(1, CHUNK // weights.shape[-1])
    starts = range(0, weights.n_rows, step)
    every = max(1, len(starts) // MEASURED_CHUNKS)
    return [
        _Chunk(weights, fmt, start, min(start + step, weights.n_rows), i % every == 0) for i, start in enumerate(starts)
    ]


def _encode(chunk: _Chunk) -> _Encoded:
    weights, fmt = chunk.weights, chunk.format
    rows = weights.rows(chunk.start, chunk.stop)
    check_range(weights.name, fmt, rows)
    if weights.packed and weights.source == fmt.name:
        packed = weights.packed(chunk.start, chunk.stop)
    else:
        packed = encode(fmt, rows)
    off, size = squared_error(fmt, rows, packed) if chunk.measured else (0.0, 0.0)
    return _Encoded(packed, off, size)


def in_order(
    pool: ThreadPoolExecutor, function: Callable[[Job], Result], jobs: Iterator[Job], ahead: int
) -> Iterator[Result]:
    """Results in the order of the jobs, of which at most `ahead` wait or run beyond the one handed out."""
    waiting: deque[Future[Result]] = deque()
    for job in jobs:
        waiting.append(pool.submit(function, job))
        if len(waiting) > ahead:
            yield waiting.popleft().result()
    while waiting:
        yield waiting.popleft().result()


def _available() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _check_target(out: Path, sources: tuple[Path, ...]) -> Path:
    """The real path to write to, links followed; refuses one that is read from, by whatever name."""
    out = Path(os.path.realpath(out))
    if not out.exists():
        return out
    if not stat.S_ISREG(out.stat().st_mode) and not out.is_dir():
        raise UsageError(f"cannot write {quoted(str(out), 120)}: it is not a regular file; give a file name")
    if any(out.samefile(source) for source in sources):
        raise UsageError(f"{quoted(out.name)} is the input itself, which would be destroyed; give another output file")
    return out
