"""How much it hurts a model when one of its tensors is quantized: measured, by quantizing that one and running it.

A probe is the model with one tensor replaced by what three bits leave of it (four, where rows are no blocks of 256);
the KL divergence of its predictions from those of the model itself tells how sensitive the model is to that tensor's
error. All probes pass through a layer before the next one begins, so each weight is read from disk once. Of a deep
model some layers are probed and those between interpolated.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from llmq.cache import KVRing
from llmq.cores import usable_cores
from llmq.engine.cpu import Engine
from llmq.errors import FileFormatError, UsageError
from llmq.formats import BF16, F16, F32, Q3_K, Q4_0, Format, dequantize, row_bytes
from llmq.gguf import GGUF, quoted
from llmq.layout import BATCH
from llmq.sampler import NOT_NUMBERS
from llmq.tokenizer import load_tokenizer
from quant.calibrate import chunks_of
from quant.encode import FAST, encode
from quant.evaluate import LEAST_TOKENS, divergence, log_softmax, targets
from quant.limits import STRIP, check_finite, check_range
from quant.memory import BASE_BYTES, TEXT_BYTES, check_room, give_back
from quant.model import SourceModel, open_model
from quant.recipe import takes_type
from quant.reference import OUTPUT_ROWS, output_logits, output_name

PROBED_LAYERS = 12
# A model of more weights is probed on part of a chunk, smaller ones on one to eight chunks.
LARGE, FEW_TOKENS = 1 << 30, 256
MOST_CHUNKS = 8
# Of a weight in a strip: floats, their encoding, and what is between. Of a token's logit: of two models, and blocks.
STRIP_BYTES, LOGIT_BYTES = 24, 16
# Positions whose probabilities are compared together.
KL_ROWS = 16
FLOATS = (F32, F16, BF16)

Tell = Callable[[int, int], None]


def unheard(done: int, total: int) -> None:
    del done, total


def probe_format(n_cols: int) -> Format:
    return Q3_K if n_cols % Q3_K.block_size == 0 else Q4_0


class Altered(GGUF):
    """An open file of which one tensor has other weights: F32 where it is F32, else BF16."""

    __slots__ = ("_gguf", "_name", "_packed")

    def __init__(self, gguf: GGUF, name: str, packed: np.ndarray) -> None:
        info = replace(gguf.tensors[name], format=_altered_format(gguf, name), n_bytes=packed.nbytes)
        super().__init__(gguf.path, gguf.metadata, gguf.tensors | {name: info}, None)
        self._gguf, self._name, self._packed = gguf, name, packed

    def data(self, name: str) -> np.ndarray:
        return self._packed if name == self._name else self._gguf.data(name)


def _altered_format(gguf: GGUF, name: str) -> Format:
    return F32 if gguf.tensors[name].format is F32 else BF16


@dataclass(frozen=True, slots=True)
class _Probe:
    """A tensor's name, empty for the model as it is, and the hidden states of each chunk, f32 [n, dim]."""

    name: str
    hidden: list[np.ndarray]


