"""Downloads that stop and go on: what has arrived is not asked for again, and what is damaged is."""

import itertools
import random
import subprocess
import sys
from pathlib import Path

import pytest
from downloads import asked, journalled, leave
from hub import TOKEN, Hub, sha256

from llmq import fetcher, ledger, transfer
from llmq.errors import FileFormatError
from llmq.fetcher import CHUNK, Limits, Remote
from llmq.http import Request
from llmq.part import part_paths
from llmq.transfer import Progress, fetch

SIZE = 12 * CHUNK + 54321
DATA = random.Random(5).randbytes(SIZE)
QUICK = Limits(idle_seconds=2.0, tries=3, first_wait=0.01, longest_wait=0.05)


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transfer, "TICK_SECONDS", 0.01)


def remote(hub: Hub, data: bytes = DATA) -> Remote:
    url = hub.add("org/model", "model.gguf", data)
    return Remote(Request(url, {}, {"Authorization": f"Bearer {TOKEN}"}), len(data), sha256(data))


def finish(file: Remote, target: Path, data: bytes = DATA) -> list[Progress]:
    steps = list(itertools.islice(fetch(file, target, QUICK), 6000))
    assert steps[-1].sha256 == sha256(data)
    assert target.read_bytes() == data
    assert [path.name for path in target.parent.iterdir()] == [target.name]
    return steps


def stop_when(hub: Hub, file: Remote, target: Path, n_bytes: int) -> None:
    """Closed as soon as so much is there; the end of the file never comes before."""
    end = hub.fail("hang_headers", at=file.n_bytes - 1)
    steps = fetch(file, target, QUICK)
    for _ in itertools.takewhile(lambda step: step.n_bytes < n_bytes, steps):
        pass
    steps.close()
    hub.faults.remove(end)
    assert not target.exists()


@pytest.mark.parametrize("connections", [1, 2, 4])
def test_closed_at_random_moments(hub: Hub, tmp_path: Path, connections: int) -> None:
    """What the journal tells of is not asked for again, and no more is lost than a chunk of each connection (and, on
    its way, as much again)."""
    rng, file, target = random.Random(connections), remote(hub), tmp_path / "model.gguf"
    limits = Limits(connections=connections, tries=3)
    hub.bytes_per_second = 80e6 / connections
    n_sent, there, stops = 0, 0, 0
    for _ in range(100):
        before = journalled(target)
        hub.reset()
        if stops < 5:
            hub.fail("hang_headers", at=SIZE - 1)
        steps = fetch(file, target, limits)
        seen = list(itertools.islice(steps, rng.randrange(1, 15)))
        steps.close()
        n_sent += hub.n_sent()
        assert not before & set(asked(hub))
        assert seen[0].resumed >= there
        there = seen[-1].n_bytes
        if seen[-1].sha256:
            break
        stops += 1
    assert target.read_bytes() == DATA
    assert [path.name for path in tmp_path.iterdir()] == [target.name]
    assert stops >= 5
    assert n_sent <= SIZE + stops * 2 * connections * CHUNK


