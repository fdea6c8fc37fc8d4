"""What a download leaves on disk: a journal that may be cut off or wrong anywhere; and what others have planted."""

import os
import random
import shutil
import stat
import zlib
from collections.abc import Callable
from pathlib import Path

import pytest

from llmq import fetcher, ledger
from llmq.errors import ResourceError, UsageError
from llmq.fetcher import Remote
from llmq.http import Request
from llmq.ledger import Ledger
from llmq.part import part_paths

CHUNK = 512
SIZE = 5 * CHUNK + 100
DATA = random.Random(3).randbytes(SIZE)
CRCS = {index: zlib.crc32(DATA[index * CHUNK : (index + 1) * CHUNK]) for index in range(6)}
REMOTE = Remote(Request("https://example.com/x", {}, {}), SIZE, sha256="0" * 64)


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (fetcher, ledger):
        monkeypatch.setattr(module, "CHUNK", CHUNK)
    monkeypatch.setattr(os, "fsync", lambda _descriptor: None)  # of thousands of files


def put(book: Ledger, *chunks: int) -> None:
    for index in chunks:
        book.put(index, memoryview(DATA)[index * CHUNK : (index + 1) * CHUNK])


def left(target: Path, *chunks: int, remote: Remote = REMOTE) -> None:
    """An earlier run that got so far."""
    book = Ledger(target, remote)
    assert book.try_open() == {}
    book.reserve()
    put(book, *chunks)
    book.close()


def found(target: Path, remote: Remote = REMOTE) -> dict[int, int]:
    """What the next run finds, and that it can be finished."""
    book = Ledger(target, remote)
    there = book.try_open()
    assert there is not None
    book.reserve()
    space = memoryview(bytearray(CHUNK))
    right = {index for index, crc in there.items() if zlib.crc32(book.read(index, space)) == crc == CRCS[index]}
    put(book, *(set(CRCS) - right))
    book.publish()
    assert target.read_bytes() == DATA
    assert [path.name for path in target.parent.iterdir()] == [target.name]
    return there


def test_what_was_left_is_found(tmp_path: Path) -> None:
    left(tmp_path / "x", 4, 0, 5)
    assert found(tmp_path / "x") == {index: CRCS[index] for index in (4, 0, 5)}


@pytest.mark.parametrize(
    "remote",
    [
        Remote(REMOTE.request, SIZE, sha256="1" * 64),
        Remote(REMOTE.request, SIZE + 1, sha256="0" * 64),
        Remote(REMOTE.request, SIZE),
        Remote(REMOTE.request, SIZE, etag="b"),
        Remote(Request("https://example.com/y", {}, {}), SIZE, etag="a"),
    ],
)
def test_what_another_content_left_is_not_taken(tmp_path: Path, remote: Remote) -> None:
    earlier = REMOTE if remote.sha256 else Remote(REMOTE.request, SIZE, etag="a")
    left(tmp_path / "x", 0, 1, remote=remote)
    assert found(tmp_path / "x", earlier) == {}


def test_a_journal_that_was_cut_off_anywhere(tmp_path: Path) -> None:
    target, expected = tmp_path / "x", dict[int, int]()
    left(target, *CRCS)
    journal = part_paths(target)[1].read_bytes()
    found(target)
    target.unlink()
    for length in range(len(journal) + 1):
        left(target, *CRCS)
        part_paths(target)[1].write_bytes(journal[:length])
        expected = {index: CRCS[index] for index in list(CRCS)[: max(journal[:length].count(b"\n") - 2, 0)]}
        assert found(target) == expected
        target.unlink()
    assert expected == CRCS


def test_lines_after_one_that_was_cut_off(tmp_path: Path) -> None:
    left(tmp_path / "x", 0, 1)
    journal = part_paths(tmp_path / "x")[1]
    os.truncate(journal, journal.stat().st_size - 5)
    book = Ledger(tmp_path / "x", REMOTE)
    assert book.try_open() == {0: CRCS[0]}
    put(book, 2, 3)
    book.close()
    assert set(found(tmp_path / "x")) == {0, 2, 3}


DAMAGES: list[Callable[[int], int]] = [lambda byte: byte ^ 1, lambda byte: byte ^ 128, lambda _: 0]
DAMAGES += [lambda _, c=c: c for c in b"-+ _f\n"]  # type: ignore[misc]


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_journal_with_a_wrong_byte_anywhere(tmp_path: Path, damage: Callable[[int], int]) -> None:
    """No chunk is believed to be there by a number that it does not have, whatever the byte became."""
    target = tmp_path / "x"
    left(target, *CRCS)
    journal = part_paths(target)[1].read_bytes()
    part = part_paths(target)[0].read_bytes()
    for at in range(len(journal)):
        wrong = bytearray(journal)
        wrong[at] = damage(wrong[at])
        part_paths(target)[0].write_bytes(part)
        part_paths(target)[1].write_bytes(wrong)
        assert set(found(target)) <= set(CRCS)
        target.unlink()


def test_a_journal_of_anything(tmp_path: Path) -> None:
    target, rng = tmp_path / "x", random.Random(4)
    for _ in range(100):
        left(target, 0, 1)
        journal = part_paths(target)[1]
        journal.write_bytes(journal.read_bytes() + rng.randbytes(rng.randrange(100)))
        assert set(found(target)) <= set(CRCS)
        target.unlink()


