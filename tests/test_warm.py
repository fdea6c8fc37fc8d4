"""The process that compiles in the background: what it does, and that it ends with the one that started it."""

import os
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from llmq import warm
from llmq.formats import F16, F32, Q4_K, Q6_K
from llmq.warm import warming

ROOT = Path(__file__).parents[1]

# The real process, with kernels that only say what is done with them; the last one never ends.
FAKE = """import json, sys; sys.path[:] = json.loads(sys.argv[1])
import time
from pathlib import Path
from llmq.engine import compilers
class Kernel:
    def __init__(self, name):
        self.name, self.is_ready = name, name == "ready"
    def prepare(self):
        with open(TOLD, "a") as file:
            print(self.name, file=file, flush=True)
        if self.name == "last":
            Path(TOLD).rename(TOLD + ".all")
            time.sleep(1000)
def kernels_of(formats, embedding, kv):
    names = [fmt.name for fmt in formats], embedding.name, kv.name
    return [Kernel(str(names)), Kernel("ready"), Kernel("second"), Kernel("last")]
compilers.kernels_of = kernels_of
compilers.compile_alone()
"""


def fake(told: Path) -> str:
    """As warm.PROGRAM, which is formatted."""
    return FAKE.replace("TOLD", repr(str(told))).replace("{", "{{").replace("}", "}}")


def wait_for(path: Path, process: psutil.Process) -> None:
    while not path.exists():
        assert process.is_running()
        assert process.status() != psutil.STATUS_ZOMBIE


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LLMQ_CACHE_DIR", str(tmp_path / "cache"))


def test_what_is_missing_is_compiled_in_order_while_the_body_runs(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(warm, "PROGRAM", fake(tmp_path / "told"))
    with warming([Q4_K, Q6_K], F32, "f16"):
        (child,) = psutil.Process().children()
        wait_for(tmp_path / "told.all", child)
        assert not hasattr(os, "nice") or child.nice() > 0
    assert not psutil.Process().children()
    assert (tmp_path / "told.all").read_text().splitlines() == ["(['Q4_K', 'Q6_K'], 'F32', 'f16')", "second", "last"]


def interrupted() -> None:
    with warming([F16], F16, "f16"):
        assert len(psutil.Process().children()) == 1
        raise KeyboardInterrupt


def test_it_ends_when_the_body_fails(monkeypatch) -> None:
    monkeypatch.setattr(warm, "PROGRAM", "import os; os.read(0, 1)")
    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert not psutil.Process().children()


@pytest.mark.parametrize("executable", ["", "/opt/editor/bin/editor", "/nonexistent/python"])
def test_without_a_python_to_start_nothing_is_compiled(monkeypatch, executable: str) -> None:
    monkeypatch.setattr(sys, "executable", executable)
    with warming([F16], F16, "f16"):
        assert not psutil.Process().children()


PARENT = """
import sys, time
from llmq import warm
from llmq.formats import F16
warm.PROGRAM = sys.argv[1]
with warm.warming([F16], F16, "f16"):
    time.sleep(1000)
"""


def test_it_ends_at_once_when_its_parent_is_killed(tmp_path) -> None:
    """In the middle of a kernel."""
    parent = subprocess.Popen([sys.executable, "-c", PARENT, fake(tmp_path / "told")], cwd=ROOT)
    try:
        while not (found := psutil.Process(parent.pid).children()):
            assert parent.poll() is None
        (child,) = found
        wait_for(tmp_path / "told.all", child)
    finally:
        parent.kill()
        parent.wait()
    _, alive = psutil.wait_procs([child], timeout=30)
    assert not alive
