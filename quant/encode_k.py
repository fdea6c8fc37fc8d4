"""Encoders of Q4_K, Q5_K and Q6_K: a search for scale and minimum per sub-block, then integer scales per 256 weights.

Lanes are sub-blocks: 16 of them are transposed, so that row i holds weight i of each, and every lane searches for
itself. The search is the one ggml does without an importance matrix (`ggml-quants.c`): try inverse scales near the
obvious one, fit scale and minimum to the levels of each by weighted least squares, keep the best. Integer scales are
rounded against the half-precision number that is stored, which matters where that one is subnormal.
"""

import numpy as np

from llmq.simd import (
    abs_f32x16,
    clear_bytes,
    copy_bytes,
    i8_of_i32x16,
    i32_of_f32x16,
    load_f32,
    load_f32x16,
    load_i32,
    pair_f32x16,
    round_f32x16,
    splat_i32x16,
    stack,
    store_f16,
    store_f32x16,
    store_i8x16,
    store_i32,
    store_i32x16,
    where_less,
)
from quant.lanes import (
    clamp,
    divide_or_zero,
    encoder,
    half_unit,
    larger,
    root,
    smaller,
    splat,
    strict,
    transpose,
)


@strict
def weigh(w, x):  # type: ignore[no-untyped-def]
    """Importance of each of 32 weights per lane: its magnitude plus the root mean square; returns sums of w and w*x."""
    squares = splat(0)
    for i in range(0, 2048, 64):
        value = load_f32x16(x + i)
        squares = squares + value * value
    base = root(squares * splat(1 / 32))
    sum_w, sum_wx = splat(0), splat(0)
    for i in range(0, 2048, 64):
        value = load_f32x16(x + i)
        weight = base + abs_f32x16(value)
        store_f32x16(w + i, weight)
        sum_w = sum_w + weight
        sum_wx = sum_wx + weight * value
    return sum_w, sum_wx


@strict
def limits(x):  # type: ignore[no-untyped-def]
    """Smallest (at most zero) and largest of 32 weights per lane."""
    low, high = splat(0), load_f32x16(x)
    for i in range(0, 2048, 64):
        value = load_f32x16(x + i)
        low, high = smaller(low, value), larger(high, value)
    return low, high


@strict
def mean(x):  # type: ignore[no-untyped-def]
    """Mean of 32 weights per lane."""
    total = splat(0)
    for i in range(0, 2048, 64):
        total = total + load_f32x16(x + i)
    return total * splat(1 / 32)


@strict
def weighted_error(x, w, q, scale, low):  # type: ignore[no-untyped-def]
    """Sum of w * (scale * q + low - x)^2 per lane."""
    total = splat(0)
    for i in range(0, 2048, 64):
        off = scale * load_f32x16(q + i) + low - load_f32x16(x + i)
        total = total + load_f32x16(w + i) * (off * off)
    return total


@strict
def set_levels(q, x, inverse, low, top):  # type: ignore[no-untyped-def]
    for i in range(0, 2048, 64):
        store_f32x16(q + i, clamp(round_f32x16(inverse * (load_f32x16(x + i) - low)), np.float32(0), top))


@strict
def fit(x, w, q, sum_w, sum_wx):  # type: ignore[no-untyped-def]
    """Scale and minimum (never above zero) that fit the levels best, and their error; infinite where none does."""
    zero = splat(0)
    sum_q, sum_qq, sum_qx = zero, zero, zero
    for i in range(0, 2048, 64):
        level = load_f32x16(q + i)
        weighted = load_f32x16(w + i) * level
        sum_q = sum_q + weighted
        sum_qq = sum_qq + weighted * level
        sum_qx = sum_qx + weighted * load_f32x16(x + i)
    determinant = sum_w * sum_qq - sum_q * sum_q
    scale = divide_or_zero(sum_w * sum_qx - sum_wx * sum_q, determinant)
    low = divide_or_zero(sum_qq * sum_wx - sum_q * sum_qx, determinant)
    scale = where_less(zero, low, divide_or_zero(sum_qx, sum_qq), scale)
    low = smaller(low, zero)
    error = weighted_error(x, w, q, scale, low)
    return scale, low, where_less(zero, determinant, error, splat(np.inf))


@strict
def search(x, top, first, step, tries):  # type: ignore[no-untyped-def]
    """Scale and minimum per lane for 32 weights in levels 0..top.

    The inverse scales tried are (top + first + k * step) / span for k below `tries`.
    """
    w, q = stack(2048), stack(2048)
    sum_w, sum_wx = weigh(w, x)
    low, high = limits(x)
    span = high - low
    inverse = divide_or_zero(splat(top), span)
    scale = divide_or_zero(splat(1), inverse)
    set_levels(q, x, inverse, low, top)
    error = weighted_error(x, w, q, scale, low)
    for k in range(tries):
        inverse = divide_or_zero(splat(first + step * np.float32(k) + top), span)
        set_levels(q, x, inverse, low, top)
        new_scale, new_low, new_error = fit(x, w, q, sum_w, sum_wx)
        scale = where_less(new_error, error, new_scale, scale)
        low = where_less(new_error, error, new_low, low)
        error = smaller(new_error, error)
    return scale, low


@strict
def largest_of_8(at):  # type: ignore[no-untyped-def]
    top = np.float32(0)
    for i in range(0, 32, 4):
        top = max(top, load_f32(at + i))
    return top


