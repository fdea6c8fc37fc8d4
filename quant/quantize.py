"""The quantizer: every tensor of a source, a few rows at a time, through recipe and encoder into one GGUF file."""

import contextlib
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

from llmq.errors import FileFormatError, UnsupportedError, UsageError
from llmq.formats import Format
from llmq.gguf import GGUFWriter, TensorSpec, quoted
from llmq.jit import source_stamp
from llmq.part import Note, nothing_to_check
from quant.calibrate import SHORTER
from quant.encode import FAST, ROUNDS, encode_guided, squared_error
from quant.guide import Guide, Guides, Running, no_guide
from quant.limits import check_range
from quant.memory import BASE_BYTES, TEXT_BYTES, check_room
from quant.outputs import check_outputs
from quant.pieces import Piece, Tally, TensorReport, pieces_of
from quant.receipt import PREFIX, measured, receipt, row_digests, settings
from quant.recipe import PRESETS, Override, assign, takes_type
from quant.source import DamagedStreamError, Source, in_layer_order, open_source

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
class _Chunk:
    piece: Piece
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
    src: Path | Source,
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
    follow: bool = True,
    held: Callable[[], None] = nothing_to_check,
) -> Iterator[TensorReport]:
    """Write `src`, a checkpoint folder, a GGUF file or what was opened, as the GGUF file `out`; yields a report after
    each tensor.

    `out` appears, complete, when the iterator is exhausted. Where it is closed early, or the process dies, what was
    finished stays in `<out>.part`, and the next call of the same kind goes on from there; an error of the source
    removes it. The bytes depend neither on that nor on `threads` (default: one per available processor). A tensor that
    already has the wanted format is copied. `overrides` give the tensors that they match another format than the
    preset does. `guides` tell what is known of the tensors' inputs, and `guided_by` names that knowledge, by a sha256
    of what it comes from: another name starts an interrupted run over. `fast` leaves out the joint fit of scales. `mix`
    gives the formats of matrices in place of preset and overrides. `remarks` are for the receipt that the file carries
    (quant.receipt): words about guides and mix. `follow` and `held` are as for GGUFWriter.

    Raises UsageError (unknown preset; an override that fits no tensor; `out` is a source, a folder, no regular file),
    BusyError (`out` is being written), ResourceError (disk space, memory), FileFormatError and UnsupportedError (the
    source).
    """
    if preset not in PRESETS:
        raise UsageError(f"there is no type {quoted(preset)}; choose from {', '.join(PRESETS)}")
    source = open_source(src) if isinstance(src, Path) else src
    assert not source.course or guides is no_guide, "guides come in the order of layers"
    check_outputs([out], source.files)
    tensors = in_layer_order(source.weights)
    shapes = {weights.name: weights.shape for weights in tensors}
    formats = assign(PRESETS[preset], shapes, overrides=overrides, calibrated=guides is not no_guide)
    formats |= mix or {}
    specs = [TensorSpec(weights.name, weights.shape, formats[weights.name]) for weights in tensors]
    words = settings(fast, overrides, remarks)
    metadata = file_metadata(source, preset, words, guided_by, mixed=mix is not None)
    n_threads = threads or _available()
    check_memory(source, n_threads, guides)
    job = _job(source)
    pieces = [piece for weights, spec in zip(tensors, specs, strict=True) for piece in pieces_of(weights, spec)]
    if course := source.course:
        pieces.sort(key=lambda piece: course.place(piece.spec.name, piece.expert))
    ending = contextlib.closing(source.course) if source.course else contextlib.nullcontext()
    writing = GGUFWriter(out, metadata, specs, job, follow=follow, held=held)
    with ThreadPoolExecutor(n_threads) as pool, ending, writing as writer:
        run = functools.partial(in_order, pool, _encode, ahead=2 * n_threads)
        notes = yield from _write(pieces, writer, run, guides, FAST if fast else ROUNDS, source)
        for key, value in measured(specs, [notes[spec.name] for spec in specs]).items():
            writer.amend(key, value)


def file_metadata(source: Source, preset: str, words: str, guided_by: str, *, mixed: bool = False) -> dict[str, Any]:
    """What the file begins with; `words` are what settings() gives; of a `mixed` one only the size is the preset's."""
    kept = {key: value for key, value in source.metadata.items() if not key.startswith(PREFIX)}
    return kept | {
        "general.file_type": PRESETS[preset].file_type,
        "general.quantization_version": QUANTIZATION_VERSION,
        **receipt(source.name, source.revision, f"mix near {preset}" if mixed else preset, words, guided_by),
    }


def _job(source: Source) -> str:
    """What the data depends on beside the header, whose receipt tells what was asked for: the files read, as far as
    their dates tell, and this code.
    """
    return json.dumps([source.identity, CHUNK, source_stamp()])


