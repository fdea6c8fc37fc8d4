"""A few tokens: dot products of packed rows with prepared activations, straight from the mapped file.

`make_dot(unpack)` is generic over the formats of unpack.py. A row's 256-weight groups are met in order, so the result
does not depend on how rows are shared out; and a token's result does not depend on how many others are beside it.
Several tokens share each unpacked row, four at a time. A row that ends inside a group is finished on a padded copy.
"""

from typing import Any

from numba import types

from llmq.jit import Kernel, jit, kernel
from llmq.kernels.activation import BLOCK, FLOAT, GROUP_BYTES, SUMS16, SUMS32, VALUES, K
from llmq.kernels.unpack import GROUP, BlockFormat, FloatFormat, KFormat, group_bytes, is_signed, product_lanes
from llmq.simd import (
    ROWS,
    SIGNED,
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
    prefetch,
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
    tile_dot_scaled16,
    tile_dot_scaled32,
    tile_dot_u7,
    tile_dot_u8,
    tile_f32,
    tile_f32x4,
    tile_f32x8,
    tile_i32,
    tile_load,
    tile_store,
    tile_sums,
    zero_i32x4,
    zero_i32x8,
)

# More tokens than this go faster by panels.
FEW = 8
TOGETHER = 4
AHEAD = 8192  # bytes: how far before its use a row is asked for from memory
CACHED = 24 * 1024  # bytes of activations that stay in the first-level cache beside what streams through it
ROW_STATE = 2 * TOGETHER * 64  # bytes: two tiles of sums that wait
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
    def row(acc, below, w, x, x_stride, n_groups, ahead):
        acc, below = acc[0], below[0]
        pairs = stack(32)
        for _ in range(n_groups):
            prefetch(w + ahead, size)
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
            below = fma4(f32_of_i32x4(sums), splat_f32x4(-dm * dx), below)
            w += size
            x += x_stride
        return (acc,), (below,)

    return row


def _k32_rows(unpack: KFormat, size: int, n: int) -> Any:
    """d * sum(scale * (u . q)) - dm * sum(min * sum(q)), in integers within a group; 32 weights to a scale."""
    if n == 1 and not SIGNED:  # registers of 16 bytes have one scale each, so that no shuffle spreads it
        return _k32_row(unpack, size)
    lanes, scales, words, factors = unpack.lanes, unpack.scales, unpack.words, unpack.factors

    @jit
    def rows(acc, below, w, x, x_stride, n_groups, ahead):
        for _ in range(n_groups):
            prefetch(w + ahead, size)
            d, dm = factors(w)
            scale, mins = scales(w), i16x8_of_bytes(words(w)[1])
            sums = tile_dot_scaled32(tile_i32(n), lanes(w, 0), spread(scale, 0), x + VALUES, K_STEP)
            sums = tile_dot_scaled32(sums, lanes(w, 1), spread(scale, 1), x + VALUES + 64, K_STEP)
            sums = tile_dot_scaled32(sums, lanes(w, 2), spread(scale, 2), x + VALUES + 128, K_STEP)
            sums = tile_dot_scaled32(sums, lanes(w, 3), spread(scale, 3), x + VALUES + 192, K_STEP)
            acc = tile_add_scaled(acc, sums, d, x, K_STEP)
            below = tile_add_mins(below, mins, x + SUMS32, -dm, x, K_STEP)
            w += size
            x += x_stride
        return acc, below

    return rows


def _k_rows(unpack: KFormat, size: int, n: int) -> Any:
    """The same with 16 weights to a scale."""
    if unpack.halves:
        return _k32_rows(unpack, size, n)
    lanes, scales, mins, factors = product_lanes(unpack), unpack.scales, unpack.mins, unpack.factors
    signed = is_signed(unpack)

    @jit
    def rows(acc, below, w, x, x_stride, n_groups, ahead):
        for _ in range(n_groups):
            prefetch(w + ahead, size)
            d, dm = factors(w)
            scale = scales(w)
            sums = tile_dot_scaled16(tile_i32(n), lanes(w, 0), spread(scale, 0), x + VALUES, K_STEP)
            sums = tile_dot_scaled16(sums, lanes(w, 1), spread(scale, 1), x + VALUES + 64, K_STEP)
            sums = tile_dot_scaled16(sums, lanes(w, 2), spread(scale, 2), x + VALUES + 128, K_STEP)
            sums = tile_dot_scaled16(sums, lanes(w, 3), spread(scale, 3), x + VALUES + 192, K_STEP)
            acc = tile_add_scaled(acc, sums, d, x, K_STEP)
            if not signed:
                below = tile_add_mins(below, mins(w), x + SUMS16, -dm, x, K_STEP)
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
                offset = tile_add_product8(offset, c, x + 32, BLOCK_STEP)
            w += size
            x += x_stride
        return acc, offset

    return rows


def _float_rows(unpack: FloatFormat, size: int, _n: int) -> Any:
    lanes, step = unpack.lanes, 16 * unpack.format.block_bytes

    @jit
    def rows(even, odd, w, x, x_stride, n_groups, ahead):
        for _ in range(n_groups):
            prefetch(w + ahead, size)
            for i in range(0, 16, 2):
                even = tile_add_product16(even, lanes(w + i * step), x + 64 * i, FLOAT_STEP)
                odd = tile_add_product16(odd, lanes(w + (i + 1) * step), x + 64 * i + 64, FLOAT_STEP)
            w += size
            x += x_stride
        return even, odd

    return rows


