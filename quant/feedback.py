"""Rounding with error feedback: the error of a weight is made good by the weights that are rounded after it.

What counts is the error of a product, e^T H e for the error e of a row's block and the second moments H of its inputs.
A first pass goes through the columns once: with H = (I + U) D (I + U)^T, U strictly upper triangular, the error becomes
a sum of squares, one for each column, that only that column and those before it enter (LDLQ: Chee et al., "QuIP",
arXiv 2307.13304; with U from a Cholesky factor it is GPTQ, Frantar et al., arXiv 2210.17323). More passes choose each
level again, given all the others, which never makes the error larger. Scales stay as the search left them.

H is taken block by block of 256 columns: what two blocks have in common is left out, so memory and time grow with the
number of columns and not with its square. Lanes are rows.
"""

from dataclasses import dataclass

import numpy as np
from numba import types

from llmq.simd import (
    clear_bytes,
    copy_bytes,
    i8_of_i32x16,
    i32_of_f32x16,
    load_f32,
    load_f32x16,
    round_f32x16,
    stack,
    store_f32,
    store_f32x16,
    store_i8x16,
)
from quant.grid import TABLE, Grid
from quant.lanes import (
    clamp,
    divide_or_zero,
    nearest_of_iq4,
    splat,
    strict,
    strict_kernel,
    transpose,
)
from quant.search import LANES, PARAMS

BLOCK = 256
# Of the mean of the moments' diagonal, added to it: what few tokens say about directions they hardly saw is not much.
DAMPING = 0.1
SWEEPS = 2


@strict
def weighted_sum(errors, row, n):  # type: ignore[no-untyped-def]
    """Sum over j < n of errors[j] * row[j]; four sums side by side, so that none waits for the one before."""
    a, b, c, d = splat(0), splat(0), splat(0), splat(0)
    whole = n // 4 * 4
    for j in range(0, whole, 4):
        at, to = errors + 64 * j, row + 4 * j
        a = a + load_f32x16(at) * splat(load_f32(to))
        b = b + load_f32x16(at + 64) * splat(load_f32(to + 4))
        c = c + load_f32x16(at + 128) * splat(load_f32(to + 8))
        d = d + load_f32x16(at + 192) * splat(load_f32(to + 12))
    for j in range(whole, n):
        a = a + load_f32x16(errors + 64 * j) * splat(load_f32(row + 4 * j))
    return (a + b) + (c + d)