def sensitivities(src: Path, text: str, *, threads: int | None = None, tell: Tell = unheard) -> dict[str, float]:
    """KL divergence in nats that probing each matrix causes, by tensor name. `tell` is told the step that is about to
    be done, from 1, and how many there are: the layers, then the output.

    A probe is the whole matrix encoded as probe_format(), fast and without calibration. What comes out does not depend
    on `threads` (default: one per physical core).

    Raises UsageError (a source that is quantized already, a text of fewer than 32 tokens), ResourceError (memory),
    FileFormatError (weights that give no numbers), and what open_model raises.
    """
    model = open_model(src)
    gguf, config = model.gguf, model.config
    matrices = [name for name, info in gguf.tensors.items() if takes_type(name, info.shape)]
    if any(gguf.tensors[name].format not in FLOATS for name in matrices):
        raise UsageError(f"{quoted(src.name)} is quantized already; a mix of types is chosen from the original weights")
    chunks = _spread(chunks_of(load_tokenizer(gguf.metadata), text, min(BATCH, config.context_length)), gguf)
    check_memory(model, chunks)
    probed, n_threads = _probed(config.n_layers), threads or usable_cores()
    probes = [_Probe("", []), _Probe("token_embd.weight", [])]
    with closing(Engine(gguf, config, n_threads)) as engine:
        ring = engine.ring(len(chunks[0]))
        for i in range(config.n_layers):
            tell(i + 1, config.n_layers + 1)
            model.prepare(i)
            if i in probed:
                names = [name for name in matrices if name.startswith(f"blk.{i}.")]
                probes += [_Probe(name, [x.copy() for x in probes[0].hidden]) for name in names]
            for probe in probes:
                with _altered_engine(engine, model, i, probe.name) as own:
                    _run_layer(own, i, probe, chunks, ring)
            if not all(np.isfinite(x).all() for x in probes[0].hidden):
                check_finite(gguf, "token_embd.", f"blk.{i}.")
                raise FileFormatError(NOT_NUMBERS)
            model.release()
            give_back()
    tell(config.n_layers + 1, config.n_layers + 1)
    for probe in probes:
        probe.hidden[:] = [x[_counted(chunk)].copy() for x, chunk in zip(probe.hidden, chunks, strict=True)]
    if not config.tied_embeddings:
        probes.append(_Probe(output_name(config), probes[0].hidden))
    return _interpolated(_divergences(model, probes, chunks), matrices, probed)


