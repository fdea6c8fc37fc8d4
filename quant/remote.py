"""A checkpoint that stays where it is published: its small files are read, and its weights pass as a stream.

Each tensor is read once, in the order of the files. The sha256 of every file is checked when its last tensor has
passed, however often the reading was stopped before.
"""

import tempfile
import threading
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from llmq.ask import read_piece
from llmq.errors import FileFormatError, UnsupportedError
from llmq.fetcher import LIMITS, Limits, Remote
from llmq.hub import Snapshot, read_small, remote_file
from quant.checkpoint import (
    ADDED_TOKENS,
    CONFIG,
    CONFIG_LIMIT,
    INDEX,
    INDEX_LIMIT,
    PICKLES,
    SINGLE,
    TOKENIZER_CONFIG,
    Checkpoint,
    open_checkpoint,
)
from quant.names import read_hf_config, tensor_map
from quant.safetensors import DTYPES, Entry, Stored, header_bytes, read_header
from quant.sha256 import Sha256
from quant.source import DamagedStreamError, Source, read_checkpoint
from quant.stream import Stream
from quant.vocab import MODEL, MODEL_LIMIT

SMALL_FILES = {
    CONFIG: CONFIG_LIMIT, TOKENIZER_CONFIG: CONFIG_LIMIT, ADDED_TOKENS: CONFIG_LIMIT, MODEL: MODEL_LIMIT,
    INDEX: INDEX_LIMIT,
}  # fmt: skip
FIRST_PIECE = 1 << 20


def open_remote(found: Snapshot, limits: Limits = LIMITS) -> Source:
    """What is at a commit of a repository, to be quantized as it arrives.

    Raises what open_source() does of a folder with these files, and NetworkError.
    """
    name = found.repo.rpartition("/")[2]
    course = StreamCourse(limits)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / name
        folder.mkdir()
        for small, limit in SMALL_FILES.items():
            if small in found.files:
                (folder / small).write_bytes(read_small(found, small, limit, limits))
        _check_weights(found)
        checkpoint = open_checkpoint(folder, elsewhere=lambda shard: course.add(shard, _shard(found, shard)))
        metadata, weights, _ = read_checkpoint(checkpoint, name)
    course.arrange(checkpoint)
    identity = f"{found.repo}@{found.commit} {' '.join(shard.remote.sha256 for shard in course.shards)}"
    return Source(found.repo, found.commit, identity, metadata, weights, (), lambda: None, course)


def _check_weights(found: Snapshot) -> None:
    if SINGLE not in found.files and INDEX not in found.files:
        if any(file.endswith(PICKLES) for file in found.files):
            raise UnsupportedError(
                f"{found.repo} has its weights only as pickles, a format that can run code when it is read"
            )
        raise FileFormatError(f"{found.repo} has neither {SINGLE} nor {INDEX}; is it a model's repository?")


def _shard(found: Snapshot, name: str) -> Remote:
    file = found.files.get(name)
    if not file or not file.sha256:
        what = "does not tell the sha256 of" if file else "does not have"
        raise FileFormatError(f"{found.repo} {what} {name}, which its index names; it cannot be read safely")
    return remote_file(found, file)


@dataclass(slots=True)
class Shard:
    """A file of tensors: those that are used, in its order."""

    name: str
    remote: Remote
    entries: dict[str, Entry]


@dataclass(frozen=True, slots=True)
class Passage:
    """A tensor of the checkpoint as a piece: in which file, where, and how many rows are read together."""

    shard: int
    entry: Entry
    first_row: int
    rows_together: int


class StreamCourse:
    """Reads the files one after the other, each through a stream of its own."""

    def __init__(self, limits: Limits) -> None:
        self.shards: list[Shard] = []
        self._limits = limits
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
        number = len(self.shards)
        self.shards.append(Shard(name, remote, entries))
        return {key: Stored(e.dtype, e.shape, StreamedRows(self, number, e)) for key, e in entries.items()}

    def arrange(self, checkpoint: Checkpoint) -> None:
        """Finds out which tensor each piece is."""
        places = {name: (i, shard.entries[name]) for i, shard in enumerate(self.shards) for name in shard.entries}
        for placement in tensor_map(read_hf_config(checkpoint.config, "")):
            n_rows = placement.shape[0] if len(placement.shape) > 1 else 1
            together = n_rows // placement.rotary_heads if placement.rotary_heads else 1
            for expert, source in enumerate(placement.sources):
                self._passages[placement.name, expert] = Passage(*places[source], expert * n_rows, together)
        used = {(passage.shard, passage.entry.start) for passage in self._passages.values()}
        for i, shard in enumerate(self.shards):
            shard.entries = {name: entry for name, entry in shard.entries.items() if (i, entry.start) in used}

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
        if passage.entry.end < max(entry.end for entry in shard.entries.values()):
            stream.release(passage.entry.end)
            return stream.state_at(passage.entry.end)
        stream.release(shard.remote.n_bytes)
        digest = stream.sha256()
        if digest != shard.remote.sha256:
            raise DamagedStreamError(
                f"{shard.name} arrived damaged: its sha256 is not what was announced; the same command goes on before "
                "that file",
                passage.shard,
            )
        self._close(passage.shard)
        return ""

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

    def _open(self, shard: int, kept: str) -> Stream:
        marks = sorted(entry.end for entry in self.shards[shard].entries.values())
        return Stream(self.shards[shard].remote, Sha256(kept).n_bytes, kept, marks, self._limits)

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
