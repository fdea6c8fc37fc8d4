"""Grouped-query attention over a ring of half-float keys and values, with online softmax.

One ring, one layer, one KV head (capacity a multiple of 16, slot = position % capacity):

  keys    f16 [capacity / 16][head_dim][16]   sixteen positions side by side, so that scores need no sum across lanes
  values  f16 [capacity][head_dim]

RoPE is in the keys when they are stored, so a slot never has to be turned again. A query at position p sees positions
max(0, p - window + 1) .. p; whatever else lies in the ring is masked.
"""

import numpy as np
from numba import types

from llmq.jit import Kernel, jit, kernel
from llmq.simd import (
    add_lanes_f32x16,
    count16,
    exp_f32x16,
    load_f16x16,
    load_f32,
    load_f32x16,
    load_i64,
    max_f32x16,
    max_lanes_f32x16,
    splat_f32x16,
    store_f16,
    store_f16x16,
    store_f32,
    store_f32x16,
    tile_f32,
    tile_fma,
    tile_load,
    tile_scale,
    tile_store,
    where_between,
)

SPAN = 64  # keys scored between two looks at the running maximum
QUERIES = 8  # queries that share each loaded key and value

# Scratch of one thread, in bytes: query vectors, sums of values, scores, then per query maximum, total and rescaling.
HEAD_DIM_LIMIT = 1024
SCORES = 2 * QUERIES * HEAD_DIM_LIMIT * 4
STATE = SCORES + QUERIES * SPAN * 4
SCRATCH_BYTES = STATE + 3 * QUERIES * 4

# outs, queries, q_positions, keys, values, capacity, head_dim, window, scratch
ATTEND_TYPES = (types.int64,) * 9


@jit
def store_kv(keys, values, slot, k, v, head_dim):
    """Write one position's key and value [head_dim] of one KV head."""
    block = keys + ((slot >> 4) * head_dim * 16 + (slot & 15)) * 2
    for i in range(head_dim):
        store_f16(block + 32 * i, load_f32(k + 4 * i))
    for i in range(0, head_dim, 16):
        store_f16x16(values + (slot * head_dim + i) * 2, load_f32x16(v + 4 * i))


def make_attend(n: int) -> Kernel:
    """Kernel: attention of `n` queries of one KV head, which share every key and value that is loaded."""

    @jit
    def score(scratch, keys, capacity, head_dim, block, n_blocks):
        """Scores of `n_blocks` <= 4 blocks of 16 positions, raw."""
        for b in range(n_blocks):
            at = keys + ((block + b) % (capacity >> 4)) * head_dim * 32
            acc = tile_f32(n)
            for i in range(head_dim):
                acc = tile_fma(acc, load_f16x16(at + 32 * i), scratch + 4 * i, 4 * head_dim)
            tile_store(scratch + SCORES + 64 * b, 4 * SPAN, acc)

    @jit
    def soften(scratch, q_positions, window, block, n_blocks):
        """Mask, then exp against the new running maximum; keeps what the older sums must be multiplied by."""
        nothing = splat_f32x16(np.float32(-np.inf))
        for i in range(n):
            position = load_i64(q_positions + 8 * i)
            low, high = np.int32(max(0, position - window + 1)), np.int32(position)
            scores, state = scratch + SCORES + 4 * SPAN * i, scratch + STATE + 4 * i
            old, top = load_f32(state), nothing
            for b in range(n_blocks):
                lanes = count16(np.int32(16 * (block + b)))
                s = where_between(lanes, low, high, load_f32x16(scores + 64 * b), nothing)
                store_f32x16(scores + 64 * b, s)
                top = max_f32x16(top, s)
            new = max(old, max_lanes_f32x16(top))
            total = splat_f32x16(np.float32(0))
            # Nothing seen yet: any finite maximum leaves exp(-inf) = 0.
            base = splat_f32x16(new if new > np.float32(-1e30) else np.float32(0))
            for b in range(n_blocks):
                p = exp_f32x16(load_f32x16(scores + 64 * b) - base)
                store_f32x16(scores + 64 * b, p)
                total = total + p
            factor = np.float32(np.exp(old - new)) if new > old else np.float32(1)
            store_f32(state, new)
            store_f32(state + 4 * n, load_f32(state + 4 * n) * factor + add_lanes_f32x16(total))
            store_f32(state + 8 * n, factor)

    @jit
    def gather(scratch, sums, values, capacity, head_dim, block, n_blocks):
        """sums = sums * factor + probabilities . values."""
        for i in range(0, head_dim, 16):
            acc = tile_scale(tile_load(tile_f32(n), sums + 4 * i, 4 * head_dim), scratch + STATE + 8 * n, 4)
            for b in range(n_blocks):
                slot = ((block + b) % (capacity >> 4)) * 16
                at, p = values + (slot * head_dim + i) * 2, scratch + SCORES + 64 * b
                for k in range(16):
                    acc = tile_fma(acc, load_f16x16(at + 2 * k * head_dim), p + 4 * k, 4 * SPAN)
            tile_store(sums + 4 * i, 4 * head_dim, acc)

    def attend(outs, queries, q_positions, keys, values, capacity, head_dim, window, scratch):
        """`outs`, `queries`: n addresses of [head_dim] floats; `q_positions`: n positions, ascending; all int64."""
        sums = scratch + SCORES // 2
        scale = splat_f32x16(np.float32(1) / np.float32(np.sqrt(np.float32(head_dim))))
        for q in range(n):
            source = load_i64(queries + 8 * q)
            for i in range(0, head_dim, 16):
                store_f32x16(scratch + 4 * (q * head_dim + i), load_f32x16(source + 4 * i) * scale)
                store_f32x16(sums + 4 * (q * head_dim + i), splat_f32x16(np.float32(0)))
            store_f32(scratch + STATE + 4 * q, np.float32(-np.inf))
            store_f32(scratch + STATE + 4 * (n + q), np.float32(0))
        first = max(0, load_i64(q_positions) - window + 1) >> 4
        last = load_i64(q_positions + 8 * (n - 1)) >> 4
        for block in range(first, last + 1, SPAN // 16):
            n_blocks = min(SPAN // 16, last + 1 - block)
            score(scratch, keys, capacity, head_dim, block, n_blocks)
            soften(scratch, q_positions, window, block, n_blocks)
            gather(scratch, sums, values, capacity, head_dim, block, n_blocks)
        for q in range(n):
            total = splat_f32x16(np.float32(1) / load_f32(scratch + STATE + 4 * (n + q)))
            out = load_i64(outs + 8 * q)
            for i in range(0, head_dim, 16):
                store_f32x16(out + 4 * i, load_f32x16(sums + 4 * (q * head_dim + i)) * total)

    return kernel(*ATTEND_TYPES, name=f"attend{n}")(attend)


attend8, attend4, attend1 = make_attend(8), make_attend(4), make_attend(1)
