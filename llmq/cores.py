"""The processor as this process may use it: physical cores, time quota, cache, name.

Sources: the Linux kernel's documentation of `/sys/devices/system/cpu`, `cpu.max` (cgroup v2), `cpu.cfs_quota_us` (v1).
"""

import math
import os
import platform
from pathlib import Path

import psutil

from llmq.cgroup import cgroup_folders, read_text

# What is told before a machine is measured.
MEASURING = "measuring this machine"

# Where the system does not say how large its last cache is: more than a laptop has.
CACHE_BYTES = 32 << 20


def allowed_cpus() -> list[int]:
    """Numbers of the logical processors that this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return sorted(os.sched_getaffinity(0))
    return list(range(os.cpu_count() or 1))


def usable_cores(root: Path = Path("/")) -> int:
    """Physical cores among the allowed processors, efficient ones too, within the cgroup's quota; at least 1."""
    cpus = allowed_cpus()
    threads = [read_text(root / f"sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list") for cpu in cpus]
    # Processors that share a core name the same siblings.
    cores = len(set(threads)) if all(threads) else min(psutil.cpu_count(logical=False) or len(cpus), len(cpus))
    # Rounded: with a thread too many all stand still at the end of each period, with one too few half a core is lost.
    return max(1, math.floor(min(cores, cgroup_quota(root)) + 0.5))


def cgroup_quota(root: Path = Path("/")) -> float:
    """Processors' worth of time that the cgroup and those above it allow; infinite where there is no limit."""
    v2, v1 = cgroup_folders("cpu", root)
    return min([math.inf, *map(_quota_v2, v2), *map(_quota_v1, v1)])


def _quota_v2(folder: Path) -> float:
    quota, _, period = read_text(folder / "cpu.max").partition(" ")
    return _share(quota, period)


def _quota_v1(folder: Path) -> float:
    return _share(read_text(folder / "cpu.cfs_quota_us"), read_text(folder / "cpu.cfs_period_us"))


def _share(quota: str, period: str) -> float:
    if not quota.isdecimal() or not period.isdecimal() or int(quota) == 0 or int(period) == 0:
        return math.inf
    return int(quota) / int(period)


def last_cache_bytes(root: Path = Path("/")) -> int:
    """Bytes of all last-level caches of the allowed processors, CACHE_BYTES where the system does not say."""
    found: dict[str, int] = {}
    for cpu in allowed_cpus():
        levels = sorted((root / f"sys/devices/system/cpu/cpu{cpu}/cache").glob("index[0-9]"))
        size = read_text(levels[-1] / "size") if levels else ""
        if size.endswith("K") and size[:-1].isdecimal():
            found[read_text(levels[-1] / "shared_cpu_list")] = int(size[:-1]) << 10
    return sum(found.values()) or CACHE_BYTES


def cpu_name(root: Path = Path("/")) -> str:
    """The model of the processor in its maker's words, as far as the system tells."""
    for line in read_text(root / "proc/cpuinfo").splitlines():
        key, _, value = line.partition(":")
        if key.strip() == "model name":
            return " ".join(value.split())
    return platform.processor() or platform.machine()
