"""A quantizer killed at any moment: never half a file under the final name, and the next run ends as it should have.

With -s each test says how many kills there were.
"""

import hashlib
import random
import shutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from checkpoints import write_checkpoint
from kills import CALLS, KILLED, forking, injected, needs_strace

from llmq.part import part_paths
from quant.quantize import quantize

SEED = 20261121
RUN = """
import sys
from pathlib import Path
from llmq import part
from quant.quantize import quantize
part.SAVE_SECONDS = 0
def run():
    for _ in quantize(Path(sys.argv[1]), Path(sys.argv[2]), "q8_0", threads=2):
        pass
"""


@dataclass
class Case:
    """A checkpoint, the bytes that it gives, and what has been seen so far."""

    source: Path
    out: Path
    expected: str
    fired: int = 0
    continued: int = 0
    wrong: list[str] = field(default_factory=list)

    def check(self, moment: str, before: bytes | None) -> None:
        """After a kill: the old file or the new one. After the next run: the new one, and nothing beside it."""
        self.fired += 1
        now = self.out.read_bytes() if self.out.exists() else None
        if now != before and (now is None or hashlib.sha256(now).hexdigest() != self.expected):
            self.wrong.append(f"{moment}: a file that is neither old nor new")
        reports = list(quantize(self.source, self.out, "q8_0"))
        self.continued += any(report.resumed for report in reports)
        if hashlib.sha256(self.out.read_bytes()).hexdigest() != self.expected:
            self.wrong.append(f"{moment}: other bytes than without a kill")
        if any(path.exists() for path in part_paths(self.out)):
            self.wrong.append(f"{moment}: something is left over")

    def tell(self) -> None:
        sys.stdout.write(f"{self.fired} kills, {self.continued} runs continued, {len(self.wrong)} wrong\n")

    def reset(self, before: bytes | None) -> None:
        for path in (self.out, *part_paths(self.out)):
            path.unlink(missing_ok=True)
        if before is not None:
            self.out.write_bytes(before)


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Case]:
    folder = tmp_path_factory.mktemp("kills")
    write_checkpoint(folder / "model", num_hidden_layers=1)
    list(quantize(folder / "model", folder / "out.gguf", "q8_0", threads=1))
    (folder / "made").mkdir()
    yield Case(folder / "model", folder / "made" / "out.gguf", digest(folder / "out.gguf"))
    shutil.rmtree(folder)


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.mark.parametrize("n_kills", [10, pytest.param(100, marks=pytest.mark.slow)])
def test_kills_at_random_moments(case: Case, n_kills: int) -> None:
    rng = random.Random(SEED)
    case.fired, case.continued, case.wrong = 0, 0, []
    with forking(RUN, str(case.source), str(case.out)) as run:
        case.reset(None)
        code, took = run(None)
        assert (code, digest(case.out)) == (0, case.expected)
        while case.fired < n_kills:
            before = rng.choice([None, b"the file that was there"])
            case.reset(before)
            seconds = rng.uniform(0, took)
            if run(seconds)[0] == -9:
                case.check(f"seed {SEED}, kill {case.fired}, after {seconds:.4f} s", before)
    case.tell()
    assert not case.wrong


@pytest.mark.slow
@pytest.mark.timeout(3000)
@needs_strace
def test_kills_at_every_call_that_changes_a_file(case: Case) -> None:
    """The process dies when it asks for the k-th call of a kind on a file, for every k, kind and file."""
    case.fired, case.continued, case.wrong = 0, 0, []
    command = [sys.executable, "-c", RUN + "run()", str(case.source), str(case.out)]
    for path in (*part_paths(case.out), case.out.parent):
        for call in CALLS:
            for k in range(1, 100):
                case.reset(b"old")
                if injected(path, call, k, "signal=KILL", command).returncode not in KILLED:
                    assert digest(case.out) == case.expected
                    break
                case.check(f"{call} {k} on {path.name}", b"old")
    case.tell()
    assert not case.wrong
    assert case.fired > 40
    assert case.continued > 40
