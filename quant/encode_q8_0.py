"""The encoder of Q8_0; its bytes are those of ggml's reference: to nearest, halves away from zero."""

import numpy as np
from numba import types

from llmq.simd import (
    abs_f32x16,
    f32_of_i32x16,
    i8_of_i32x16,
    i32_of_f32x16,
    load_f32x16,
    max_f32x16,
    max_lanes_f32x16,
    store_f16,
    store_i8x16,
    where_less,
)
from quant.lanes import splat, strict, strict_kernel

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


@strict_kernel(types.int64, types.int64, types.int64)
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
