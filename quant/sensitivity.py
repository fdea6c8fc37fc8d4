"""How much it hurts a model when one of its tensors is quantized: measured, by quantizing that one and running it.

A probe is the model with one tensor replaced by what three bits leave of it; the KL divergence of its predictions from
those of the model itself tells how sensitive the model is to that tensor's error. All probes pass through a layer
before the next one begins, so each weight is read once. Of a deep model some layers are probed and those between
interpolated.
"""

import math
from collections.abc import Callable, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from llmq.cores import usable_cores
from llmq.engine.cpu import BATCH, Engine
from llmq.errors import UsageError
from llmq.formats import BF16, F16, F32, Q3_K, Q4_0, Format, dequantize, row_bytes
from llmq.gguf import GGUF, quoted
from llmq.tokenizer import load_tokenizer
from quant.calibrate import chunks_of, rms_norm
from quant.encode import FAST, encode
from quant.evaluate import divergence, log_softmax, targets
from quant.model import SourceModel, open_model

PROBED_LAYERS = 12
# A model of so many weights is probed on one chunk of text, smaller ones on up to eight.
LARGE = 1 << 30
MOST_CHUNKS = 8
# Rows of the output matrix that are multiplied at a time.
STRIP = 8192
FLOATS = (F32, F16, BF16)

Tell = Callable[[int, int], None]


def unheard(done: int, total: int) -> None:
    del done, total


def probe_format(n_cols: int) -> Format:
    return Q3_K if n_cols % Q3_K.block_size == 0 else Q4_0


class Altered(GGUF):
    """An open file of which one tensor has other rows, float32."""

    __slots__ = ("_gguf", "_name", "_rows")

    def __init__(self, gguf: GGUF, name: str, rows: np.ndarray) -> None:
        info = replace(gguf.tensors[name], format=F32, n_bytes=rows.nbytes)
        super().__init__(gguf.path, gguf.metadata, gguf.tensors | {name: info}, None)
        self._gguf, self._name, self._rows = gguf, name, rows

    def data(self, name: str) -> np.ndarray:
        return self._rows.view(np.uint8) if name == self._name else self._gguf.data(name)


@dataclass(frozen=True, slots=True)
class _Probe:
    """A tensor's name, and the hidden states of each chunk, f32 [n, dim]."""

    name: str
    hidden: list[np.ndarray]


def sensitivities(src: Path, text: str, *, threads: int | None = None, tell: Tell = unheard) -> dict[str, float]:
    """KL divergence in nats that probing each matrix causes, by tensor name; `tell` hears of layers done and in all.

    A probe is the whole matrix encoded as probe_format(), fast and without calibration. Raises UsageError for a source
    that is quantized already, and what calibrate() raises.
    """
    model = open_model(src)
    gguf, config = model.gguf, model.config
    matrices = [name for name, info in gguf.tensors.items() if len(info.shape) > 1 and "ffn_gate_inp" not in name]
    if any(gguf.tensors[name].format not in FLOATS for name in matrices):
        raise UsageError(f"{quoted(src.name)} is quantized already; a mix of types is chosen from the original weights")
    chunks = _spread(chunks_of(load_tokenizer(gguf.metadata), text, min(BATCH, config.context_length)), gguf)
    probed = _probed(config.n_layers)
    n_threads = threads or usable_cores()
    probes = [_Probe("", []), _Probe("token_embd.weight", [])]
    with closing(Engine(gguf, config, n_threads)) as engine:
        for i in range(config.n_layers):
            model.prepare(i)
            if i in probed:
                names = [name for name in matrices if name.startswith(f"blk.{i}.")]
                probes += [_Probe(name, [x.copy() for x in probes[0].hidden]) for name in names]
            for probe in probes:
                _run_layer(engine, model, i, probe, chunks, n_threads)
            model.release()
            tell(i + 1, config.n_layers + 1)
    found = _divergences(model, probes, chunks)
    tell(config.n_layers + 1, config.n_layers + 1)
    return _interpolated(found, matrices, probed)