@pytest.mark.parametrize("n_bytes", [0, 1, CHUNK, CHUNK + 1, SIZE - 1, SIZE + 1000])
def test_a_part_that_was_cut_off(tmp_path: Path, n_bytes: int) -> None:
    left(tmp_path / "x", *CRCS)
    os.truncate(part_paths(tmp_path / "x")[0], n_bytes)
    ends = {index: min((index + 1) * CHUNK, SIZE) for index in CRCS}
    assert set(found(tmp_path / "x")) == {index for index, end in ends.items() if end <= n_bytes}


def test_what_is_forgotten_is_not_found(tmp_path: Path) -> None:
    book = Ledger(tmp_path / "x", REMOTE)
    book.try_open()
    put(book, 0, 1)
    book.forget()
    put(book, 2)
    book.close()
    assert found(tmp_path / "x") == {2: CRCS[2]}


def test_the_order_that_a_power_cut_wants(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The content is on disk before it has its name, and the name before anybody hears of it."""
    events: list[object] = []
    replace = Path.replace
    monkeypatch.setattr(os, "fsync", lambda file: events.append(os.fstat(file).st_ino))
    monkeypatch.setattr(Path, "replace", lambda *paths: (events.append("name"), replace(*paths))[1])
    found(tmp_path / "x")
    assert events == [(tmp_path / "x").stat().st_ino, "name", tmp_path.stat().st_ino]


def test_only_one_has_it(tmp_path: Path) -> None:
    first, second = Ledger(tmp_path / "x", REMOTE), Ledger(tmp_path / "x", REMOTE)
    assert first.try_open() == {}
    put(first, 3)
    assert second.try_open() is None
    assert second.holder() == os.getpid()
    first.close()
    assert second.try_open() == {3: CRCS[3]}
    second.discard()
    assert not list(tmp_path.iterdir())
    assert second.holder() == 0


@pytest.mark.parametrize("journal", [b"", b"{}\n", b"{}\nnonsense\n"])
def test_a_holder_that_has_not_said_who_it_is(tmp_path: Path, journal: bytes) -> None:
    part_paths(tmp_path / "x")[1].write_bytes(journal)
    book = Ledger(tmp_path / "x", REMOTE)
    assert book.holder() == 0
    book.close()


def snapshot(folder: Path) -> dict[str, object]:
    return {path.name: (path.lstat().st_mode, path.is_file() and path.read_bytes()) for path in folder.iterdir()}


PLANTS: dict[str, Callable[[Path, Path], None]] = {
    "symlink": lambda path, other: path.symlink_to(other),
    "hard link": lambda path, other: path.hardlink_to(other),
    "FIFO": lambda path, _other: os.mkfifo(path),
    "folder": lambda path, _other: path.mkdir(),
}


@pytest.mark.parametrize("name", ["x.part", "x.part.journal"])
@pytest.mark.parametrize("plant", PLANTS)
def test_what_others_planted_is_left_alone(tmp_path: Path, plant: str, name: str) -> None:
    other, folder = tmp_path / "other", tmp_path / "folder"
    other.write_bytes(b"of somebody else")
    folder.mkdir()
    PLANTS[plant](folder / name, other)
    before = snapshot(folder)
    with pytest.raises(UsageError, match=r"remove it|check the path|Is a directory"):
        Ledger(folder / "x", REMOTE).try_open()
    assert snapshot(folder) == before
    assert other.read_bytes() == b"of somebody else"


@pytest.mark.parametrize("plant", ["FIFO", "folder"])
def test_a_target_that_is_no_file(tmp_path: Path, plant: str) -> None:
    PLANTS[plant](tmp_path / "x", tmp_path)
    before = snapshot(tmp_path)
    with pytest.raises(UsageError, match=r"folder|not a regular file"):
        Ledger(tmp_path / "x", REMOTE).try_open()
    assert snapshot(tmp_path) == before


def test_a_target_with_another_name_keeps_what_that_has(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "other").write_bytes(b"old")
    (tmp_path / "folder" / "x").hardlink_to(tmp_path / "other")
    found(tmp_path / "folder" / "x")
    assert (tmp_path / "other").read_bytes() == b"old"


@pytest.mark.parametrize("there", [True, False])
def test_a_target_that_is_a_link_is_replaced(tmp_path: Path, there: bool) -> None:
    (tmp_path / "folder").mkdir()
    if there:
        (tmp_path / "other").write_bytes(b"old")
    (tmp_path / "folder" / "x").symlink_to(tmp_path / "other")
    found(tmp_path / "folder" / "x")
    assert stat.S_ISREG((tmp_path / "folder" / "x").lstat().st_mode)
    assert not there or (tmp_path / "other").read_bytes() == b"old"
    assert (tmp_path / "other").exists() == there


def test_a_disk_that_is_too_full(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is there already needs no room."""
    usage = shutil.disk_usage(tmp_path)
    left(tmp_path / "x", 0, 1)
    book = Ledger(tmp_path / "x", REMOTE)
    assert len(book.try_open() or ()) == 2
    monkeypatch.setattr(shutil, "disk_usage", lambda _path: usage._replace(free=0))
    with pytest.raises(ResourceError, match="make room"):
        book.reserve()
    monkeypatch.setattr(shutil, "disk_usage", lambda _path: usage._replace(free=SIZE // 50))
    put(book, *CRCS)
    book.reserve()
    book.discard()
