"""What the system says of its processors, in folders that look like those of other machines."""

import math
import os
from pathlib import Path

import psutil
import pytest

from llmq import cores
from llmq.cores import CACHE_BYTES, cgroup_quota, cpu_name, last_cache_bytes, usable_cores


@pytest.fixture
def cpus(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Eight processors may be used; a test may take some out."""
    allowed = list(range(8))
    monkeypatch.setattr(cores, "allowed_cpus", lambda: allowed)
    return allowed


def write(root: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text + "\n")


def siblings(*groups: str) -> dict[str, str]:
    """Files of processors 0, 1 ... with the group that each is in."""
    return {f"sys/devices/system/cpu/cpu{i}/topology/thread_siblings_list": text for i, text in enumerate(groups)}


PAIRS = siblings(*("0,4", "1,5", "2,6", "3,7") * 2)
NEIGHBOURS = siblings("0-1", "0-1", "2-3", "2-3", "4-5", "4-5", "6-7", "6-7")
# Two fast cores with two threads each, four efficient cores.
HYBRID = siblings("0-1", "0-1", "2-3", "2-3", "4", "5", "6", "7")


@pytest.mark.parametrize(
    ("topology", "allowed", "expected"),
    [
        (PAIRS, range(8), 4),
        (PAIRS, [0, 1, 2, 3], 4),
        (PAIRS, [0, 4], 1),
        (PAIRS, [3], 1),
        (NEIGHBOURS, range(8), 4),
        (NEIGHBOURS, [0, 1, 2, 3], 2),
        (HYBRID, range(8), 6),
        (HYBRID, [4, 5, 6, 7], 4),
    ],
)
def test_threads_of_a_core_count_once(tmp_path, cpus, topology, allowed, expected) -> None:
    write(tmp_path, topology)
    cpus[:] = allowed
    assert usable_cores(tmp_path) == expected


@pytest.mark.parametrize(("physical", "expected"), [(4, 4), (16, 8), (None, 8)])
@pytest.mark.usefixtures("cpus")
def test_a_system_that_says_nothing_of_siblings(tmp_path, monkeypatch, physical, expected) -> None:
    monkeypatch.setattr(psutil, "cpu_count", lambda logical: 8 if logical else physical)
    assert usable_cores(tmp_path) == expected


V2 = {"proc/self/cgroup": "0::/user.slice/job"}
V1 = {"proc/self/cgroup": "12:memory:/m\n4:cpu,cpuacct:/docker/abc\n0::/"}


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({}, math.inf),
        (V2, math.inf),
        (V2 | {"sys/fs/cgroup/user.slice/job/cpu.max": "max 100000"}, math.inf),
        (V2 | {"sys/fs/cgroup/user.slice/job/cpu.max": "150000 100000"}, 1.5),
        (V2 | {"sys/fs/cgroup/user.slice/cpu.max": "300000 100000"}, 3),
        (
            V2
            | {"sys/fs/cgroup/user.slice/cpu.max": "200000 100000"}
            | {"sys/fs/cgroup/user.slice/job/cpu.max": "25000 50000"},
            0.5,
        ),
        # In a container the path is that of the host, and the folder itself is at the top.
        (V2 | {"sys/fs/cgroup/cpu.max": "400000 100000"}, 4),
        ({"proc/self/cgroup": "0::/../../other", "sys/fs/cgroup/cpu.max": "400000 100000"}, 4),
        (V2 | {"sys/fs/cgroup/user.slice/job/cpu.max": "nonsense"}, math.inf),
        (V2 | {"sys/fs/cgroup/user.slice/job/cpu.max": "0 0"}, math.inf),
        (V1, math.inf),
        (
            V1
            | {"sys/fs/cgroup/cpu,cpuacct/docker/abc/cpu.cfs_quota_us": "-1"}
            | {"sys/fs/cgroup/cpu,cpuacct/docker/abc/cpu.cfs_period_us": "100000"},
            math.inf,
        ),
        (
            V1
            | {"sys/fs/cgroup/cpu,cpuacct/docker/abc/cpu.cfs_quota_us": "250000"}
            | {"sys/fs/cgroup/cpu,cpuacct/docker/abc/cpu.cfs_period_us": "100000"},
            2.5,
        ),
        (
            V1
            | {"sys/fs/cgroup/cpu,cpuacct/cpu.cfs_quota_us": "100000"}
            | {"sys/fs/cgroup/cpu,cpuacct/cpu.cfs_period_us": "100000"},
            1,
        ),
    ],
)
def test_quotas(tmp_path, files, expected) -> None:
    write(tmp_path, files)
    assert cgroup_quota(tmp_path) == expected


@pytest.mark.parametrize(("quota", "expected"), [(50, 1), (100, 1), (140, 1), (150, 2), (260, 3), (390, 4), (900, 4)])
@pytest.mark.usefixtures("cpus")
def test_a_quota_bounds_the_cores(tmp_path, quota, expected) -> None:
    write(tmp_path, PAIRS | {"proc/self/cgroup": "0::/", "sys/fs/cgroup/cpu.max": f"{quota} 100"})
    assert usable_cores(tmp_path) == expected


def caches(shared: list[str], size: str) -> dict[str, str]:
    files = {}
    for i, group in enumerate(shared):
        folder = f"sys/devices/system/cpu/cpu{i}/cache"
        files |= {f"{folder}/index0/size": "48K", f"{folder}/index0/shared_cpu_list": str(i)}
        files |= {f"{folder}/index3/size": size, f"{folder}/index3/shared_cpu_list": group}
    return files


def test_the_last_caches_are_added_up(tmp_path, cpus) -> None:
    write(tmp_path, caches(["0-3"] * 4 + ["4-7"] * 4, "16384K"))
    assert last_cache_bytes(tmp_path) == 32 << 20
    cpus[:] = [0, 1]
    assert last_cache_bytes(tmp_path) == 16 << 20
    assert last_cache_bytes(tmp_path / "nowhere") == CACHE_BYTES


def test_names(tmp_path) -> None:
    write(tmp_path, {"proc/cpuinfo": "processor\t: 0\nmodel name\t: Some   Processor 9 \nmodel name\t: Other"})
    assert cpu_name(tmp_path) == "Some Processor 9"
    assert cpu_name(tmp_path / "nowhere")


def test_this_machine() -> None:
    assert 1 <= usable_cores() <= len(cores.allowed_cpus()) <= (os.cpu_count() or 1)
    assert last_cache_bytes() > 0


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="affinity is Linux's")
def test_affinity_counts() -> None:
    before = os.sched_getaffinity(0)
    try:
        os.sched_setaffinity(0, {min(before)})
        assert cores.allowed_cpus() == [min(before)]
        assert usable_cores() == 1
    finally:
        os.sched_setaffinity(0, before)