def test_what_is_there_is_not_asked_for(hub: Hub, tmp_path: Path) -> None:
    file, target = remote(hub), tmp_path / "model.gguf"
    hub.bytes_per_second = 20e6
    stop_when(hub, file, target, SIZE // 2)
    before = journalled(target)
    hub.reset()
    steps = finish(file, target)
    assert sorted(asked(hub)) == sorted(set(range(13)) - before)
    assert steps[0].resumed == steps[-1].resumed
    assert len(before) * CHUNK - steps[0].resumed in (0, CHUNK - SIZE % CHUNK)


def all_there(hub: Hub, target: Path) -> None:
    leave(remote(hub), target, DATA, range(13))


def test_nothing_is_missing(hub: Hub, tmp_path: Path) -> None:
    all_there(hub, tmp_path / "model.gguf")
    finish(remote(hub), tmp_path / "model.gguf")
    assert not hub.seen


@pytest.mark.parametrize("chunks", [{0}, {12}, {3, 4, 9}, set(range(13))])
def test_chunks_damaged_on_disk(hub: Hub, tmp_path: Path, chunks: set[int]) -> None:
    target = tmp_path / "model.gguf"
    all_there(hub, target)
    with part_paths(target)[0].open("r+b") as part:
        for index in chunks:
            part.seek(index * CHUNK + 1234)
            part.write(bytes([DATA[index * CHUNK + 1234] ^ 16]))
    finish(remote(hub), target)
    assert sorted(asked(hub)) == sorted(chunks)


@pytest.mark.parametrize("n_bytes", [0, 1, CHUNK - 1, 5 * CHUNK, SIZE - 1])
def test_a_part_that_lost_its_end(hub: Hub, tmp_path: Path, n_bytes: int) -> None:
    target = tmp_path / "model.gguf"
    all_there(hub, target)
    with part_paths(target)[0].open("r+b") as part:
        part.truncate(n_bytes)
    finish(remote(hub), target)
    assert sorted(asked(hub)) == list(range(n_bytes // CHUNK, 13))


def test_what_came_wrong_in_an_earlier_run(hub: Hub, tmp_path: Path) -> None:
    """The journal fits what is there, and the whole is not what it should be: all of it is fetched again, once."""
    file, target = remote(hub), tmp_path / "model.gguf"
    hub.bytes_per_second = 20e6
    hub.fail("flip", at=5, times=1)
    stop_when(hub, file, target, SIZE // 2)
    hub.reset()
    hub.bytes_per_second = 0
    finish(file, target)
    assert sum(seen.stop - seen.start for seen in hub.answers()) > SIZE
    target.unlink()
    hub.fail("flip", at=5)
    hub.bytes_per_second = 20e6
    stop_when(hub, file, target, SIZE // 2)
    with pytest.raises(FileFormatError):
        finish(file, target)
    assert not list(tmp_path.iterdir())


def test_another_content_begins_anew(hub: Hub, tmp_path: Path) -> None:
    target = tmp_path / "model.gguf"
    all_there(hub, target)
    other = DATA[::-1]
    finish(remote(hub, other), target, other)
    assert sorted(asked(hub)) == list(range(13))


def test_an_old_file_stays_until_the_new_one_is_whole(hub: Hub, tmp_path: Path) -> None:
    target = tmp_path / "model.gguf"
    target.write_bytes(b"old")
    hub.bytes_per_second = 20e6
    steps = fetch(remote(hub), target, QUICK)
    for step in steps:
        if not step.sha256:
            assert target.read_bytes() in (b"old", DATA)
    assert target.read_bytes() == DATA


def test_a_file_that_is_right_already(hub: Hub, tmp_path: Path) -> None:
    target = tmp_path / "model.gguf"
    target.write_bytes(DATA)
    finish(remote(hub), target)
    assert not hub.seen


@pytest.mark.parametrize("n_bytes", [0, SIZE // 2])
def test_a_server_that_ignores_ranges(hub: Hub, tmp_path: Path, n_bytes: int) -> None:
    """All of it comes again over one connection; what is there stays as it is."""
    file, target = remote(hub), tmp_path / "model.gguf"
    hub.bytes_per_second = 20e6
    if n_bytes:
        stop_when(hub, file, target, n_bytes)
    before = len(journalled(target))
    hub.reset()
    hub.bytes_per_second = 0
    hub.fail("ignore_range")
    assert finish(file, target)[0].resumed >= (before - 1) * CHUNK
    assert [seen.status for seen in hub.answers()] == [200]


@pytest.mark.parametrize("damage", ["cut off", "flipped", "a byte too many"])
def test_a_damaged_journal(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, damage: str) -> None:
    """Wherever it is: the file is exact in the end. Every byte is in test_ledger.py; here, all the way, every ninth."""
    for module in (fetcher, ledger, transfer):
        monkeypatch.setattr(module, "CHUNK", 4096)
    data, target = DATA[: 6 * 4096 + 99], tmp_path / "model.gguf"
    file = remote(hub, data)
    leave(file, target, data, range(1, 5))
    part, journal = (path.read_bytes() for path in part_paths(target)[:2])
    for at in range(0, len(journal), 9):
        wrong = {
            "cut off": journal[:at],
            "flipped": journal[:at] + bytes([journal[at] ^ (1 << at % 8)]) + journal[at + 1 :],
            "a byte too many": journal[:at] + b"0" + journal[at:],
        }[damage]
        part_paths(target)[0].write_bytes(part)
        part_paths(target)[1].write_bytes(wrong)
        finish(file, target, data)
        target.unlink()


RUN = """
import sys
from pathlib import Path
from llmq import transfer
from llmq.fetcher import Limits, Remote
from llmq.http import Request
transfer.WAIT_SECONDS = 0.02
url, n_bytes, sha256, target = sys.argv[1:]
steps = transfer.fetch(Remote(Request(url, {}, {}), int(n_bytes), sha256), Path(target), Limits(first_wait=0.01))
for step in steps:
    if step.holder is not None:
        print("waits for", step.holder, flush=True)
    elif step.n_bytes:
        print("fetches", flush=True)
"""


def start(file: Remote, target: Path) -> "subprocess.Popen[str]":
    arguments = [file.request.url, str(file.n_bytes), file.sha256, str(target)]
    return subprocess.Popen([sys.executable, "-c", RUN, *arguments], stdout=subprocess.PIPE, text=True)


def read_until(process: "subprocess.Popen[str]", word: str) -> None:
    assert process.stdout is not None
    assert any(word in line for line in process.stdout)


def end(process: "subprocess.Popen[str]") -> int:
    process.communicate(timeout=60)
    return process.returncode


@pytest.mark.parametrize("n_processes", [2, 4])
def test_several_at_once_fetch_it_once(hub: Hub, tmp_path: Path, n_processes: int) -> None:
    file, target = remote(hub), tmp_path / "model.gguf"
    hub.bytes_per_second = 5e6
    processes = [start(file, target) for _ in range(n_processes)]
    assert [end(process) for process in processes] == [0] * n_processes
    assert target.read_bytes() == DATA
    assert [path.name for path in tmp_path.iterdir()] == [target.name]
    assert hub.n_sent() <= 1.05 * SIZE


def test_who_waits_takes_over_from_one_that_was_killed(hub: Hub, tmp_path: Path) -> None:
    file, target = remote(hub), tmp_path / "model.gguf"
    hub.bytes_per_second = 2e6
    holder = start(file, target)
    read_until(holder, "fetches")
    heir = start(file, target)
    read_until(heir, f"waits for {holder.pid}")
    before = hub.n_sent()
    assert before < SIZE / 2
    holder.kill()
    end(holder)
    hub.bytes_per_second = 0
    assert end(heir) == 0
    assert target.read_bytes() == DATA
    assert [path.name for path in tmp_path.iterdir()] == [target.name]
    assert hub.n_sent() <= SIZE + 8 * CHUNK
