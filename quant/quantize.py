"""The quantizer: every tensor of a source, a few rows at a time, through recipe and encoder into one GGUF file."""

import functools
import hashlib
import json
import os
from collections import deque
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from llmq.errors import UsageError
from llmq.formats import Format
from llmq.gguf import GGUFWriter, TensorSpec, quoted
from llmq.jit import source_stamp
from llmq.part import Note
from quant.encode import FAST, ROUNDS, encode_guided, squared_error
from quant.guide import Guide, Guides, no_guide
from quant.limits import check_range
from quant.memory import BASE_BYTES, TEXT_BYTES, check_room
from quant.outputs import check_outputs
from quant.receipt import PREFIX, measured, receipt, relative, row_digests, settings
from quant.recipe import PRESETS, Override, assign, takes_type
from quant.source import Source, Weights, in_layer_order, open_source

Job = TypeVar("Job")
Result = TypeVar("Result")

# Weights that are read, encoded and written together, and how many such chunks of a tensor the error is measured on.
CHUNK = 1 << 18
MEASURED_CHUNKS = 8
# After this many chunks the source's pages are let go.
RELEASED_CHUNKS = 64
QUANTIZATION_VERSION = 2

# Memory of a weight that is being encoded.
WORKING_BYTES = 48


@dataclass(frozen=True, slots=True)
class TensorReport:
    """One tensor as it was written: `shape` has rows first, `source` is the type it came in, `n_bytes` its new size.

    `rms_error` is the root mean square difference to the source's weights over their root mean square; of a large
    tensor it is measured on an even sample of at least 8 chunks of rows. `index` counts from 0 to `total` - 1.
    `resumed` tells that an earlier run wrote it.
    """

    name: str
    shape: tuple[int, ...]
    source: str
    format: Format
    n_bytes: int
    index: int
    total: int
    rms_error: float
    resumed: bool


@dataclass(frozen=True, slots=True)
class _Chunk:
    weights: Weights
    format: Format
    start: int
    stop: int
    measured: bool
    guide: Guide | None
    rounds: int


@dataclass(frozen=True, slots=True)
class _Encoded:
    """`squared_error` and `squared_size` are of `n_measured` weights; `digests` are those of the source's rows."""

    packed: np.ndarray
    squared_error: float
    squared_size: float
    n_measured: int
    digests: bytes


def quantize(
    src: Path,
    out: Path,
    preset: str,
    *,
    threads: int | None = None,
    overrides: Sequence[Override] = (),
    guides: Guides = no_guide,
    guided_by: str = "",
    remarks: Sequence[str] = (),
    fast: bool = False,
    mix: Mapping[str, Format] | None = None,
) -> Iterator[TensorReport]:
    """Write `src`, a checkpoint folder or a GGUF file, as the GGUF file `out`; yields a report after each tensor.

    `out` appears, complete, when the iterator is exhausted. Where it is closed early, or the process dies, what was
    finished stays in `<out>.part`, and the next call of the same kind goes on from there; an error of the source
    removes it. The bytes depend neither on that nor on `threads` (default: one per available processor). A tensor that
    already has the wanted format is copied. `overrides` give the tensors that they match another format than the
    preset does. `guides` tell what is known of the tensors' inputs, and `guided_by` names that knowledge, by a sha256
    of what it comes from: another name starts an interrupted run over. `fast` leaves out the joint fit of scales. `mix`
    gives the formats of matrices in place of preset and overrides. `remarks` are for the receipt that the file carries
    (quant.receipt): words about guides and mix.

    Raises UsageError (unknown preset; an override that fits no tensor; `out` is a source, a folder, no regular file, or
    being written), ResourceError (disk space, memory), FileFormatError and UnsupportedError (the source).
    """
    if preset not in PRESETS:
        raise UsageError(f"there is no type {quoted(preset)}; choose from {', '.join(PRESETS)}")
    source = open_source(src)
    check_outputs([out], source.files)
    tensors = in_layer_order(source.weights)
    shapes = {weights.name: weights.shape for weights in tensors}
    formats = assign(PRESETS[preset], shapes, overrides=overrides, calibrated=guides is not no_guide)
    formats |= mix or {}
    specs = [TensorSpec(weights.name, weights.shape, formats[weights.name]) for weights in tensors]
    words = settings(fast, overrides, remarks)
    metadata = file_metadata(source, src, preset, words, guided_by, mixed=mix is not None)
    n_threads = threads or _available()
    check_memory(source, n_threads)
    job = _job(source, preset, guided_by, str(fast))
    plan = list(zip(tensors, specs, strict=True))
    with ThreadPoolExecutor(n_threads) as pool, GGUFWriter(out, metadata, specs, job) as writer:
        run = functools.partial(in_order, pool, _encode, ahead=2 * n_threads)
        notes = yield from _write(plan, writer, run, guides, FAST if fast else ROUNDS, source.release)
        for key, value in measured(specs, notes).items():
            writer.amend(key, value)


def file_metadata(
    source: Source, src: Path, preset: str, words: str, guided_by: str, *, mixed: bool = False
) -> dict[str, Any]:
    """What the file begins with; `words` are what settings() gives; of a `mixed` one only the size is the preset's."""
    kept = {key: value for key, value in source.metadata.items() if not key.startswith(PREFIX)}
    return kept | {
        "general.file_type": PRESETS[preset].file_type,
        "general.quantization_version": QUANTIZATION_VERSION,
        **receipt(src, f"mix near {preset}" if mixed else preset, words, guided_by),
    }


