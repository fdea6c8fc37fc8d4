"""Many tokens: a strip of rows by 256 weights is unpacked once into a panel, then every token runs over it.

A panel lies in the first-level cache with rows as lanes, so that a token's activation word is broadcast from memory and
no sum has to cross lanes. All parts come as vectors of 16 rows, those of a strip (four or one) side by side:

  0        64 times rows x 4 weights, bytes (or, for float formats, 256 times rows x 1 float)
  SCALES   i32 scales, per 32 or 16 weights (K); f32 d of 8 blocks, then f32 c of 8 blocks (blocks of 32)
  MINS     pairs of i16 mins (K)
  FACTORS  f32 d, then f32 -dm (K)

`make_panel(unpack)` is generic over the formats of unpack.py. Results are [n_tokens][ROWS] floats, added up by group.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
from numba import types

from llmq.jit import Kernel, jit, kernel
from llmq.kernels.activation import BLOCK_STEP, FLOAT_STEP, K_STEP, SUMS, SUMS16, SUMS32, VALUES
from llmq.kernels.unpack import BlockFormat, FloatFormat, KFormat, group_bytes, is_signed, product_lanes
from llmq.simd import (
    ROWS,
    TOKENS,
    as_i32x16,
    clear_bytes,
    copy_bytes,
    i32_of_i16x16,
    load_i32x16,
    prefetch,
    splat_i32x16,
    stack,
    store_f32,
    store_i32x16,
    strip_add_scaled,
    strip_dot32,
    strip_dot_pair,
    strip_f32,
    strip_fma,
    strip_fma_offset,
    strip_fma_scaled,
    strip_fma_scaled2,
    strip_i32,
    strip_load,
    strip_offset,
    strip_settle,
    strip_store,
    tile_store,
    transpose_f32,
    transpose_i32,
    weave_i32,
)

LINE = 4 * ROWS  # bytes of one word of each row
TILE = TOKENS * LINE
SCALES = 64 * LINE
MINS = SCALES + 16 * LINE
FACTORS = MINS + 8 * LINE
PANEL_BYTES = 256 * LINE  # the float panel is the largest

# out, w, row_bytes, n_rows, x, x_stride, n_tokens, n_groups, tail_bytes, panel
PANEL_TYPES = (types.int64,) * 10


@jit
def sixteen_from(w, row_bytes, n_rows, first):
    """Address and number of the rows from `first` on, at least one: a strip that ends before repeats its last row."""
    last = n_rows - 1
    return w + min(first, last) * row_bytes, max(1, n_rows - first)


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
    """Bytes of 16 rows x 256 weights, in vectors of 16 rows x 4 weights (on Arm of 4 rows x 16 weights)."""

    @jit
    def words(w, j):
        return as_i32x16(lanes(w, j))

    sixteen = _sixteen(words)

    @jit
    def pack(panel, w, row_bytes, n_rows):
        for first in range(0, ROWS, 16):
            at, n = sixteen_from(w, row_bytes, n_rows, first)
            for j in range(4):
                tile_store(panel + 4 * first + 16 * LINE * j, LINE, weave_i32(sixteen(at, row_bytes, n, j)))

    return pack


def _k_pack(unpack: KFormat) -> Any:
    pack_lanes, factors, scales, mins = _pack_lanes(product_lanes(unpack)), unpack.factors, unpack.scales, unpack.mins
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
    def pack_scales(panel, w, row_bytes, n_rows):
        columns = stack(1024)
        tile_store(columns, 64, transpose_i32(scale_rows(w, row_bytes, n_rows, 0)))
        for s in range(16 // step):
            store_i32x16(panel + SCALES + LINE * s, load_i32x16(columns + 64 * step * s))
        tile_store(columns, 64, transpose_i32(min_rows(w, row_bytes, n_rows, 0)))
        for p in range(n_pairs):
            even = load_i32x16(columns + 128 * step * p) & splat_i32x16(low16)
            odd = load_i32x16(columns + 128 * step * p + 64 * step) << splat_i32x16(np.int32(16))
            store_i32x16(panel + MINS + LINE * p, even | odd)

    @jit
    def pack(panel, w, row_bytes, n_rows):
        pack_lanes(panel, w, row_bytes, n_rows)
        for first in range(0, ROWS, 16):
            at, n = sixteen_from(w, row_bytes, n_rows, first)
            pack_scales(panel + 4 * first, at, row_bytes, n)
        for r in range(ROWS):
            d, dm = factors(w + min(r, n_rows - 1) * row_bytes)
            store_f32(panel + FACTORS + 4 * r, d)
            store_f32(panel + FACTORS + LINE + 4 * r, -dm)

    return pack


def _k_tile(unpack: KFormat) -> Any:
    add_scaled, n_subs = strip_add_scaled(unpack.sub, unpack.top), 256 // unpack.sub
    n_pairs, sums, span = n_subs // 2, SUMS32 if unpack.sub == 32 else SUMS16, unpack.sub
    signed = is_signed(unpack)

    @jit
    def tile(out, panel, x):
        total = strip_i32(TOKENS)
        for s in range(n_subs):
            w, scales = panel + span // 4 * LINE * s, panel + SCALES + LINE * s
            total = add_scaled(total, w, x + VALUES + span * s, scales, K_STEP)
        total, acc = strip_settle(total), strip_load(strip_f32(TOKENS), out)
        if signed:
            acc = strip_fma_scaled(acc, total, panel + FACTORS, x, K_STEP)
        else:
            below = strip_i32(TOKENS)
            for p in range(n_pairs):
                below = strip_dot_pair(below, panel + MINS + LINE * p, x + sums + 4 * p, K_STEP)
            acc = strip_fma_scaled2(acc, total, below, panel + FACTORS, x, K_STEP)
        strip_store(out, acc)

    return tile


def _block_pack(unpack: BlockFormat) -> Any:
    pack_lanes, factors = _pack_lanes(product_lanes(unpack)), unpack.factors

    @jit
    def pack(panel, w, row_bytes, n_rows):
        pack_lanes(panel, w, row_bytes, n_rows)
        for r in range(ROWS):
            at = w + min(r, n_rows - 1) * row_bytes
            for s in range(8):
                d, c = factors(at, s)
                store_f32(panel + SCALES + LINE * s + 4 * r, d)
                store_f32(panel + SCALES + LINE * (8 + s) + 4 * r, c)

    return pack


def _block_tile(unpack: BlockFormat) -> Any:
    """Per block d * dx * (u . q) + c * dx * sum(q); with a centre d * dx * (u . q - centre * sum(q))."""
    dot, start, signed = strip_dot32(unpack.top), strip_offset(unpack.centre), is_signed(unpack)
    centred = bool(unpack.centre)

    @jit
    def tile(out, panel, x):
        acc = strip_load(strip_f32(TOKENS), out)
        for s in range(8):
            sums = strip_i32(TOKENS)
            if centred and not signed:
                sums = start(sums, x + SUMS + 4 * s, BLOCK_STEP)
            sums = dot(sums, panel + 8 * LINE * s, x + VALUES + 32 * s, BLOCK_STEP)
            acc = strip_fma_scaled(acc, sums, panel + SCALES + LINE * s, x + 4 * s, BLOCK_STEP)
            if not centred:
                acc = strip_fma_offset(acc, panel + SCALES + LINE * (8 + s), x + 4 * s, x + SUMS + 4 * s, BLOCK_STEP)
        strip_store(out, acc)

    return tile


def _float_pack(unpack: FloatFormat) -> Any:
    lanes, step = unpack.lanes, 16 * unpack.format.block_bytes

    @jit
    def sixteenth(w, i):
        return lanes(w + i * step)

    sixteen = _sixteen(sixteenth)

    @jit
    def pack(panel, w, row_bytes, n_rows):
        for first in range(0, ROWS, 16):
            at, n = sixteen_from(w, row_bytes, n_rows, first)
            for i in range(16):
                tile_store(panel + 4 * first + 16 * LINE * i, LINE, transpose_f32(sixteen(at, row_bytes, n, i)))

    return pack


def _float_tile(_unpack: FloatFormat) -> Any:
    @jit
    def tile(out, panel, x):
        acc = strip_load(strip_f32(TOKENS), out)
        for k in range(256):
            acc = strip_fma(acc, panel + LINE * k, x + 4 * k, FLOAT_STEP)
        strip_store(out, acc)

    return tile


MAKERS: dict[type, Any] = {
    KFormat: (_k_pack, _k_tile, K_STEP),
    BlockFormat: (_block_pack, _block_tile, BLOCK_STEP),
    FloatFormat: (_float_pack, _float_tile, FLOAT_STEP),
}


def make_panel(unpack: KFormat | BlockFormat | FloatFormat) -> Kernel:
    """Kernel: out[t][r] = row r at `w` . token t, for up to ROWS rows; what lies past `n_rows` in `out` is of no use.

    Tokens of a group lie side by side and groups `x_stride` bytes apart; `panel` is PANEL_BYTES of scratch. The last
    tile may compute up to TOKENS - 1 tokens too many: activations must be readable and `out` writable that far. Both
    and the panel are aligned to 64 bytes.
    """
    size = group_bytes(unpack.format)
    make_pack, make_tile, step = MAKERS[type(unpack)]
    pack, tile = make_pack(unpack), make_tile(unpack)
    padded_bytes, tile_x_bytes = ROWS * size, TOKENS * step

    @jit
    def sweep(out, panel, x, n_tokens):
        for t in range(0, n_tokens, TOKENS):
            prefetch(x + (t + TOKENS) * step, tile_x_bytes)
            prefetch(out + LINE * (t + TOKENS), TILE)
            tile(out + LINE * t, panel, x + t * step)

    def panel_product(out, w, row_bytes, n_rows, x, x_stride, n_tokens, n_groups, tail_bytes, panel):
        clear_bytes(out, LINE * n_tokens)
        for g in range(n_groups):
            pack(panel, w + g * size, row_bytes, n_rows)
            sweep(out, panel, x + g * x_stride, n_tokens)
        if tail_bytes:
            padded = stack(padded_bytes)
            clear_bytes(padded, padded_bytes)
            for r in range(n_rows):
                copy_bytes(padded + r * size, w + r * row_bytes + n_groups * size, tail_bytes)
            pack(panel, padded, size, n_rows)
            sweep(out, panel, x + n_groups * x_stride, n_tokens)

    return kernel(*PANEL_TYPES, name=f"panel_{unpack.format.name.lower()}")(panel_product)
