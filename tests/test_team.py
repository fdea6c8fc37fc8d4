"""Threads: every job by every thread once, waiting, parking, more threads than processors, interrupts."""

import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from compiled import compiled

from llmq.jit import Kernel
from llmq.simd import load_i64, store_i64
from llmq.team import Team, fetch_add, wait_for

COUNT, WRONG, SLOTS, TAKEN = 2, 3, 4, 16  # words of a job, after the number of threads
ROUNDS = 3


@compiled
def count_jobs(job, thread):
    """Each thread counts its jobs in its own word, and all of them at COUNT."""
    at = job + 8 * SLOTS + 8 * thread
    store_i64(at, load_i64(at) + 1)
    fetch_add(job + 8 * COUNT, 1)


@compiled
def count_in_rounds(job, thread):  # noqa: ARG001
    """Nobody begins a round before all have begun the one before; WRONG collects what any of them saw otherwise."""
    n = load_i64(job)
    for r in range(ROUNDS):
        if load_i64(job + 8 * COUNT) < n * r:
            fetch_add(job + 8 * WRONG, 1)
        fetch_add(job + 8 * COUNT, 1)
        fetch_add(job + 8 * (SLOTS + r), 1)
        wait_for(job + 8 * (SLOTS + r), n)


@compiled
def take_items(job, thread):  # noqa: ARG001
    """Items 0 .. 199, each marked by whoever takes it."""
    item = fetch_add(job + 8 * COUNT, 1)
    while item < 200:
        fetch_add(job + 8 * TAKEN + 8 * item, 1)
        item = fetch_add(job + 8 * COUNT, 1)


@contextmanager
def team(n_threads: int, function: Kernel) -> Iterator[tuple[Callable[[], None], Team, np.ndarray]]:
    """What runs one job, the team, and the job: int64 words, first the number of threads."""
    job = np.zeros(256, np.int64)
    job[0] = n_threads
    made = Team(n_threads, function.address, job)
    yield made.run, made, job
    made.close()


@pytest.mark.parametrize("n_threads", [1, 2, 3, 7])
def test_every_thread_runs_every_job_once(n_threads: int) -> None:
    with team(n_threads, count_jobs) as (run, _, job):
        for n in range(1, 101):
            run()
            assert job[COUNT] == n * n_threads, "a job is over when every thread has left it"
        assert job[SLOTS : SLOTS + n_threads].tolist() == [100] * n_threads


@pytest.mark.parametrize("n_threads", [1, 2, 4])
def test_waiting_holds_everyone(n_threads: int) -> None:
    with team(n_threads, count_in_rounds) as (run, _, job):
        for _ in range(100):
            job[COUNT:] = 0
            run()
            assert job[WRONG] == 0
            assert job[COUNT] == n_threads * ROUNDS


def test_items_are_taken_once() -> None:
    with team(3, take_items) as (run, _, job):
        run()
        assert (job[TAKEN : TAKEN + 200] == 1).all()


def test_parked_threads_wake_up() -> None:
    with team(3, count_jobs) as (run, workers, job):
        for n in range(1, 4):
            run()
            assert job[COUNT] == 3 * n
            while len(workers._wake._waiters) < 2:  # a millisecond or two of spinning comes first
                threading.Event().wait(0.001)


def test_closing_ends_the_threads() -> None:
    before = threading.active_count()
    with team(4, count_jobs) as (run, _, _job):
        run()
        assert threading.active_count() == before + 3
    assert threading.active_count() == before


def run_script(code: str, *arguments: object) -> str:
    """Output of a Python script; a crash or a hang in compiled code ends only that."""
    command = [sys.executable, "-c", code, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, cwd=Path(__file__).parents[1])
    assert done.returncode == 0, done.stderr[-2000:] or f"ended with {done.returncode}"
    return done.stdout


ENGINE = """
import sys
import threading
import numpy as np
from llmq.cache import KVRing
from llmq.config import read_config
from llmq.engine.cpu import Engine
from llmq.gguf import open_gguf
from llmq.kernels.kv import F16_KV

gguf = open_gguf(sys.argv[1])
config = read_config(gguf)
running = Engine(gguf, config, int(sys.argv[2]))
ids = np.random.default_rng(0).integers(3, config.vocab_size, 40).tolist()

def logits():
    ring = KVRing(config, 512, 0, 512, F16_KV)
    for first in range(0, 40, 4):
        part = ids[first : first + 4]
        outputs = [3] if first == 36 else []
        found = running.forward(part, range(first, first + 4), [ring] * 4, outputs)
        ring.advance(4)
    return found

alone = Engine(gguf, config, 1)
running, team = alone, running
expected = logits()
running = team
"""


def test_more_threads_than_processors(tmp_path: Path) -> None:
    """Threads that lose their processor in the middle of a barrier must not see the next batch's numbers."""
    from tiny import tiny_gguf

    tiny_gguf(tmp_path / "model.gguf", n_layers=1)
    code = ENGINE + "print(sum(not np.array_equal(logits(), expected) for _ in range(15)))"
    assert run_script(code, tmp_path / "model.gguf", 4) == "0\n"


def test_an_interrupt_before_the_call(tmp_path: Path) -> None:
    """Ctrl-C in the few lines of Python between waking the workers and joining them: the next job is right again."""
    from tiny import tiny_gguf

    tiny_gguf(tmp_path / "model.gguf", n_layers=1)
    code = (
        ENGINE
        + """
class Interrupted:
    def __init__(self, lock):
        self.lock = lock
    def __enter__(self):
        self.lock.__enter__()
        running._team._wake = self.lock
        self.lock.__exit__(None, None, None)
        raise KeyboardInterrupt
    def __exit__(self, *exc):
        pass

many = np.random.default_rng(1).integers(3, config.vocab_size, 400).tolist()
ring = KVRing(config, 512, 0, 512, F16_KV)
for _ in range(5):
    logits()  # so that the workers spin, and take up the job at once
    running._team._wake = Interrupted(running._team._wake)
    try:
        running.forward(many, range(400), [ring] * 400)
    except KeyboardInterrupt:
        for _ in range(100):  # time for the workers to get into the middle of the job, if they have seen it
            if not running._phases.any():
                threading.Event().wait(0.0001)
    print(np.array_equal(logits(), expected))
"""
    )
    assert run_script(code, tmp_path / "model.gguf", 2) == "True\n" * 5