def _job(source: Source, *settings: str) -> str:
    """All that the data depends on: the files read, as far as their dates tell, what was asked for, and this code."""
    files = [(str(path), path.stat().st_size, path.stat().st_mtime_ns) for path in source.files]
    return json.dumps([files, settings, CHUNK, source_stamp()])


def _write(
    tensors: list[tuple[Weights, TensorSpec]],
    writer: GGUFWriter,
    run: Callable[[Iterator[_Chunk]], Iterator[_Encoded]],
    guides: Guides,
    rounds: int,
    release: Callable[[], None],
) -> Generator[TensorReport, None, list[Note]]:
    """Returns what was noted of each tensor: what the receipt is made of."""
    notes: list[Note] = []
    while len(notes) < len(tensors) and (note := writer.take_over()) is not None:
        notes.append(note)
        yield _report(tensors, len(notes) - 1, note, resumed=True)
    done = len(notes)
    # Made as they are asked for: guides of a later layer come from running the model that far.
    chunks = (chunk for weights, spec in tensors[done:] for chunk in _chunks(weights, spec.format, guides, rounds))
    results = run(chunks)
    n_written = 0
    for index in range(done, len(tensors)):
        weights, spec = tensors[index]
        error = size = 0.0
        n_measured, digest = 0, hashlib.sha256()
        for _ in _starts(weights):
            result = next(results)
            writer.write(spec.name, result.packed)
            error += result.squared_error
            size += result.squared_size
            n_measured += result.n_measured
            digest.update(result.digests)
            n_written += 1
            if n_written % RELEASED_CHUNKS == 0:
                release()
        whole = weights.n_rows * spec.shape[-1] / n_measured
        note = {"squared_error": error * whole, "squared_size": size * whole, "sha256": digest.hexdigest()}
        writer.record(note)
        notes.append(note)
        yield _report(tensors, index, note, resumed=False)
    return notes


def _report(tensors: list[tuple[Weights, TensorSpec]], index: int, note: Note, *, resumed: bool) -> TensorReport:
    weights, spec = tensors[index]
    error = relative(note["squared_error"], note["squared_size"])
    return TensorReport(
        spec.name, spec.shape, weights.source, spec.format, spec.n_bytes, index, len(tensors), error, resumed
    )


def _starts(weights: Weights) -> list[tuple[int, int]]:
    """Ranges of rows that are encoded together, within one expert each."""
    per_expert = weights.shape[-2] if len(weights.shape) > 1 else 1
    step = max(1, CHUNK // weights.shape[-1])
    ends = (min(at + step, per_expert) for at in range(0, per_expert, step))
    ranges = list(zip(range(0, per_expert, step), ends, strict=True))
    return [(first + a, first + b) for first in range(0, weights.n_rows, per_expert) for a, b in ranges]


def _chunks(weights: Weights, fmt: Format, guides: Guides, rounds: int) -> Iterator[_Chunk]:
    starts = _starts(weights)
    every = max(1, len(starts) // MEASURED_CHUNKS)
    guide = guides(weights.name)
    for i, (start, stop) in enumerate(starts):
        yield _Chunk(weights, fmt, start, stop, i % every == 0, guide, rounds)


def _encode(chunk: _Chunk) -> _Encoded:
    weights, fmt = chunk.weights, chunk.format
    rows = weights.rows(chunk.start, chunk.stop)
    check_range(weights.name, fmt, rows)
    if weights.packed and weights.source == fmt.name:
        packed = weights.packed(chunk.start, chunk.stop)
    else:
        expert = chunk.start // weights.shape[-2] if len(weights.shape) > 1 else 0
        packed = encode_guided(fmt, rows, chunk.guide, expert, rounds=chunk.rounds)
    off, size = squared_error(fmt, rows, packed) if chunk.measured else (0.0, 0.0)
    # Norms and routers become F32 in any GGUF file; as that they have one hash in all of them.
    stored = weights.source if takes_type(weights.name, weights.shape) else "F32"
    return _Encoded(packed, off, size, rows.size if chunk.measured else 0, row_digests(rows, stored))


def in_order(
    pool: ThreadPoolExecutor, function: Callable[[Job], Result], jobs: Iterator[Job], *, ahead: int
) -> Iterator[Result]:
    """Results in the order of the jobs, of which at most `ahead` wait or run beyond the one handed out."""
    waiting: deque[Future[Result]] = deque()
    for job in jobs:
        waiting.append(pool.submit(function, job))
        if len(waiting) > ahead:
            yield waiting.popleft().result()
    while waiting:
        yield waiting.popleft().result()


def predicted_memory(source: Source, n_threads: int) -> int:
    """Bytes that this process has at its peak, most of them once: the interpreter and what compiles the encoders.

    The rest: chunks being encoded, encoded chunks in the queue, source pages not yet let go, and the vocabulary.
    """
    chunk = max(max(CHUNK, weights.shape[-1]) for weights in source.weights)
    n_texts = sum(len(value) for value in source.metadata.values() if isinstance(value, list))
    per_weight = n_threads * WORKING_BYTES + (2 * n_threads + 1 + n_threads + RELEASED_CHUNKS) * 4
    return BASE_BYTES + chunk * per_weight + n_texts * TEXT_BYTES


def check_memory(source: Source, n_threads: int) -> None:
    check_room(f"quantizing with {n_threads} threads", predicted_memory(source, n_threads))


def _available() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
