"""Many tokens: 16 rows by 256 weights are unpacked once into a panel, then every token runs over it.

A panel lies in the first-level cache with rows as lanes, so that a token's activation word is broadcast from memory and
no sum has to cross lanes:

  bytes   64 vectors of 16 rows x 4 weights (or 256 vectors of 16 floats)
  scales  per 32 (or 16) weights, 16 rows: i32 scales (K), f32 d and f32 c (blocks of 32)
  mins    i16 pairs of 16 rows (K), then f32 d and f32 dm of 16 rows

`make_panel(unpack)` is generic over the formats of unpack.py. Results are [n_tokens][16] floats, added up group by group.
"""

from typing import Any

import numpy as np
from numba import types

from llmq.jit import Kernel, jit, kernel
from llmq.kernels.activation import VALUES
from llmq.kernels.unpack import GROUP, BlockFormat, FloatFormat, KFormat, group_bytes
from llmq.simd import (
    TILE,
    as_i32x16,
    as_u8x64,
    clear_bytes,
    copy_bytes,
    f32_of_i32x16,
    load_f32,
    load_f32x16,
    load_i16x32,
    load_i32x16,
    splat_f32x16,
    stack,
    store_f32,
    store_f32x16,
    store_i8x16,
    store_i16,
    store_i16x16,
    store_i32,
    store_u8x64,
    tile_dot16_u7,
    tile_dot32_u7,
    tile_dot32_u8,
    tile_dot_pair,
    tile_f32,
    tile_fma,
    tile_fma_scaled,
    tile_i32,
    tile_load,
    tile_mul_add,
    tile_scale,
    tile_store,
    transpose_f32,
    transpose_i32,
)

ROWS = 16
SCALES = 64 * 64  # offsets in a panel
MINS = SCALES + 16 * 64
FACTORS = MINS + 8 * 64
PANEL_BYTES = 256 * 64  # the float panel is the largest

# tile, w, row_bytes, n_rows, x, x_stride, n_tokens, n_groups, tail_bytes, panel
PANEL_TYPES = (types.int64,) * 10
