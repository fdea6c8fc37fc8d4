"""Downloads onto a disk that is too small, or that fills up: refused before the first byte where that can be known,
otherwise with a sentence; and with room again the next run goes on.
"""

import json
import os
import random
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hub import Hub, sha256

from llmq.fetcher import CHUNK
from llmq.files import SPARE_SHARE

DATA = random.Random(6).randbytes(4 * CHUNK + 1000)
PAGE = 4096

# Runs in a process of its own, which may set limits to itself and mount things that nobody else sees.
FETCH = """
import json, os, resource, subprocess, sys
from pathlib import Path
from llmq.errors import LlmqError
from llmq.fetcher import Limits, Remote
from llmq.http import Request
from llmq.transfer import fetch
url, n_bytes, sha256, folder, *sizes = sys.argv[1:]
target = Path(folder) / "model.gguf"
def attempt(name, during=lambda: None):
    remote = Remote(Request(f"{url}{name}", {}, {}), int(n_bytes), sha256)
    resumed = 0
    try:
        for step in fetch(remote, target, Limits(first_wait=0.01)):
            resumed = step.resumed
            if step.n_bytes > resumed and not step.sha256:
                during()
        error, code = "", 0
    except LlmqError as caught:
        error, code = str(caught), caught.exit_code
    digest = sha256_of(target) if target.exists() else ""
    files = sorted(path.name for path in Path(folder).iterdir())
    return {"error": error, "code": code, "sha256": digest, "resumed": resumed, "files": files}
def sha256_of(path):
    import hashlib
    return hashlib.sha256(path.read_bytes()).hexdigest()
def mount(option):
    subprocess.run(["mount", "-t", "tmpfs", "-o", option, "tmpfs", folder], check=True)
"""
SMALL_DISKS = """
for size in sizes:
    mount(f"size={size}")
    first = attempt(f"first-{size}")
    mount("remount,size=64M")
    print(json.dumps([int(size), first, attempt(f"second-{size}")]))
    subprocess.run(["umount", folder], check=True)
"""
FULL_DISK = """
def fill():
    with contextlib.suppress(OSError), open(Path(folder) / "filler", "ab", buffering=0) as file:
        while True:
            file.write(bytes(4096))
import contextlib
mount(f"size={sizes[0]}")
first = attempt("first", fill)
(Path(folder) / "filler").unlink()
print(json.dumps([int(sizes[0]), first, attempt("second")]))
subprocess.run(["umount", folder], check=True)
"""
LIMITED = """
hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
for size in sizes:
    resource.setrlimit(resource.RLIMIT_FSIZE, (int(size), hard))
    first = attempt(f"first-{size}")
    resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
    print(json.dumps([int(size), first, attempt(f"second-{size}")]))
    target.unlink()
"""


def run(hub: Hub, folder: Path, program: str, sizes: list[int], mounts: bool) -> list[tuple[int, Any, Any]]:
    """For each size, what came of the first attempt and of the second, which has room."""
    for name in ("first", "second", *(f"{name}-{size}" for name in ("first", "second") for size in sizes)):
        url = hub.add("org/model", name, DATA).removesuffix(name)
    command = [sys.executable, "-c", FETCH + program, url, str(len(DATA)), sha256(DATA), str(folder)]
    done = subprocess.run(
        [*(["unshare", "-rm"] if mounts else []), *command, *map(str, sizes)],
        check=False,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.stderr == ""
    return [json.loads(line) for line in done.stdout.splitlines()]


def check(size: int, first: Any, second: Any) -> None:
    """`first` may have failed, for want of room."""
    if first["code"]:
        assert first["code"] == 3
        assert first["error"].endswith("make room or give another folder")
        assert "model.gguf" not in first["files"]
    else:
        assert first["sha256"] == sha256(DATA)
    assert (second["code"], second["sha256"], second["files"]) == (0, sha256(DATA), ["model.gguf"]), size


def was_asked(hub: Hub, name: str) -> bool:
    return any(seen.path.endswith(f"/{name}") for seen in hub.seen)


@pytest.fixture
def mounts(tmp_path: Path) -> None:
    command = ["unshare", "-rm", "mount", "-t", "tmpfs", "tmpfs", str(tmp_path)]
    if not shutil.which("unshare") or subprocess.run(command, check=False, capture_output=True).returncode:
        pytest.skip("cannot mount a file system of its own")


@pytest.mark.usefixtures("mounts")
@pytest.mark.parametrize("n_sizes", [8, pytest.param(64, marks=pytest.mark.slow)])
def test_disks_of_all_sizes(hub: Hub, tmp_path: Path, n_sizes: int) -> None:
    """From a page, as 0 would be no limit, to 5 % more than the file has."""
    sizes = [max(int(1.05 * len(DATA) * i / (n_sizes - 1)) // PAGE, 1) * PAGE for i in range(n_sizes)]
    needed = (1 + SPARE_SHARE) * len(DATA)
    results = run(hub, tmp_path, SMALL_DISKS, sizes, mounts=True)
    assert [size for size, _, _ in results] == sizes
    for size, first, second in results:
        check(size, first, second)
        assert bool(first["code"]) == (size < needed + PAGE)
        if first["code"]:
            assert first["files"] == []
            assert not was_asked(hub, f"first-{size}")


@pytest.mark.usefixtures("mounts")
def test_a_disk_that_fills_up(hub: Hub, tmp_path: Path) -> None:
    hub.bytes_per_second = 10e6
    ((size, first, second),) = run(hub, tmp_path, FULL_DISK, [2 * len(DATA) // PAGE * PAGE], mounts=True)
    check(size, first, second)
    assert first["code"] == 3
    assert second["resumed"] > 0


@pytest.mark.skipif(os.name == "nt", reason="no such limits")
def test_limits_to_the_size_of_files(hub: Hub, tmp_path: Path) -> None:
    sizes = [*random.Random(7).sample(range(1, len(DATA)), 16), 0, 200, len(DATA) - 1, len(DATA)]
    for size, first, second in run(hub, tmp_path, LIMITED, sizes, mounts=False):
        check(size, first, second)
        assert bool(first["code"]) == (size < len(DATA))
        assert first["files"] == ([] if first["code"] else ["model.gguf"])
        assert was_asked(hub, f"first-{size}") == (size == len(DATA))
