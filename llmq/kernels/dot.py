"""One token: dot products of packed rows with one prepared activation, straight from the mapped file.

`make_dot(unpack)` is generic over the formats of unpack.py. A row's 256-weight groups are met in order, so the result
does not depend on how rows are shared out. A row that ends inside a group is finished on a zero-padded copy.
"""

from typing import Any

import numpy as np
from numba import types

from llmq.jit import Kernel, jit, kernel
from llmq.kernels.activation import SUMS16, SUMS32, VALUES
from llmq.kernels.unpack import GROUP, BlockFormat, FloatFormat, KFormat, group_bytes
from llmq.simd import (
    add_lanes_f32x4,
    add_lanes_f32x8,
    add_lanes_f32x16,
    clear_bytes,
    copy_bytes,
    dot_i16x8,
    dot_i16x16,
    dot_u7s8,
    dot_u7s8_half,
    dot_u7s8_scaled,
    dot_u8s8,
    f32_of_i32x4,
    f32_of_i32x8,
    f32_of_i32x16,
    fma,
    fma4,
    fma8,
    i16x8_of_bytes,
    load_f32,
    load_f32x16,
    load_i8x32,
    load_i8x64,
    load_i16x8,
    load_i16x16,
    pair_f32x16,
    scale_pairs,
    splat_f32x4,
    splat_f32x8,
    splat_f32x16,
    splat_i32x16,
    spread,
    stack,
    store_f32,
    store_i32x8,
    zero_i32x4,
    zero_i32x8,
)

# out, w, row_bytes, n_rows, x, x_stride, n_groups, tail_bytes
DOT_TYPES = (types.int64,) * 8


def _k32_row(unpack: KFormat, size: int) -> Any:
    """`_k_row` for formats with 32 weights to a scale, in vectors of 32: the scale is broadcast from memory.

    With 64 weights to a vector a group takes twelve shuffles more, and shuffles are what bounds it.
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
        return add_lanes_f32x8(acc) - add_lanes_f32x4(below)

    return row


def _k_row(unpack: KFormat, size: int) -> Any:
    """d * sum(scale * (u . q)) - dm * sum(min * sum(q)), in integers within a group."""
    if unpack.halves:
        return _k32_row(unpack, size)
    lanes, scales, mins, factors = unpack.lanes, unpack.scales, unpack.mins, unpack.factors

    @jit
    def row(w, x, x_stride, n_groups):
        acc, below = splat_f32x16(np.float32(0)), splat_f32x8(np.float32(0))
        zero = splat_i32x16(np.int32(0))
        for _ in range(n_groups):
            d, dm = factors(w)
            dx, q, scale = load_f32(x), x + VALUES, scales(w)
            low = dot_u7s8_scaled(zero, lanes(w, 0), load_i8x64(q), spread(scale, 0))
            low = dot_u7s8_scaled(low, lanes(w, 1), load_i8x64(q + 64), spread(scale, 1))
            high = dot_u7s8_scaled(zero, lanes(w, 2), load_i8x64(q + 128), spread(scale, 2))
            high = dot_u7s8_scaled(high, lanes(w, 3), load_i8x64(q + 192), spread(scale, 3))
            acc = fma(f32_of_i32x16(low + high), splat_f32x16(d * dx), acc)
            sums = dot_i16x16(zero_i32x8(), mins(w), load_i16x16(x + SUMS16))
            below = fma8(f32_of_i32x8(sums), splat_f32x8(dm * dx), below)
            w += size
            x += x_stride
        return add_lanes_f32x16(acc) - add_lanes_f32x8(below)

    return row


def _block_row(unpack: BlockFormat, size: int) -> Any:
    """Per block d * dx * (u . q) + c * dx * sum(q)."""
    lanes, factors = unpack.lanes, unpack.factors
    dot, block = dot_u8s8 if unpack.full else dot_u7s8, unpack.format.block_bytes

    @jit
    def row(w, x, x_stride, n_groups):
        acc, offset = splat_f32x16(np.float32(0)), np.float32(0)
        zero = splat_i32x16(np.int32(0))
        for _ in range(n_groups):
            for j in range(4):
                d0, c0 = factors(w + 2 * j * block)
                d1, c1 = factors(w + (2 * j + 1) * block)
                at = x + 8 * j
                scale = pair_f32x16(d0 * load_f32(at), d1 * load_f32(at + 4))
                product = dot(zero, lanes(w, j), load_i8x64(x + VALUES + 64 * j))
                acc = fma(f32_of_i32x16(product), scale, acc)
                offset += c0 * load_f32(at + 32) + c1 * load_f32(at + 36)
            w += size
            x += x_stride
        return add_lanes_f32x16(acc) + offset

    return row


def _float_row(unpack: FloatFormat, size: int) -> Any:
    lanes, step = unpack.lanes, 16 * unpack.format.block_bytes

    @jit
    def row(w, x, x_stride, n_groups):
        even, odd = splat_f32x16(np.float32(0)), splat_f32x16(np.float32(0))
        for _ in range(n_groups):
            for i in range(0, 16, 2):
                even = fma(lanes(w + i * step), load_f32x16(x + 64 * i), even)
                odd = fma(lanes(w + (i + 1) * step), load_f32x16(x + 64 * i + 64), odd)
            w += size
            x += x_stride
        return add_lanes_f32x16(even + odd)

    return row


MAKERS: dict[type, Any] = {KFormat: _k_row, BlockFormat: _block_row, FloatFormat: _float_row}


def make_dot(unpack: KFormat | BlockFormat | FloatFormat) -> Kernel:
    """Kernel: out[r] = row r at `w` . x for `n_rows` rows of `n_groups` whole groups and `tail_bytes` more."""
    size = group_bytes(unpack.format)
    row = MAKERS[type(unpack)](unpack, size)
    has_tail = unpack.format.block_size < GROUP

    def dot(out, w, row_bytes, n_rows, x, x_stride, n_groups, tail_bytes):
        for r in range(n_rows):
            store_f32(out + 4 * r, row(w + r * row_bytes, x, x_stride, n_groups))
        if has_tail and tail_bytes:
            padded = stack(size)
            clear_bytes(padded, size)
            for r in range(n_rows):
                copy_bytes(padded, w + r * row_bytes + n_groups * size, tail_bytes)
                tail = row(padded, x + n_groups * x_stride, x_stride, 1)
                store_f32(out + 4 * r, load_f32(out + 4 * r) + tail)

    return kernel(*DOT_TYPES, name=f"dot_{unpack.format.name.lower()}")(dot)