def _spread(chunks: list[list[int]], gguf: GGUF) -> list[list[int]]:
    """Whole chunks, evenly taken from the text; of its first one the beginning for a large model."""
    if len(chunks[0]) < LEAST_TOKENS:
        raise UsageError(
            f"the text has {len(chunks[0])} of the {LEAST_TOKENS} tokens that measuring needs; give a longer one"
        )
    n_weights = sum(math.prod(info.shape) for info in gguf.tensors.values())
    whole = chunks[:-1] or chunks
    if n_weights > LARGE:
        return [whole[0][:FEW_TOKENS]]
    n = min(len(whole), MOST_CHUNKS, LARGE // n_weights)
    return [whole[len(whole) * i // n] for i in range(n)]


def predicted_memory(model: SourceModel, chunks: Sequence[list[int]]) -> int:
    """Bytes at the peak: the compiler and the vocabulary, every probe's hidden states, one altered matrix, and either
    one layer as the source has it, or the output matrix and the probabilities of a chunk.
    """
    tensors, config = model.gguf.tensors, model.config
    per_layer = sum(name.startswith("blk.0.") and takes_type(name, info.shape) for name, info in tensors.items())
    n_probes = 2 + per_layer * len(_probed(config.n_layers))
    layer = sum(info.n_bytes for name, info in tensors.items() if name.startswith("blk.0."))
    output = tensors[output_name(config)].n_bytes + 8 * OUTPUT_ROWS * config.dim
    return (
        BASE_BYTES
        + TEXT_BYTES * config.vocab_size
        + 4 * n_probes * sum(map(len, chunks)) * config.dim
        + max(row_bytes(_altered_format(model.gguf, name), math.prod(info.shape)) for name, info in tensors.items())
        + STRIP_BYTES * STRIP
        + max(layer, output + LOGIT_BYTES * len(targets(chunks[0])) * config.vocab_size)
    )


def check_memory(model: SourceModel, chunks: Sequence[list[int]]) -> None:
    check_room("measuring sensitivity", predicted_memory(model, chunks), ", or quantize without a budget")


def _probed(n_layers: int) -> list[int]:
    """All layers of a shallow model; else the first two and the last, and some evenly between."""
    if n_layers <= PROBED_LAYERS:
        return list(range(n_layers))
    return sorted({0, *np.linspace(1, n_layers - 1, PROBED_LAYERS - 1).round().astype(int).tolist()})


def _probed_rows(gguf: GGUF, name: str) -> np.ndarray:
    """The tensor after encoding, as Altered takes it: uint8 [..., row_bytes]. BF16 adds a hundredth of its error."""
    info, kept = gguf.tensors[name], _altered_format(gguf, name)
    out = np.empty((*info.shape[:-1], row_bytes(kept, info.shape[-1])), np.uint8)
    flat, packed = out.reshape(-1, out.shape[-1]), gguf.data(name).reshape(-1, row_bytes(info.format, info.shape[-1]))
    fmt, step = probe_format(info.shape[-1]), max(1, STRIP // info.shape[-1])
    for at in range(0, len(flat), step):
        rows = dequantize(info.format, packed[at : at + step])
        check_range(name, fmt, rows)
        flat[at : at + step] = encode(kept, dequantize(fmt, encode(fmt, rows, rounds=FAST)))
    return out


@contextmanager
def _altered_engine(engine: Engine, model: SourceModel, i: int, name: str) -> Iterator[Engine]:
    """One for the model with this tensor altered, where layer i reads it; else the one given."""
    if not (name.startswith(f"blk.{i}.") or (i == 0 and name == "token_embd.weight")):
        yield engine
        return
    altered = Altered(model.gguf, name, _probed_rows(model.gguf, name))
    model.release()
    with closing(Engine(altered, model.config, engine.n_threads)) as own:
        yield own


def _run_layer(engine: Engine, i: int, probe: _Probe, chunks: Sequence[list[int]], ring: KVRing) -> None:
    for place, chunk in enumerate(chunks):
        state = engine.embed(chunk, range(len(chunk)), [ring] * len(chunk))
        if i == 0:
            engine.run_layer(0)
            probe.hidden.append(state.copy())
        else:
            state[:] = probe.hidden[place]
            engine.run_layer(i)
            probe.hidden[place][:] = state


def _counted(chunk: list[int]) -> slice:
    """Positions in a chunk's second half but the last, as evaluation counts them."""
    return slice(len(chunk) // 2, len(chunk) - 1)


def _divergences(model: SourceModel, probes: list[_Probe], chunks: Sequence[list[int]]) -> dict[str, float]:
    """Mean KL of every probe's predictions from the first one's, by the name of its tensor; their hidden states are
    those of the positions that count.
    """
    name = output_name(model.config)
    altered = Altered(model.gguf, name, _probed_rows(model.gguf, name))
    model.release()
    totals = {probe.name: 0.0 for probe in probes[1:]}
    for place, chunk in enumerate(chunks):
        reference = output_logits(model.gguf, model.config, probes[0].hidden[place])
        for probe in probes[1:]:
            gguf = altered if probe.name == name else model.gguf
            logits = output_logits(gguf, model.config, probe.hidden[place])
            totals[probe.name] += _mean_kl(reference, logits, targets(chunk))
    return {probed: max(total, 0.0) / len(chunks) for probed, total in totals.items()}


def _mean_kl(reference: np.ndarray, logits: np.ndarray, ids: np.ndarray) -> float:
    """KL divergence in nats, a few positions at a time: in float64 those of a chunk would be the peak of the memory."""
    strips = [slice(at, at + KL_ROWS) for at in range(0, len(ids), KL_ROWS)]
    pairs = ((log_softmax(reference[strip]), log_softmax(logits[strip]), ids[strip]) for strip in strips)
    return float(np.concatenate([divergence(*pair)["kl"] for pair in pairs]).mean())


def _interpolated(found: dict[str, float], matrices: Sequence[str], probed: Sequence[int]) -> dict[str, float]:
    """The layers between the probed ones, by the logarithm of their neighbours of the same role."""
    result = {}
    for name in matrices:
        if name in found:
            result[name] = found[name]
            continue
        _blk, layer, role = name.split(".", 2)
        logs = [math.log(max(found[f"blk.{i}.{role}"], 1e-12)) for i in probed]
        result[name] = math.exp(float(np.interp(int(layer), probed, logs)))
    return result
