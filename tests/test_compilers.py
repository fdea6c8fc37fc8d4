"""Processes that compile for this one: what they deliver is used, and whatever they fail at is done here."""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import psutil
import pytest
from compiled import address
from numba import types

from llmq import jit, warm
from llmq.engine import compilers
from llmq.engine.compilers import compile_together, kernels_of
from llmq.formats import F32, FORMATS, Q4_K, Q8_0
from llmq.jit import Kernel, compile_log, kernel, read_cached
from llmq.kernels.kv import F16_KV, Q8_0_KV
from llmq.simd import load_f32, store_f32

ROOT = Path(__file__).parents[1]


@pytest.fixture(autouse=True)
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("LLMQ_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(jit, "_folder", [])
    return tmp_path / "cache" / "kernels"


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    names: list[str] = []
    monkeypatch.setattr(compile_log, "listener", names.append)
    return names


def toy(factor: int) -> Kernel:
    def scale(out: Any, x: Any) -> None:
        store_f32(out, load_f32(x) * np.float32(factor))

    return kernel(types.int64, types.int64, name=f"times{factor}")(scale)


@pytest.fixture
def toys(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Kernel]]:
    """Five small kernels in the place of a model's, and two helpers to compile them, whatever this machine has."""
    made = [toy(factor) for factor in (2, 3, 5, 7, 11)]
    monkeypatch.setattr(compilers, "kernels_of", lambda _formats, _embedding, _kv: made)
    monkeypatch.setattr(compilers, "_n_helpers", lambda n_missing: 2 if n_missing > 1 else 0)
    yield made
    assert not psutil.Process().children(), "a helper is left"


def check(toys: list[Kernel]) -> None:
    for made, factor in zip(toys, (2, 3, 5, 7, 11), strict=True):
        out, x = np.zeros(1, np.float32), np.array([7], np.float32)
        made(address(out), address(x))
        assert out[0] == 7 * factor


def helper_script(monkeypatch: pytest.MonkeyPatch, code: str) -> None:
    monkeypatch.setattr(warm, "PROGRAM", code.replace("{", "{{").replace("}", "}}"))


TAKE_ONE = "import os; os.read(0, 1); "


@pytest.mark.parametrize(
    "code",
    [
        "raise SystemExit(1)",
        TAKE_ONE,
        TAKE_ONE + "os.kill(os.getpid(), 9)",
        "import os\nwhile os.read(0, 1): pass",
        TAKE_ONE + "print('x' * 1_000_000); raise SystemExit(3)",
    ],
    ids=["no start", "one and away", "killed", "all and nothing done", "noise"],
)
def test_what_a_helper_leaves_undone_is_done_here(toys, told, monkeypatch, code) -> None:
    helper_script(monkeypatch, code)
    compile_together([F32], F32, F16_KV)
    assert list(dict.fromkeys(told)) == [made.name for made in toys], "each is told, in order"
    check(toys)


def test_a_helper_that_hangs_is_not_waited_for(toys, monkeypatch) -> None:
    helper_script(monkeypatch, TAKE_ONE + "import time; time.sleep(1000)")
    monkeypatch.setattr(compilers, "PATIENCE", 0.01)
    compile_together([F32], F32, F16_KV)
    check(toys)


def test_no_python_to_start(toys, monkeypatch, tmp_path) -> None:
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python-that-went"))
    compile_together([F32], F32, F16_KV)
    assert all(made.is_ready for made in toys)
    check(toys)


@pytest.mark.usefixtures("toys")
def test_an_interrupt_ends_the_helpers(monkeypatch) -> None:
    helper_script(monkeypatch, "import time; time.sleep(1000)")

    def interrupt(_name: str) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(compile_log, "listener", interrupt)
    with pytest.raises(KeyboardInterrupt):
        compile_together([F32], F32, F16_KV)


@pytest.mark.usefixtures("toys")
def test_nothing_is_started_for_kernels_that_are_there(monkeypatch) -> None:
    compile_together([F32], F32, F16_KV)
    monkeypatch.setattr(compilers, "_start_helpers", None)
    compile_together([F32], F32, F16_KV)


@pytest.mark.parametrize("reason", ["one kernel", "no cache", "one core", "little memory", "an application", "frozen"])
def test_when_there_are_no_helpers(monkeypatch, reason) -> None:
    monkeypatch.setattr(compilers, "usable_cores", lambda: 4)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=2**34))
    assert compilers._n_helpers(9) == 3
    if reason == "no cache":
        monkeypatch.setattr(compilers, "cache_folder", lambda: None)
    elif reason == "one core":
        monkeypatch.setattr(compilers, "usable_cores", lambda: 1)
    elif reason == "little memory":
        monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=2**29))
    elif reason == "an application":
        monkeypatch.setattr(sys, "executable", "/opt/editor/bin/editor")
    elif reason == "frozen":
        monkeypatch.setattr(sys, "frozen", True, raising=False)
    assert compilers._n_helpers(1 if reason == "one kernel" else 9) == 0


# ---- real helpers
def help_with(names: list[str], cache: Path, folder: Path) -> subprocess.CompletedProcess[bytes]:
    """One helper, with these of the kernels of a Q8_0 model in the queue."""
    needed = [made.name for made in kernels_of([Q8_0], F32, F16_KV)]

    command = warm.command("help_out", ["f16", "0", "8"])
    return subprocess.run(
        command,
        input=bytes(needed.index(name) for name in names),
        cwd=folder,
        env={**os.environ, "LLMQ_CACHE_DIR": str(cache)},
        capture_output=True,
        timeout=200,
    )


def test_a_helper_fills_the_cache_and_imports_nothing_from_the_current_folder(tmp_path) -> None:
    for name in ("json", "numba", "numpy", "llmq", "sitecustomize"):
        (tmp_path / f"{name}.py").write_text("raise SystemExit('this is not the one')")
    done = help_with(["dismiss", "lead", "dot_q8_0"], tmp_path / "cache", tmp_path)
    assert (done.returncode, done.stdout, done.stderr) == (0, b"", b"")
    files = {path.stem: path for path in (tmp_path / "cache").rglob("*.o")}
    assert set(files) == {"dismiss", "lead", "dot_q8_0"}
    assert all(read_cached(path) for path in files.values())


def test_a_queue_number_names_a_kernel_of_any_model() -> None:
    """One byte each; the largest model has matrices of every format."""
    names = [made.name for made in kernels_of(list(FORMATS.values()), Q4_K, Q8_0_KV)]
    assert len(set(names)) == len(names) < 256


LOAD = """
import sys
from llmq import load
from llmq.engine import compilers
compilers.usable_cores = lambda: 4
load(sys.argv[1], threads=1, on_event=lambda name: print(name, flush=True)).close()
"""


@pytest.mark.skipif(os.name == "nt", reason="signals are POSIX's")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_no_helper_outlives_a_start_that_was_stopped(tiny_model, tmp_path, number) -> None:
    """One that is killed cannot end its helpers: they finish the kernel that they are at, and go."""
    environment = {**os.environ, "LLMQ_CACHE_DIR": str(tmp_path)}
    command = [sys.executable, "-c", LOAD, tiny_model(format=Q8_0, n_layers=1)[0]]
    with subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    ) as child:
        assert child.stdout is not None
        assert child.stdout.readline() == "forward\n"
        helpers = psutil.Process(child.pid).children()
        assert len(helpers) == 3
        child.send_signal(number)
        child.wait(60)
    if number == signal.SIGINT:
        assert not any(helper.is_running() for helper in helpers)
    _, alive = psutil.wait_procs(helpers, timeout=200)
    assert not alive
