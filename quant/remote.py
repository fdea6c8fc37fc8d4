"""A checkpoint that stays where it is published: its small files are read, and its weights pass as a stream.

Each tensor is read once, in the order of the files. The sha256 of every file is checked when its last tensor has
passed, however often the reading was stopped before; headers, which are read beforehand, are compared with those that
pass.
"""

import tempfile
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from llmq.ask import read_piece
from llmq.errors import FileFormatError, quoted
from llmq.fetcher import CHUNK, LIMITS, Limits, Remote
from llmq.hub import Snapshot, read_small, remote_file
from quant.checkpoint import (
    ADDED_TOKENS,
    CONFIG,
    CONFIG_LIMIT,
    INDEX,
    INDEX_LIMIT,
    SINGLE,
    TOKENIZER_CONFIG,
    Checkpoint,
    no_weights,
    open_checkpoint,
)
from quant.files import check_name
from quant.names import read_hf_config, tensor_map
from quant.safetensors import DTYPES, Entry, Stored, header_bytes, read_header
from quant.sha256 import Sha256
from quant.source import DamagedStreamError, Source, read_checkpoint
from quant.stream import WINDOW, Stream
from quant.vocab import MODEL, MODEL_LIMIT, no_model

SMALL_FILES = {
    CONFIG: CONFIG_LIMIT, TOKENIZER_CONFIG: CONFIG_LIMIT, ADDED_TOKENS: CONFIG_LIMIT, MODEL: MODEL_LIMIT,
    INDEX: INDEX_LIMIT,
}  # fmt: skip
FIRST_PIECE = 1 << 20


def open_remote(found: Snapshot, limits: Limits = LIMITS, window: int = WINDOW) -> Source:
    """What is at a commit of a repository, to be quantized as it arrives, about `window` bytes ahead.

    Raises what open_source() does of a folder with these files, and NetworkError.
    """
    name = found.repo.rpartition("/")[2]
    check_files(found)
    course = StreamCourse(limits, window)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / name
        folder.mkdir()
        for small, limit in SMALL_FILES.items():
            if small in found.files and not (small == INDEX and SINGLE in found.files):
                (folder / small).write_bytes(read_small(found, small, limit, limits))
        checkpoint = open_checkpoint(folder, elsewhere=lambda shards: _headers(found, shards, course))
        metadata, weights, _ = read_checkpoint(checkpoint, name)
    course.arrange(checkpoint)
    identity = " ".join([f"{found.repo}@{found.commit}", *(each.remote.sha256 + each.header for each in course.shards)])
    return Source(found.repo, found.commit, identity, metadata, weights, (), lambda: None, course)


def check_files(found: Snapshot) -> None:
    """FileFormatError where something is missing that a model is made of."""
    if SINGLE not in found.files and INDEX not in found.files:
        raise no_weights(found.repo, found.files)
    if MODEL not in found.files:
        raise no_model(found.repo)


def _headers(found: Snapshot, shards: Sequence[str], course: "StreamCourse") -> Iterator[dict[str, Stored]]:
    """The tensors of each file; none is asked for where one could not be checked."""
    for name in shards:
        check_name(found.repo, name)
        file = found.files.get(name)
        if not file or not file.sha256:
            what = "does not tell the sha256 of" if file else "has no"
            raise FileFormatError(f"{found.repo} {what} {quoted(name)}, which holds weights; it cannot be read safely")
    for name in shards:
        yield course.add(name, remote_file(found, found.files[name]))


@dataclass(slots=True)
class Shard:
    """A file of tensors, those that are `used` in its order; `header` is the state of its hash where they begin."""

    name: str
    remote: Remote
    entries: dict[str, Entry]
    header: str
    used: list[Entry] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Passage:
    """A tensor of the checkpoint as a piece: in which file, where, and how many rows are read together."""

    shard: int
    entry: Entry
    first_row: int
    rows_together: int


