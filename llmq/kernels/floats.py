"""One packed row to floats: what an embedding look-up needs, and the compiled twin of formats.dequantize."""

from typing import Any

import numpy as np
from numba import types

from llmq.jit import Kernel, jit, kernel
from llmq.kernels.unpack import BlockFormat, FloatFormat, KFormat, group_bytes
from llmq.simd import (
    clear_bytes,
    copy_bytes,
    load_i16,
    load_u8,
    stack,
    store_f32,
    store_f32x16,
    store_i16x16,
    store_u8x64,
)

# out, w, n_groups, tail_bytes, tail_weights
FLOATS_TYPES = (types.int64,) * 5


def _k_group(unpack: KFormat) -> Any:
    lanes, scales, mins, factors = unpack.lanes, unpack.scales, unpack.mins, unpack.factors

    @jit
    def group(out, w):
        u, scale, low = stack(64), stack(64), stack(64)
        store_i16x16(scale, scales(w))
        store_i16x16(low, mins(w))
        d, dm = factors(w)
        for j in range(4):
            store_u8x64(u, lanes(w, j))
            for i in range(64):
                s = 4 * j + (i >> 4)
                x = d * np.float32(load_i16(scale + 2 * s)) * np.float32(load_u8(u + i))
                store_f32(out + 256 * j + 4 * i, x - dm * np.float32(load_i16(low + 2 * s)))

    return group


def _block_group(unpack: BlockFormat) -> Any:
    lanes, factors = unpack.lanes, unpack.factors

    @jit
    def group(out, w):
        u = stack(64)
        for j in range(4):
            store_u8x64(u, lanes(w, j))
            for half in range(2):
                d, c = factors(w, 2 * j + half)
                for i in range(32):
                    at = 32 * half + i
                    store_f32(out + 256 * j + 4 * at, d * np.float32(load_u8(u + at)) + c)

    return group


def _float_group(unpack: FloatFormat) -> Any:
    lanes, step = unpack.lanes, 16 * unpack.format.block_bytes

    @jit
    def group(out, w):
        for i in range(16):
            store_f32x16(out + 64 * i, lanes(w + i * step))

    return group


MAKERS: dict[type, Any] = {KFormat: _k_group, BlockFormat: _block_group, FloatFormat: _float_group}


def make_floats(unpack: KFormat | BlockFormat | FloatFormat) -> Kernel:
    """Kernel: out[256 * n_groups + tail_weights] = the floats of the row at `w`."""
    size = group_bytes(unpack.format)
    group = MAKERS[type(unpack)](unpack)

    def floats(out, w, n_groups, tail_bytes, tail_weights):
        for g in range(n_groups):
            group(out + 1024 * g, w + size * g)
        if tail_bytes:
            padded, values = stack(size), stack(1024)
            clear_bytes(padded, size)
            copy_bytes(padded, w + size * n_groups, tail_bytes)
            group(values, padded)
            copy_bytes(out + 1024 * n_groups, values, 4 * tail_weights)

    return kernel(*FLOATS_TYPES, name=f"floats_{unpack.format.name.lower()}")(floats)
