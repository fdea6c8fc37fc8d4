"""Calibration: a model in full precision works through a text, and what its matrices read is summed up.

All chunks of the text pass through a layer before the next one begins, so each weight is read from disk once and only
one layer has to be in memory. Chunks are conversations of their own that begin with BOS, and share one KV ring: within
a layer nothing of an earlier chunk is seen.
"""

import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from llmq.cache import KVRing
from llmq.config import ModelConfig
from llmq.cores import usable_cores
from llmq.engine.cpu import Engine
from llmq.errors import FileFormatError, UsageError
from llmq.gguf import GGUF, quoted
from llmq.layout import BATCH
from llmq.tokenizer import Tokenizer, load_tokenizer
from quant.calibration import DEFAULT_TEXT, Calibration, Inputs
from quant.evaluate import LEAST_TOKENS
from quant.limits import check_finite
from quant.memory import BASE_BYTES, TEXT_BYTES, check_room, give_back
from quant.model import SourceModel, open_model

# Every token has a hidden state in memory all the time: 2 GiB of them where a model is 4096 wide.
MAX_TOKENS = 1 << 17
# A moment is summed in float64 and kept in float32, for the text and for what is held out of it; what feedback needs of
# it is float32 twice, of a layer and the one before.
MOMENT_BYTES = 56
# One chunk of so many is held out.
HELD = 5
SHORTER = ", or give a shorter text"  # another way to have room


@dataclass(frozen=True, slots=True)
class LayerStatistics:
    """What the matrices of one layer read, by tensor name; the last of `total` is the output matrix.

    `moments` float32 [n_experts, n_cols / block, block, block]: the mean of x[i] * x[j] over an expert's tokens within
    each block of columns, 0 for an expert that had none; `held` are the same of chunks kept apart, to measure on.
    Matrices that read the same thing share their arrays.
    """

    index: int
    total: int
    n_chunks: int
    chunk_size: int
    inputs: dict[str, Inputs]
    moments: dict[str, np.ndarray]
    held: dict[str, np.ndarray]


@dataclass(frozen=True, slots=True)
class Plan:
    """A run over `chunks` that has not begun, and the memory it will take, in bytes."""

    model: SourceModel
    chunks: list[list[int]]
    block: int
    n_bytes: int


def calibrate(
    src: Path,
    text: str,
    *,
    threads: int | None = None,
    block: int = 0,
    tell: Callable[[int, int], None] | None = None,
) -> Iterator[LayerStatistics]:
    """Run `src`, a checkpoint folder or a GGUF file, over `text`; yields layer by layer, then the output matrix.

    `block` > 0 asks for moments too, within blocks of so many columns; narrower matrices are one block, and where it
    does not divide the width it is their greatest common divisor. Every fifth chunk is held out of them. What comes
    out does not depend on `threads` (default: one per physical core). `tell` is told the layer that is about to be run,
    from 1, and how many there are.

    Raises at once what plan() does; on the way FileFormatError for weights that give no numbers.
    """
    return run(plan(src, text, block), threads=threads, tell=tell)


def plan(src: Path, text: str, block: int = 0) -> Plan:
    """What run() needs to do what calibrate() does.

    Raises UsageError (a text of fewer than 32 tokens, or too many), ResourceError (memory), FileFormatError and
    UnsupportedError (the source).
    """
    model = open_model(src)
    chunks = chunks_of(load_tokenizer(model.gguf.metadata), text, min(BATCH, model.config.context_length))
    n_tokens = sum(map(len, chunks))
    if n_tokens < LEAST_TOKENS:
        raise UsageError(
            f"the text for calibration has {n_tokens} of the {LEAST_TOKENS} tokens that it needs; give a longer one"
        )
    n_bytes = predicted_memory(model, chunks, block)
    check_room("calibrating", n_bytes, SHORTER)
    return Plan(model, chunks, block, n_bytes)