class StreamCourse:
    """Reads the files one after the other, each through a stream of its own."""

    def __init__(self, limits: Limits, window: int) -> None:
        self.shards: list[Shard] = []
        self._limits, self._window = limits, window
        self._passages: dict[tuple[str, int], Passage] = {}
        self._lock = threading.Lock()
        self._streams: dict[int, Stream] = {}
        self._closed = False

    def add(self, name: str, remote: Remote) -> dict[str, Stored]:
        """Reads a file's header; the tensors that are in it."""
        n_first = min(FIRST_PIECE, remote.n_bytes)
        head = read_piece(remote, 0, n_first, self._limits) if n_first else b""
        end = 8 + header_bytes(name, head[:8], remote.n_bytes)
        if end > n_first:
            head += read_piece(remote, n_first, end, self._limits)
        entries = read_header(name, head[8:end], remote.n_bytes)
        header, number = Sha256(), len(self.shards)
        header.update(head[:end])
        self.shards.append(Shard(name, remote, entries, header.kept))
        return {key: Stored(e.dtype, e.shape, StreamedRows(self, number, e)) for key, e in entries.items()}

    def arrange(self, checkpoint: Checkpoint) -> None:
        """Finds out which tensor each piece is."""
        places = {name: (i, shard.entries[name]) for i, shard in enumerate(self.shards) for name in shard.entries}
        for placement in tensor_map(read_hf_config(checkpoint.config, "")):
            n_rows = placement.shape[0] if len(placement.shape) > 1 else 1
            together = n_rows // placement.rotary_heads if placement.rotary_heads else 1
            for expert, source in enumerate(placement.sources):
                passage = Passage(*places[source], expert * n_rows, together)
                self._passages[placement.name, expert] = passage
                self.shards[passage.shard].used.append(passage.entry)
        for shard in self.shards:
            shard.used.sort(key=lambda entry: entry.start)
        # What is read together goes through any window.
        self._window += 2 * max(each.rows_together * row_bytes(each.entry) for each in self._passages.values())

    @property
    def n_bytes(self) -> int:
        """Of the file that is read and of the next: both windows, and chunks on their way into them."""
        return 2 * (self._window + 2 * self._limits.connections * CHUNK)

    def place(self, name: str, expert: int) -> tuple[int, int]:
        passage = self._passages[name, expert]
        return passage.shard, passage.entry.start

    def begin(self, name: str, expert: int, kept: str) -> None:
        if kept:
            shard = self._passages[name, expert].shard
            self._streams[shard] = self._open(shard, kept)

    def passed(self, name: str, stop: int) -> None:
        expert = next(i for i in range(stop) if self._ends_after(name, i, stop))
        passage = self._passages[name, expert]
        rows = (stop - passage.first_row) // passage.rows_together * passage.rows_together
        self._stream(passage.shard).release(passage.entry.start + rows * row_bytes(passage.entry))

    def end(self, name: str, expert: int) -> str:
        passage = self._passages[name, expert]
        shard, stream = self.shards[passage.shard], self._stream(passage.shard)
        if passage.entry is shard.used[-1]:
            self.check(name, expert)
            self._close(passage.shard)
            return ""
        stream.release(next(entry.start for entry in shard.used if entry.start >= passage.entry.end))
        self._check_header(passage.shard)
        return stream.state_at(passage.entry.end)

    def check(self, name: str, expert: int) -> None:
        number = self._passages[name, expert].shard
        shard, stream = self.shards[number], self._stream(number)
        stream.release(shard.remote.n_bytes)
        self._check_header(number)
        if stream.sha256() != shard.remote.sha256:
            raise self._damaged(number)

    def close(self) -> None:
        with self._lock:
            self._closed = True
            for stream in self._streams.values():
                stream.close()

    def read(self, shard: int, start: int, end: int) -> bytes:
        return self._stream(shard).read(start, end)

    def _ends_after(self, name: str, expert: int, stop: int) -> bool:
        following = self._passages.get((name, expert + 1))
        return following is None or stop <= following.first_row

    def _stream(self, shard: int) -> Stream:
        with self._lock:
            if shard not in self._streams:
                assert not self._closed, "the course is closed"
                self._streams[shard] = self._open(shard, "")
            return self._streams[shard]

    def _open(self, number: int, kept: str) -> Stream:
        shard, start = self.shards[number], Sha256(kept).n_bytes
        marks = [Sha256(shard.header).n_bytes, *(entry.end for entry in shard.used)]
        stream = Stream(shard.remote, start, kept, marks, self._limits, self._window)
        stream.release(next(entry.start for entry in shard.used if entry.start >= start))
        return stream

    def _check_header(self, number: int) -> None:
        """What was believed of the file's header is what came; one that goes on has been compared before."""
        shard, stream = self.shards[number], self._stream(number)
        if stream.start == 0 and stream.state_at(Sha256(shard.header).n_bytes) != shard.header:
            raise self._damaged(number)

    def _damaged(self, number: int) -> DamagedStreamError:
        return DamagedStreamError(self.shards[number].name, number)

    def _close(self, shard: int) -> None:
        with self._lock:
            self._streams.pop(shard).close()


class StreamedRows:
    """Rows of a tensor in a stream, as bit patterns."""

    def __init__(self, course: StreamCourse, shard: int, entry: Entry) -> None:
        self._course, self._shard, self._entry = course, shard, entry

    def __getitem__(self, rows: slice | np.ndarray) -> np.ndarray:
        if isinstance(rows, np.ndarray):
            first = int(rows.min())
            return self[first : int(rows.max()) + 1][rows - first]
        per_row, at = row_bytes(self._entry), self._entry.start
        raw = self._course.read(self._shard, at + rows.start * per_row, at + rows.stop * per_row)
        return np.frombuffer(raw, DTYPES[self._entry.dtype]).reshape(rows.stop - rows.start, -1)


def row_bytes(entry: Entry) -> int:
    return entry.shape[-1] * DTYPES[entry.dtype].itemsize
