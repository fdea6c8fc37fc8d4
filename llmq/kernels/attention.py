"""Grouped-query attention over a ring of keys and values (kv.py), with online softmax.

A query at position p sees positions max(0, p - window + 1) .. p; whatever else lies in the ring is masked. Positions
are met in spans of 64 that start at multiples of 64, so that a query's result does not depend on which queries go with
it. A long context can be cut in parts (Flash-Decoding, Dao et al. 2023): each part leaves its unscaled sums, its
maximum and its total, and `combine_parts` adds them up.
"""

from typing import Any

import numpy as np
from numba import types

from llmq.jit import Kernel, jit, kernel
from llmq.kernels.kv import F16_KV, KEYS_BLOCK, KVFormat, quantize32
from llmq.layout import PART_STATE
from llmq.simd import (
    BIAS,
    ISA,
    add_lanes_f32x16,
    add_lanes_i32x16,
    count16,
    exp_f32x16,
    fma,
    grid_add_scaled,
    grid_dot,
    grid_f32,
    grid_fma,
    grid_load,
    grid_scale,
    grid_start,
    grid_store,
    i16_of_i8x16,
    i32_of_i16x16,
    load_f16_each,
    load_f16_row,
    load_f32,
    load_f32x16,
    load_i8_each,
    load_i8x16,
    load_i32,
    load_i64,
    load_q8_row,
    max_f32x16,
    max_lanes_f32x16,
    splat_f32x16,
    stack,
    store_f32,
    store_f32x16,
    store_i32,
    where_between,
)

SPAN = 64  # keys scored between two looks at the running maximum
SPAN_BYTES = 4 * SPAN
# Queries that share each loaded key and value: as many sums as the registers hold.
QUERIES = 8 if ISA == "avx512vnni" else 4
SIZES = (QUERIES, 4, 1)

# Scratch of one thread, in bytes: query words, sums of values, scores, then per query maximum, total and rescaling.
HEAD_DIM_LIMIT = 1024
SUMS = QUERIES * HEAD_DIM_LIMIT * 4
SCORES = 2 * SUMS
STATE = SCORES + QUERIES * SPAN_BYTES
SCRATCH_BYTES = STATE + 3 * QUERIES * 4

# outs, queries, q_positions, keys, values, capacity, head_dim, window, first, end, is_part, scratch
ATTEND_TYPES = (types.int64,) * 12


def _f16_steps(n: int, wide: int) -> tuple[Any, ...]:
    cells = n * wide

    @jit
    def put_query(words, q, source, head_dim, scale):
        """Query `q` as words [head_dim][n]."""
        for i in range(head_dim):
            store_f32(words + 4 * (n * i + q), load_f32(source + 4 * i) * scale)

    @jit
    def score(words, at, head_dim):
        """Scores of the blocks of 16 positions at the addresses `at`."""
        acc = grid_f32(cells)
        for i in range(head_dim):
            acc = grid_fma(acc, load_f16_each(at, 32 * i), words + 4 * n * i, 4)
        return acc

    return put_query, score, load_f16_row


def _q8_0_steps(n: int, wide: int) -> tuple[Any, ...]:
    cells = n * wide

    @jit
    def put_query(words, q, source, head_dim, scale):
        """Query `q` as bytes [head_dim / 4][n][4], then for each 32 of them f32 scales [n] and i32 starts [n].

        Keys are taken BIAS too high: a sum starts at -BIAS times the sum of the query's bytes.
        """
        values, bytes_ = stack(128), stack(32)
        for g in range(head_dim >> 5):
            for i in range(32):
                store_f32(values + 4 * i, load_f32(source + 4 * (32 * g + i)) * scale)
            factors = words + n * head_dim + 8 * n * g
            store_f32(factors + 4 * q, quantize32(bytes_, values))
            for word in range(8):
                store_i32(words + 4 * (n * (8 * g + word) + q), load_i32(bytes_ + 4 * word))
            total = sum_of_bytes(bytes_) + sum_of_bytes(bytes_ + 16)
            store_i32(factors + 4 * (n + q), np.int32(-BIAS) * total)

    @jit
    def score(words, at, head_dim):
        acc = grid_f32(cells)
        for g in range(head_dim >> 5):
            base, factors = g * KEYS_BLOCK, words + n * head_dim + 8 * n * g
            scales = load_f16_each(at, base)
            sums = grid_start(scales, n, factors + 4 * n)
            for word in range(8):
                sums = grid_dot(sums, load_i8_each(at, base + 32 + 64 * word), words + 4 * n * (8 * g + word))
            acc = grid_add_scaled(acc, sums, scales, factors)
        return acc

    return put_query, score, load_q8_row