def run(
    planned: Plan, *, threads: int | None = None, tell: Callable[[int, int], None] | None = None
) -> Iterator[LayerStatistics]:
    model, chunks, block = planned.model, planned.chunks, planned.block
    config, gguf, n_threads = model.config, model.gguf, threads or usable_cores()
    give_back()
    hidden = [np.empty((len(chunk), config.dim), np.float32) for chunk in chunks]
    with closing(Engine(gguf, config, n_threads)) as engine:
        ring = engine.ring(len(chunks[0]))
        for i in range(config.n_layers):
            if tell:
                tell(i + 1, config.n_layers)
            model.prepare(i)
            sums = {what: _Sums(names, _shapes(gguf), block) for what, names in _readers(config, i).items()}
            for place, (chunk, x) in enumerate(zip(chunks, hidden, strict=True)):
                _run_layer(engine, i, chunk, ring, x, sums, held=_is_held(place))
            if not all(np.isfinite(x).all() for x in hidden) or not all(each.fits() for each in sums.values()):
                check_finite(gguf, "token_embd.", f"blk.{i}.")
                raise _overflow(f"layer {i}", gguf)
            model.release()
            give_back()
            found = _statistics(i, config, chunks, sums)
            yield found
            del found
    output = _Sums(("token_embd.weight" if config.tied_embeddings else "output.weight",), _shapes(gguf), block)
    for place, x in enumerate(hidden):
        output.add(0, rms_norm(x, gguf, "output_norm.weight", config.rms_eps), held=_is_held(place))
    if not output.fits():
        check_finite(gguf, "output_norm.")
        raise _overflow("the last norm", gguf)
    yield _statistics(config.n_layers, config, chunks, {"output": output})


