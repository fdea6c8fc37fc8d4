"""Many tokens: 16 rows by 256 weights are unpacked once into a panel, then every token runs over it.

A panel lies in the first-level cache with rows as lanes, so that a token's activation word is broadcast from memory and
no sum has to cross lanes:

  0        64 vectors of 16 rows x 4 weights, bytes (or, for float formats, 256 vectors of 16 floats)
  SCALES   i32 scales, a vector per 32 or 16 weights (K); f32 d of 8 blocks, then f32 c of 8 blocks (blocks of 32)
  MINS     pairs of i16 mins of 16 rows (K)
  FACTORS  f32 d, then f32 dm, of 16 rows (K)

`make_panel(unpack)` is generic over the formats of unpack.py. Results are [n_tokens][16] floats, added up by group.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
from numba import types

from llmq.jit import Kernel, jit, kernel
from llmq.kernels.activation import SUMS16, SUMS32, VALUES
from llmq.kernels.unpack import BlockFormat, FloatFormat, KFormat, group_bytes
from llmq.simd import (
    TILE,
    as_i32x16,
    clear_bytes,
    copy_bytes,
    i32_of_i16x16,
    load_f32x16,
    load_i16x32,
    load_i32x16,
    splat_i32x16,
    stack,
    store_f32,
    store_i32x16,
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
    tile_store,
    transpose_f32,
    transpose_i32,
)

ROWS = 16
SCALES = 64 * 64
MINS = SCALES + 16 * 64
FACTORS = MINS + 8 * 64
PANEL_BYTES = 256 * 64  # the float panel is the largest

# out, w, row_bytes, n_rows, x, x_step, x_stride, n_tokens, n_groups, tail_bytes, panel
PANEL_TYPES = (types.int64,) * 11


def _sixteen(value: Callable[..., Any]) -> Any:
    """value(w, i) of the 16 rows at w, w + row_bytes, ...; rows past the last repeat it."""

    @jit
    def rows(w, row_bytes, n_rows, i):
        last = n_rows - 1
        return (
            value(w, i), value(w + min(1, last) * row_bytes, i),
            value(w + min(2, last) * row_bytes, i), value(w + min(3, last) * row_bytes, i),
            value(w + min(4, last) * row_bytes, i), value(w + min(5, last) * row_bytes, i),
            value(w + min(6, last) * row_bytes, i), value(w + min(7, last) * row_bytes, i),
            value(w + min(8, last) * row_bytes, i), value(w + min(9, last) * row_bytes, i),
            value(w + min(10, last) * row_bytes, i), value(w + min(11, last) * row_bytes, i),
            value(w + min(12, last) * row_bytes, i), value(w + min(13, last) * row_bytes, i),
            value(w + min(14, last) * row_bytes, i), value(w + min(15, last) * row_bytes, i),
        )  # fmt: skip

    return rows


def _pack_lanes(lanes: Callable[..., Any]) -> Any:
    """Bytes of 16 rows x 256 weights, in vectors of 16 rows x 4 weights."""

    @jit
    def words(w, j):
        return as_i32x16(lanes(w, j))

    sixteen = _sixteen(words)

    @jit
    def pack(panel, w, row_bytes, n_rows):
        for j in range(4):
            tile_store(panel + 1024 * j, 64, transpose_i32(sixteen(w, row_bytes, n_rows, j)))

    return pack


def _k_pack(unpack: KFormat) -> Any:
    pack_lanes, factors, scales, mins = _pack_lanes(unpack.lanes), unpack.factors, unpack.scales, unpack.mins
    # Scales and mins are held per 16 weights; formats with 32 to a scale repeat each, and every second one is kept.
    step, n_pairs = (2, 4) if unpack.sub == 32 else (1, 8)
    low16 = np.int32(0xFFFF)

    @jit
    def wide_scales(w, _i):
        return i32_of_i16x16(scales(w))

    @jit
    def wide_mins(w, _i):
        return i32_of_i16x16(mins(w))

    scale_rows, min_rows = _sixteen(wide_scales), _sixteen(wide_mins)

    @jit
    def pack(panel, w, row_bytes, n_rows):
        pack_lanes(panel, w, row_bytes, n_rows)
        columns = stack(1024)
        tile_store(columns, 64, transpose_i32(scale_rows(w, row_bytes, n_rows, 0)))
        for s in range(16 // step):
            store_i32x16(panel + SCALES + 64 * s, load_i32x16(columns + 64 * step * s))
        tile_store(columns, 64, transpose_i32(min_rows(w, row_bytes, n_rows, 0)))
        for p in range(n_pairs):
            even = load_i32x16(columns + 128 * step * p) & splat_i32x16(low16)
            odd = load_i32x16(columns + 128 * step * p + 64 * step) << splat_i32x16(np.int32(16))
            store_i32x16(panel + MINS + 64 * p, even | odd)
        for r in range(ROWS):
            d, dm = factors(w + min(r, n_rows - 1) * row_bytes)
            store_f32(panel + FACTORS + 4 * r, d)
            store_f32(panel + FACTORS + 64 + 4 * r, -dm)

    return pack


def _k_tile(unpack: KFormat, n: int) -> Any:
    dot, n_subs = (tile_dot32_u7, 8) if unpack.sub == 32 else (tile_dot16_u7, 16)
    n_pairs, sums, span = n_subs // 2, SUMS32 if unpack.sub == 32 else SUMS16, 256 // n_subs

    @jit
    def tile(out, panel, x, x_step):
        total = tile_i32(n)
        for s in range(n_subs):
            product = dot(tile_i32(n), panel + 16 * span * s, x + VALUES + span * s, x_step)
            total = tile_mul_add(total, product, load_i32x16(panel + SCALES + 64 * s))
        below = tile_i32(n)
        for p in range(n_pairs):
            below = tile_dot_pair(below, load_i16x32(panel + MINS + 64 * p), x + sums + 4 * p, x_step)
        acc = tile_load(tile_f32(n), out, 64)
        acc = tile_fma_scaled(acc, total, load_f32x16(panel + FACTORS), x, x_step)
        acc = tile_fma_scaled(acc, below, load_f32x16(panel + FACTORS + 64), x, x_step)
        tile_store(out, 64, acc)

    return tile


def _block_pack(unpack: BlockFormat) -> Any:
    pack_lanes, factors, block = _pack_lanes(unpack.lanes), unpack.factors, unpack.format.block_bytes

    @jit
    def pack(panel, w, row_bytes, n_rows):
        pack_lanes(panel, w, row_bytes, n_rows)
        for r in range(ROWS):
            at = w + min(r, n_rows - 1) * row_bytes
            for s in range(8):
                d, c = factors(at + s * block)
                store_f32(panel + SCALES + 64 * s + 4 * r, d)
                store_f32(panel + SCALES + 512 + 64 * s + 4 * r, c)

    return pack


def _block_tile(unpack: BlockFormat, n: int) -> Any:
    dot = tile_dot32_u8 if unpack.full else tile_dot32_u7

    @jit
    def tile(out, panel, x, x_step):
        acc = tile_load(tile_f32(n), out, 64)
        for s in range(8):
            product = dot(tile_i32(n), panel + 512 * s, x + VALUES + 32 * s, x_step)
            acc = tile_fma_scaled(acc, product, load_f32x16(panel + SCALES + 64 * s), x + 4 * s, x_step)
            acc = tile_fma(acc, load_f32x16(panel + SCALES + 512 + 64 * s), x + 32 + 4 * s, x_step)
        tile_store(out, 64, acc)

    return tile


def _float_pack(unpack: FloatFormat) -> Any:
    lanes, step = unpack.lanes, 16 * unpack.format.block_bytes

    @jit
    def sixteenth(w, i):
        return lanes(w + i * step)

    sixteen = _sixteen(sixteenth)

    @jit
    def pack(panel, w, row_bytes, n_rows):
        for i in range(16):
            tile_store(panel + 1024 * i, 64, transpose_f32(sixteen(w, row_bytes, n_rows, i)))

    return pack


def _float_tile(_unpack: FloatFormat, n: int) -> Any:
    @jit
    def tile(out, panel, x, x_step):
        acc = tile_load(tile_f32(n), out, 64)
        for k in range(256):
            acc = tile_fma(acc, load_f32x16(panel + 64 * k), x + 4 * k, x_step)
        tile_store(out, 64, acc)

    return tile


MAKERS: dict[type, Any] = {
    KFormat: (_k_pack, _k_tile),
    BlockFormat: (_block_pack, _block_tile),
    FloatFormat: (_float_pack, _float_tile),
}


def make_panel(unpack: KFormat | BlockFormat | FloatFormat) -> Kernel:
    """Kernel: out[t][r] = row r at `w` . token t, for up to 16 rows; what lies past `n_rows` in `out` is of no use.

    Tokens of a group lie `x_step` bytes apart and groups `x_stride`; `panel` is PANEL_BYTES of scratch, aligned to 64.
    """
    size = group_bytes(unpack.format)
    make_pack, make_tile = MAKERS[type(unpack)]
    pack = make_pack(unpack)
    large, middle, single = (make_tile(unpack, n) for n in (TILE, TILE // 2, 1))
    half, padded_bytes = TILE // 2, ROWS * size

    @jit
    def sweep(out, panel, x, x_step, n_tokens):
        t = 0
        while n_tokens - t >= TILE:
            large(out + 64 * t, panel, x + t * x_step, x_step)
            t += TILE
        if n_tokens - t >= half:
            middle(out + 64 * t, panel, x + t * x_step, x_step)
            t += half
        while t < n_tokens:
            single(out + 64 * t, panel, x + t * x_step, x_step)
            t += 1

    def panel_product(out, w, row_bytes, n_rows, x, x_step, x_stride, n_tokens, n_groups, tail_bytes, panel):
        clear_bytes(out, 64 * n_tokens)
        for g in range(n_groups):
            pack(panel, w + g * size, row_bytes, n_rows)
            sweep(out, panel, x + g * x_stride, x_step, n_tokens)
        if tail_bytes:
            padded = stack(padded_bytes)
            clear_bytes(padded, padded_bytes)
            for r in range(n_rows):
                copy_bytes(padded + r * size, w + r * row_bytes + n_groups * size, tail_bytes)
            pack(panel, padded, size, n_rows)
            sweep(out, panel, x + n_groups * x_stride, x_step, n_tokens)

    return kernel(*PANEL_TYPES, name=f"panel_{unpack.format.name.lower()}")(panel_product)
