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

from numba import types

from llmq.jit import Kernel, kernel
from llmq.simd import ISA, dot_u7s8, load_i8x64, load_u8x64, splat_i32x16, store_i32x16, store_i64
from llmq.team import aligned

# The kernel cache is named after llmq's sources; this file is none of them.
STAMP = hashlib.sha256(Path(__file__).read_bytes()).hexdigest()[:12]
WIDE = ISA == "avx512vnni"  # a sum is one register, else two or four
IN_REGISTERS = ISA in ("avx512vnni", "avxvnni")
SUMS = 12 if WIDE else 5
DOTS, LINKS = 10_000_000, 100_000_000


@kernel(*(types.int64,) * 3, name=f"bench_dots_{STAMP}")
def dots(out, x, n):
    """n times SUMS dot products of 64 bytes; x has 4 KiB."""
    u = load_u8x64(x)
    a0 = splat_i32x16(0)
    a1, a2, a3, a4, a5, a6, a7, a8, a9, a10, a11 = a0, a0, a0, a0, a0, a0, a0, a0, a0, a0, a0
    for i in range(n):
        at = x if IN_REGISTERS else x + 512 * (i & 7)
        a0 = dot_u7s8(a0, u, load_i8x64(at))
        a1 = dot_u7s8(a1, u, load_i8x64(at + 64))
        a2 = dot_u7s8(a2, u, load_i8x64(at + 128))
        a3 = dot_u7s8(a3, u, load_i8x64(at + 192))
        a4 = dot_u7s8(a4, u, load_i8x64(at + 256))
        if WIDE:
            a5 = dot_u7s8(a5, u, load_i8x64(at + 320))
            a6 = dot_u7s8(a6, u, load_i8x64(at + 384))
            a7 = dot_u7s8(a7, u, load_i8x64(at + 448))
            a8 = dot_u7s8(a8, u, load_i8x64(at + 512))
            a9 = dot_u7s8(a9, u, load_i8x64(at + 576))
            a10 = dot_u7s8(a10, u, load_i8x64(at + 640))
            a11 = dot_u7s8(a11, u, load_i8x64(at + 704))
    total = a0 + a1 + a2 + a3 + a4 + a5 + (a6 + a7 + a8 + a9 + a10 + a11)
    store_i32x16(out, total)


@kernel(*(types.int64,) * 3, name=f"bench_chain_{STAMP}")
def chain(out, x, n):
    """n times a shift and an exclusive or that wait for each other."""
    value = x
    for _ in range(n):
        value ^= value >> 7
    store_i64(out, value)


def seconds(work: Kernel, n: int, n_threads: int) -> float:
    """All threads do the same, each in memory of its own."""
    memory = [(aligned(64), aligned(4096)) for _ in range(n_threads)]
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