def _spread(chunks: list[list[int]], gguf: GGUF) -> list[list[int]]:
    """Whole chunks, evenly taken from the text: one for a large model, more for smaller ones."""
    n_weights = sum(math.prod(info.shape) for info in gguf.tensors.values())
    whole = chunks[:-1] or chunks
    n = max(1, min(len(whole), MOST_CHUNKS, LARGE // n_weights))
    return [whole[len(whole) * i // n] for i in range(n)]


def _probed(n_layers: int) -> list[int]:
    """All layers of a shallow model; else the first two and the last, and some evenly between."""
    if n_layers <= PROBED_LAYERS:
        return list(range(n_layers))
    return sorted({0, *np.linspace(1, n_layers - 1, PROBED_LAYERS - 1).round().astype(int).tolist()})


def _probed_rows(gguf: GGUF, name: str) -> np.ndarray:
    """The tensor after encoding, float32 [..., n_cols]."""
    info = gguf.tensors[name]
    out = np.empty(info.shape, np.float32)
    flat, packed = out.reshape(-1, info.shape[-1]), gguf.data(name).reshape(-1, row_bytes(info.format, info.shape[-1]))
    fmt = probe_format(info.shape[-1])
    for at in range(0, len(flat), STRIP):
        rows = np.ascontiguousarray(dequantize(info.format, packed[at : at + STRIP]))
        flat[at : at + STRIP] = dequantize(fmt, encode(fmt, rows, rounds=FAST))
    return out


def _run_layer(
    engine: Engine, model: SourceModel, i: int, probe: _Probe, chunks: Sequence[list[int]], n_threads: int
) -> None:
    """All chunks of a probe through layer i, in which its own tensor is altered."""
    with ExitStack() as stack:
        if probe.name.startswith(f"blk.{i}.") or (i == 0 and probe.name == "token_embd.weight"):
            altered = Altered(model.gguf, probe.name, _probed_rows(model.gguf, probe.name))
            engine = stack.enter_context(closing(Engine(altered, model.config, n_threads)))
        ring = engine.ring(len(chunks[0]))
        for place, chunk in enumerate(chunks):
            state = engine.embed(chunk, range(len(chunk)), [ring] * len(chunk))
            if i > 0:
                state[:] = probe.hidden[place]
            engine.run_layer(i)
            if place < len(probe.hidden):
                probe.hidden[place][:] = state
            else:
                probe.hidden.append(state.copy())


def _divergences(model: SourceModel, probes: list[_Probe], chunks: Sequence[list[int]]) -> dict[str, float]:
    """Mean KL of every probe's predictions from the first one's, that of the model as it is, and of the output's."""
    name = "token_embd.weight" if model.config.tied_embeddings else "output.weight"
    info, packed = model.gguf.tensors[name], model.gguf.data(name)
    rows = dequantize(info.format, packed)
    totals: dict[str, float] = {}
    for place, chunk in enumerate(chunks):
        right = targets(chunk)
        reference = _log_probs(model, probes[0].hidden[place], rows, len(chunk))
        for probe in probes[1:]:
            logp = _log_probs(model, probe.hidden[place], rows, len(chunk))
            kl = float(divergence(reference, logp, right)["kl"].mean())
            totals[probe.name] = totals.get(probe.name, 0.0) + max(kl, 0.0) / len(chunks)
        logp = _log_probs(model, probes[0].hidden[place], _probed_rows(model.gguf, name), len(chunk))
        totals[name] = totals.get(name, 0.0) + float(divergence(reference, logp, right)["kl"].mean()) / len(chunks)
    return totals


def _log_probs(model: SourceModel, hidden: np.ndarray, output: np.ndarray, n: int) -> np.ndarray:
    """Of the positions in a chunk's second half but the last, as evaluation counts them."""
    x = rms_norm(hidden[n // 2 : n - 1], model.gguf, "output_norm.weight", model.config.rms_eps)
    return log_softmax(x @ output.T)


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
