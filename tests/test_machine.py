"""Measuring a machine: what the kernels read and multiply, what is chosen, and what is remembered for how long."""

import json
import os
import time
from pathlib import Path

import numpy as np
import pytest
from compiled import address, aligned
from conftest import Tiny
from hypothesis import given
from hypothesis import strategies as st

from llmq import figures, jit, load, machine
from llmq.cores import MEASURING
from llmq.figures import DAY, Machine, choose_threads, remember, remembered
from llmq.kernels.probe import CHUNK, READ_JOB, SUMS, WORKING_SET, read_chunks, repeat_dots
from llmq.machine import default_threads, thread_counts
from llmq.team import Team


# ---- the kernels
@pytest.mark.parametrize("n_threads", [1, 2, 3])
def test_every_byte_is_read_once(n_threads: int) -> None:
    stream = np.random.default_rng(0).integers(0, 256, 5 * CHUNK, dtype=np.uint8)
    job = np.zeros(1, READ_JOB)
    job["address"], job["n_chunks"] = address(stream), 5
    team = Team(n_threads, read_chunks.address, job)
    team.run()
    team.close()
    # Each chunk's sum wraps round at 32 bits.
    sums = stream.reshape(5, -1).view(np.int32).sum(axis=1, dtype=np.int32)
    assert job["total"][0] == sums.sum(dtype=np.int64)


def test_the_products_that_are_counted_are_made() -> None:
    rng = np.random.default_rng(0)
    memory, out = aligned((WORKING_SET,), np.uint8), aligned((SUMS, 16), np.int32)
    weights, values = memory[:64].reshape(16, 4), memory[64:].view(np.int8).reshape(8, SUMS, 16, 4)
    weights[:] = rng.integers(0, 128, weights.shape)
    values[:] = rng.integers(-127, 128, values.shape)
    repeat_dots(address(out), address(memory), 19)
    times = np.array([3, 3, 3, 2, 2, 2, 2, 2])  # 19 steps over 8
    np.testing.assert_array_equal(out, np.einsum("s,wb,stwb->tw", times, weights.astype(np.int64), values))


def test_a_measurement_is_plausible() -> None:
    found = machine.measure(2)
    assert list(found.read_rates) == [1, 2]
    assert all(0.1 < rate < 5000 for rate in found.read_rates.values())
    assert 0.1 < found.dot_rate < 100_000
    assert found.n_threads in (1, 2)


# ---- the choice
def test_thread_counts() -> None:
    assert [thread_counts(n) for n in (1, 2, 3, 4, 6, 8)] == [
        [1], [1, 2], [1, 2, 3], [1, 2, 4], [1, 2, 4, 6], [1, 2, 4, 8],
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("rates", "expected"),
    [
        ({1: 10}, 1),
        ({1: 10, 2: 19}, 2),
        ({1: 10, 2: 18, 4: 25, 8: 25}, 8),
        ({1: 10, 2: 18, 4: 25, 8: 22.6}, 8),
        ({1: 10, 2: 18, 4: 25, 8: 22}, 4),
        ({1: 10, 2: 24.5, 4: 25, 8: 22}, 2),
        ({1: 25, 2: 20, 4: 15}, 1),
    ],
)
def test_all_cores_but_for_a_clear_loss(rates: dict[int, float], expected: int) -> None:
    assert choose_threads(rates) == expected


@given(st.integers(1, 64).map(thread_counts).flatmap(lambda counts: st.fixed_dictionaries(
    dict.fromkeys(counts, st.floats(0.1, 1000)))))  # fmt: skip
def test_what_is_chosen_is_nearly_the_best(rates: dict[int, float]) -> None:
    chosen = choose_threads(rates)
    assert rates[chosen] >= 0.9 * max(rates.values())
    assert chosen == max(rates) or rates[max(rates)] < 0.9 * max(rates.values())


class Measured:
    """Stands for the team that reads: all cores are slow while the machine is busy, the first `busy` rounds."""

    def __init__(self, busy: int) -> None:
        self.rounds, self.busy = 0, busy

    def __call__(self, _stream: np.ndarray, n_threads: int) -> float:
        self.rounds += n_threads == 1
        return {1: 10.0, 2: 18.0, 4: 12.0 if self.rounds <= self.busy else 25.0}[n_threads]


@pytest.mark.parametrize(("busy", "rounds", "chosen"), [(0, 8, 4), (7, 8, 4), (12, 13, 4), (100, 16, 2)])
def test_a_busy_moment_does_not_count(monkeypatch, busy: int, rounds: int, chosen: int) -> None:
    """Fewer threads than cores are chosen only after more rounds than usual have agreed."""
    measured = Measured(busy)
    monkeypatch.setattr(machine, "measure_read", measured)
    assert choose_threads(machine.measure_reads(np.zeros(0, np.uint8), 4)) == chosen
    assert measured.rounds == rounds