def _write(
    pieces: list[Piece],
    writer: GGUFWriter,
    run: Callable[[Iterator[_Chunk]], Iterator[_Encoded]],
    guides: Guides,
    rounds: int,
    source: Source,
) -> Generator[TensorReport, None, dict[str, Note]]:
    """Returns what was noted of each tensor: what the receipt is made of."""
    tally, course, kept = Tally(pieces), source.course, ""
    for piece in pieces:
        start, n_bytes = piece.place
        writer.turn_to(piece.spec.name, start)
        note = writer.take_over(n_bytes)
        if note is None:
            break
        kept = note.get("kept", "")
        yield from tally.add(piece, note, resumed=True)
    left = pieces[tally.n_pieces :]
    if course and left:
        course.begin(left[0].spec.name, left[0].expert, kept)
    # Made as they are asked for: guides of a later layer come from running the model that far.
    results = run(chunk for piece in left for chunk in _chunks(piece, guides, rounds))
    for piece in left:
        writer.turn_to(piece.spec.name, piece.place[0])
        try:
            note = _checked_piece(piece, writer, results, source)
        except DamagedStreamError as error:
            assert course
            writer.keep(sum(course.place(each.spec.name, each.expert) < (error.shard, 0) for each in pieces))
            raise
        writer.record(note)
        yield from tally.add(piece, note, resumed=False)
    return tally.notes


def _checked_piece(piece: Piece, writer: GGUFWriter, results: Iterator[_Encoded], source: Source) -> Note:
    """A piece, and that it arrived as it was announced, as far as that is known by now."""
    course = source.course
    try:
        note = _write_piece(piece, writer, results, source)
    except (FileFormatError, UnsupportedError):
        # Weights that cannot be may have become so on their way.
        if course:
            course.check(piece.spec.name, piece.expert)
        raise
    return note | {"kept": course.end(piece.spec.name, piece.expert)} if course else note


def _write_piece(piece: Piece, writer: GGUFWriter, results: Iterator[_Encoded], source: Source) -> Note:
    error = size = 0.0
    n_measured, digest = 0, hashlib.sha256()
    for number, (_, stop) in enumerate(_starts(piece), 1):
        result = next(results)
        if source.course:
            source.course.passed(piece.spec.name, stop)
        writer.write(piece.spec.name, result.packed)
        error += result.squared_error
        size += result.squared_size
        n_measured += result.n_measured
        digest.update(result.digests)
        if number % RELEASED_CHUNKS == 0:
            source.release()
    whole = (piece.stop - piece.start) * piece.spec.shape[-1] / n_measured
    return {"squared_error": error * whole, "squared_size": size * whole, "sha256": digest.hexdigest()}


def _starts(piece: Piece) -> list[tuple[int, int]]:
    """Ranges of rows that are encoded together."""
    step = max(1, CHUNK // piece.weights.shape[-1])
    return [(at, min(at + step, piece.stop)) for at in range(piece.start, piece.stop, step)]


def _chunks(piece: Piece, guides: Guides, rounds: int) -> Iterator[_Chunk]:
    starts = _starts(piece)
    every = max(1, len(starts) // MEASURED_CHUNKS)
    guide = guides(piece.spec.name)
    for i, (start, stop) in enumerate(starts):
        yield _Chunk(piece, start, stop, i % every == 0, guide, rounds)


def _encode(chunk: _Chunk) -> _Encoded:
    weights, fmt = chunk.piece.weights, chunk.piece.spec.format
    rows = weights.rows(chunk.start, chunk.stop)
    check_range(weights.name, fmt, rows)
    if weights.packed and weights.source == fmt.name:
        packed = weights.packed(chunk.start, chunk.stop)
    else:
        packed = encode_guided(fmt, rows, chunk.guide, chunk.piece.expert, rounds=chunk.rounds)
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

    The rest: chunks being encoded, encoded chunks in the queue, source pages not yet let go, or what a stream holds and
    copies of it, and the vocabulary.
    """
    chunk = max(max(CHUNK, weights.shape[-1]) for weights in source.weights)
    n_texts = sum(len(value) for value in source.metadata.values() if isinstance(value, list))
    read = 2 * n_threads if source.course else RELEASED_CHUNKS
    per_weight = n_threads * WORKING_BYTES + (2 * n_threads + 1 + n_threads + read) * 4
    streams = source.course.n_bytes if source.course else 0
    return BASE_BYTES + chunk * per_weight + streams + n_texts * TEXT_BYTES


def check_memory(source: Source, n_threads: int, guides: Guides) -> None:
    """Raises ResourceError where there is too little, also for a run of the model meanwhile, in the same process."""
    what, needed = f"quantizing with {n_threads} threads", predicted_memory(source, n_threads)
    if isinstance(guides, Running):
        check_room(f"{what} while calibrating", needed + guides.n_bytes - BASE_BYTES, SHORTER)
    else:
        check_room(what, needed)


def _available() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
