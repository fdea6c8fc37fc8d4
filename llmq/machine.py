"""What this machine gives: how fast its threads read memory together, and how fast a core multiplies bytes.

Measured in about a second, once, and remembered in the cache folder for as long as the machine stays the same. Memory
bounds decode and products bound prefill, so both figures together say what to expect of a model.
"""

import contextlib
import dataclasses
import hashlib
import json
import math
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from llmq.cores import MEASURING, allowed_cpus, cgroup_quota, cpu_name, last_cache_bytes, usable_cores
from llmq.files import open_private, write_atomically
from llmq.jit import cache_root, codegen_target
from llmq.kernels.probe import CHUNK, READ_JOB, SUMS, WORKING_SET, read_chunks, repeat_dots
from llmq.team import Team, aligned

# Fewer threads than cores are chosen only where all cores lose this much, and then the least that come this close.
CLEAR_LOSS, CLOSE = 0.9, 0.97
DAY = 86_400.0
# What was measured in a busy moment must not count for ever; fewer threads than cores are looked at again soon.
LIFETIME, LIFETIME_OF_FEWER = 30 * DAY, DAY

# Larger than the caches, and little beside what a model takes.
STREAM_BYTES, MOST_BYTES = 128 << 20, 1 << 30
LEAST_ROUNDS, ROUNDS, MOST_ROUNDS, SECONDS = 2, 8, 16, 0.6
DOT_STEPS = 128 << 10


@dataclass(frozen=True, slots=True)
class Machine:
    """`read_rates` has the streaming read rate (10^9 bytes a second) of 1, 2, 4 ... and of all `n_cores` threads;
    `dot_rate` is in 10^9 multiply-adds of bytes a second, for one core; `measured` in seconds since 1970.
    """

    n_cores: int
    read_rates: dict[int, float]
    dot_rate: float
    measured: float

    @property
    def read_rate(self) -> float:
        """The best of them: the memory limit."""
        return max(self.read_rates.values())

    @property
    def n_threads(self) -> int:
        """One thread for each core, unless memory is clearly read faster by fewer."""
        return choose_threads(self.read_rates)


def choose_threads(read_rates: dict[int, float]) -> int:
    """Of the thread counts whose rates these are; the largest is the number of cores."""
    best, n_cores = max(read_rates.values()), max(read_rates)
    if read_rates[n_cores] >= CLEAR_LOSS * best:
        return n_cores
    return min(n for n, rate in read_rates.items() if rate >= CLOSE * best)


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


# ---- remembering
def machines_folder() -> Path | None:
    """Where figures are kept, a file for each machine that shares the folder; None where it is not private."""
    return open_private(cache_root().parent / "machines")


def machine_key(n_cores: int) -> str:
    """What must be the same for figures to count: processor, cores, affinity and quota, and what is measured how."""
    known = (READ_JOB.names, CHUNK, DOT_STEPS, cpu_name(), codegen_target(), os.cpu_count(), allowed_cpus(), n_cores)
    return hashlib.sha256(repr((*known, cgroup_quota())).encode()).hexdigest()


def remember(folder: Path, machine: Machine) -> None:
    key = machine_key(machine.n_cores)
    content = dataclasses.asdict(machine) | {"key": key, "cpu": cpu_name()}
    content["read_rates"] = {str(n): rate for n, rate in machine.read_rates.items()}
    text = json.dumps({"check": _check(content), **content}, indent=1) + "\n"
    with contextlib.suppress(OSError):  # measured again next time
        write_atomically(folder / f"{key[:20]}.json", text.encode())


def remembered(folder: Path, n_cores: int) -> Machine | None:
    """Figures of this machine that are still young enough, or None; a damaged file is as none."""
    key = machine_key(n_cores)
    try:
        content = json.loads((folder / f"{key[:20]}.json").read_bytes())
        check = content.pop("check")
    except (OSError, ValueError, RecursionError, AttributeError, KeyError, TypeError):
        return None
    if check != _check(content) or content["key"] != key:
        return None
    rates = {int(n): rate for n, rate in content["read_rates"].items()}
    machine = Machine(content["n_cores"], rates, content["dot_rate"], content["measured"])
    lifetime = LIFETIME if machine.n_threads == n_cores else LIFETIME_OF_FEWER
    return machine if 0 <= time.time() - machine.measured < lifetime else None


def _check(content: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
