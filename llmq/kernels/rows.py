"""One row of packed weights times one token, or times four that share each unpacked weight.

`row_products(unpack)` is generic over the formats of unpack.py. A row's 256-weight groups are met in order, and both
ways add up the same numbers in the same order, so that a token's result does not depend on how many are beside it.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from llmq.jit import jit
from llmq.kernels.activation import BLOCK_STEP, FLOAT_STEP, K_STEP, SUMS, SUMS16, SUMS32, VALUES
from llmq.kernels.unpack import BlockFormat, FloatFormat, KFormat, group_bytes, is_signed, product_lanes
from llmq.simd import (
    ISA,
    SIGNED,
    add_halves,
    copy_bytes,
    dot_i16x8,
    dot_u7s8_half,
    f32_of_i32x4,
    f32_of_i32x8,
    fma4,
    fma8,
    high_i16_u8x16,
    load_f32,
    load_i8x32,
    load_i16x8,
    low_pairs_u8x16,
    prefetch,
    splat_f32x4,
    splat_f32x8,
    stack,
    store_f32,
    store_i32x8,
    tile_add_blocks,
    tile_add_mins,
    tile_add_offsets,
    tile_add_product,
    tile_add_scaled,
    tile_dot_crossed32,
    tile_dot_scaled16,
    tile_dot_scaled32,
    tile_dot_u7,
    tile_dot_u8,
    tile_i32,
    tile_load,
    tile_splat,
    tile_times,
    zero_i32x4,
    zero_i32x8,
)

# Numbers of tokens that share an unpacked row; the sums of eight need many registers.
SHARED = (4, 8) if ISA == "avx512vnni" else (4,)


@dataclass(frozen=True, slots=True)
class Shared:
    """`n` tokens: `rows` as in RowProducts, on groups of activations as `arrange(to, x)` puts them, `n_bytes` long."""

    n: int
    rows: Callable[..., Any]
    arrange: Callable[..., Any]
    n_bytes: int


@dataclass(frozen=True, slots=True)
class RowProducts:
    """Functions rows(first, second, w, x, x_stride, n_groups, ahead), which add a row's products to two tiles.

    The lanes of a token in both tiles together are its sum. Groups of activations lie `x_stride` bytes apart; `ahead`
    bytes behind `w` is what will be read next.
    """

    lanes: tuple[int, int]  # of a token in the first tile and in the second
    token_bytes: int  # of a token's group of activations
    one: Callable[..., Any]
    shared: tuple[Shared, ...]  # for each of SHARED


def _k32_row(unpack: KFormat, size: int) -> Any:
    """`_k_rows` of one token for 32 weights to a scale, in vectors of 32: the scale is broadcast from memory.

    With 64 weights to a vector a group takes twelve shuffles more, and with one token they are what bounds it.
    """
    halves, words, factors = unpack.halves, unpack.words, unpack.factors

    @jit
    def quarter(even, odd, w, j, q, pairs):
        low, high = halves(w, j)
        even = dot_u7s8_half(even, low, load_i8x32(q + 64 * j), pairs + 8 * j)
        return even, dot_u7s8_half(odd, high, load_i8x32(q + 64 * j + 32), pairs + 8 * j + 4)

    @jit
    def row(acc, below, w, x, x_stride, n_groups, ahead):
        acc, below = acc[0], below[0]
        pairs = stack(32)
        for _ in range(n_groups):
            prefetch(w + ahead, size)
            d, dm = factors(w)
            scales_mins = words(w)
            store_i32x8(pairs, low_pairs_u8x16(scales_mins))
            dx, q = load_f32(x), x + VALUES
            even, odd = quarter(zero_i32x8(), zero_i32x8(), w, 0, q, pairs)
            even, odd = quarter(even, odd, w, 1, q, pairs)
            even, odd = quarter(even, odd, w, 2, q, pairs)
            even, odd = quarter(even, odd, w, 3, q, pairs)
            acc = fma8(f32_of_i32x8(add_halves(even, odd)), splat_f32x8(d * dx), acc)
            sums = dot_i16x8(zero_i32x4(), high_i16_u8x16(scales_mins), load_i16x8(x + SUMS32))
            below = fma4(f32_of_i32x4(sums), splat_f32x4(-dm * dx), below)
            w += size
            x += x_stride
        return (acc,), (below,)

    return row


def _k_mins(unpack: KFormat) -> Any:
    """mins(w), a lane for each scale."""
    if unpack.words is None:
        return unpack.mins
    words = unpack.words

    @jit
    def mins(w):
        return high_i16_u8x16(words(w))

    return mins


@dataclass(frozen=True, slots=True)
class Layout:
    """Where things lie in a group of activations for K weights, in bytes; the first tile's floats come first."""

    floats2: int  # the second tile's
    sums: int  # i16 sums of what a scale is for
    values: int
    step: int  # from one token's bytes to the next one's


