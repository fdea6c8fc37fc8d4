"""The model as records that compiled code reads: addresses, sizes, and which kernels each matrix needs.

Everything here is checked before a kernel sees it: gguf.py and config.py have made sure that each tensor has the shape
that the configuration asks for and lies inside the mapped file.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np

from llmq.config import ModelConfig
from llmq.formats import Format
from llmq.gguf import GGUF
from llmq.jit import Kernel
from llmq.kernels.dot import make_dot
from llmq.kernels.floats import make_floats
from llmq.kernels.panel import make_panel
from llmq.kernels.unpack import GROUP, UNPACK, group_bytes
from llmq.layout import activation_kind


def _ints(*names: str) -> list[tuple[str, Any]]:
    return [(name, np.int64) for name in names]


MATRIX = np.dtype(
    _ints("address", "rows", "cols", "row_bytes", "expert_bytes", "n_groups", "tail_bytes", "kind", "dot", "panel")
)
LAYER = np.dtype(
    [
        *_ints("attn_norm", "ffn_norm", "ffn_gate_inp", "attn_kinds", "ffn_kinds"),
        *((name, MATRIX) for name in ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down")),
    ]
)
MODEL = np.dtype(
    [
        *_ints("n_layers", "dim", "n_heads", "n_kv_heads", "head_dim", "ffn_dim", "n_experts", "n_used"),
        *_ints("window", "rope_step", "rope_gap", "frequencies", "output_norm", "layers", "floats"),
        ("rms_eps", np.float32),
        ("token_embd", MATRIX),
        ("output", MATRIX),
    ]
)


@dataclass(frozen=True, slots=True)
class Kernels:
    """The kernels of one format; each compiles when its address is first asked for."""

    dot: Kernel
    panel: Kernel
    floats: Kernel


_kernels: dict[int, Kernels] = {}


def kernels(fmt: Format) -> Kernels:
    if fmt.id not in _kernels:
        unpack = UNPACK[fmt.id]
        _kernels[fmt.id] = Kernels(make_dot(unpack), make_panel(unpack), make_floats(unpack))
    return _kernels[fmt.id]


@dataclass(frozen=True, slots=True)
class Plan:
    """Records for compiled code, and what keeps their addresses valid."""

    model: np.ndarray  # MODEL [1]
    layers: np.ndarray  # LAYER [n_layers]
    frequencies: np.ndarray  # f64 [head_dim / 2]
    gguf: GGUF

    @property
    def layer_bytes(self) -> int:
        """Bytes of one layer's weights, all experts counted."""
        return sum(info.n_bytes for name, info in self.gguf.tensors.items() if name.startswith("blk.0."))


def matrix_formats(gguf: GGUF) -> list[Format]:
    """The formats of the matrices in a file; norms and routers are read as they are."""
    matrices = [
        info for name, info in gguf.tensors.items() if len(info.shape) > 1 and not name.endswith("ffn_gate_inp.weight")
    ]
    return list(dict.fromkeys(info.format for info in matrices))


def make_plan(gguf: GGUF, config: ModelConfig) -> Plan:
    """Look every tensor up; compiles (or loads) the kernels of the formats in the file."""
    layers = np.zeros(config.n_layers, LAYER)
    for i in range(config.n_layers):
        _fill_layer(layers[i : i + 1], gguf, config, f"blk.{i}.")
    # float32 as the reference implementations have it; angles are then formed in double precision.
    exponents = np.arange(0, config.head_dim, 2, dtype=np.float32) / np.float32(config.head_dim)
    frequencies = (np.float32(1) / np.float32(config.rope_base) ** exponents).astype(np.float64)
    model = np.zeros(1, MODEL)
    for name in ("n_layers", "dim", "n_heads", "n_kv_heads", "head_dim", "ffn_dim", "rms_eps"):
        model[name] = getattr(config, name)
    model["n_experts"], model["n_used"] = max(1, config.n_experts), max(1, config.n_experts_used)
    model["window"] = config.window or 2**40
    model["rope_step"], model["rope_gap"] = (2, 1) if config.rope_interleaved else (1, config.head_dim // 2)
    model["frequencies"], model["layers"] = frequencies.ctypes.data, layers.ctypes.data
    model["output_norm"] = _address(gguf, "output_norm.weight")
    embedding = "token_embd.weight"
    model["token_embd"] = _matrix(gguf, embedding)
    model["floats"] = kernels(gguf.tensors[embedding].format).floats.address
    model["output"] = _matrix(gguf, embedding if config.tied_embeddings else "output.weight")
    return Plan(model, layers, frequencies, gguf)


def _fill_layer(layer: np.ndarray, gguf: GGUF, config: ModelConfig, prefix: str) -> None:
    experts = "_exps" if config.n_experts else ""
    for name in ("attn_q", "attn_k", "attn_v", "attn_output"):
        layer[name] = _matrix(gguf, f"{prefix}{name}.weight")
    for name in ("ffn_gate", "ffn_up", "ffn_down"):
        layer[name] = _matrix(gguf, f"{prefix}{name}{experts}.weight")
    for name in ("attn_norm", "ffn_norm"):
        layer[name] = _address(gguf, f"{prefix}{name}.weight")
    if config.n_experts:
        layer["ffn_gate_inp"] = _address(gguf, f"{prefix}ffn_gate_inp.weight")
    layer["attn_kinds"] = _kinds(layer, "attn_q", "attn_k", "attn_v")
    layer["ffn_kinds"] = _kinds(layer, "ffn_gate", "ffn_up")


def _kinds(layer: np.ndarray, *names: str) -> int:
    """A bit for each kind of activation that these matrices read."""
    return int(np.bitwise_or.reduce([1 << int(layer[name]["kind"][0]) for name in names]))


def _address(gguf: GGUF, name: str) -> int:
    return gguf.data(name).ctypes.data


def _matrix(gguf: GGUF, name: str) -> np.ndarray:
    info = gguf.tensors[name]
    rows, cols = info.shape[-2:]
    matrix = np.zeros(1, MATRIX)
    row_bytes = cols // info.format.block_size * info.format.block_bytes
    n_groups = cols // GROUP
    matrix["address"], matrix["rows"], matrix["cols"] = _address(gguf, name), rows, cols
    matrix["row_bytes"], matrix["expert_bytes"] = row_bytes, rows * row_bytes
    matrix["n_groups"], matrix["tail_bytes"] = n_groups, row_bytes - n_groups * group_bytes(info.format)
    matrix["kind"] = activation_kind(info.format)
    found = kernels(info.format)
    matrix["dot"], matrix["panel"] = found.dot.address, found.panel.address
    return matrix[0]
