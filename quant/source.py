"""What is quantized: tensors of a checkpoint folder or a GGUF file under GGUF names, and the metadata to write."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from llmq.config import check_tensors as check_gguf_tensors
from llmq.config import read_config
from llmq.formats import dequantize
from llmq.gguf import GGUF, open_gguf
from quant.checkpoint import Checkpoint, open_checkpoint
from quant.names import Placement, check_tensors, interleaved, model_metadata, read_hf_config, tensor_map
from quant.safetensors import Stored, to_float32
from quant.vocab import vocab_metadata

MOST_LAYERS = 1 << 32


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


@dataclass(frozen=True, slots=True)
class Source:
    """`files` are the paths read from, which must not be written to; `release` drops pages already read."""

    metadata: dict[str, Any]
    weights: list[Weights]
    files: tuple[Path, ...]
    release: Callable[[], None]


def open_source(path: Path) -> Source:
    """Opens and checks a checkpoint folder or a GGUF file; raises what their readers raise."""
    if path.is_dir():
        return _from_checkpoint(open_checkpoint(path))
    return _from_gguf(open_gguf(path))


def in_layer_order(weights: Sequence[Weights]) -> list[Weights]:
    """Layers in their order, then the rest: in the order in which a run of the model tells of them."""
    return sorted(weights, key=_layer)


def _layer(weights: Weights) -> int:
    parts = weights.name.split(".")
    return int(parts[1]) if parts[0] == "blk" else MOST_LAYERS


def _from_checkpoint(checkpoint: Checkpoint) -> Source:
    name = checkpoint.folder.resolve().name.encode(errors="replace").decode()
    config = read_hf_config(checkpoint.config, name)
    entries = list(tensor_map(config))
    check_tensors(entries, config, checkpoint.tensors)
    vocab, vocab_path = vocab_metadata(checkpoint, config.vocab_size)
    weights = [_placed(entry, checkpoint.tensors) for entry in entries]
    files = (*checkpoint.files, vocab_path)
    return Source(model_metadata(config) | vocab, weights, files, checkpoint.release)


def _placed(entry: Placement, tensors: dict[str, Stored]) -> Weights:
    parts = [tensors[name] for name in entry.sources]
    dtype, data = parts[0].dtype, parts[0].data
    if len(parts) > 1:
        widest = dtype if len({part.dtype for part in parts}) == 1 else "F32"
        return Weights(entry.name, (len(parts), *entry.shape), widest, lambda a, b: _expert_rows(parts, a, b))
    if entry.rotary_heads:
        order = interleaved(entry.shape[0], entry.rotary_heads)
        return Weights(entry.name, entry.shape, dtype, lambda a, b: to_float32(dtype, data[order[a:b]]))
    flat = data.reshape(-1, entry.shape[-1])
    return Weights(entry.name, entry.shape, dtype, lambda a, b: to_float32(dtype, flat[a:b]))


def _expert_rows(parts: list[Stored], start: int, stop: int) -> np.ndarray:
    """Rows of stacked experts; a range may cross from one to the next."""
    n_rows = parts[0].shape[0]
    pieces = []
    for expert in range(start // n_rows, (stop - 1) // n_rows + 1):
        part, first = parts[expert], expert * n_rows
        rows = part.data[max(start - first, 0) : stop - first]
        pieces.append(to_float32(part.dtype, rows))
    return pieces[0] if len(pieces) == 1 else np.concatenate(pieces)


def _from_gguf(gguf: GGUF) -> Source:
    check_gguf_tensors(gguf, read_config(gguf))
    # An importance matrix served the format it was measured for; the new file does not have that.
    metadata = {key: value for key, value in gguf.metadata.items() if not key.startswith("quantize.imatrix.")}
    weights = [_from_tensor(gguf, name) for name in gguf.tensors]
    return Source(metadata, weights, (gguf.path,), gguf.release)


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