@jit
def sum_of_bytes(at):
    return add_lanes_i32x16(i32_of_i16x16(i16_of_i8x16(load_i8x16(at))))


def _addresses(wide: int) -> Any:
    """Where `wide` blocks of keys lie from `block` on; a ring goes on at its start."""

    @jit
    def one(keys, block, n_blocks, size):
        return (keys + block % n_blocks * size,)

    @jit
    def two(keys, block, n_blocks, size):
        return keys + block % n_blocks * size, keys + (block + 1) % n_blocks * size

    @jit
    def four(keys, block, n_blocks, size):
        return (
            keys + block % n_blocks * size, keys + (block + 1) % n_blocks * size,
            keys + (block + 2) % n_blocks * size, keys + (block + 3) % n_blocks * size,
        )  # fmt: skip

    return {1: one, 2: two, 4: four}[wide]


def _make_soften(n: int) -> Any:
    @jit
    def soften(scratch, q_positions, window, first, end, block, n_blocks):
        """Mask, then exp against the new running maximum; keeps what the older sums must be multiplied by."""
        nothing = splat_f32x16(np.float32(-np.inf))
        for i in range(n):
            position = load_i64(q_positions + 8 * i)
            low, high = np.int32(max(first, position - window + 1)), np.int32(min(end - 1, position))
            scores, state = scratch + SCORES + SPAN_BYTES * i, scratch + STATE + 4 * i
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

    return soften


