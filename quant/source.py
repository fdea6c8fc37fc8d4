"""What is quantized: tensors of a checkpoint folder or a GGUF file under GGUF names, and the metadata to write."""

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from llmq.config import check_tensors as check_gguf_tensors
from llmq.config import read_config
from llmq.errors import NetworkError
from llmq.formats import dequantize
from llmq.gguf import GGUF, open_gguf
from quant.checkpoint import Checkpoint, open_checkpoint
from quant.names import Placement, check_tensors, interleaved, model_metadata, read_hf_config, tensor_map
from quant.safetensors import Rows, Stored, to_float32
from quant.vocab import vocab_metadata

MOST_LAYERS = 1 << 32
COMMIT = re.compile(r"[0-9a-f]{40}")


@dataclass(frozen=True, slots=True)
class Weights:
    """One tensor, read a few rows at a time; a tensor of experts is their rows one after the other.

    `rows(start, stop)` gives float32 [stop - start, n_cols]; `packed(start, stop)`, where it is there, the same rows in
    the format named by `source`, uint8 [stop - start, row_bytes].
    """

    name: str
    shape: tuple[int, ...]
    source: str
    rows: Callable[[int, int], np.ndarray]
    packed: Callable[[int, int], np.ndarray] | None = None

    @property
    def n_rows(self) -> int:
        return int(np.prod(self.shape[:-1], dtype=np.int64))


class DamagedStreamError(NetworkError):
    """A file of a stream is not what was announced: its name, and its number `shard`."""

    def __init__(self, file: str, shard: int) -> None:
        super().__init__(
            f"{file} arrived damaged: its sha256 is not what was announced; the same command goes on before that file"
        )
        self.file, self.shard = file, shard


class Course(Protocol):
    """The order in which a source has to be read, where it has one: as a stream that passes once.

    `n_bytes` is what it has in memory at most.
    """

    @property
    def n_bytes(self) -> int: ...

    def place(self, name: str, expert: int) -> tuple[int, int]:
        """Where a piece comes: pieces are read in the order of these."""

    def begin(self, name: str, expert: int, kept: str) -> None:
        """Reading goes on at this piece; `kept` is what end() gave for the one before."""

    def passed(self, name: str, stop: int) -> None:
        """Rows before `stop` of a tensor are not read again."""

    def end(self, name: str, expert: int) -> str:
        """A piece is read to its end. Raises DamagedStreamError where what came is not what was announced."""

    def check(self, name: str, expert: int) -> None:
        """Reads on past this piece as far as it takes to know of it what end() would in the end."""

    def close(self) -> None:
        """Nothing more is read."""


@dataclass(frozen=True, slots=True)
class Source:
    """What is quantized. `name` and `revision` ("" if there is none) are for the receipt; `identity` is another one
    whenever the data is. `files` are the paths read from, which must not be written to; `release` drops pages already
    read.
    """

    name: str
    revision: str
    identity: str
    metadata: dict[str, Any]
    weights: list[Weights]
    files: tuple[Path, ...]
    release: Callable[[], None]
    course: Course | None = None


def open_source(path: Path) -> Source:
    """Opens and checks a checkpoint folder or a GGUF file; raises what their readers raise."""
    if path.is_dir():
        checkpoint = open_checkpoint(path)
        metadata, weights, vocab = read_checkpoint(checkpoint, model_name(path))
        return _local(path, metadata, weights, (*checkpoint.files, vocab), checkpoint.release)
    gguf = open_gguf(path)
    return _local(path, *_read_gguf(gguf), (gguf.path,), gguf.release)


