"""What a processor's dot-product unit can do: the peak that matrix products are a share of.

    python bench/peak.py [--threads 1 2] [--rounds 7]

A loop of nothing but integer dot products of bytes, in as many independent sums as cover their latency, in 10^9
multiply-adds a second. With VNNI every operand is in a register; on AVX2 (two multiplications and an addition) one
comes from the first-level cache, as the compiler would take a loop of constants apart. The clock is measured by a chain
of shifts and exclusive ors, two cycles a link. For another instruction set than the processor's widest:

    NUMBA_CPU_NAME=haswell NUMBA_CPU_FEATURES=+avx2,+fma,+f16c python bench/peak.py
"""

import argparse
import hashlib
import os
import statistics
import threading
import time
from pathlib import Path
from typing import Any

from llvmlite import ir
from numba import types

from llmq.jit import Kernel, kernel
from llmq.simd import ADDRESS, I64, ISA, ll, load_i8x64, load_u8x64, pointer, store_i64, tile_i32, tile_store
from llmq.simd.dot import dot_small
from llmq.simd.tile import _each
from llmq.simd.vector import i8x64, u8x64
from llmq.team import aligned

# The kernel cache is named after llmq's sources; this file is none of them.
STAMP = hashlib.sha256(Path(__file__).read_bytes()).hexdigest()[:12]
HAS_VNNI = ISA in ("avx512vnni", "avxvnni")
SUMS = 16 if ISA == "avx512vnni" else 5  # registers of 64 bytes, or pairs of 32
DOTS, LINKS = 8_000_000, 100_000_000


def _dot_at(b: Any, i: int, acc: Any, u: Any, at: Any) -> Any:
    there = b.add(at, ir.Constant(I64, 64 * i))
    return dot_small(b, acc, u, b.load(pointer(b, there, ll(i8x64)), align=64))


tile_dot = _each(lambda b, _i, acc, u, s: dot_small(b, acc, u, s), (u8x64, i8x64))
tile_dot_at = _each(_dot_at, (u8x64, ADDRESS))


@kernel(*(types.int64,) * 3, name=f"bench_dots_{STAMP}")
def dots(out, x, n):
    """n times SUMS dot products of 64 bytes; x has 4 KiB."""
    u, s = load_u8x64(x), load_i8x64(x + 64)
    sums = tile_i32(SUMS)
    for i in range(n):
        if HAS_VNNI:
            sums = tile_dot(sums, u, s)
        else:
            sums = tile_dot_at(sums, u, x + 512 * (i & 7))
    tile_store(out, 64, sums)


@kernel(*(types.int64,) * 3, name=f"bench_chain_{STAMP}")
def chain(out, x, n):
    """n times a shift and an exclusive or that wait for each other."""
    value = x
    for _ in range(n):
        value ^= value >> 7
    store_i64(out, value)


def seconds(work: Kernel, n: int, n_threads: int) -> float:
    """All threads do the same, each in memory of its own."""
    memory = [(aligned(64 * SUMS), aligned(4096)) for _ in range(n_threads)]
    threads = [threading.Thread(target=work, args=(a.ctypes.data, b.ctypes.data, n)) for a, b in memory]
    start = time.perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, nargs="+", default=sorted({1, len(os.sched_getaffinity(0))}))
    parser.add_argument("--rounds", type=int, default=7)
    arguments = parser.parse_args()
    for work in dots, chain:
        work.prepare()
    for n_threads in arguments.threads:
        rates, clocks = [], []
        for _ in range(arguments.rounds):
            rates.append(DOTS * SUMS * 64 * n_threads / seconds(dots, DOTS, n_threads) / 1e9)
            clocks.append(LINKS * 2 / seconds(chain, LINKS, n_threads) / 1e9)
        rate, clock = statistics.median(rates), statistics.median(clocks)
        each = rate / n_threads / clock
        print(  # noqa: T201
            f"{ISA}, {n_threads} threads: {rate:.0f} GMAC/s (best {max(rates):.0f}), "
            f"{each:.0f} a cycle and thread at {clock:.2f} GHz"
        )


if __name__ == "__main__":
    main()
