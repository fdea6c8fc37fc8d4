"""What measuring a machine takes: threads that read memory, and a core that multiplies bytes."""

import numpy as np
from numba import types

from llmq.jit import jit, kernel
from llmq.simd import (
    ISA,
    add_lanes_i32x16,
    load_i32x16,
    load_i64,
    load_u8x64,
    splat_i32x16,
    tile_dot_u7,
    tile_i32,
    tile_store,
)
from llmq.team import fetch_add

CHUNK = 1 << 20
# Offsets of a job's words: what threads write lies on cache lines of its own.
TAKEN, TOTAL, ADDRESS, N_CHUNKS = 0, 64, 128, 136
READ_JOB = np.dtype(
    {
        "names": ["taken", "total", "address", "n_chunks"],
        "formats": [np.int64] * 4,
        "offsets": [TAKEN, TOTAL, ADDRESS, N_CHUNKS],
    }
)

# Independent sums that cover the latency of a dot product; they fit the registers.
SUMS = 12 if ISA == "avx512vnni" else 4
# One vector of weights, and those that it is multiplied with, of eight steps in turn.
WORKING_SET = 64 + 8 * 64 * SUMS


@jit
def sum_words(at, n_bytes):
    """Sum of the 32-bit words at `at`, of both halves side by side, in four chains; n_bytes is a multiple of 256.

    Two streams a thread are read faster than one.
    """
    half = n_bytes // 2
    zero = splat_i32x16(np.int32(0))
    a, b, c, d = zero, zero, zero, zero
    for i in range(at, at + half, 128):
        a = a + load_i32x16(i)
        b = b + load_i32x16(i + 64)
        c = c + load_i32x16(i + half)
        d = d + load_i32x16(i + half + 64)
    return add_lanes_i32x16((a + b) + (c + d))


@kernel(types.int64, types.int64, name="read_chunks")
def read_chunks(job, thread):  # noqa: ARG001
    """READ_JOB: threads take chunks from a counter, as they take strips of weights; total += the sum of all words."""
    at, n_chunks = load_i64(job + ADDRESS), load_i64(job + N_CHUNKS)
    chunk = fetch_add(job + TAKEN, 1)
    while chunk < n_chunks:
        fetch_add(job + TOTAL, sum_words(at + chunk * CHUNK, CHUNK))
        chunk = fetch_add(job + TAKEN, 1)


@kernel(types.int64, types.int64, types.int64, name="repeat_dots")
def repeat_dots(out, x, n_steps):
    """out [SUMS][16] i32: dot products of bytes and little else, on WORKING_SET bytes that stay in the cache."""
    weights, acc = load_u8x64(x), tile_i32(SUMS)
    for step in range(n_steps):
        acc = tile_dot_u7(acc, weights, x + 64 + (step & 7) * 64 * SUMS, 64)
    tile_store(out, 64, acc)
