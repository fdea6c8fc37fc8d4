"""The mix of formats that a model's own sensitivity asks for, within a byte budget."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from llmq.errors import UsageError
from llmq.formats import (
    F16,
    F32,
    IQ4_NL,
    IQ4_XS,
    Q2_K,
    Q3_K,
    Q4_K,
    Q5_0,
    Q5_1,
    Q5_K,
    Q6_K,
    Q8_0,
    Format,
    dequantize,
)
from llmq.gguf import GGUFWriter, TensorSpec
from llmq.gguf_header import ALIGNMENT
from quant.budget import Option, allocate
from quant.encode import FAST, ROUNDS, encode, encode_guided
from quant.feedback import weighted_error
from quant.guide import Guide, Guides, no_guide
from quant.limits import check_range
from quant.recipe import PRESETS, Override, assign, override_of, takes_type
from quant.sensitivity import Tell, probe_format, unheard
from quant.source import Source, Weights, in_layer_order

# What rows of whole blocks of 256 can be, and shorter ones; others at the same size are worse.
WIDE = (Q2_K, Q3_K, IQ4_XS, Q4_K, Q5_K, Q6_K, Q8_0)
NARROW = (IQ4_NL, Q5_0, Q5_1, Q8_0)
SAMPLED_ROWS = 64


def file_bytes(source: Source, formats: Mapping[str, Format], metadata: dict[str, Any]) -> int:
    """Size of the file that has this metadata and the source's tensors in these formats."""
    specs = [TensorSpec(weights.name, weights.shape, formats[weights.name]) for weights in source.weights]
    return GGUFWriter(Path("unwritten"), metadata, specs).n_bytes


def matrix_budget(source: Source, size: int, metadata: dict[str, Any]) -> int:
    """Bytes for all matrices together in a file of `size` bytes that has this metadata; below 0 where there are none.

    Of the whole file, whatever the matrices take is theirs: F32 stands for any format here.
    """
    everything = dict.fromkeys((weights.name for weights in source.weights), F32)
    matrices = sum(_in_file(source, weights, F32) for weights in _matrices(source))
    return size - (file_bytes(source, everything, metadata) - matrices)


def budget_of_bits(source: Source, bits: float) -> int:
    """Bytes for all matrices together, at `bits` a weight."""
    return int(sum(math.prod(weights.shape) for weights in _matrices(source)) * bits / 8)


def check_budget(source: Source, budget: int, overrides: Sequence[Override] = ()) -> None:
    """Raises UsageError where best_mix() would: for an override that fits nothing, and for too small a budget."""
    assign(PRESETS["q8_0"], {weights.name: weights.shape for weights in source.weights}, overrides=overrides)
    least = _least_bytes(source, overrides)
    if least <= budget:
        return
    bits = 8 * least / sum(math.prod(weights.shape) for weights in _matrices(source))
    spared = overrides and _least_bytes(source, ()) < least
    raise UsageError(
        f"the smallest types take {math.ceil(100 * bits) / 100:.2f} bits a weight, {least - budget:,} bytes more than "
        f"there are; give a larger budget{', or leave out --tensor-type' if spared else ''}"
    )


def _least_bytes(source: Source, overrides: Sequence[Override]) -> int:
    """Of all matrices in their smallest types."""
    return sum(
        min(_in_file(source, weights, fmt) for fmt in _choices(weights, overrides)) for weights in _matrices(source)
    )


def nearest_preset(source: Source, mix: Mapping[str, Format]) -> str:
    """Of the presets of such formats, the one whose matrices take most nearly as many bytes: how other programs will
    name the mix.
    """
    shapes = {weights.name: weights.shape for weights in source.weights}

    def n_bytes(formats: Mapping[str, Format]) -> int:
        return sum(TensorSpec(name, shapes[name], formats[name]).n_bytes for name in mix)

    presets = [name for name, preset in PRESETS.items() if preset.base in WIDE]
    return min(presets, key=lambda name: abs(n_bytes(assign(PRESETS[name], shapes)) - n_bytes(mix)))


