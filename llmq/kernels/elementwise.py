"""RMSNorm, RoPE, SwiGLU and adding up: float32 at addresses, sizes multiples of 16 unless said otherwise."""

import math

import numpy as np

from llmq.jit import jit
from llmq.simd import (
    add_lanes_f32x16,
    exp_f32x16,
    fma,
    load_f32,
    load_f32x16,
    load_f64,
    splat_f32x16,
    store_f32,
    store_f32x16,
)


@jit
def rms_norm(out, x, weight, n, eps):
    """out[n] = x / sqrt(mean(x^2) + eps) * weight."""
    squares = splat_f32x16(np.float32(0))
    for i in range(0, n, 16):
        v = load_f32x16(x + 4 * i)
        squares = fma(v, v, squares)
    mean = add_lanes_f32x16(squares) / np.float32(n)
    factor = splat_f32x16(np.float32(1) / np.float32(math.sqrt(mean + eps)))
    for i in range(0, n, 16):
        store_f32x16(out + 4 * i, load_f32x16(x + 4 * i) * factor * load_f32x16(weight + 4 * i))


@jit
def rope_angles(out, frequencies, n, position):
    """out[n][2] = cos and sin of position * frequency, in double precision up to the last step; any n."""
    for i in range(n):
        angle = position * load_f64(frequencies + 8 * i)
        store_f32(out + 8 * i, np.float32(math.cos(angle)))
        store_f32(out + 8 * i + 4, np.float32(math.sin(angle)))


@jit
def rope(x, angles, n, step, gap):
    """Rotate n pairs (x[i * step], x[i * step + gap]) of one head in place; any n.

    step 2, gap 1: neighbours (GGUF "llama"); step 1, gap n: halves (Hugging Face).
    """
    for i in range(n):
        first, second = x + 4 * i * step, x + 4 * (i * step + gap)
        c, s = load_f32(angles + 8 * i), load_f32(angles + 8 * i + 4)
        a, b = load_f32(first), load_f32(second)
        store_f32(first, a * c - b * s)
        store_f32(second, a * s + b * c)


@jit
def silu_mul(out, gate, up, n):
    """out = gate / (1 + exp(-gate)) * up, of `n` floats, by sixteens."""
    one, zero = splat_f32x16(np.float32(1)), splat_f32x16(np.float32(0))
    for at in range(0, 4 * n, 64):
        g = load_f32x16(gate + at)
        store_f32x16(out + at, g / (one + exp_f32x16(zero - g)) * load_f32x16(up + at))
