"""A few tokens: dot products of packed rows with prepared activations, straight from the mapped file.

`make_dot(unpack)` is generic over the formats of unpack.py. A row's 256-weight groups are met in order, so the result
does not depend on how rows are shared out; and a token's result does not depend on how many others are beside it.
Several tokens share each unpacked row, four at a time. A row that ends inside a group is finished on a padded copy.
"""

from typing import Any

import numpy as np
from numba import types

from llmq.jit import Kernel, jit, kernel
from llmq.kernels.activation import BLOCK, FLOAT, GROUP_BYTES, SUMS16, SUMS32, VALUES, K
from llmq.kernels.unpack import GROUP, BlockFormat, FloatFormat, KFormat, group_bytes
from llmq.simd import (
    ROWS,
    add_lanes_f32x4,
    add_lanes_f32x8,
    clear_bytes,
    copy_bytes,
    dot_i16x8,
    dot_u7s8_half,
    f32_of_i32x4,
    f32_of_i32x8,
    fma4,
    fma8,
    i16x8_of_bytes,
    load_f32,
    load_i8x32,
    load_i16x8,
    scale_pairs,
    splat_f32x4,
    splat_f32x8,
    spread,
    stack,
    store_f32,
    store_i32x8,
    tile_add_blocks,
    tile_add_mins,
    tile_add_product8,
    tile_add_product16,
    tile_add_scaled,
    tile_dot_scaled,
    tile_dot_u7,
    tile_dot_u8,
    tile_f32,
    tile_f32x4,
    tile_f32x8,
    tile_i32,
    tile_sums,
    zero_i32x4,
    zero_i32x8,
)

# More tokens than this go faster by panels.
FEW = 8
TOGETHER = 4
K_STEP, BLOCK_STEP, FLOAT_STEP = GROUP_BYTES[K], GROUP_BYTES[BLOCK], GROUP_BYTES[FLOAT]

# out, w, row_bytes, n_rows, x, x_stride, n_tokens, n_groups, tail_bytes
DOT_TYPES = (types.int64,) * 9


def _k32_row(unpack: KFormat, size: int) -> Any:
    """`_k32_rows` of one token, in vectors of 32: the scale is broadcast from memory.

    With 64 weights to a vector a group takes twelve shuffles more, and with one token they are what bounds it.
    """
    halves, words, factors = unpack.halves, unpack.words, unpack.factors

    @jit
    def quarter(even, odd, w, j, q, pairs):
        low, high = halves(w, j)
        even = dot_u7s8_half(even, low, load_i8x32(q + 64 * j), pairs + 8 * j)
        return even, dot_u7s8_half(odd, high, load_i8x32(q + 64 * j + 32), pairs + 8 * j + 4)

    @jit
    def row(w, x, x_stride, n_groups):
        acc, below = splat_f32x8(np.float32(0)), splat_f32x4(np.float32(0))
        pairs = stack(32)
        for _ in range(n_groups):
            d, dm = factors(w)
            scales, mins = words(w)
            store_i32x8(pairs, scale_pairs(scales))
            dx, q = load_f32(x), x + VALUES
            even, odd = quarter(zero_i32x8(), zero_i32x8(), w, 0, q, pairs)
            even, odd = quarter(even, odd, w, 1, q, pairs)
            even, odd = quarter(even, odd, w, 2, q, pairs)
            even, odd = quarter(even, odd, w, 3, q, pairs)
            acc = fma8(f32_of_i32x8(even + odd), splat_f32x8(d * dx), acc)
            sums = dot_i16x8(zero_i32x4(), i16x8_of_bytes(mins), load_i16x8(x + SUMS32))
            below = fma4(f32_of_i32x4(sums), splat_f32x4(dm * dx), below)
            w += size
            x += x_stride
        return (add_lanes_f32x8(acc) - add_lanes_f32x4(below),)

    return row


def _k32_rows(unpack: KFormat, size: int, n: int) -> Any:
    """d * sum(scale * (u . q)) - dm * sum(min * sum(q)), in integers within a group; 32 weights to a scale."""
    if n == 1:
        return _k32_row(unpack, size)
    lanes, scales, words, factors = unpack.lanes, unpack.scales, unpack.words, unpack.factors

    @jit
    def rows(w, x, x_stride, n_groups):
        acc, below = tile_f32x8(n), tile_f32x4(n)
        for _ in range(n_groups):
            d, dm = factors(w)
            scale, mins = scales(w), i16x8_of_bytes(words(w)[1])
            sums = tile_dot_scaled(tile_i32(n), lanes(w, 0), spread(scale, 0), x + VALUES, K_STEP)
            sums = tile_dot_scaled(sums, lanes(w, 1), spread(scale, 1), x + VALUES + 64, K_STEP)
            sums = tile_dot_scaled(sums, lanes(w, 2), spread(scale, 2), x + VALUES + 128, K_STEP)
            sums = tile_dot_scaled(sums, lanes(w, 3), spread(scale, 3), x + VALUES + 192, K_STEP)
            acc = tile_add_scaled(acc, sums, d, x, K_STEP)
            below = tile_add_mins(below, mins, x + SUMS32, -dm, x, K_STEP)
            w += size
            x += x_stride
        return tile_sums(acc, below)

    return rows


