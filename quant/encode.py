"""Weights to packed rows: one encoder per format."""

from collections.abc import Callable

import numpy as np

from llmq.formats import BF16, F16, F32, Q8_0, Format, dequantize, row_bytes
from quant.encode_q8_0 import encode_q8_0
from quant.feedback import Feedback, error_difference, round_rows
from quant.grid import GRIDS
from quant.guide import Guide
from quant.pack import pack
from quant.search import Found, blocks_of, search

# How often scales are fitted jointly after the first search: thorough, and fast.
ROUNDS, FAST = 3, 0


def _f32(rows: np.ndarray) -> np.ndarray:
    return rows.view(np.uint8)


def _f16(rows: np.ndarray) -> np.ndarray:
    return rows.astype("<f2").view(np.uint8)


def _bf16(rows: np.ndarray) -> np.ndarray:
    """Round to nearest even by carrying into the upper half; cannot overflow into NaN, the weights being finite."""
    bits = rows.view(np.uint32)
    rounded = bits + (np.uint32(0x7FFF) + (bits >> np.uint32(16) & np.uint32(1)))
    return (rounded >> np.uint32(16)).astype("<u2").view(np.uint8)


PLAIN: dict[Format, Callable[[np.ndarray], np.ndarray]] = {F32: _f32, F16: _f16, BF16: _bf16}


def encode(
    fmt: Format,
    rows: np.ndarray,
    importance: np.ndarray | None = None,
    feedback: Feedback | None = None,
    *,
    rounds: int = ROUNDS,
) -> np.ndarray:
    """Packed rows: finite float32 [n, n_cols], C-contiguous -> uint8 [n, row_bytes(fmt, n_cols)].

    `importance` float32 [n_cols] weighs the columns' errors; with `feedback` they make each other's errors good, and it
    gives the weights. The bytes depend on nothing but these. F16, BF16 and Q8_0 are the same whatever the importance,
    and are ggml's reference bytes.
    """
    assert rows.dtype == np.float32, rows.dtype
    assert rows.flags.c_contiguous
    if fmt in PLAIN:
        return PLAIN[fmt](rows)
    if fmt is Q8_0:
        out = np.empty((rows.shape[0], row_bytes(fmt, rows.shape[1])), np.uint8)
        encode_q8_0(out.ctypes.data, rows.ctypes.data, rows.size // fmt.block_size)
        return out
    grid = GRIDS[fmt]
    if feedback is None:
        found = search(grid, rows, importance, rounds=rounds)
    else:
        found = search(grid, rows, feedback.importance, rounds=rounds)
        found = Found(round_rows(grid, rows, found.params, feedback), found.params)
    return pack(fmt, blocks_of(grid, found)).reshape(rows.shape[0], -1)


def encode_guided(
    fmt: Format, rows: np.ndarray, guide: Guide | None, expert: int, *, rounds: int = ROUNDS
) -> np.ndarray:
    """encode() by what is known of an expert's inputs; with feedback where that is better on text held out."""
    if guide is None:
        return encode(fmt, rows, rounds=rounds)
    alone = encode(fmt, rows, guide.importance[expert], rounds=rounds)
    if not guide.feedback or fmt not in GRIDS:
        return alone
    assert guide.held is not None
    together = encode(fmt, rows, feedback=guide.feedback[expert], rounds=rounds)
    errors = [dequantize(fmt, each) - rows for each in (together, alone)]
    return together if error_difference(errors[0], errors[1], guide.held[expert]) < 0 else alone


def squared_error(fmt: Format, rows: np.ndarray, packed: np.ndarray) -> tuple[float, float]:
    """Sum of squared differences between `rows` and what `packed` decodes to, and the sum of squares of `rows`."""
    off = dequantize(fmt, packed).reshape(rows.shape) - rows
    return _sum_of_squares(off), _sum_of_squares(rows)


def _sum_of_squares(x: np.ndarray) -> float:
    # Not np.vdot: its BLAS starts threads of its own beside the ones that encode.
    return float(np.square(x, dtype=np.float64).sum())