def test_a_slow_machine_is_measured_briefly(monkeypatch) -> None:
    clock = iter(range(1000))
    monkeypatch.setattr(time, "perf_counter", lambda: float(next(clock)))
    measured = Measured(0)
    monkeypatch.setattr(machine, "measure_read", measured)
    machine.measure_reads(np.zeros(0, np.uint8), 4)
    assert measured.rounds == machine.LEAST_ROUNDS


# ---- memory
@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    jit.cache_folder()  # kernels stay where they are
    monkeypatch.setenv("LLMQ_CACHE_DIR", str(tmp_path / "cache"))
    found = figures.machines_folder()
    assert found == tmp_path / "cache" / "machines"
    return found


def known(measured: float | None = None, all_cores: float = 25.0) -> Machine:
    return Machine(4, {1: 10.125, 2: 20.0, 4: all_cores}, 300.5, time.time() if measured is None else measured)


def test_what_is_remembered_is_what_was_measured(folder: Path) -> None:
    assert remembered(folder, 4) is None
    mine = known()
    remember(folder, mine)
    assert remembered(folder, 4) == mine
    assert [path.suffix for path in folder.iterdir()] == [".json"]


def test_no_damage_is_accepted(folder: Path) -> None:
    mine = known()
    remember(folder, mine)
    (path,) = folder.iterdir()
    good = path.read_bytes()
    for bit in range(0, 8 * len(good), 7):
        bad = bytearray(good)
        bad[bit // 8] ^= 1 << bit % 8
        path.write_bytes(bad)
        # What JSON passes over, such as a space for a line's end, changes nothing that is said.
        assert remembered(folder, 4) in (None, mine), bit
    for bad in (b"", b"{}", b"[]", b"7", b'"x"', b"null", b"[" * 100_000, b"\xff\xfe", good[:-9], good + good):
        path.write_bytes(bad)
        assert remembered(folder, 4) is None
    path.unlink()
    path.mkdir()
    assert remembered(folder, 4) is None


def test_another_machine_is_measured_itself(folder: Path, monkeypatch) -> None:
    remember(folder, known())
    (path,) = folder.iterdir()
    before = path.read_bytes()
    for name, value in (
        ("cpu_name", "another processor"), ("code_target", ("x", "y", None, None)), ("allowed_cpus", [0, 5]),
        ("cgroup_quota", 1.5),
    ):  # fmt: skip
        with monkeypatch.context() as other:
            other.setattr(figures, name, lambda value=value: value)
            assert remembered(folder, 4) is None
            (folder / f"{figures.machine_key(4)[:20]}.json").write_bytes(before)
            assert remembered(folder, 4) is None, "the name of a file is not enough"
    assert remembered(folder, 3) is None
    assert remembered(folder, 4) is not None


@pytest.mark.parametrize(
    ("age", "all_cores", "counts"),
    [
        (0, 25, True),
        (29 * DAY, 25, True),
        (31 * DAY, 25, False),
        (-2, 25, False),
        (0.9 * DAY, 15, True),
        (1.1 * DAY, 15, False),
    ],
)
def test_figures_grow_old_sooner_where_cores_are_left_out(folder, age: float, all_cores: float, counts: bool) -> None:
    remember(folder, known(time.time() - age, all_cores))
    assert (remembered(folder, 4) is not None) == counts


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The number of cores of each measurement; none is really made."""
    calls: list[int] = []
    monkeypatch.setattr(machine, "usable_cores", lambda: 4)
    monkeypatch.setattr(machine, "measure", lambda n: (calls.append(n), known(all_cores=15))[1])
    return calls


def test_a_machine_is_measured_once(folder: Path, measured: list[int]) -> None:
    told: list[str] = []
    assert [default_threads(told.append) for _ in range(3)] == [2, 2, 2]
    assert default_threads(None) == 2
    assert (measured, told) == ([4], [MEASURING])
    (path,) = folder.iterdir()
    path.write_text("{}")
    assert default_threads(told.append) == 2
    assert measured == [4, 4]
    assert json.loads(path.read_text())["n_cores"] == 4


def test_one_core_needs_no_measurement(folder: Path, measured: list[int], monkeypatch) -> None:
    monkeypatch.setattr(machine, "usable_cores", lambda: 1)
    assert default_threads(None) == 1
    assert not measured
    assert not list(folder.iterdir())


@pytest.mark.skipif(os.name == "nt", reason="no such permissions")
def test_without_a_private_folder_all_cores_are_used_unmeasured(folder: Path, measured: list[int]) -> None:
    folder.chmod(0o777)
    assert default_threads(None) == 4
    assert not measured


def test_a_models_default_and_what_the_user_says(folder: Path, measured: list[int], tiny_model: Tiny) -> None:
    path = tiny_model(n_layers=1)[0]
    with load(path, threads=3) as model:
        assert model.n_threads == 3
    assert not measured
    with load(path) as model:
        assert model.n_threads == 2
    assert measured == [4]
    assert list(folder.iterdir())
