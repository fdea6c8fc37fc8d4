"""Activations in the form that a weight format's dot product wants, 256 at a time.

A product with `n` tokens reads groups in the order [group][token], so that the tokens of one group lie together.

  FLOAT   256 x f32                                            1024 bytes   for F32, F16, BF16 weights
  K       f32 d | 12 unused | i16 sums of 32 q [8] | i16 sums of 16 q [16] | i8 q[256]     320 bytes   one scale
  BLOCK   f32 d[8] | i32 sums of 32 q [8] | i8 q[256]           320 bytes   one scale per 32
"""

import numpy as np
from numba import types

from llmq.jit import jit, kernel
from llmq.layout import FLOAT, GROUP_BYTES, K
from llmq.simd import (
    abs_f32x16,
    add_lanes_f32x16,
    add_lanes_i32x16,
    clear_bytes,
    copy_bytes,
    fma,
    i8_of_i32x16,
    i32_of_f32x16,
    load_f32x16,
    max_f32x16,
    max_lanes_f32x16,
    round_f32x16,
    splat_f32x16,
    stack,
    store_f32,
    store_i8x16,
    store_i16,
    store_i32,
)

FLOAT_STEP, K_STEP, BLOCK_STEP = GROUP_BYTES
assert K_STEP == BLOCK_STEP
SUMS32, SUMS16, VALUES = 16, 32, 64  # offsets in K groups; q lies at VALUES in BLOCK groups too
SUMS = 32  # offset in BLOCK groups

# out, kind, x, n, n_tokens
PREPARE_TYPES = (types.int64,) * 5


@jit
def largest(x, n):
    """Largest magnitude among `n` floats (a multiple of 16) at address `x`; NaN if any is NaN or infinite."""
    zero = splat_f32x16(np.float32(0))
    top, spoilt = zero, zero
    for i in range(0, n, 16):
        v = load_f32x16(x + 4 * i)
        top = max_f32x16(top, abs_f32x16(v))
        spoilt = fma(v, zero, spoilt)
    return max_lanes_f32x16(top) + add_lanes_f32x16(spoilt)


@jit
def quantize16(q, x, inverse):
    """Write round(x * inverse) of 16 floats as bytes; returns their sum."""
    values = i32_of_f32x16(round_f32x16(load_f32x16(x) * splat_f32x16(inverse)))
    store_i8x16(q, i8_of_i32x16(values))
    return add_lanes_i32x16(values)


@jit
def inverse_scale(top):
    return np.float32(127) / top if top > np.float32(0) else np.float32(0)


@jit
def quantize_k(out, x):
    """256 floats at `x` to one K group at `out`."""
    top = largest(x, 256)
    inverse = inverse_scale(top)
    store_f32(out, top / np.float32(127))
    for i in range(8):
        low = quantize16(out + VALUES + 32 * i, x + 128 * i, inverse)
        high = quantize16(out + VALUES + 32 * i + 16, x + 128 * i + 64, inverse)
        store_i16(out + SUMS16 + 4 * i, np.int16(low))
        store_i16(out + SUMS16 + 4 * i + 2, np.int16(high))
        store_i16(out + SUMS32 + 2 * i, np.int16(low + high))


@jit
def quantize_block(out, x):
    """256 floats at `x` to one BLOCK group at `out`."""
    for i in range(8):
        at = x + 128 * i
        top = largest(at, 32)
        inverse = inverse_scale(top)
        q = out + VALUES + 32 * i
        total = quantize16(q, at, inverse) + quantize16(q + 16, at + 64, inverse)
        store_f32(out + 4 * i, top / np.float32(127))
        store_i32(out + SUMS + 4 * i, total)


@jit
def prepare_group(out, kind, x, n):
    """One group of `kind` at `out` from `n` <= 256 floats at `x`; missing ones count as zero."""
    source = x
    if n < 256:
        source = stack(1024)
        clear_bytes(source, 1024)
        copy_bytes(source, x, 4 * n)
    if kind == FLOAT:
        copy_bytes(out, source, 1024)
    elif kind == K:
        quantize_k(out, source)
    else:
        quantize_block(out, source)


@kernel(*PREPARE_TYPES, name="prepare")
def prepare(out, kind, x, n, n_tokens):
    """Rows x [n_tokens][n] of floats to groups [ceil(n / 256)][n_tokens] of `kind` at `out`."""
    size = FLOAT_STEP if kind == FLOAT else K_STEP
    for token in range(n_tokens):
        for group in range((n + 255) // 256):
            at = out + (group * n_tokens + token) * size
            prepare_group(at, kind, x + 4 * (token * n + 256 * group), min(256, n - 256 * group))
