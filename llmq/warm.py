"""Kernels compiled in the background, by a process that ends with this one. Nothing here loads the compiler."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from llmq.formats import Format

# Isolated, and told where to look: nothing that lies in the current folder is imported.
PROGRAM = "import json, sys; sys.path[:] = json.loads(sys.argv[1]); from llmq.engine.compilers import {0}; {0}()"
NICENESS = 10


def search_path() -> list[str]:
    """Where another process finds this package and what it needs; never "", which is the current folder."""
    return [str(Path(__file__).parents[1]), *(str(entry) for entry in sys.path if entry)]


def command(entry: str, arguments: Sequence[str]) -> list[str]:
    """Runs a function of llmq.engine.compilers, which finds `arguments` from sys.argv[2] on."""
    return [sys.executable, "-I", "-c", PROGRAM.format(entry), json.dumps(search_path()), *arguments]


def has_python() -> bool:
    """Whether a process can be started: not in a program that was frozen into one file."""
    return Path(sys.executable or "").name.lower().startswith("python") and not getattr(sys, "frozen", False)


@contextmanager
def warming(formats: Sequence[Format], embedding: Format, kv: str) -> Iterator[None]:
    """While the body runs, the kernels of a model with matrices of these formats are compiled; what is done stays."""
    pipe, null, hidden = subprocess.PIPE, subprocess.DEVNULL, getattr(subprocess, "CREATE_NO_WINDOW", 0)
    arguments = [kv, *(str(fmt.id) for fmt in (embedding, *formats))]
    process = None
    with suppress(OSError):
        if has_python():
            # Nothing is written to the pipe: its end, when this process is gone, is the end of the other one.
            process = subprocess.Popen(
                command("compile_alone", arguments), stdin=pipe, stdout=null, stderr=null, creationflags=hidden
            )
    try:
        yield
    finally:
        if process:
            with process:
                process.kill()


def step_aside() -> None:
    """Others go first, where the system has such an order."""
    if hasattr(os, "nice"):
        os.nice(NICENESS)