def make_attend(n: int, kv: KVFormat) -> Kernel:
    """Kernel: attention of `n` queries of one KV head, which share every key and value that is loaded.

    `outs`, `queries`: n addresses of [head_dim] floats; `q_positions`: n positions, ascending; all int64. Positions
    before `first` (a multiple of SPAN) and from `end` on are left out. With `is_part`, outs are parts.
    """
    wide = min(4, QUERIES // n)
    put_query, score, load_row = (_f16_steps if kv is F16_KV else _q8_0_steps)(n, wide)
    addresses, soften, bytes_of_32 = _addresses(wide), _make_soften(n), kv.row_bytes(32)
    at_once = max(32, 16 * wide)  # dimensions; sums have room for whole grids

    @jit
    def row_bytes(head_dim):
        return head_dim * bytes_of_32 >> 5

    @jit
    def score_span(scratch, keys, capacity, head_dim, block, n_blocks):
        for b in range(0, n_blocks, wide):
            at = addresses(keys, block + b, capacity >> 4, 16 * row_bytes(head_dim))
            grid_store(scratch + SCORES + 64 * b, SPAN_BYTES, n, score(scratch, at, head_dim))

    @jit
    def gather_some(scratch, values, capacity, head_dim, stride, block, n_blocks, i, skip):
        """Dimensions i + 16 skip .. of: sums = sums * factor + probabilities . values."""
        sums = scratch + SUMS + 4 * (i + 16 * skip)
        acc = grid_scale(grid_load(n, wide, sums, stride), n, scratch + STATE + 8 * n)
        for b in range(n_blocks):
            row = values + ((block + b) % (capacity >> 4)) * 16 * row_bytes(head_dim)
            p = scratch + SCORES + 64 * b
            for k in range(16):
                acc = grid_fma(acc, load_row(row, i, skip, wide), p + 4 * k, SPAN_BYTES)
                row += row_bytes(head_dim)
        grid_store(sums, stride, n, acc)

    @jit
    def gather(scratch, values, capacity, head_dim, stride, block, n_blocks):
        for i in range(0, head_dim, at_once):
            gather_some(scratch, values, capacity, head_dim, stride, block, n_blocks, i, 0)
            if wide == 1:
                gather_some(scratch, values, capacity, head_dim, stride, block, n_blocks, i, 1)

    @jit
    def finish(out, sums, state, head_dim, is_part):
        total = load_f32(state + 4 * n)
        factor = splat_f32x16(np.float32(1) if is_part else np.float32(1) / total)
        for i in range(0, head_dim, 16):
            store_f32x16(out + 4 * i, load_f32x16(sums + 4 * i) * factor)
        if is_part:
            store_f32(out + 4 * head_dim, load_f32(state))
            store_f32(out + 4 * head_dim + 4, total)

    def attend(outs, queries, q_positions, keys, values, capacity, head_dim, window, first, end, is_part, scratch):
        stride = 4 * ((head_dim + 63) & ~63)  # sums of whole grids
        scale = np.float32(1) / np.float32(np.sqrt(np.float32(head_dim)))
        for q in range(n):
            put_query(scratch, q, load_i64(queries + 8 * q), head_dim, scale)
            for i in range(0, stride, 64):
                store_f32x16(scratch + SUMS + q * stride + i, splat_f32x16(np.float32(0)))
            store_f32(scratch + STATE + 4 * q, np.float32(-np.inf))
            store_f32(scratch + STATE + 4 * (n + q), np.float32(0))
        begin = max(first, load_i64(q_positions) - window + 1) // SPAN * (SPAN // 16)
        last = min(end - 1, load_i64(q_positions + 8 * (n - 1))) >> 4
        for block in range(begin, last + 1, SPAN // 16):
            n_blocks = min(SPAN // 16, last + 1 - block)
            score_span(scratch, keys, capacity, head_dim, block, n_blocks)
            soften(scratch, q_positions, window, first, end, block, n_blocks)
            gather(scratch, values, capacity, head_dim, stride, block, n_blocks)
        for q in range(n):
            finish(load_i64(outs + 8 * q), scratch + SUMS + q * stride, scratch + STATE + 4 * q, head_dim, is_part)

    return kernel(*ATTEND_TYPES, name=f"attend{n}_{kv.name}")(attend)


@jit
def combine_parts(out, parts, n_parts, head_dim):
    """out [head_dim] = the attention that `n_parts` parts of a context give together."""
    step, top, total = 4 * head_dim + PART_STATE, np.float32(-np.inf), np.float32(0)
    for part in range(n_parts):
        top = max(top, load_f32(parts + part * step + 4 * head_dim))
    for i in range(0, head_dim, 16):
        store_f32x16(out + 4 * i, splat_f32x16(np.float32(0)))
    for part in range(n_parts):
        at = parts + part * step
        factor = np.float32(np.exp(load_f32(at + 4 * head_dim) - top))
        total += load_f32(at + 4 * head_dim + 4) * factor
        for i in range(0, head_dim, 16):
            store_f32x16(out + 4 * i, fma(load_f32x16(at + 4 * i), splat_f32x16(factor), load_f32x16(out + 4 * i)))
    inverse = splat_f32x16(np.float32(1) / total)
    for i in range(0, head_dim, 16):
        store_f32x16(out + 4 * i, load_f32x16(out + 4 * i) * inverse)


_attends: dict[tuple[int, str], Kernel] = {}


def attend_kernel(n: int, kv: KVFormat) -> Kernel:
    """The kernel for `n` (of SIZES) queries at once over a ring of this format."""
    if (n, kv.name) not in _attends:
        _attends[n, kv.name] = make_attend(n, kv)
    return _attends[n, kv.name]
