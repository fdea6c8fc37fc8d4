"""Threads that stay in compiled code: a team that spins between jobs, then parks.

A job is one call of a kernel with the type `(job record address, thread)` by every thread of the team. Within a job
threads share work through counters and wait for work, never for each other: a thread that the system has put aside
holds up the others only if it was in the middle of something. Layout of the shared words, one per cache line:
generation of jobs, stop flag, then for each thread the last generation that it ran.
"""

import os
import threading
from typing import Any

import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils

from llmq.jit import jit, kernel
from llmq.simd import call, pause
from llmq.simd.vector import ADDRESS, I64, op, pointer

GENERATION, STOP, SEEN = 0, 64, 128
# A waiting loop turns about this often in a millisecond or two; tokens follow each other faster than that.
SPINS_BEFORE_PARKING = 40_000
SPINS_BEFORE_YIELDING = 2_000

fetch_add = op(
    lambda b, at, n: b.atomic_rmw("add", pointer(b, at, I64), n, "seq_cst"), types.int64, ADDRESS, types.int64
)
load_shared = op(lambda b, at: b.load_atomic(pointer(b, at, I64), "seq_cst", 8), types.int64, ADDRESS)


def _store_shared(b: Any, at: Any, value: Any) -> None:
    b.store_atomic(value, pointer(b, at, I64), "seq_cst", 8)


store_shared = op(_store_shared, types.void, ADDRESS, types.int64)


def _yield(b: Any) -> Any:
    name = "SwitchToThread" if os.name == "nt" else "sched_yield"
    function = cgutils.get_or_insert_function(b.module, ir.FunctionType(ir.IntType(32), []), name)
    return b.call(function, [])


yield_processor = op(_yield, types.int32)
run_job = call(types.int64, types.int64)


@jit
def wait_for(at, value):
    """Wait until the shared word is `value`."""
    spins = 0
    while load_shared(at) != value:
        pause()
        spins += 1
        if spins % SPINS_BEFORE_YIELDING == 0:
            yield_processor()


@kernel(*(types.int64,) * 4, name="serve")
def serve(shared, job, function, thread):
    """Run each new job at `function` until none has come for a while, or the team stops."""
    spins, seen = 0, load_shared(shared + SEEN + 64 * thread)
    while spins < SPINS_BEFORE_PARKING and load_shared(shared + STOP) == 0:
        generation = load_shared(shared + GENERATION)
        if generation != seen:
            seen = generation
            run_job(function, job, thread)
            store_shared(shared + SEEN + 64 * thread, seen)
            spins = 0
        else:
            pause()
            spins += 1
            if spins % SPINS_BEFORE_YIELDING == 0:
                yield_processor()


@kernel(*(types.int64,) * 5, name="lead")
def lead(shared, n_threads, generation, function, job):
    """Show the workers a new job, run it as thread 0, and wait until every worker has left it."""
    store_shared(shared + GENERATION, generation)
    run_job(function, job, 0)
    for thread in range(1, n_threads):
        wait_for(shared + SEEN + 64 * thread, generation)


@kernel(types.int64, name="dismiss")
def dismiss(shared):
    """Send the workers home."""
    store_shared(shared + STOP, 1)


def aligned(n_bytes: int) -> np.ndarray:
    """Zeroed bytes [n_bytes] that start on a cache line; pages are not touched before they are used."""
    memory = np.zeros(n_bytes + 64, np.uint8)
    start = -memory.ctypes.data % 64
    return memory[start : start + n_bytes]


class Team:
    """`n_threads` threads, the caller's among them, that run one kernel on one job record."""

    def __init__(self, n_threads: int, function: int, job: np.ndarray) -> None:
        self.n_threads = n_threads
        self._function, self._job = function, job
        self._memory = aligned(SEEN + 64 * n_threads)
        self.shared = self._memory.ctypes.data
        self._generation = 0
        self._stopped = False
        self._busy = False
        for helper in (serve, lead, dismiss):
            helper.prepare()
        self._wake = threading.Condition()
        self._workers = [threading.Thread(target=self._work, args=(i,), daemon=True) for i in range(1, n_threads)]
        for worker in self._workers:
            worker.start()

    def run(self) -> None:
        """One job: every thread of the team runs `function` on it, this one too.

        Workers see the job, finish it and leave it within one compiled call: a KeyboardInterrupt comes before or after,
        never between, where the next job would be written under the eyes of workers still at this one.
        """
        try:
            if self._workers:
                with self._wake:
                    self._busy = True
                    self._wake.notify_all()
            self._generation += 1
            lead(self.shared, self.n_threads, self._generation, self._function, self._job.ctypes.data)
        finally:
            self._busy = False

    def close(self) -> None:
        self._stopped = True
        dismiss(self.shared)
        with self._wake:
            self._wake.notify_all()
        for worker in self._workers:
            worker.join()

    def _work(self, thread: int) -> None:
        while not self._stopped:
            serve(self.shared, self._job.ctypes.data, self._function, thread)
            with self._wake:
                while not self._busy and not self._stopped:
                    self._wake.wait()