# Each makes rows(first, second, w, x, x_stride, n_groups, ahead), which adds one row's products with `n` tokens to two
# tiles, whose lanes together are the sums. With it the bytes from one token to the next.
MAKERS: dict[type, Any] = {
    KFormat: (_k_rows, K_STEP),
    BlockFormat: (_block_rows, BLOCK_STEP),
    FloatFormat: (_float_rows, FLOAT_STEP),
}


def _tiles(unpack: KFormat | BlockFormat | FloatFormat) -> tuple[Any, Any]:
    """What makes the two tiles of a format's rows."""
    if isinstance(unpack, KFormat):
        return (tile_f32x8, tile_f32x4) if unpack.halves else (tile_f32, tile_f32x8)
    return tile_f32, tile_f32x8 if isinstance(unpack, BlockFormat) else tile_f32


def _make_one(unpack: KFormat | BlockFormat | FloatFormat, size: int) -> Any:
    """One token: rows from the first group to the last."""
    rows, (first_tile, second_tile) = MAKERS[type(unpack)][0](unpack, size, 1), _tiles(unpack)
    has_tail = unpack.format.block_size < GROUP

    @jit
    def one(out, w, row_bytes, n_rows, x, x_stride, n_groups, tail_bytes):
        padded = stack(size)
        for r in range(n_rows):
            at = w + r * row_bytes
            first, second = rows(first_tile(1), second_tile(1), at, x, x_stride, n_groups, AHEAD)
            if has_tail and tail_bytes:
                clear_bytes(padded, size)
                copy_bytes(padded, at + n_groups * size, tail_bytes)
                first, second = rows(first, second, padded, x + n_groups * x_stride, x_stride, 1, 0)
            store_f32(out + 4 * r, tile_sums(first, second)[0])

    return one


def _make_several(unpack: KFormat | BlockFormat | FloatFormat, size: int) -> Any:
    """TOGETHER tokens: as many groups at a time as the first-level cache holds activations of, for all rows.

    Sums wait in memory meanwhile, unrounded, so that they are what one token alone would give.
    """
    make_rows, step = MAKERS[type(unpack)]
    rows, (first_tile, second_tile) = make_rows(unpack, size, TOGETHER), _tiles(unpack)
    has_tail, at_once, state_bytes = unpack.format.block_size < GROUP, CACHED // (TOGETHER * step), ROWS * ROW_STATE

    @jit
    def add(state, w, x, x_stride, n_groups, ahead):
        first = tile_load(first_tile(TOGETHER), state, 64)
        second = tile_load(second_tile(TOGETHER), state + ROW_STATE // 2, 64)
        first, second = rows(first, second, w, x, x_stride, n_groups, ahead)
        tile_store(state, 64, first)
        tile_store(state + ROW_STATE // 2, 64, second)
        return tile_sums(first, second)

    @jit
    def put(out, sums):
        for i in range(TOGETHER):
            store_f32(out + 4 * ROWS * i, sums[i])

    @jit
    def several(out, w, row_bytes, n_rows, x, x_stride, n_groups, tail_bytes):
        state, padded = stack(state_bytes), stack(size)
        clear_bytes(state, state_bytes)
        for g in range(0, n_groups, at_once):
            for r in range(n_rows):
                part = min(at_once, n_groups - g)
                at = w + r * row_bytes + g * size
                put(out + 4 * r, add(state + r * ROW_STATE, at, x + g * x_stride, x_stride, part, row_bytes))
        if has_tail and tail_bytes:
            for r in range(n_rows):
                clear_bytes(padded, size)
                copy_bytes(padded, w + r * row_bytes + n_groups * size, tail_bytes)
                put(out + 4 * r, add(state + r * ROW_STATE, padded, x + n_groups * x_stride, x_stride, 1, 0))

    return several


def make_dot(unpack: KFormat | BlockFormat | FloatFormat) -> Kernel:
    """Kernel: out[t][r] = row r at `w` . token t, of `n_groups` whole groups and `tail_bytes` more; out [..][ROWS].

    Tokens of a group lie side by side and groups `x_stride` bytes apart. Several tokens are computed in fours, up to
    three too many: activations must be readable and `out` writable that far. `n_rows` is ROWS at most then.
    """
    size, step = group_bytes(unpack.format), MAKERS[type(unpack)][1]
    one, several = _make_one(unpack, size), _make_several(unpack, size)

    def dot(out, w, row_bytes, n_rows, x, x_stride, n_tokens, n_groups, tail_bytes):
        if n_tokens == 1:
            one(out, w, row_bytes, n_rows, x, x_stride, n_groups, tail_bytes)
        else:
            for t in range(0, n_tokens, TOGETHER):
                several(out + 4 * ROWS * t, w, row_bytes, n_rows, x + t * step, x_stride, n_groups, tail_bytes)

    return kernel(*DOT_TYPES, name=f"dot_{unpack.format.name.lower()}")(dot)
