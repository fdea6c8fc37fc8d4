"""How fast a model runs here: prompts read and tokens made, several times each, beside the work that a token takes."""

import dataclasses
import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import psutil

from llmq.cache import KVRing
from llmq.config import ModelConfig, tensor_shapes
from llmq.cores import last_cache_bytes
from llmq.engine.cpu import Engine
from llmq.errors import FileFormatError
from llmq.formats import F32, Q4_K, row_bytes
from llmq.gguf import GGUF, TensorInfo
from llmq.model import Model
from llmq.sampler import NOT_NUMBERS
from llmq.team import aligned
from llmq.work import Work, work_per_token

PREFILL, DECODE = (128, 512), 16  # tokens
# This many runs, more where they are short, fewer where they take long.
RUNS, MOST_RUNS = 5, 50
SHORT, LONG = 1.0, 8.0  # seconds for all runs of one length
# Mistral 7B's layer, in the format that most of a Q4_K_M file has.
LAYER = ModelConfig(
    n_layers=1, dim=4096, n_heads=32, n_kv_heads=8, head_dim=128, ffn_dim=14336, vocab_size=256, context_length=32768,
    rms_eps=1e-5, rope_base=1e6, rope_interleaved=True, n_experts=0, n_experts_used=0, window=0, tied_embeddings=False,
    name="7B layer",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Rate:
    """Tokens a second of each run; a run is `n_tokens` tokens."""

    n_tokens: int
    runs: tuple[float, ...]

    @property
    def median(self) -> float:
        return statistics.median(self.runs)


@dataclass(frozen=True, slots=True)
class Speed:
    """Prefill of prompts of several lengths, and decode at the beginning of a context."""

    work: Work
    prefill: tuple[Rate, ...]
    decode: Rate
    is_memory_bound: bool  # whether a token takes so many bytes that no cache holds them

    @property
    def read_rate(self) -> float:
        """10^9 bytes of weights a second, in decode."""
        return self.work.n_bytes * self.decode.median / 1e9

    @property
    def product_rate(self) -> float:
        """10^9 multiply-adds a second, in prefill of the longest prompt."""
        return self.work.n_products * self.prefill[-1].median / 1e9


def measure_model(model: Model, tell: Callable[[str], None]) -> Speed:
    """Speed of a loaded model; its conversation is left alone. `tell` is told what is being measured.

    May be interrupted (KeyboardInterrupt). Raises FileFormatError for weights that give no numbers.
    """
    return _measure(model._engine, model.n_ctx, model.path.stem, tell)


def measure_layer(n_threads: int, tell: Callable[[str], None]) -> Speed:
    """Speed of one layer of Mistral 7B's shape in Q4_K, or of several where caches are large."""
    shapes = tensor_shapes(LAYER)
    layer_bytes = sum(_n_bytes(shape) for name, shape in shapes.items() if name.startswith("blk."))
    n_layers = max(1, math.ceil(min(4 * last_cache_bytes(), psutil.virtual_memory().available // 4) / layer_bytes))
    gguf = synthetic_layers(n_layers)
    engine = Engine(gguf, _layers(n_layers), n_threads)
    try:
        return _measure(engine, max(PREFILL), LAYER.name, tell)
    finally:
        engine.close()


def synthetic_layers(n_layers: int) -> GGUF:
    """Layers in memory: norms of 1, and matrices in which all bytes are the same."""
    tensors, at = {}, 0
    for name, shape in tensor_shapes(_layers(n_layers)).items():
        tensors[name] = TensorInfo(name, shape, F32 if len(shape) == 1 else Q4_K, at, _n_bytes(shape))
        at += -(-_n_bytes(shape) // 64) * 64
    data = aligned(at)
    data[:] = 0x23
    gguf = GGUF(Path(LAYER.name), {}, tensors, data)
    for name, info in tensors.items():
        if info.format == F32:
            gguf.data(name).view(np.float32)[:] = 1
    return gguf


def _layers(n_layers: int) -> ModelConfig:
    return dataclasses.replace(LAYER, n_layers=n_layers)


def _n_bytes(shape: tuple[int, ...]) -> int:
    return math.prod(shape[:-1]) * row_bytes(F32 if len(shape) == 1 else Q4_K, shape[-1])


def _measure(engine: Engine, n_ctx: int, name: str, tell: Callable[[str], None]) -> Speed:
    lengths = sorted({min(n, n_ctx) for n in PREFILL})
    ring = engine.ring(lengths[-1])
    ids = np.random.default_rng(0).integers(0, engine.config.vocab_size, lengths[-1]).tolist()
    logits = _read(engine, ring, ids[:32])  # the file's first pages, and the threads
    if not np.isfinite(logits).all():
        raise FileFormatError(NOT_NUMBERS)
    prefill = []
    for length in lengths:
        tell(f"{name}, prompt of {length}")
        prefill.append(_rate(length, partial(_read, engine, ring, ids[:length])))
    tell(f"{name}, reply")
    decode = _rate(min(DECODE, n_ctx), partial(_read_singly, engine, ring, ids[:DECODE]))
    tensors = {info.name: (info.shape, info.format) for info in engine.plan.gguf.tensors.values()}
    work = work_per_token(engine.config, tensors)
    return Speed(work, tuple(prefill), decode, work.n_bytes > 2 * last_cache_bytes())


def _rate(n_tokens: int, run: Callable[[], object]) -> Rate:
    runs: list[float] = []
    first = time.perf_counter()
    while True:
        start = time.perf_counter()
        run()
        end = time.perf_counter()
        runs.append(n_tokens / (end - start))
        spent = end - first
        if len(runs) >= (RUNS if spent > SHORT else MOST_RUNS) or spent > LONG:
            return Rate(n_tokens, tuple(runs))


def _read(engine: Engine, ring: KVRing, ids: Sequence[int]) -> np.ndarray:
    """Logits of the last token of a prompt, read from position 0 on."""
    for first in range(0, len(ids), engine.batch):
        part = ids[first : first + engine.batch]
        outputs = [len(part) - 1] if first + len(part) == len(ids) else []
        logits = engine.forward(part, range(first, first + len(part)), [ring] * len(part), outputs)
    return logits


def _read_singly(engine: Engine, ring: KVRing, ids: Sequence[int]) -> None:
    for position, token in enumerate(ids):
        engine.forward([token], [position], [ring], [0])
