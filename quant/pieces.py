"""Pieces of tensors that are quantized, written and kept by themselves: a whole tensor, or one of its experts."""

import hashlib
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass

from llmq.formats import Format
from llmq.gguf import TensorSpec
from llmq.part import Note
from quant.receipt import relative
from quant.source import Weights


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
class Piece:
    """Rows `start` to `stop` of a tensor: all of them, or an expert's."""

    weights: Weights
    spec: TensorSpec
    expert: int
    start: int
    stop: int

    @property
    def place(self) -> tuple[int, int]:
        """First byte and number of bytes within the tensor."""
        per_row = self.spec.n_bytes // self.weights.n_rows
        return self.start * per_row, (self.stop - self.start) * per_row


def pieces_of(weights: Weights, spec: TensorSpec) -> list[Piece]:
    per_expert = weights.shape[-2] if len(weights.shape) > 1 else 1
    firsts = range(0, weights.n_rows, per_expert)
    return [Piece(weights, spec, expert, first, first + per_expert) for expert, first in enumerate(firsts)]


class Tally:
    """What is known of tensors whose pieces come in any order."""

    def __init__(self, pieces: list[Piece]) -> None:
        self._missing = Counter(piece.spec.name for piece in pieces)
        self._total = len(self._missing)
        self._known: dict[str, dict[int, Note]] = defaultdict(dict)
        self._fresh: set[str] = set()
        self.notes: dict[str, Note] = {}
        self.n_pieces = 0

    def add(self, piece: Piece, note: Note, *, resumed: bool) -> Iterator[TensorReport]:
        """A report, where this completes a tensor."""
        weights, spec = piece.weights, piece.spec
        self.n_pieces += 1
        self._known[spec.name][piece.expert] = note
        self._missing[spec.name] -= 1
        if not resumed:
            self._fresh.add(spec.name)
        if self._missing[spec.name] == 0:
            self.notes[spec.name] = total = _sum([note for _, note in sorted(self._known.pop(spec.name).items())])
            error, index = relative(total["squared_error"], total["squared_size"]), len(self.notes) - 1
            yield TensorReport(
                spec.name, spec.shape, weights.source, spec.format, spec.n_bytes, index, self._total, error,
                spec.name not in self._fresh,
            )  # fmt: skip


def _sum(notes: list[Note]) -> Note:
    """Of a tensor's pieces; the sha256 of several is that of theirs."""
    if len(notes) == 1:
        return notes[0]
    digests = b"".join(bytes.fromhex(note["sha256"]) for note in notes)
    return {
        "squared_error": sum(note["squared_error"] for note in notes),
        "squared_size": sum(note["squared_size"] for note in notes),
        "sha256": hashlib.sha256(digests).hexdigest(),
    }
