"""A machine's figures: what they mean for the number of threads, and how they are remembered between runs.

They are measured in machine.py, which needs the compiler; whoever finds them remembered does not.
"""

import contextlib
import dataclasses
import hashlib
import json
import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llvmlite import binding

from llmq.cores import allowed_cpus, cgroup_quota, cpu_name
from llmq.files import open_private, write_atomically
from llmq.store import cache_root

# Figures count as long as what is measured stays the same: another number for every change of that.
MEASUREMENT = 2

# Fewer threads than cores are chosen only where all cores lose this much, and then the least that come this close.
CLEAR_LOSS, CLOSE = 0.9, 0.97
DAY = 86_400.0
# What was measured in a busy moment must not count for ever; fewer threads than cores are looked at again soon.
LIFETIME, LIFETIME_OF_FEWER = 30 * DAY, DAY


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


def machines_folder() -> Path | None:
    """Where figures are kept, a file for each machine that shares the folder; None where it is not private."""
    return open_private(cache_root().parent / "machines")


def code_target() -> tuple[str | None, ...]:
    """What code is generated for: the processor as LLVM sees it, unless the environment names another."""
    forced = os.environ.get("NUMBA_CPU_NAME"), os.environ.get("NUMBA_CPU_FEATURES")
    return binding.get_host_cpu_name(), binding.get_host_cpu_features().flatten(), *forced


def machine_key(n_cores: int) -> str:
    """What must be the same for figures to count: processor, cores, affinity and quota, and what is measured how."""
    known = (MEASUREMENT, cpu_name(), code_target(), os.cpu_count(), allowed_cpus(), n_cores, cgroup_quota())
    return hashlib.sha256(repr(known).encode()).hexdigest()


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
