"""Programs that are stopped at random moments, or at a call that strace names, and calls that fail."""

import contextlib
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

# What a run may stop in the middle of. strace counts calls by thread, so each file's are counted by themselves.
CALLS = ("openat", "flock", "write", "ftruncate", "fsync", "fdatasync", "rename", "unlink")
KILLED = (-9, 137)

needs_strace = pytest.mark.skipif(shutil.which("strace") is None, reason="needs strace")

# After a program that has run(): for each line with a number of seconds, or with none, that in a process of its own,
# killed after so long.
FORK = """
import os, signal, sys, time
for line in sys.stdin:
    start = time.perf_counter()
    child = os.fork()
    if child == 0:
        os._exit(run() or 0)
    if line.strip():
        time.sleep(float(line))
        os.kill(child, signal.SIGKILL)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    print(code, time.perf_counter() - start, flush=True)
"""


@contextlib.contextmanager
def forking(program: str, *arguments: str) -> Iterator[Callable[[float | None], tuple[int, float]]]:
    """A function that runs the program's run(), for so many seconds or to its end: its code, and how long it took."""
    command = [sys.executable, "-c", program + FORK, *arguments]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as server:

        def run(seconds: float | None) -> tuple[int, float]:
            assert server.stdin is not None
            assert server.stdout is not None
            server.stdin.write(f"{'' if seconds is None else seconds}\n")
            server.stdin.flush()
            code, took = server.stdout.readline().split()
            return int(code), float(took)

        yield run


def injected(path: Path, call: str, k: int, what: str, command: list[str]) -> "subprocess.CompletedProcess[str]":
    """Runs a command whose k-th `call` on `path` does something else: "signal=KILL" or "error=ENOSPC"."""
    strace = ["strace", "-f", "-qq", "-o", "/dev/null", "-P", str(path)]
    inject = ["-e", f"trace={call}", "-e", f"inject={call}:{what}:when={k}"]
    return subprocess.run([*strace, *inject, *command], check=False, capture_output=True, text=True, timeout=120)
