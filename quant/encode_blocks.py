"""Encoders of the formats with one scale (and minimum) per 32 weights; their bytes are ggml's reference bytes.

Rounding follows ggml's C reference: Q8_0 to nearest, halves away from zero; the others by adding 0.5 and cutting off.
"""

import numpy as np

from llmq.simd import (
    abs_f32x16,
    add_lanes_i32x16,
    count16,
    f32_of_i32x16,
    i8_of_i32x16,
    i32_of_f32x16,
    load_f32,
    load_f32x16,
    max_f32x16,
    max_lanes_f32x16,
    splat_i32x16,
    store_f16,
    store_i8x16,
    store_i16,
    where_less,
)
from quant.lanes import clamp, encoder, splat, strict

# The least magnitude whose inverse is a finite float32.
INVERTIBLE = np.float32(2.0**-127)


@strict
def inverse(d):  # type: ignore[no-untyped-def]
    return np.float32(1) / d if abs(d) >= INVERTIBLE else np.float32(0)


@strict
def round_away(x):  # type: ignore[no-untyped-def]
    """Nearest integer in each lane, halves away from zero."""
    size = abs_f32x16(x)
    whole = f32_of_i32x16(i32_of_f32x16(size))
    rest = size - whole
    rounded = whole + f32_of_i32x16(i32_of_f32x16(rest + rest))
    return where_less(x, splat(0), splat(0) - rounded, rounded)


@encoder
def encode_q8_0(out, x, n):  # type: ignore[no-untyped-def]
    """| d | int8 q[32] |  with d = max|w| / 127."""
    for block in range(n):
        to, at = out + 34 * block, x + 128 * block
        low, high = load_f32x16(at), load_f32x16(at + 64)
        d = max_lanes_f32x16(max_f32x16(abs_f32x16(low), abs_f32x16(high))) / np.float32(127)
        scale = splat(inverse(d))
        store_f16(to, d)
        store_i8x16(to + 2, i8_of_i32x16(i32_of_f32x16(round_away(low * scale))))
        store_i8x16(to + 18, i8_of_i32x16(i32_of_f32x16(round_away(high * scale))))


@strict
def farthest(at):  # type: ignore[no-untyped-def]
    """The first of 32 floats with the largest magnitude."""
    found = np.float32(0)
    for i in range(32):
        value = load_f32(at + 4 * i)
        if abs(value) > abs(found):
            found = value
    return found


@strict
def bounds(at):  # type: ignore[no-untyped-def]
    """Smallest and largest of 32 floats."""
    low, high = load_f32x16(at), load_f32x16(at + 64)
    zero = splat(0)
    largest = max_lanes_f32x16(max_f32x16(low, high))
    # 0 - 0 is 0, where a sign change would store -0.
    least = np.float32(0) - max_lanes_f32x16(max_f32x16(zero - low, zero - high))
    return least, largest


@strict
def levels(at, start, scale, offset, top):  # type: ignore[no-untyped-def]
    """(w - start) * scale + offset, cut off to 0..top, for 16 floats."""
    value = (load_f32x16(at) - splat(start)) * splat(scale) + splat(offset)
    return i32_of_f32x16(clamp(value, np.float32(0), top))


@strict
def store_nibbles(to, low, high):  # type: ignore[no-untyped-def]
    """16 bytes: `low` in b3..b0, `high` in b7..b4."""
    fifteen = splat_i32x16(np.int32(15))
    store_i8x16(to, i8_of_i32x16((low & fifteen) | ((high & fifteen) << splat_i32x16(np.int32(4)))))


@strict
def store_fifth_bits(to, low, high):  # type: ignore[no-untyped-def]
    """4 bytes: bit i is bit 4 of level i."""
    place = count16(np.int32(0))
    four = splat_i32x16(np.int32(4))
    store_i16(to, np.int16(add_lanes_i32x16((low >> four) << place)))
    store_i16(to + 2, np.int16(add_lanes_i32x16((high >> four) << place)))


@encoder
def encode_q4_0(out, x, n):  # type: ignore[no-untyped-def]
    """| d | qs[16] |  with d so that the weight farthest from zero is -8 d."""
    for block in range(n):
        to, at = out + 18 * block, x + 128 * block
        d = farthest(at) / np.float32(-8)
        scale, offset, top = inverse(d), np.float32(8.5), np.float32(15)
        store_f16(to, d)
        start = np.float32(0)
        store_nibbles(to + 2, levels(at, start, scale, offset, top), levels(at + 64, start, scale, offset, top))


@encoder
def encode_q5_0(out, x, n):  # type: ignore[no-untyped-def]
    """| d | qh[4] | qs[16] |  with d so that the weight farthest from zero is -16 d."""
    for block in range(n):
        to, at = out + 22 * block, x + 128 * block
        d = farthest(at) / np.float32(-16)
        scale, offset, top = inverse(d), np.float32(16.5), np.float32(31)
        start = np.float32(0)
        low, high = levels(at, start, scale, offset, top), levels(at + 64, start, scale, offset, top)
        store_f16(to, d)
        store_fifth_bits(to + 2, low, high)
        store_nibbles(to + 6, low, high)


@encoder
def encode_q4_1(out, x, n):  # type: ignore[no-untyped-def]
    """| d | m | qs[16] |  from the smallest to the largest weight in 15 steps."""
    for block in range(n):
        to, at = out + 20 * block, x + 128 * block
        least, most = bounds(at)
        d = (most - least) / np.float32(15)
        scale, half, top = inverse(d), np.float32(0.5), np.float32(15)
        store_f16(to, d)
        store_f16(to + 2, least)
        store_nibbles(to + 4, levels(at, least, scale, half, top), levels(at + 64, least, scale, half, top))


@encoder
def encode_q5_1(out, x, n):  # type: ignore[no-untyped-def]
    """| d | m | qh[4] | qs[16] |  from the smallest to the largest weight in 31 steps."""
    for block in range(n):
        to, at = out + 24 * block, x + 128 * block
        least, most = bounds(at)
        d = (most - least) / np.float32(31)
        scale, half, top = inverse(d), np.float32(0.5), np.float32(31)
        low, high = levels(at, least, scale, half, top), levels(at + 64, least, scale, half, top)
        store_f16(to, d)
        store_f16(to + 2, least)
        store_fifth_bits(to + 4, low, high)
        store_nibbles(to + 8, low, high)
