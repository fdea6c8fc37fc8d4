"""What a processor's dot-product unit can do: the peak that matrix products are a share of.

    python bench/peak.py [--threads 1 2] [--rounds 7]

The loop that `llmq bench` measures a core with, in all threads at once, in 10^9 multiply-adds a second. The clock is
measured by a chain of shifts and exclusive ors, two cycles a link. For another instruction set than the processor's
widest:

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
from llmq.kernels.probe import SUMS, WORKING_SET, repeat_dots
from llmq.simd import ISA, store_i64
from llmq.team import aligned

# The kernel cache is named after llmq's sources; this file is none of them.
STAMP = hashlib.sha256(Path(__file__).read_bytes()).hexdigest()[:12]
DOTS, LINKS = 10_000_000, 100_000_000


@kernel(*(types.int64,) * 3, name=f"bench_chain_{STAMP}")
def chain(out, x, n):
    """n times a shift and an exclusive or that wait for each other."""
    value = x
    for _ in range(n):
        value ^= value >> 7
    store_i64(out, value)


def seconds(work: Kernel, n: int, n_threads: int) -> float:
    """All threads do the same, each in memory of its own."""
    memory = [(aligned(64 * SUMS), aligned(WORKING_SET)) for _ in range(n_threads)]
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
    for work in repeat_dots, chain:
        work.prepare()
    for n_threads in arguments.threads:
        rates, clocks = [], []
        for _ in range(arguments.rounds):
            rates.append(DOTS * SUMS * 64 * n_threads / seconds(repeat_dots, DOTS, n_threads) / 1e9)
            clocks.append(LINKS * 2 / seconds(chain, LINKS, n_threads) / 1e9)
        rate, clock = statistics.median(rates), statistics.median(clocks)
        each = rate / n_threads / clock
        print(  # noqa: T201
            f"{ISA}, {n_threads} threads: {rate:.0f} GMAC/s (best {max(rates):.0f}), "
            f"{each:.0f} a cycle and thread at {clock:.2f} GHz"
        )


if __name__ == "__main__":
    main()