def _local(
    path: Path,
    metadata: dict[str, Any],
    weights: list[Weights],
    files: tuple[Path, ...],
    release: Callable[[], None],
) -> Source:
    name, revision = origin(path)
    dates = [(str(file), file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    return Source(name, revision, json.dumps(dates), metadata, weights, files, release)


def origin(path: Path) -> tuple[str, str]:
    """Name and revision: of a file or folder, or of the repository whose snapshot a Hugging Face cache keeps there.

    Its folders are called models--OWNER--NAME/snapshots/REVISION.
    """
    is_folder = path.is_dir()
    place = path.resolve() if is_folder else path.absolute()
    folder = place if is_folder else place.parent
    if not COMMIT.fullmatch(folder.name) or folder.parent.name != "snapshots":
        return place.name, ""
    repository = folder.parent.parent.name.removeprefix("models--").replace("--", "/")
    return repository if is_folder else place.name, folder.name


def model_name(folder: Path) -> str:
    """What the model of a checkpoint folder is called: by the folder, or by the repository that it is a snapshot of."""
    return origin(folder)[0].rpartition("/")[2].encode(errors="replace").decode()


def in_layer_order(weights: Sequence[Weights]) -> list[Weights]:
    """Layers in their order, then the rest: in the order in which a run of the model tells of them."""
    return sorted(weights, key=_layer)


def _layer(weights: Weights) -> int:
    parts = weights.name.split(".")
    return int(parts[1]) if parts[0] == "blk" else MOST_LAYERS


def read_checkpoint(checkpoint: Checkpoint, name: str) -> tuple[dict[str, Any], list[Weights], Path]:
    """Metadata and tensors, and the file that the vocabulary comes from; `name` is the model's."""
    config = read_hf_config(checkpoint.config, name)
    entries = list(tensor_map(config))
    check_tensors(entries, config, checkpoint.tensors)
    vocab, vocab_path = vocab_metadata(checkpoint, config.vocab_size)
    return model_metadata(config) | vocab, [_placed(entry, checkpoint.tensors) for entry in entries], vocab_path


def _placed(entry: Placement, tensors: dict[str, Stored]) -> Weights:
    parts = [tensors[name] for name in entry.sources]
    dtype, data = parts[0].dtype, _matrix(parts[0])
    if len(parts) > 1:
        widest = dtype if len({part.dtype for part in parts}) == 1 else "F32"
        return Weights(entry.name, (len(parts), *entry.shape), widest, lambda a, b: _expert_rows(parts, a, b))
    if entry.rotary_heads:
        order = interleaved(entry.shape[0], entry.rotary_heads)
        return Weights(entry.name, entry.shape, dtype, lambda a, b: to_float32(dtype, data[order[a:b]]))
    return Weights(entry.name, entry.shape, dtype, lambda a, b: to_float32(dtype, data[a:b]))


def _matrix(stored: Stored) -> Rows:
    """Its rows; a vector is one."""
    return stored.data.reshape(-1, stored.shape[-1]) if isinstance(stored.data, np.ndarray) else stored.data


def _expert_rows(parts: list[Stored], start: int, stop: int) -> np.ndarray:
    """Rows of stacked experts; a range may cross from one to the next."""
    n_rows = parts[0].shape[0]
    pieces = []
    for expert in range(start // n_rows, (stop - 1) // n_rows + 1):
        part, first = parts[expert], expert * n_rows
        rows = part.data[max(start - first, 0) : stop - first]
        pieces.append(to_float32(part.dtype, rows))
    return pieces[0] if len(pieces) == 1 else np.concatenate(pieces)


def _read_gguf(gguf: GGUF) -> tuple[dict[str, Any], list[Weights]]:
    check_gguf_tensors(gguf, read_config(gguf))
    # An importance matrix served the format it was measured for; the new file does not have that.
    metadata = {key: value for key, value in gguf.metadata.items() if not key.startswith("quantize.imatrix.")}
    return metadata, [_from_tensor(gguf, name) for name in gguf.tensors]


def _from_tensor(gguf: GGUF, name: str) -> Weights:
    info, data = gguf.tensors[name], gguf.data(name)
    packed = data.reshape(-1, data.shape[-1])
    return Weights(
        name,
        info.shape,
        info.format.name,
        lambda a, b: dequantize(info.format, packed[a:b]),
        lambda a, b: packed[a:b],
    )