def _lanes(unpack: KFormat) -> tuple[int, int]:
    return (8, 4) if unpack.sub == 32 else (16, 8)


def _one_layout(unpack: KFormat) -> Layout:
    return Layout(0, SUMS32 if unpack.sub == 32 else SUMS16, VALUES, K_STEP)


def _shared_layout(unpack: KFormat, n: int) -> Layout:
    """f32 [n][lanes] | f32 [n][lanes2] | i16 sums [n][scales] | i8 [n][256]; floats are each token's, over and over."""
    lanes, lanes2 = _lanes(unpack)
    floats2, sums = 4 * n * lanes, 4 * n * (lanes + lanes2)
    return Layout(floats2, sums, sums + 4 * n * lanes2, 256)


def _is_crossed(unpack: KFormat) -> bool:
    """Whether several tokens meet nibbles 64 bytes at a time, sub-blocks 0 and 2 of four and then 1 and 3.

    Registers of 16 bytes have nothing to gain from it.
    """
    return bool(unpack.wide and not SIGNED)


def _k_arrange(unpack: KFormat, n: int) -> Any:
    layout, (lanes, lanes2), crossed = _shared_layout(unpack, n), _lanes(unpack), _is_crossed(unpack)
    floats2, sums, values, sums_from = layout.floats2, layout.sums, layout.values, _one_layout(unpack).sums
    sums_bytes = 4 * lanes2

    @jit
    def fill(to, count, value):
        for i in range(count):
            store_f32(to + 4 * i, value)

    @jit
    def arrange(to, x):
        for t in range(n):
            at, q = x + t * K_STEP, to + values + 256 * t
            fill(to + 4 * lanes * t, lanes, load_f32(at))
            fill(to + floats2 + 4 * lanes2 * t, lanes2, load_f32(at))
            copy_bytes(to + sums + sums_bytes * t, at + sums_from, sums_bytes)
            copy_bytes(q, at + VALUES, 256)
            if crossed:
                for half in range(0, 256, 128):
                    copy_bytes(q + half + 32, at + VALUES + half + 64, 32)
                    copy_bytes(q + half + 64, at + VALUES + half + 32, 32)

    return arrange


def _k_rows(unpack: KFormat, size: int, n: int) -> Any:
    """d * sum(scale * (u . q)) - dm * sum(min * sum(q)), in integers within a group."""
    crossed, layout = n > 1 and _is_crossed(unpack), _shared_layout(unpack, n) if n > 1 else _one_layout(unpack)
    floats2, sums, values, step = layout.floats2, layout.sums, layout.values, layout.step
    lanes, wide, scales, mins = product_lanes(unpack), unpack.wide, unpack.scales, _k_mins(unpack)
    factors, signed = unpack.factors, is_signed(unpack)
    dot = tile_dot_crossed32 if crossed else tile_dot_scaled32 if unpack.sub == 32 else tile_dot_scaled16

    @jit
    def pair(w, j):
        return wide(w, j) if crossed else (lanes(w, 2 * j), lanes(w, 2 * j + 1))

    @jit
    def times(tile, d, x):
        return tile_splat(tile, d * load_f32(x)) if n == 1 else tile_times(tile_load(tile, x, 64), d)

    @jit
    def rows(acc, below, w, x, x_stride, n_groups, ahead):
        for _ in range(n_groups):
            prefetch(w + ahead, size)
            d, dm = factors(w)
            scale = scales(w)
            low, high = pair(w, 0)
            total = dot(tile_i32(n), low, high, scale, 0, x + values, step)
            low, high = pair(w, 1)
            total = dot(total, low, high, scale, 1, x + values + 128, step)
            acc = tile_add_scaled(acc, total, times(acc, d, x))
            if not signed:
                below = tile_add_mins(below, mins(w), x + sums, times(below, -dm, x + floats2))
            w += size
            x += x_stride
        return acc, below

    return rows


