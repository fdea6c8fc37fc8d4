"""Processes that compile beside this one, where a model needs kernels that are not in the cache yet.

Numba compiles one function at a time in a process, so threads are no help. Each process takes the next kernel from a
pipe that all of them read, and leaves it in the kernel cache, where this process finds it. Whatever a helper does not
deliver, for whatever reason, is compiled here as if there had been none.
"""

import contextlib
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence

import psutil

from llmq.cores import usable_cores
from llmq.engine.forward import forward
from llmq.engine.plan import kernels
from llmq.formats import FORMATS, Format
from llmq.jit import Kernel, cache_folder, compile_log
from llmq.kernels.activation import prepare
from llmq.kernels.attention import SIZES, attend_kernel
from llmq.kernels.kv import KV_FORMATS, KVFormat
from llmq.team import dismiss, lead, serve
from llmq.warm import command, has_python, step_aside

# The longest kernel takes a third of the work of all, so more processes than this would wait for it.
MAX_HELPERS = 3
# What a process that compiles may take; it is about a third of that.
HELPER_BYTES = 2**30
# Far more than any kernel takes: a helper that needs longer has been stopped.
PATIENCE = 120.0


def kernels_of(formats: Sequence[Format], embedding: Format, kv: KVFormat) -> list[Kernel]:
    """The kernels of a model with matrices of these formats; the longest to compile first, so that none comes last."""
    mine = [kernels(fmt) for fmt in formats]
    return [
        forward,
        *(one.panel for one in mine),
        *(attend_kernel(n, kv) for n in dict.fromkeys(SIZES)),
        *(one.dot for one in mine),
        *(prepare, kernels(embedding).floats, kv.store),
        *(serve, lead, dismiss),
    ]


def compile_together(formats: Sequence[Format], embedding: Format, kv: KVFormat) -> None:
    """Make the kernels of a model ready, with the help of other processes where that is possible and worth it."""
    needed = kernels_of(formats, embedding, kv)
    missing = [i for i, kernel in enumerate(needed) if not kernel.is_ready]
    n_helpers = _n_helpers(len(missing))
    if not n_helpers:
        return
    before, start = compile_log.seconds, time.perf_counter()
    queue, feed = os.pipe()
    os.write(feed, bytes(missing))
    os.close(feed)
    helpers: list[subprocess.Popen[bytes]] = []
    try:
        _start_helpers(helpers, n_helpers, [kv.name, *(str(fmt.id) for fmt in (embedding, *formats))], queue)
        _take_part(needed, missing, queue)
        with contextlib.suppress(subprocess.TimeoutExpired):
            for helper in helpers:
                helper.wait(PATIENCE)
    finally:
        for helper in helpers:
            helper.kill()
            helper.wait()
        os.close(queue)
        compile_log.seconds = before + time.perf_counter() - start


def _n_helpers(n_missing: int) -> int:
    """None without a cache to share, without a Python to start, on one core, or for a single kernel."""
    if n_missing < 2 or not has_python() or cache_folder() is None:
        return 0
    return min(MAX_HELPERS, n_missing - 1, usable_cores() - 1, psutil.virtual_memory().available // HELPER_BYTES)


def _start_helpers(helpers: list[subprocess.Popen[bytes]], count: int, arguments: list[str], queue: int) -> None:
    """Append to `helpers` what can be started; each is there before an interrupt could lose sight of it."""
    started, null, hidden = (
        command("help_out", arguments),
        subprocess.DEVNULL,
        getattr(subprocess, "CREATE_NO_WINDOW", 0),
    )
    with contextlib.suppress(OSError):
        while len(helpers) < count:
            helpers.append(subprocess.Popen(started, stdin=queue, stdout=null, stderr=null, creationflags=hidden))


def _take_part(needed: list[Kernel], missing: list[int], queue: int) -> None:
    """Compile what this process takes from the queue, and tell of what the others have taken meanwhile."""
    untold = list(missing)
    for taken in _taken(queue):
        while (index := untold.pop(0)) != taken:
            compile_log.tell(needed[index].name)
        needed[taken].prepare()
    for index in untold:
        compile_log.tell(needed[index].name)


def _taken(queue: int) -> Iterator[int]:
    """Numbers of kernels, one byte each: a read gets a byte that no other process gets."""
    while byte := os.read(queue, 1):
        yield byte[0]


def help_out() -> None:
    """What a helper does: its arguments are the formats of the model, its stdin is the queue."""
    _prepare(_asked_for(), _taken(0))


def compile_alone() -> None:
    """What a process does that compiles in the background: all that is missing, one after the other, for as long as
    the one that started it holds the other end of its stdin.
    """
    threading.Thread(target=_end_with_stdin, daemon=True).start()
    step_aside()
    needed = _asked_for()
    if cache_folder() is not None:
        _prepare(needed, (i for i, kernel in enumerate(needed) if not kernel.is_ready))


def _end_with_stdin() -> None:
    os.read(0, 1)
    os._exit(0)


def _asked_for() -> list[Kernel]:
    kv, (embedding, *formats) = KV_FORMATS[sys.argv[2]], [FORMATS[int(text)] for text in sys.argv[3:]]
    return kernels_of(formats, embedding, kv)


def _prepare(needed: list[Kernel], numbers: Iterator[int]) -> None:
    parent = os.getppid()
    for taken in numbers:
        needed[taken].prepare()
        if os.getppid() != parent:
            return  # nobody waits for the rest
