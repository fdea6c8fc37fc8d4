"""A source as the engine runs it: a GGUF file as it is, a checkpoint's matrices where they lie in its own files."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from llmq.config import ModelConfig, check_tensors, read_config
from llmq.formats import BF16, F16, F32, Format, row_bytes
from llmq.gguf import GGUF, TensorInfo, open_gguf
from quant.checkpoint import open_checkpoint
from quant.names import Placement, model_metadata, read_hf_config, tensor_map
from quant.names import check_tensors as check_checkpoint
from quant.safetensors import Stored, to_float32
from quant.source import model_name
from quant.vocab import vocab_metadata

FORMATS = {fmt.name: fmt for fmt in (F32, F16, BF16)}


@dataclass(frozen=True, slots=True)
class SourceModel:
    """`prepare(i)` comes before layer i is run; `release` drops pages already read."""

    gguf: GGUF
    config: ModelConfig
    prepare: Callable[[int], None]
    release: Callable[[], None]


def open_model(path: Path) -> SourceModel:
    """Opens a checkpoint folder or a GGUF file to run it; nothing is converted or written.

    Raises what their readers raise, and UnsupportedError for a model that the engine cannot run.
    """
    if not path.is_dir():
        gguf = open_gguf(path)
        model = SourceModel(gguf, read_config(gguf), lambda _: None, gguf.release)
    else:
        file = CheckpointFile(path)
        # Rotary pairs are half a head apart in a checkpoint; only GGUF's llama architecture reorders them.
        config = replace(read_config(file), rope_interleaved=False)
        model = SourceModel(file, config, file.stack_experts, file.release)
    check_tensors(model.gguf, model.config)
    return model


class CheckpointFile(GGUF):
    """A checkpoint folder with the face of an open GGUF file.

    A checkpoint keeps every expert as a tensor of its own, and the engine reads a layer's experts one after the other:
    stack_experts copies those of one layer together, to where all layers have theirs. Norms and routers are F32 copies.
    """

    __slots__ = ("_checkpoint", "_parts", "_rows")

    def __init__(self, folder: Path) -> None:
        checkpoint = open_checkpoint(folder)
        config = read_hf_config(checkpoint.config, model_name(folder))
        entries = list(tensor_map(config))
        check_checkpoint(entries, config, checkpoint.tensors)
        vocab, _path = vocab_metadata(checkpoint, config.vocab_size)
        self._checkpoint = checkpoint
        self._parts = {entry.name: [checkpoint.tensors[source] for source in entry.sources] for entry in entries}
        infos = {entry.name: _info(entry, self._parts[entry.name]) for entry in entries}
        super().__init__(folder, model_metadata(config) | vocab, infos, None)
        stacks = {role: np.empty(n_bytes, np.uint8) for role, n_bytes in _stack_sizes(infos).items()}
        self._rows = {entry.name: self._place(entry, stacks) for entry in entries}

    def data(self, name: str) -> np.ndarray:
        return self._rows[name]

    def release(self) -> None:
        self._checkpoint.release()

    def stack_experts(self, layer: int) -> None:
        """Brings the experts of one layer together; those of the layer before are gone."""
        for name in self.tensors:
            if name.startswith(f"blk.{layer}.") and name.endswith("_exps.weight"):
                for rows, part in zip(self._rows[name], self._parts[name], strict=True):
                    rows[...] = _packed(part, self.tensors[name].format)

    def _place(self, entry: Placement, stacks: dict[str, np.ndarray]) -> np.ndarray:
        info, parts = self.tensors[entry.name], self._parts[entry.name]
        if len(parts) == 1:
            return _packed(parts[0], info.format)
        stack = stacks[_role(entry.name)][: info.n_bytes]
        return stack.reshape(*info.shape[:-1], row_bytes(info.format, info.shape[-1]))


def _role(name: str) -> str:
    """blk.3.ffn_up_exps.weight -> ffn_up_exps.weight."""
    return name.split(".", 2)[2]


def _stack_sizes(infos: dict[str, TensorInfo]) -> dict[str, int]:
    """Bytes for the largest layer's experts, by role."""
    sizes: dict[str, int] = {}
    for name, info in infos.items():
        if name.endswith("_exps.weight"):
            sizes[_role(name)] = max(sizes.get(_role(name), 0), info.n_bytes)
    return sizes


def _info(entry: Placement, parts: list[Stored]) -> TensorInfo:
    types = {part.dtype for part in parts}
    small = len(entry.shape) == 1 or entry.name.endswith("ffn_gate_inp.weight")
    fmt = F32 if small or len(types) > 1 else FORMATS[types.pop()]
    shape = entry.shape if len(parts) == 1 else (len(parts), *entry.shape)
    n_bytes = int(np.prod(shape[:-1], dtype=np.int64)) * row_bytes(fmt, shape[-1])
    return TensorInfo(entry.name, shape, fmt, 0, n_bytes)


def _packed(part: Stored, fmt: Format) -> np.ndarray:
    """One tensor's rows, uint8 [*shape[:-1], row_bytes]: a view where it has the format already, else F32."""
    assert isinstance(part.data, np.ndarray), "a stream passes only once"
    values = part.data if part.dtype == fmt.name else to_float32(part.dtype, part.data)
    return values.view(np.uint8)
