"""The encoder of Q6_K: 16 sub-blocks of 16 weights without a minimum, so one block of 256 fills the lanes."""

import numpy as np

from llmq.simd import (
    abs_f32x16,
    i8_of_i32x16,
    i32_of_f32x16,
    load_f32,
    load_f32x16,
    round_f32x16,
    splat_i32x16,
    stack,
    store_f16,
    store_f32x16,
    store_i8x16,
    where_less,
)
from quant.lanes import clamp, divide_or_zero, encoder, half_unit, splat, strict, transpose

# A scale below this counts as zero.
NEGLIGIBLE = np.float32(1e-15)


@strict
def farthest(x):  # type: ignore[no-untyped-def]
    """Per lane the first of 16 weights with the largest magnitude."""
    found = splat(0)
    for i in range(0, 1024, 64):
        value = load_f32x16(x + i)
        found = where_less(abs_f32x16(found), abs_f32x16(value), value, found)
    return found


@strict
def products(x, inverse):  # type: ignore[no-untyped-def]
    """Sums of x^2 * (x * level) and x^2 * level^2 per lane, for the levels -32..31 that `inverse` gives."""
    sum_qx, sum_qq = splat(0), splat(0)
    for i in range(0, 1024, 64):
        value = load_f32x16(x + i)
        level = clamp(round_f32x16(inverse * value), np.float32(-32), np.float32(31))
        weighted = value * value * level
        sum_qx = sum_qx + weighted * value
        sum_qq = sum_qq + weighted * level
    return sum_qx, sum_qq


@strict
def search(x):  # type: ignore[no-untyped-def]
    """The scale per lane that fits best with weights x^2, over 19 inverse scales (32 + 0.1 k) / -farthest."""
    extreme = farthest(x)
    sum_qx, sum_qq = products(x, divide_or_zero(splat(-32), extreme))
    scale = divide_or_zero(sum_qx, sum_qq)
    best = scale * sum_qx
    for k in range(-9, 10):
        numerator = -(np.float32(32) + np.float32(0.1) * np.float32(k))
        sum_qx, sum_qq = products(x, divide_or_zero(splat(numerator), extreme))
        new_scale = divide_or_zero(sum_qx, sum_qq)
        left, right = best * sum_qq, sum_qx * sum_qx
        scale = where_less(left, right, new_scale, scale)
        best = where_less(left, right, new_scale * sum_qx, best)
    return where_less(abs_f32x16(extreme), splat(NEGLIGIBLE), splat(0), scale)


@strict
def farthest_of_16(values):  # type: ignore[no-untyped-def]
    space = stack(64)
    store_f32x16(space, values)
    found = np.float32(0)
    for i in range(0, 64, 4):
        value = load_f32(space + i)
        if abs(value) > abs(found):
            found = value
    return found


@strict
def level(levels, i):  # type: ignore[no-untyped-def]
    """Levels i to i + 15, moved to 0..63."""
    return i32_of_f32x16(load_f32x16(levels + 4 * i)) + splat_i32x16(np.int32(32))


@strict
def pack_levels(out, levels):  # type: ignore[no-untyped-def]
    """ql[128] and qh[64]; the diagram is beside Q6_K in llmq.formats."""
    fifteen, two, four, six = (
        splat_i32x16(np.int32(15)), splat_i32x16(np.int32(2)), splat_i32x16(np.int32(4)), splat_i32x16(np.int32(6))
    )  # fmt: skip
    for half in range(2):
        for i in range(0, 64, 16):
            low, high = level(levels, 128 * half + i), level(levels, 128 * half + i + 64)
            store_i8x16(out + 64 * half + i, i8_of_i32x16(low & fifteen | (high & fifteen) << four))
        for i in range(0, 32, 16):
            at = 128 * half + i
            bits = level(levels, at) >> four | level(levels, at + 32) >> four << two
            bits = bits | level(levels, at + 64) >> four << four | level(levels, at + 96) >> four << six
            store_i8x16(out + 128 + 32 * half + i, i8_of_i32x16(bits))


@strict
def encode_block(out, source):  # type: ignore[no-untyped-def]
    x, levels = stack(1024), stack(1024)
    transpose(x, 64, source, 64)
    scales = search(x)
    farthest_scale = splat(farthest_of_16(scales))
    unit = half_unit(abs_f32x16(farthest_scale), 128)
    unit = where_less(splat(0), farthest_scale, splat(0) - unit, unit)
    counts = clamp(round_f32x16(divide_or_zero(scales, unit)), np.float32(-128), np.float32(127))
    scale = unit * counts
    scale = where_less(splat(0), abs_f32x16(scale), scale, splat(np.inf))
    for i in range(0, 1024, 64):
        quotient = round_f32x16(load_f32x16(x + i) / scale)
        store_f32x16(x + i, clamp(quotient, np.float32(-32), np.float32(31)))
    transpose(levels, 64, x, 64)
    pack_levels(out, levels)
    store_i8x16(out + 192, i8_of_i32x16(i32_of_f32x16(counts)))
    space = stack(64)
    store_f32x16(space, unit)
    store_f16(out + 208, load_f32(space))


@encoder
def encode_q6_k(out, x, n):  # type: ignore[no-untyped-def]
    """| ql[128] | qh[64] | int8 sc[16] | d |"""
    for block in range(n):
        encode_block(out + 210 * block, x + 1024 * block)