def predicted_memory(model: SourceModel, chunks: Sequence[list[int]], block: int) -> int:
    """Bytes at the peak: the compiler and the vocabulary, the text's hidden states, one layer as the source has it, and
    with moments those of one layer with what is made of them.
    """
    tensors, config = model.gguf.tensors, model.config
    layer = sum(info.n_bytes for name, info in tensors.items() if name.startswith("blk.0."))
    inputs = [tensors[names[0]].shape for names in _readers(config, 0).values()]
    columns = sum(math.prod(shape) // shape[-2] for shape in inputs)
    return (
        BASE_BYTES
        + TEXT_BYTES * config.vocab_size
        + 4 * sum(map(len, chunks)) * config.dim
        + layer
        + columns * block * MOMENT_BYTES
    )


def _shapes(gguf: GGUF) -> dict[str, tuple[int, ...]]:
    return {name: info.shape for name, info in gguf.tensors.items()}


def _overflow(what: str, gguf: GGUF) -> FileFormatError:
    return FileFormatError(
        f"{what} of {quoted(gguf.path.name)} gives values that are too large: its weights are damaged; "
        "download or make it again"
    )


def gather(layers: Iterable[LayerStatistics], dataset: str = DEFAULT_TEXT.name) -> Calibration:
    """All layers of a run together, without their moments; `dataset` names the text."""
    inputs: dict[str, Inputs] = {}
    for layer in layers:
        inputs |= layer.inputs
    return Calibration(inputs, dataset, layer.n_chunks, layer.chunk_size)


def chunks_of(tokenizer: Tokenizer, text: str, size: int) -> list[list[int]]:
    """Token ids in chunks of `size`, the last one shorter; each begins with BOS where the model wants that."""
    start = [tokenizer.bos_id] if tokenizer.add_bos else []
    step = size - len(start)
    ids = tokenizer.encode(text)
    if not ids or step < 1:
        raise UsageError("the text for calibration has no tokens; give a longer one")
    if len(ids) > MAX_TOKENS:
        raise UsageError(f"the text for calibration has {len(ids)} tokens; give one of up to {MAX_TOKENS}")
    return [start + ids[at : at + step] for at in range(0, len(ids), step)]


def _readers(config: ModelConfig, i: int) -> dict[str, tuple[str, ...]]:
    """Names of a layer's tensors by what they read."""
    blk, experts = f"blk.{i}.", "_exps" if config.n_experts else ""
    return {
        "attn_normed": (f"{blk}attn_q.weight", f"{blk}attn_k.weight", f"{blk}attn_v.weight"),
        "attended": (f"{blk}attn_output.weight",),
        "ffn_normed": (f"{blk}ffn_gate{experts}.weight", f"{blk}ffn_up{experts}.weight"),
        "hidden": (f"{blk}ffn_down{experts}.weight",),
    }


# What is not finite is found after the layer.
@np.errstate(over="ignore", invalid="ignore")
def _run_layer(
    engine: Engine, i: int, chunk: list[int], ring: KVRing, x: np.ndarray, sums: dict[str, "_Sums"], *, held: bool
) -> None:
    """One chunk through layer i: hidden states x [n, dim] become those after it, and what matrices read is added."""
    gguf, config = engine.plan.gguf, engine.config
    # Beyond the first layer what is embedded does not count, and one row of the embedding is enough to touch.
    state = engine.embed(chunk if i == 0 else chunk[:1] * len(chunk), range(len(chunk)), [ring] * len(chunk))
    if i > 0:
        state[:] = x
    sums["attn_normed"].add(0, rms_norm(state, gguf, f"blk.{i}.attn_norm.weight", config.rms_eps), held=held)
    inputs = engine.run_layer(i)
    x[:] = state
    sums["attended"].add(0, inputs.attended, held=held)
    for expert, (start, stop) in enumerate(itertools.pairwise(inputs.starts)):
        if start < stop:
            sums["ffn_normed"].add(expert, inputs.normed[inputs.entries[start:stop]], held=held)
            sums["hidden"].add(expert, inputs.hidden[start:stop], held=held)


def rms_norm(x: np.ndarray, gguf: GGUF, weight: str, eps: float) -> np.ndarray:
    """float32 [n, dim] of x [n, dim], which the engine prepares for its kernels without leaving it as floats."""
    mean = np.square(x, dtype=np.float64).mean(axis=1, keepdims=True)
    return (x / np.sqrt(mean + eps)).astype(np.float32) * gguf.data(weight).view(np.float32)


def _is_held(place: int) -> bool:
    return place % HELD == HELD - 1


class _Sums:
    """Sums in float64 over one input that the tensors `names` share; products of columns in float32 within a chunk."""

    def __init__(self, names: tuple[str, ...], shapes: Mapping[str, tuple[int, ...]], block: int) -> None:
        shape = shapes[names[0]]
        n_experts, n_cols = shape[0] if len(shape) == 3 else 1, shape[-1]
        self.names = names
        self.counts = np.zeros((2, n_experts), np.int64)
        self.squares = np.zeros((n_experts, n_cols))
        size = n_cols if block > n_cols else math.gcd(block, n_cols)
        self.products = np.zeros((2, n_experts, n_cols // size, size, size)) if block else None

    # What does not fit is found afterwards.
    @np.errstate(over="ignore", invalid="ignore")
    def add(self, expert: int, x: np.ndarray, *, held: bool) -> None:
        """Rows [n, n_cols] that an expert reads."""
        self.counts[int(held), expert] += len(x)
        self.squares[expert] += np.square(x, dtype=np.float64).sum(axis=0)
        if self.products is not None:
            blocks = x.reshape(len(x), *self.products.shape[2:4])
            # BLAS has its own threads, as many whatever llmq is told; each element is summed by one of them.
            self.products[int(held), expert] += np.matmul(blocks.transpose(1, 2, 0), blocks.transpose(1, 0, 2))

    def fits(self) -> bool:
        """Whether all sums are float32 numbers; no product of columns is larger than the squares."""
        return bool((self.squares <= np.finfo(np.float32).max).all())

    def inputs(self) -> Inputs:
        return Inputs(self.squares.astype(np.float32), self.counts.sum(axis=0))

    def moments(self) -> np.ndarray | None:
        """Those used and those held: float32 [2, n_experts, n_blocks, size, size]; uses the sums up."""
        if self.products is None:
            return None
        self.products /= np.maximum(self.counts, 1)[..., None, None, None]
        return self.products.astype(np.float32)


def _statistics(index: int, config: ModelConfig, chunks: list[list[int]], sums: dict[str, _Sums]) -> LayerStatistics:
    """Means of the sums, which are used up: both together would be the most that is in memory."""
    inputs: dict[str, Inputs] = {}
    moments: dict[str, np.ndarray] = {}
    held: dict[str, np.ndarray] = {}
    while sums:
        _, each = sums.popitem()
        inputs |= dict.fromkeys(each.names, each.inputs())
        found = each.moments()
        if found is not None:
            moments |= dict.fromkeys(each.names, found[0])
            held |= dict.fromkeys(each.names, found[1])
    return LayerStatistics(index, config.n_layers + 1, len(chunks), len(chunks[0]), inputs, moments, held)
