"""A few tokens: dot products of packed rows with prepared activations, straight from the mapped file.

A row's groups of 256 weights are met in order, so the result does not depend on how rows are shared out. Several tokens
go four at a time. A row that ends inside a group is finished on a padded copy.
"""

from typing import Any

from numba import types

from llmq.jit import Kernel, jit, kernel
from llmq.kernels.rows import SHARED, RowProducts, row_products
from llmq.kernels.unpack import GROUP, BlockFormat, FloatFormat, KFormat, group_bytes
from llmq.simd import (
    ROWS,
    clear_bytes,
    copy_bytes,
    stack,
    store_f32,
    tile_f32,
    tile_load,
    tile_store,
    tile_sums,
)

# More tokens than this go faster by panels.
FEW = 8
AHEAD = 8192  # bytes: how far before its use a row is asked for from memory
AHEAD_ROWS = 4  # the same where a few of a row's groups are met at a time: that many rows
CACHED = 24 * 1024  # bytes of activations that stay in the first-level cache beside what streams through it
ROW_STATE = 2 * SHARED * 64  # bytes: two tiles of sums that wait

# out, w, row_bytes, n_rows, x, x_stride, n_tokens, n_groups, tail_bytes
DOT_TYPES = (types.int64,) * 9


def _make_one(products: RowProducts, size: int, has_tail: bool) -> Any:
    """One token: rows from the first group to the last."""
    rows, (lanes, lanes2) = products.one, products.lanes

    @jit
    def one(out, w, row_bytes, n_rows, x, x_stride, n_groups, tail_bytes):
        padded = stack(size)
        for r in range(n_rows):
            at = w + r * row_bytes
            first, second = rows(tile_f32(lanes, 1), tile_f32(lanes2, 1), at, x, x_stride, n_groups, AHEAD)
            if has_tail and tail_bytes:
                clear_bytes(padded, size)
                copy_bytes(padded, at + n_groups * size, tail_bytes)
                first, second = rows(first, second, padded, x + n_groups * x_stride, x_stride, 1, 0)
            store_f32(out + 4 * r, tile_sums(1, first, second)[0])

    return one


def _make_four(products: RowProducts, size: int, has_tail: bool) -> Any:
    """Four tokens: as many groups at a time as the first-level cache holds activations of, for all rows.

    Sums wait in memory meanwhile, unrounded, so that they are what one token alone would give.
    """
    rows, (lanes, lanes2) = products.four, products.lanes
    arrange, four_bytes = products.arrange, products.four_bytes
    at_once, state_bytes = CACHED // four_bytes, ROWS * ROW_STATE
    arranged_bytes = at_once * four_bytes

    @jit
    def add(state, w, x, n_groups, ahead):
        first = tile_load(tile_f32(lanes, SHARED), state, 64)
        second = tile_load(tile_f32(lanes2, SHARED), state + ROW_STATE // 2, 64)
        first, second = rows(first, second, w, x, four_bytes, n_groups, ahead)
        tile_store(state, 64, first)
        tile_store(state + ROW_STATE // 2, 64, second)

    @jit
    def put(out, state):
        first = tile_load(tile_f32(lanes, SHARED), state, 64)
        second = tile_load(tile_f32(lanes2, SHARED), state + ROW_STATE // 2, 64)
        sums = tile_sums(SHARED, first, second)
        for i in range(SHARED):
            store_f32(out + 4 * ROWS * i, sums[i])

    @jit
    def four(out, w, row_bytes, n_rows, x, x_stride, n_groups, tail_bytes):
        state, arranged, padded = stack(state_bytes), stack(arranged_bytes), stack(size)
        clear_bytes(state, state_bytes)
        for g in range(0, n_groups, at_once):
            part = min(at_once, n_groups - g)
            for i in range(part):
                arrange(arranged + i * four_bytes, x + (g + i) * x_stride)
            for r in range(n_rows):
                at = w + r * row_bytes + g * size
                add(state + r * ROW_STATE, at, arranged, part, AHEAD_ROWS * row_bytes)
        if has_tail and tail_bytes:
            arrange(arranged, x + n_groups * x_stride)
            for r in range(n_rows):
                clear_bytes(padded, size)
                copy_bytes(padded, w + r * row_bytes + n_groups * size, tail_bytes)
                add(state + r * ROW_STATE, padded, arranged, 1, 0)
        for r in range(n_rows):
            put(out + 4 * r, state + r * ROW_STATE)

    return four


def make_dot(unpack: KFormat | BlockFormat | FloatFormat) -> Kernel:
    """Kernel: out[t][r] = row r at `w` . token t, of `n_groups` whole groups and `tail_bytes` more; out [..][ROWS].

    Tokens of a group lie side by side and groups `x_stride` bytes apart. Several tokens are computed in fours, up to
    three too many: activations must be readable and `out` writable that far. `n_rows` is ROWS at most then.
    """
    size, products, has_tail = group_bytes(unpack.format), row_products(unpack), unpack.format.block_size < GROUP
    one, four, step = _make_one(products, size, has_tail), _make_four(products, size, has_tail), products.token_bytes

    def dot(out, w, row_bytes, n_rows, x, x_stride, n_tokens, n_groups, tail_bytes):
        if n_tokens == 1:
            one(out, w, row_bytes, n_rows, x, x_stride, n_groups, tail_bytes)
        else:
            for t in range(0, n_tokens, SHARED):
                four(out + 4 * ROWS * t, w, row_bytes, n_rows, x + t * step, x_stride, n_groups, tail_bytes)

    return kernel(*DOT_TYPES, name=f"dot_{unpack.format.name.lower()}")(dot)