def best_mix(
    source: Source,
    sensitivities: Mapping[str, float],
    budget: int,
    *,
    guides: Guides = no_guide,
    overrides: Sequence[Override] = (),
    fast: bool = False,
    tell: Tell = unheard,
) -> dict[str, Format]:
    """A format for every matrix, by name; `budget` is in bytes for all of them together, each padded as in the file.

    A format's damage is the tensor's measured sensitivity times the error that the format makes on a sample of rows,
    over the error that was probed. `guides`, `overrides` and `fast` are those of quantize(); `tell` is told the matrix
    that is about to be tried, from 1, and how many there are.

    Raises UsageError where check_budget() does, FileFormatError for weights that are not finite, UnsupportedError
    for one that no format can hold.
    """
    options, matrices = {}, in_layer_order(_matrices(source))
    for at, weights in enumerate(matrices):
        tell(at + 1, len(matrices))
        formats = _choices(weights, overrides)
        samples = _samples(weights, formats)
        errors = _errors(weights, samples, formats, guides(weights.name), FAST if fast else ROUNDS)
        options[weights.name] = [
            Option(fmt, _in_file(source, weights, fmt), sensitivities[weights.name] * error)
            for fmt, error in errors.items()
        ]
        source.release()
    return allocate(options, budget)


def _matrices(source: Source) -> list[Weights]:
    return [weights for weights in source.weights if takes_type(weights.name, weights.shape)]


def _in_file(source: Source, weights: Weights, fmt: Format) -> int:
    n_bytes = TensorSpec(weights.name, weights.shape, fmt).n_bytes
    return n_bytes + -n_bytes % int(source.metadata.get("general.alignment", ALIGNMENT))


def _choices(weights: Weights, overrides: Sequence[Override]) -> tuple[Format, ...]:
    chosen = override_of(weights.name, overrides)
    return (chosen,) if chosen else _candidates(weights.shape[-1])


def _candidates(n_cols: int) -> tuple[Format, ...]:
    if n_cols % 256 == 0:
        return WIDE
    return NARROW if n_cols % 32 == 0 else (F16,)


def _errors(
    weights: Weights,
    samples: Sequence[tuple[int, np.ndarray]],
    formats: Sequence[Format],
    guide: Guide | None,
    rounds: int,
) -> dict[Format, float]:
    """Of each format, over that of the probe."""
    probe = probe_format(weights.shape[-1])
    probed = sum(_error(rows, encode(probe, rows, rounds=FAST), probe, guide, expert) for expert, rows in samples)
    errors = {
        fmt: sum(
            _error(rows, encode_guided(fmt, rows, guide, expert, rounds=rounds), fmt, guide, expert)
            for expert, rows in samples
        )
        for fmt in formats
    }
    return {fmt: error / probed if probed else 0.0 for fmt, error in errors.items()}


def _samples(weights: Weights, formats: Sequence[Format]) -> list[tuple[int, np.ndarray]]:
    """Rows evenly taken from every expert of a tensor, with its number; all formats can hold them."""
    n_experts = weights.shape[0] if len(weights.shape) == 3 else 1
    per_expert = weights.n_rows // n_experts
    count = min(per_expert, max(8, SAMPLED_ROWS // n_experts))
    samples = []
    for expert in range(n_experts):
        places = expert * per_expert + np.arange(count) * per_expert // count
        rows = np.concatenate([weights.rows(at, at + 1) for at in places.tolist()])
        for fmt in formats:
            check_range(weights.name, fmt, rows)
        samples.append((expert, rows))
    return samples


def _error(rows: np.ndarray, packed: np.ndarray, fmt: Format, guide: Guide | None, expert: int) -> float:
    """Squared error of the products with what the tensor reads, as far as that is known."""
    off = dequantize(fmt, packed).reshape(rows.shape) - rows
    if guide is None:
        return float(np.square(off, dtype=np.float64).sum())
    if guide.held is not None and guide.held[expert].any():
        return weighted_error(off, guide.held[expert])
    return float((np.square(off, dtype=np.float64) * guide.importance[expert]).sum())