@strict
def six_bits(steps, unit, values):  # type: ignore[no-untyped-def]
    """Per 8 lanes a half-precision unit, the largest value / 63, and each value in units, 0..63, as i32 at `steps`.

    Returns the values as stored; the units go to the two floats at `unit`.
    """
    space = stack(64)
    store_f32x16(space, values)
    largest = pair_f32x16(largest_of_8(space), largest_of_8(space + 32))
    units = half_unit(largest, 63)
    counts = clamp(round_f32x16(divide_or_zero(values, units)), np.float32(0), np.float32(63))
    store_f32x16(unit, units)
    store_i32x16(steps, i32_of_f32x16(counts))
    return units * counts


@strict
def pack_six_bits(out, scales, minima):  # type: ignore[no-untyped-def]
    """Eight scales and eight minima (i32 at two addresses) in 12 bytes; the diagram is beside Q4_K in llmq.formats."""
    first, second, last = 0, 0, 0
    for j in range(4):
        scale, minimum = load_i32(scales + 4 * j), load_i32(minima + 4 * j)
        later_scale, later_minimum = load_i32(scales + 16 + 4 * j), load_i32(minima + 16 + 4 * j)
        first |= (scale | later_scale >> 4 << 6) << 8 * j
        second |= (minimum | later_minimum >> 4 << 6) << 8 * j
        last |= (later_scale & 15 | (later_minimum & 15) << 4) << 8 * j
    store_i32(out, np.int32(first))
    store_i32(out + 4, np.int32(second))
    store_i32(out + 8, np.int32(last))


@strict
def integers(at):  # type: ignore[no-untyped-def]
    return i32_of_f32x16(load_f32x16(at))


@strict
def pack_nibbles(out, levels):  # type: ignore[no-untyped-def]
    """qs[128] of Q4_K and Q5_K: sub-blocks in pairs, the even one in b3..b0, the odd one in b7..b4."""
    fifteen, four = splat_i32x16(np.int32(15)), splat_i32x16(np.int32(4))
    for pair in range(4):
        for half in range(2):
            at = levels + 256 * pair + 64 * half
            both = integers(at) & fifteen | (integers(at + 128) & fifteen) << four
            store_i8x16(out + 32 * pair + 16 * half, i8_of_i32x16(both))


@strict
def pack_fifth_bits(out, levels):  # type: ignore[no-untyped-def]
    """qh[32] of Q5_K: bit j of byte l is bit 4 of weight l of sub-block j."""
    four = splat_i32x16(np.int32(4))
    for half in range(2):
        bits = splat_i32x16(np.int32(0))
        for j in range(8):
            bits = bits | integers(levels + 128 * j + 64 * half) >> four << splat_i32x16(np.int32(j))
        store_i8x16(out + 16 * half, i8_of_i32x16(bits))


@strict
def pack_pair(first, second, levels, scales, minima, units, lows, fifth):  # type: ignore[no-untyped-def]
    """Write two blocks of Q4_K, or of Q5_K where `fifth`."""
    for k in range(2):
        out = second if k else first
        store_f16(out, load_f32(units + 32 * k))
        store_f16(out + 2, load_f32(lows + 32 * k))
        pack_six_bits(out + 4, scales + 32 * k, minima + 32 * k)
        if fifth:
            pack_fifth_bits(out + 16, levels + 1024 * k)
        pack_nibbles(out + (48 if fifth else 16), levels + 1024 * k)


@strict
def encode_pair(first, second, source, top, start, step, tries, fifth):  # type: ignore[no-untyped-def]
    """512 weights at `source` to the blocks at `first` and `second`."""
    x, levels = stack(2048), stack(2048)
    scales, minima, units, lows = stack(64), stack(64), stack(64), stack(64)
    transpose(x, 64, source, 128)
    transpose(x + 1024, 64, source + 64, 128)
    scale, low = search(x, top, start, step, tries)
    scale = six_bits(scales, units, scale)
    # Where the scale is lost, the minimum alone has to stand for the sub-block.
    low = where_less(splat(0), scale, low, smaller(mean(x), splat(0)))
    minimum = six_bits(minima, lows, splat(0) - low)
    # A zero scale has one level; dividing by infinity gives level 0 whatever the weight.
    scale = where_less(splat(0), scale, scale, splat(np.inf))
    for i in range(0, 2048, 64):
        level = round_f32x16((load_f32x16(x + i) + minimum) / scale)
        store_f32x16(x + i, clamp(level, np.float32(0), top))
    transpose(levels, 128, x, 64)
    transpose(levels + 64, 128, x + 1024, 64)
    pack_pair(first, second, levels, scales, minima, units, lows, fifth)


@strict
def encode_pairs(out, x, n, size, top, start, step, tries, fifth):  # type: ignore[no-untyped-def]
    for block in range(0, n - 1, 2):
        to = out + size * block
        encode_pair(to, to + size, x + 1024 * block, top, start, step, tries, fifth)
    if n % 2:
        padded, unused = stack(2048), stack(176)
        clear_bytes(padded, 2048)
        copy_bytes(padded, x + 1024 * (n - 1), 1024)
        encode_pair(out + size * (n - 1), unused, padded, top, start, step, tries, fifth)


@encoder
def encode_q4_k(out, x, n):  # type: ignore[no-untyped-def]
    """| d | dmin | scales[12] | qs[128] |"""
    encode_pairs(out, x, n, 144, np.float32(15), np.float32(-1), np.float32(0.1), 21, False)


@encoder
def encode_q5_k(out, x, n):  # type: ignore[no-untyped-def]
    """| d | dmin | scales[12] | qh[32] | qs[128] |"""
    encode_pairs(out, x, n, 176, np.float32(31), np.float32(-0.5), np.float32(0.1), 16, True)
