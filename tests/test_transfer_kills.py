"""A download killed at any moment, or refused a call: never half a file under its name, and the next run goes on.

With -s each test says how many kills or failures there were.
"""

import itertools
import random
import sys
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from downloads import asked, journalled, leave
from hub import Hub, sha256
from kills import CALLS, KILLED, forking, injected, needs_strace

from llmq import transfer
from llmq.fetcher import CHUNK, Limits, Remote
from llmq.http import Request
from llmq.part import part_paths

SEED = 20261122
# How much may be asked for again after a kill: a chunk of each connection, and what was on its way.
LOST = 8 << 20
ERRORS = ("ENOSPC", "EIO", "EDQUOT")

RUN = """
import sys
from pathlib import Path
from llmq.errors import LlmqError
from llmq.fetcher import Limits, Remote
from llmq.http import Request
from llmq.transfer import fetch
def run():
    url, n_bytes, sha256, target, connections = sys.argv[1:]
    remote, limits = Remote(Request(url, {}, {}), int(n_bytes), sha256), Limits(int(connections), first_wait=0.01)
    try:
        for _ in fetch(remote, Path(target), limits):
            pass
    except LlmqError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    return 0
"""


@dataclass
class Case:
    """A file at a hub, where it is to be, and what has been seen so far."""

    hub: Hub
    target: Path
    data: bytes
    fired: int = 0
    continued: int = 0
    most_lost: int = 0
    wrong: list[str] = field(default_factory=list)

    @property
    def remote(self) -> Remote:
        url = self.hub.add("org/model", "model.gguf", self.data)
        return Remote(Request(url, {}, {}), len(self.data), sha256(self.data))

    def arguments(self, connections: int) -> list[str]:
        return [self.remote.request.url, str(len(self.data)), sha256(self.data), str(self.target), str(connections)]

    def reset(self, before: bytes | None, n_chunks: int = 0) -> None:
        """The file that was there, and so many chunks that an earlier run left."""
        for path in (self.target, *part_paths(self.target)):
            path.unlink(missing_ok=True)
        self.hub.reset()
        if n_chunks:
            leave(self.remote, self.target, self.data, range(n_chunks))
        if before is not None:
            self.target.write_bytes(before)

    def check(self, moment: str, before: bytes | None) -> None:
        """After it: the old file or the new one. After the next run: the new one, nothing beside it, little twice."""
        self.fired += 1
        now = self.target.read_bytes() if self.target.exists() else None
        if now not in (before, self.data):
            self.wrong.append(f"{moment}: a file that is neither old nor new")
        before_it, there = list(self.hub.seen), journalled(self.target)
        self.hub.seen.clear()
        steps = list(itertools.islice(transfer.fetch(self.remote, self.target, Limits(first_wait=0.01)), 6000))
        self.continued += steps[0].resumed > 0
        if self.target.read_bytes() != self.data:
            self.wrong.append(f"{moment}: other bytes than without it")
        if any(path.exists() for path in part_paths(self.target)):
            self.wrong.append(f"{moment}: something is left over")
        if there.intersection(asked(self.hub)) and steps[0].resumed:
            self.wrong.append(f"{moment}: what was there was asked for again")
        self.hub.seen.extend(before_it)
        lost = max(self.hub.n_sent() - len(self.data), 0)
        self.most_lost = max(self.most_lost, lost)
        if lost > LOST:
            self.wrong.append(f"{moment}: {lost} bytes were sent twice")

    def tell(self, what: str = "kills") -> None:
        sys.stdout.write(
            f"{self.fired} {what}, {self.continued} runs continued, at most {self.most_lost / 1e6:.1f} MB sent twice, "
            f"{len(self.wrong)} wrong\n"
        )


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transfer, "TICK_SECONDS", 0.01)


def new_case(hub: Hub, folder: Path, n_bytes: int) -> Case:
    return Case(hub, folder / "model.gguf", random.Random(SEED).randbytes(n_bytes))


@pytest.mark.timeout(1200)
@pytest.mark.parametrize("n_kills", [10, pytest.param(200, marks=pytest.mark.slow)])
def test_kills_at_random_moments(hub: Hub, tmp_path: Path, n_kills: int) -> None:
    case, rng = new_case(hub, tmp_path, 24_000_000), random.Random(SEED)
    hub.bytes_per_second = 20e6
    with forking(RUN, *case.arguments(4)) as run:
        case.reset(None)
        code, took = run(None)
        assert (code, case.target.read_bytes() == case.data) == (0, True)
        for _ in range(10 * n_kills):
            before = rng.choice([None, b"the file that was there"])
            case.reset(before)
            seconds = rng.uniform(0, took)
            hub.bytes_per_second = 20e6
            if run(seconds)[0] in KILLED:
                hub.bytes_per_second = 0
                case.check(f"seed {SEED}, kill {case.fired}, after {seconds:.4f} s", before)
            if case.fired == n_kills:
                break
    case.tell()
    assert not case.wrong
    assert case.fired == n_kills


def commands(case: Case) -> list[str]:
    return [sys.executable, "-c", RUN + "sys.exit(run())", *case.arguments(1)]


@pytest.mark.slow
@pytest.mark.timeout(3000)
@needs_strace
@pytest.mark.parametrize("n_chunks", [0, 2])
def test_kills_at_every_call_that_changes_a_file(hub: Hub, tmp_path: Path, n_chunks: int) -> None:
    """The process dies when it asks for the k-th call of a kind on a file, for every k, kind and file; from the first
    byte on, and where an earlier run left some."""
    case = new_case(hub, tmp_path, 3 * CHUNK + 1000)
    part, journal, _ = part_paths(case.target)
    for path, call in itertools.product((part, journal, tmp_path), CALLS):
        for k in range(1, 50):
            case.reset(b"old", n_chunks)
            if injected(path, call, k, "signal=KILL", commands(case)).returncode not in KILLED:
                assert case.target.read_bytes() == case.data
                break
            case.check(f"{call} {k} on {path.name}", b"old")
    case.tell()
    assert not case.wrong
    assert case.fired >= 14
    assert case.continued > 5


@pytest.mark.slow
@pytest.mark.timeout(3000)
@needs_strace
@pytest.mark.parametrize("error", ERRORS)
def test_errors_of_every_call_that_changes_a_file(hub: Hub, tmp_path: Path, error: str) -> None:
    """A sentence and its code, and the next run goes on."""
    case = new_case(hub, tmp_path, 3 * CHUNK + 1000)
    part, journal, _ = part_paths(case.target)
    codes = {0: 0, 2: 0, 3: 0}
    for path, call in itertools.product((part, journal, tmp_path), ("write", "ftruncate", "fsync", "rename", "unlink")):
        for k in range(1, 50):
            case.reset(None)
            done = injected(path, call, k, f"error={error}", commands(case))
            codes[done.returncode] += 1
            if done.returncode == 0:
                assert case.target.read_bytes() == case.data
                break
            assert done.returncode == (2 if error == "EIO" else 3)
            assert done.stderr.startswith("cannot write ")
            assert done.stderr.count("\n") == 1
            case.check(f"{error} of {call} {k} on {path.name}", None)
    case.tell("errors")
    assert not case.wrong
    assert case.fired >= 14
