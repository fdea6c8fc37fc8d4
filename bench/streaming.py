"""What memory gives: a compiled loop that adds up every byte, each thread its own half or share.

Two streams a thread read faster than one, and both faster than NumPy's sum, which with one thread is bound by its
additions.
"""

import hashlib
import threading
import time
from pathlib import Path

import numpy as np
from numba import types

from llmq.jit import kernel
from llmq.simd import load_i32x16, splat_i32x16, store_i32x16
from llmq.team import aligned

# The kernel cache is named after llmq's sources; this file is none of them.
STAMP = hashlib.sha256(Path(__file__).read_bytes()).hexdigest()[:12]


@kernel(*(types.int64,) * 3, name=f"bench_sweep_{STAMP}")
def sweep(out, at, n_bytes):
    """out i32x16 = the sum of all 64-byte vectors from `at` on; a rest of less than 256 bytes is left out."""
    half = n_bytes // 256 * 128
    a = splat_i32x16(0)
    b, c, d = a, a, a
    for i in range(0, half, 128):
        a = a + load_i32x16(at + i)
        b = b + load_i32x16(at + i + 64)
        c = c + load_i32x16(at + half + i)
        d = d + load_i32x16(at + half + i + 64)
    store_i32x16(out, a + b + (c + d))


def bytes_per_second(data: np.ndarray, n_threads: int) -> float:
    """One sweep over contiguous `data` by as many threads."""
    sweep.prepare()
    parts = np.array_split(data.reshape(-1).view(np.uint8), n_threads)
    sums = [aligned(64) for _ in parts]
    jobs = [(s.ctypes.data, part.ctypes.data, part.size) for s, part in zip(sums, parts, strict=True)]
    threads = [threading.Thread(target=sweep, args=job) for job in jobs]
    start = time.perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return data.nbytes / (time.perf_counter() - start)
