"""A few tokens: dot products of packed rows with prepared activations, straight from the mapped file.

A row's groups of 256 weights are met in order, so the result does not depend on how rows are shared out. Several tokens
go four at a time. A row that ends inside a group is finished on a padded copy.
"""

from typing import Any

from numba import types

from llmq.jit import Kernel, jit, kernel
from llmq.kernels.rows import SHARED, RowProducts, Shared, row_products
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

AHEAD = 8192  # bytes: how far before its use a row is asked for from memory
AHEAD_ROWS = 4  # the same where a few of a row's groups are met at a time: that many rows
CACHED = 24 * 1024  # bytes of activations that stay in the first-level cache beside what streams through it

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


def _make_shared(shared: Shared, lanes: int, lanes2: int, size: int, has_tail: bool) -> Any:
    """Several tokens: as many groups at a time as the first-level cache holds activations of, for all rows.

    Sums wait in memory meanwhile, unrounded, so that they are what one token alone would give.
    """
    n, rows, arrange, x_bytes = shared.n, shared.rows, shared.arrange, shared.n_bytes
    second_at, row_state = 4 * n * lanes, 4 * n * (lanes + lanes2)
    at_once, state_bytes = CACHED // x_bytes, ROWS * row_state
    arranged_bytes = at_once * x_bytes

    @jit
    def load(state):
        return tile_load(tile_f32(lanes, n), state, 64), tile_load(tile_f32(lanes2, n), state + second_at, 64)

    @jit
    def add(state, w, x, n_groups, ahead):
        first, second = load(state)
        first, second = rows(first, second, w, x, x_bytes, n_groups, ahead)
        tile_store(state, 64, first)
        tile_store(state + second_at, 64, second)

    @jit
    def put(out, state):
        first, second = load(state)
        sums = tile_sums(n, first, second)
        for i in range(n):
            store_f32(out + 4 * ROWS * i, sums[i])

    @jit
    def several(out, w, row_bytes, n_rows, x, x_stride, n_groups, tail_bytes):
        state, arranged, padded = stack(state_bytes), stack(arranged_bytes), stack(size)
        clear_bytes(state, state_bytes)
        for g in range(0, n_groups, at_once):
            part = min(at_once, n_groups - g)
            for i in range(part):
                arrange(arranged + i * x_bytes, x + (g + i) * x_stride)
            for r in range(n_rows):
                at = w + r * row_bytes + g * size
                add(state + r * row_state, at, arranged, part, AHEAD_ROWS * row_bytes)
        if has_tail and tail_bytes:
            arrange(arranged, x + n_groups * x_stride)
            for r in range(n_rows):
                clear_bytes(padded, size)
                copy_bytes(padded, w + r * row_bytes + n_groups * size, tail_bytes)
                add(state + r * row_state, padded, arranged, 1, 0)
        for r in range(n_rows):
            put(out + 4 * r, state + r * row_state)

    return several


def make_dot(unpack: KFormat | BlockFormat | FloatFormat) -> Kernel:
    """Kernel: out[t][r] = row r at `w` . token t, of `n_groups` whole groups and `tail_bytes` more; out [..][ROWS].

    Tokens of a group lie side by side and groups `x_stride` bytes apart. Several tokens go by fours or eights, up to
    three too many: activations must be readable and `out` writable that far, and `n_rows` is ROWS at most.
    """
    size, products, has_tail = group_bytes(unpack.format), row_products(unpack), unpack.format.block_size < GROUP
    one, step = _make_one(products, size, has_tail), products.token_bytes
    shared = [_make_shared(several, *products.lanes, size, has_tail) for several in products.shared]
    few, most, n_few, n_most = shared[0], shared[-1], SHARED[0], SHARED[-1]

    def dot(out, w, row_bytes, n_rows, x, x_stride, n_tokens, n_groups, tail_bytes):
        if n_tokens == 1:
            one(out, w, row_bytes, n_rows, x, x_stride, n_groups, tail_bytes)
            return
        for t in range(0, n_tokens, n_most):
            if n_tokens - t <= n_few:
                few(out + 4 * ROWS * t, w, row_bytes, n_rows, x + t * step, x_stride, n_groups, tail_bytes)
            else:
                most(out + 4 * ROWS * t, w, row_bytes, n_rows, x + t * step, x_stride, n_groups, tail_bytes)

    return kernel(*DOT_TYPES, name=f"dot_{unpack.format.name.lower()}")(dot)