def _k_rows(unpack: KFormat, size: int, n: int) -> Any:
    """The same with 16 weights to a scale."""
    if unpack.halves:
        return _k32_rows(unpack, size, n)
    lanes, scales, mins, factors = unpack.lanes, unpack.scales, unpack.mins, unpack.factors

    @jit
    def rows(w, x, x_stride, n_groups):
        acc, below = tile_f32(n), tile_f32x8(n)
        for _ in range(n_groups):
            d, dm = factors(w)
            scale = scales(w)
            sums = tile_dot_scaled(tile_i32(n), lanes(w, 0), spread(scale, 0), x + VALUES, K_STEP)
            sums = tile_dot_scaled(sums, lanes(w, 1), spread(scale, 1), x + VALUES + 64, K_STEP)
            sums = tile_dot_scaled(sums, lanes(w, 2), spread(scale, 2), x + VALUES + 128, K_STEP)
            sums = tile_dot_scaled(sums, lanes(w, 3), spread(scale, 3), x + VALUES + 192, K_STEP)
            acc = tile_add_scaled(acc, sums, d, x, K_STEP)
            below = tile_add_mins(below, mins(w), x + SUMS16, -dm, x, K_STEP)
            w += size
            x += x_stride
        return tile_sums(acc, below)

    return rows


def _block_rows(unpack: BlockFormat, size: int, n: int) -> Any:
    """Per block d * dx * (u . q) + c * dx * sum(q)."""
    lanes, factors = unpack.lanes, unpack.factors8
    dot = tile_dot_u8 if unpack.full else tile_dot_u7

    @jit
    def rows(w, x, x_stride, n_groups):
        acc, offset = tile_f32(n), tile_f32x8(n)
        for _ in range(n_groups):
            d, c = factors(w)
            acc = tile_add_blocks(acc, dot(tile_i32(n), lanes(w, 0), x + VALUES, BLOCK_STEP), d, 0, x, BLOCK_STEP)
            acc = tile_add_blocks(acc, dot(tile_i32(n), lanes(w, 1), x + VALUES + 64, BLOCK_STEP), d, 1, x, BLOCK_STEP)
            acc = tile_add_blocks(acc, dot(tile_i32(n), lanes(w, 2), x + VALUES + 128, BLOCK_STEP), d, 2, x, BLOCK_STEP)
            acc = tile_add_blocks(acc, dot(tile_i32(n), lanes(w, 3), x + VALUES + 192, BLOCK_STEP), d, 3, x, BLOCK_STEP)
            offset = tile_add_product8(offset, c, x + 32, BLOCK_STEP)
            w += size
            x += x_stride
        return tile_sums(acc, offset)

    return rows


def _float_rows(unpack: FloatFormat, size: int, n: int) -> Any:
    lanes, step = unpack.lanes, 16 * unpack.format.block_bytes

    @jit
    def rows(w, x, x_stride, n_groups):
        even, odd = tile_f32(n), tile_f32(n)
        for _ in range(n_groups):
            for i in range(0, 16, 2):
                even = tile_add_product16(even, lanes(w + i * step), x + 64 * i, FLOAT_STEP)
                odd = tile_add_product16(odd, lanes(w + (i + 1) * step), x + 64 * i + 64, FLOAT_STEP)
            w += size
            x += x_stride
        return tile_sums(even, odd)

    return rows


# Each makes rows(w, x, x_stride, n_groups) of one row and `n` tokens: a tuple of `n` floats.
MAKERS: dict[type, Any] = {
    KFormat: (_k_rows, K_STEP),
    BlockFormat: (_block_rows, BLOCK_STEP),
    FloatFormat: (_float_rows, FLOAT_STEP),
}


def make_dot(unpack: KFormat | BlockFormat | FloatFormat) -> Kernel:
    """Kernel: out[t][r] = row r at `w` . token t, of `n_groups` whole groups and `tail_bytes` more; out [..][ROWS].

    Tokens of a group lie side by side and groups `x_stride` bytes apart. Several tokens are computed in fours, up to
    three too many: activations must be readable and `out` writable that far.
    """
    size = group_bytes(unpack.format)
    make_rows, step = MAKERS[type(unpack)]
    has_tail = unpack.format.block_size < GROUP

    def make_sweep(n: int) -> Any:
        rows = make_rows(unpack, size, n)

        @jit
        def sweep(out, w, row_bytes, n_rows, x, x_stride, n_groups, tail_bytes):
            for r in range(n_rows):
                sums = rows(w + r * row_bytes, x, x_stride, n_groups)
                for i in range(n):
                    store_f32(out + 4 * (i * ROWS + r), sums[i])
            if has_tail and tail_bytes:
                padded = stack(size)
                clear_bytes(padded, size)
                for r in range(n_rows):
                    copy_bytes(padded, w + r * row_bytes + n_groups * size, tail_bytes)
                    sums = rows(padded, x + n_groups * x_stride, x_stride, 1)
                    for i in range(n):
                        at = out + 4 * (i * ROWS + r)
                        store_f32(at, load_f32(at) + sums[i])

        return sweep

    one, several = make_sweep(1), make_sweep(TOGETHER)

    def dot(out, w, row_bytes, n_rows, x, x_stride, n_tokens, n_groups, tail_bytes):
        if n_tokens == 1:
            one(out, w, row_bytes, n_rows, x, x_stride, n_groups, tail_bytes)
        else:
            for t in range(0, n_tokens, TOGETHER):
                several(out + 4 * ROWS * t, w, row_bytes, n_rows, x + t * step, x_stride, n_groups, tail_bytes)

    return kernel(*DOT_TYPES, name=f"dot_{unpack.format.name.lower()}")(dot)
