"""The mix of formats that a model's own sensitivity asks for, within a byte budget."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from llmq.errors import FileFormatError
from llmq.formats import (
    F16,
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
    row_bytes,
)
from llmq.gguf import GGUFWriter, TensorSpec
from llmq.gguf_header import ALIGNMENT
from quant.budget import Option, allocate
from quant.encode import FAST, encode, encode_guided
from quant.feedback import weighted_error
from quant.guide import Guide, Guides, no_guide
from quant.recipe import PRESETS, Override, Shape, assign, override_of, takes_type
from quant.sensitivity import probe_format
from quant.source import Source, Weights, in_layer_order

# What rows of whole blocks of 256 can be, and shorter ones; others at the same size are worse.
WIDE = (Q2_K, Q3_K, IQ4_XS, Q4_K, Q5_K, Q6_K, Q8_0)
NARROW = (IQ4_NL, Q5_0, Q5_1, Q8_0)
SAMPLED_ROWS = 64
# Room in the header for what is written about how the file was made.
RECEIPT_BYTES = 8192


def matrix_budget(source: Source, preset: str, *, size: int | None, bits: float | None, calibrated: bool) -> int:
    """Bytes for all matrices together, so that the file has `size` bytes at most, or a weight `bits` bits, or that
    there are as many as the preset takes. Raises UsageError for a size that has no room for what is not quantized.
    """
    shapes = {weights.name: weights.shape for weights in source.weights}
    formats = assign(PRESETS[preset], shapes, calibrated=calibrated)
    matrices = [name for name, shape in shapes.items() if takes_type(name, shape)]
    if bits is not None:
        return int(sum(math.prod(shapes[name]) for name in matrices) * bits / 8)
    needed = {name: _padded(math.prod(shapes[name][:-1]), shapes[name][-1], formats[name]) for name in matrices}
    if size is None:
        return sum(needed.values())
    specs = [TensorSpec(name, shape, formats[name]) for name, shape in shapes.items()]
    whole = GGUFWriter(Path("unwritten"), source.metadata, specs).n_bytes
    return size - (whole - sum(needed.values())) - RECEIPT_BYTES


def nearest_preset(source: Source, mix: Mapping[str, Format]) -> str:
    """The quantized preset whose matrices take most nearly as many bytes: how other programs will name the mix."""
    shapes = {weights.name: weights.shape for weights in source.weights}
    n_bytes = _total(shapes, mix)
    presets = [name for name, preset in PRESETS.items() if preset.base.block_size > 1]
    return min(presets, key=lambda name: abs(_total(shapes, assign(PRESETS[name], shapes)) - n_bytes))


def _total(shapes: Mapping[str, Shape], formats: Mapping[str, Format]) -> int:
    return sum(
        TensorSpec(name, shape, formats[name]).n_bytes for name, shape in shapes.items() if takes_type(name, shape)
    )


def _padded(n_rows: int, n_cols: int, fmt: Format) -> int:
    n_bytes = n_rows * row_bytes(fmt, n_cols)
    return n_bytes + -n_bytes % ALIGNMENT


def best_mix(
    weights: Sequence[Weights],
    sensitivities: Mapping[str, float],
    budget: int,
    *,
    guides: Guides = no_guide,
    overrides: Sequence[Override] = (),
) -> dict[str, Format]:
    """A format for every matrix, by name; `budget` is in bytes for all of them together.

    A format's damage is the tensor's measured sensitivity times the error that the format makes on a sample of rows,
    over the error that was probed. Raises UsageError where the budget is too small.
    """
    options = {}
    for each in in_layer_order(weights):
        if takes_type(each.name, each.shape):
            guide = guides(each.name)
            chosen = override_of(each.name, overrides)
            formats = (chosen,) if chosen else _candidates(each.shape[-1])
            options[each.name] = _options(each, formats, guide, sensitivities[each.name])
    return allocate(options, budget)


def _candidates(n_cols: int) -> tuple[Format, ...]:
    if n_cols % 256 == 0:
        return WIDE
    return NARROW if n_cols % 32 == 0 else (F16,)


def _options(weights: Weights, formats: Sequence[Format], guide: Guide | None, sensitivity: float) -> list[Option]:
    samples = _samples(weights)
    probed = sum(
        _error(rows, encode(fmt, rows, rounds=FAST), fmt, guide, expert)
        for expert, rows in samples
        for fmt in [probe_format(weights.shape[-1])]
    )
    options = []
    for fmt in formats:
        error = sum(
            _error(rows, encode_guided(fmt, rows, guide, expert), fmt, guide, expert) for expert, rows in samples
        )
        damage = sensitivity * error / probed if probed else 0.0
        options.append(Option(fmt, _padded(weights.n_rows, weights.shape[-1], fmt), damage))
    return options


def _samples(weights: Weights) -> list[tuple[int, np.ndarray]]:
    """Rows evenly taken from every expert of a tensor, with its number."""
    n_experts = weights.shape[0] if len(weights.shape) == 3 else 1
    per_expert = weights.n_rows // n_experts
    count = min(per_expert, max(8, SAMPLED_ROWS // n_experts))
    samples = []
    for expert in range(n_experts):
        places = expert * per_expert + np.arange(count) * per_expert // count
        rows = np.concatenate([weights.rows(at, at + 1) for at in places.tolist()])
        if not np.isfinite(rows).all():
            raise FileFormatError(
                f"tensor {weights.name} has weights that are not finite; download or make the checkpoint again"
            )
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