def _block_rows(unpack: BlockFormat, size: int, n: int) -> Any:
    """Per block d * dx * (u . q) + c * dx * sum(q)."""
    lanes, factors, signed = product_lanes(unpack), unpack.factors8, is_signed(unpack)
    dot = tile_dot_u8 if unpack.top > 127 and not signed else tile_dot_u7

    @jit
    def rows(acc, offset, w, x, x_stride, n_groups, ahead):
        for _ in range(n_groups):
            prefetch(w + ahead, size)
            d, c = factors(w)
            acc = tile_add_blocks(acc, dot(tile_i32(n), lanes(w, 0), x + VALUES, BLOCK_STEP), d, 0, x, BLOCK_STEP)
            acc = tile_add_blocks(acc, dot(tile_i32(n), lanes(w, 1), x + VALUES + 64, BLOCK_STEP), d, 1, x, BLOCK_STEP)
            acc = tile_add_blocks(acc, dot(tile_i32(n), lanes(w, 2), x + VALUES + 128, BLOCK_STEP), d, 2, x, BLOCK_STEP)
            acc = tile_add_blocks(acc, dot(tile_i32(n), lanes(w, 3), x + VALUES + 192, BLOCK_STEP), d, 3, x, BLOCK_STEP)
            if not signed:
                offset = tile_add_offsets(offset, c, x, x + SUMS, BLOCK_STEP)
            w += size
            x += x_stride
        return acc, offset

    return rows


def _float_rows(unpack: FloatFormat, size: int) -> Any:
    lanes, step = unpack.lanes, 16 * unpack.format.block_bytes

    @jit
    def rows(even, odd, w, x, x_stride, n_groups, ahead):
        for _ in range(n_groups):
            prefetch(w + ahead, size)
            for i in range(0, 16, 2):
                even = tile_add_product(even, lanes(w + i * step), x + 64 * i, FLOAT_STEP)
                odd = tile_add_product(odd, lanes(w + (i + 1) * step), x + 64 * i + 64, FLOAT_STEP)
            w += size
            x += x_stride
        return even, odd

    return rows


def _as_they_lie(n_bytes: int) -> Any:
    @jit
    def arrange(to, x):
        copy_bytes(to, x, n_bytes)

    return arrange


def row_products(unpack: KFormat | BlockFormat | FloatFormat) -> RowProducts:
    size = group_bytes(unpack.format)
    if isinstance(unpack, KFormat):
        one = _k32_row(unpack, size) if _is_crossed(unpack) else _k_rows(unpack, size, 1)
        shared = (
            Shared(n, _k_rows(unpack, size, n), _k_arrange(unpack, n), _shared_layout(unpack, n).values + n * 256)
            for n in SHARED
        )
        return RowProducts(_lanes(unpack), K_STEP, one, tuple(shared))
    if isinstance(unpack, BlockFormat):
        lanes, step, makes = (8 if SIGNED else 16, 8), BLOCK_STEP, lambda n: _block_rows(unpack, size, n)
    else:
        rows = _float_rows(unpack, size)
        lanes, step, makes = (16, 16), FLOAT_STEP, lambda _n: rows
    shared = (Shared(n, makes(n), _as_they_lie(n * step), n * step) for n in SHARED)
    return RowProducts(lanes, step, makes(1), tuple(shared))
