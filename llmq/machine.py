"""What this machine gives: how fast its threads read memory together, and how fast a core multiplies bytes.

Measured in about a second, once, and remembered in the cache folder for as long as the machine stays the same. Memory
bounds decode and products bound prefill, so both figures together say what to expect of a model.
"""

import math
import time
from collections.abc import Callable

import numpy as np
import psutil

from llmq.cores import MEASURING, last_cache_bytes, usable_cores
from llmq.figures import Machine, choose_threads, machines_folder, remember, remembered
from llmq.kernels.probe import CHUNK, READ_JOB, SUMS, WORKING_SET, read_chunks, repeat_dots
from llmq.team import Team, aligned

# Larger than the caches, and little beside what a model takes.
STREAM_BYTES, MOST_BYTES = 128 << 20, 1 << 30
LEAST_ROUNDS, ROUNDS, MOST_ROUNDS, SECONDS = 2, 8, 16, 0.6
DOT_STEPS = 128 << 10


def default_threads(on_event: Callable[[str], None] | None) -> int:
    """Threads for a model where nobody says how many; measures if it has to, and then tells MEASURING."""
    n_cores = usable_cores()
    folder = machines_folder()
    if n_cores == 1 or folder is None:
        return n_cores
    return (remembered(folder, n_cores) or measure_and_remember(n_cores, on_event)).n_threads


def measure_and_remember(n_cores: int, on_event: Callable[[str], None] | None) -> Machine:
    if on_event:
        on_event(MEASURING)
    machine = measure(n_cores)
    folder = machines_folder()
    if folder:
        remember(folder, machine)
    return machine


# ---- measuring
def thread_counts(n_cores: int) -> list[int]:
    """1, 2, 4 ... and n_cores."""
    return sorted({n_cores, *(1 << i for i in range(n_cores.bit_length()) if 1 << i < n_cores)})


def measure(n_cores: int) -> Machine:
    dot_rate = measure_dots()
    size = min(max(STREAM_BYTES, 4 * last_cache_bytes()), MOST_BYTES, psutil.virtual_memory().available // 4)
    stream = np.full(max(1, size // CHUNK) * CHUNK, 1, np.uint8)
    return Machine(n_cores, measure_reads(stream, n_cores), dot_rate, time.time())


def measure_reads(stream: np.ndarray, n_cores: int) -> dict[int, float]:
    """Best of several rounds each, so that what else runs does not count; more rounds before fewer threads win."""
    rates = dict.fromkeys(thread_counts(n_cores), 0.0)
    start, rounds = time.perf_counter(), 0
    while rounds < LEAST_ROUNDS or time.perf_counter() - start < SECONDS:
        if rounds >= (ROUNDS if choose_threads(rates) == n_cores else MOST_ROUNDS):
            break
        rates = {n: max(rate, measure_read(stream, n)) for n, rate in rates.items()}
        rounds += 1
    return rates


def measure_read(stream: np.ndarray, n_threads: int) -> float:
    """10^9 bytes a second that a team reads from `stream` (uint8, whole chunks)."""
    job = np.zeros(1, READ_JOB)
    job["address"] = stream.ctypes.data
    team = Team(n_threads, read_chunks.address, job)
    try:
        job["n_chunks"] = min(n_threads, len(stream) // CHUNK)
        team.run()  # so that the threads are there
        job["taken"], job["n_chunks"] = 0, len(stream) // CHUNK
        start = time.perf_counter()
        team.run()
        return len(stream) / (time.perf_counter() - start) / 1e9
    finally:
        team.close()


def measure_dots() -> float:
    out, x = aligned(64 * SUMS), aligned(WORKING_SET)
    x[:] = 1
    repeat_dots(out.ctypes.data, x.ctypes.data, 1)
    best = math.inf
    for _ in range(5):
        start = time.perf_counter()
        repeat_dots(out.ctypes.data, x.ctypes.data, DOT_STEPS)
        best = min(best, time.perf_counter() - start)
    return DOT_STEPS * SUMS * 64 / best / 1e9