@strict
def round_columns(errors, levels, x, matrix, scales, minima, size, low, high, table, sees_all):  # type: ignore[no-untyped-def]
    """One pass: each column of 16 rows to the level nearest to it plus what the other columns' errors ask of it."""
    for k in range(BLOCK):
        scale, minimum = load_f32x16(scales + 64 * (k // size)), load_f32x16(minima + 64 * (k // size))
        value = load_f32x16(x + 64 * k)
        target = value + weighted_sum(errors, matrix + 4 * BLOCK * k, BLOCK if sees_all else k)
        quotient = (target + minimum) * divide_or_zero(splat(1), scale)
        level = nearest_of_iq4(quotient) if table else clamp(round_f32x16(quotient), low, high)
        store_f32x16(levels + 64 * k, level)
        store_f32x16(errors + 64 * k, value - (scale * level - minimum))


@strict
def load_rows(tile, rows, x, n_rows, stride):  # type: ignore[no-untyped-def]
    """Up to 16 rows of 256 floats, `stride` bytes apart, to 256 rows of 16 lanes."""
    clear_bytes(rows, 4 * BLOCK * LANES)
    for row in range(n_rows):
        copy_bytes(rows + 4 * BLOCK * row, x + stride * row, 4 * BLOCK)
    for at in range(0, BLOCK, 16):
        transpose(tile + 64 * at, 64, rows + 4 * at, 4 * BLOCK)


@strict
def load_scales(scales, minima, params, column, total_rows, n_rows, size):  # type: ignore[no-untyped-def]
    """d * sc and dmin * m of the block at `column`, with rows as lanes; the layout of `params` is the search's."""
    clear_bytes(scales, 1024)
    clear_bytes(minima, 1024)
    for j in range(BLOCK // size):
        lane = column // size + j
        for row in range(n_rows):
            at = params + PARAMS * (lane // LANES * total_rows + row) + 4 * (lane % LANES)
            store_f32(scales + 64 * j + 4 * row, load_f32(at) * load_f32(at + 128))
            store_f32(minima + 64 * j + 4 * row, load_f32(at + 64) * load_f32(at + 192))


@strict
def store_levels(out, levels, n_rows, stride):  # type: ignore[no-untyped-def]
    rows = stack(1024)
    for at in range(0, BLOCK, 16):
        transpose(rows, 64, levels + 64 * at, 64)
        for row in range(n_rows):
            store_i8x16(out + stride * row + at, i8_of_i32x16(i32_of_f32x16(load_f32x16(rows + 64 * row))))


@strict_kernel(*[types.int64] * 9, *[types.float32] * 2, types.int64)
def feed_back(levels, params, x, forward, around, n_rows, n_cols, size, sweeps, low, high, table):  # type: ignore[no-untyped-def]
    """Rounds the rows at `x` into `levels` (int8 [n_rows, n_cols]), given the scales at `params`.

    `forward` and `around` are float32 [n_cols / 256, 256, 256]: what column k takes from the errors of those before it,
    and from those of all others.
    """
    space, tile, found, errors = stack(16384), stack(16384), stack(16384), stack(16384)
    scales, minima = stack(1024), stack(1024)
    for column in range(0, n_cols, BLOCK):
        matrix = 4 * BLOCK * column
        for row in range(0, n_rows, LANES):
            n = min(LANES, n_rows - row)
            load_rows(tile, space, x + 4 * (row * n_cols + column), n, 4 * n_cols)
            load_scales(scales, minima, params + PARAMS * row, column, n_rows, n, size)
            round_columns(errors, found, tile, forward + matrix, scales, minima, size, low, high, table, False)
            for _ in range(sweeps):
                round_columns(errors, found, tile, around + matrix, scales, minima, size, low, high, table, True)
            store_levels(levels + row * n_cols + column, found, n, n_cols)


@dataclass(frozen=True, slots=True)
class Feedback:
    """What rounding needs to know of the inputs, made from their second moments by `prepare`.

    `importance` float32 [n_cols] is D of the factored moments, the weight of each column's own error; `forward` and
    `around` float32 [n_cols / 256, 256, 256] are what the kernel takes.
    """

    importance: np.ndarray
    forward: np.ndarray
    around: np.ndarray


def prepare(moments: np.ndarray) -> Feedback:
    """Factors the second moments, float [n_blocks, 256, 256], symmetric; moments that are all zero count as equal."""
    n_blocks, n, _ = moments.shape
    importance = np.empty((n_blocks, n), np.float32)
    forward, around = np.empty((2, *moments.shape), np.float32)
    for i, block in enumerate(moments):
        exact = block.astype(np.float64)
        mean = np.trace(exact) / n
        damped = exact + np.eye(n) * (DAMPING * mean if mean > 0 else 1.0)
        upper, importance[i] = _factor(damped)
        forward[i] = upper.T
        around[i] = damped / np.diag(damped)[:, None] - np.eye(n)
    return Feedback(importance.reshape(-1), forward, around)


def _factor(moments: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """U and D of moments = (I + U) D (I + U)^T: a Cholesky factor of the matrix turned end for end."""
    lower = np.linalg.cholesky(moments[::-1, ::-1])[::-1, ::-1]
    roots = np.diag(lower)
    return lower / roots - np.eye(len(roots)), roots**2


def round_rows(grid: Grid, rows: np.ndarray, params: np.ndarray, feedback: Feedback) -> np.ndarray:
    """Levels int8 [n, n_cols] for float32 `rows`, given the search's `params`."""
    n_rows, n_cols = rows.shape
    levels = np.empty((n_rows, n_cols), np.int8)
    feed_back(
        levels.ctypes.data, params.ctypes.data, rows.ctypes.data, feedback.forward.ctypes.data,
        feedback.around.ctypes.data, n_rows, n_cols, grid.size, SWEEPS, *grid.levels, grid.spacing == TABLE,
    )  # fmt: skip
    return levels


def weighted_error(errors: np.ndarray, moments: np.ndarray) -> float:
    """Sum over rows of e^T H e, for errors float32 [n, n_cols] and moments [n_cols / 256, 256, 256]."""
    return _weighted_product(errors, errors, moments)


def error_difference(a: np.ndarray, b: np.ndarray, moments: np.ndarray) -> float:
    """weighted_error(a) - weighted_error(b), by one product: H is symmetric, so it is (a - b)^T H (a + b)."""
    return _weighted_product(a - b, a + b, moments)


def _weighted_product(a: np.ndarray, b: np.ndarray, moments: np.ndarray) -> float:
    left, right = (x.reshape(len(x), -1, BLOCK).swapaxes(0, 1) for x in (a, b))
    return float(((left @ moments) * right).sum(dtype=np.float64))
