"""Files in the making: what an interrupted run leaves, who may go on with it, and that nothing doubtful is kept."""

import json
import os
import re
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from llmq import locks
from llmq import part as module
from llmq.errors import FileFormatError, LlmqError, ResourceError, UnsupportedError, UsageError
from llmq.locks import is_held
from llmq.part import PartFile, discard, part_paths

HEAD = b"head of the file"
PIECES = [bytes([i]) * (i * 1000 + 1) for i in range(1, 7)]
WHOLE = HEAD + b"".join(PIECES)


def write(target: Path, job: str = "job", stop: int = len(PIECES), error: BaseException | None = None) -> list[int]:
    """Writes all pieces, or leaves before piece `stop`; numbers of those taken over."""
    part = PartFile(target, job)
    part.open(HEAD, len(WHOLE))
    taken, number = [], 0
    while number < stop and (note := part.take_over(len(PIECES[number]))) is not None:
        assert note == {"error": number / 3}
        taken.append(number)
        number += 1
    try:
        for i in range(number, stop):
            part.write(PIECES[i][:500])
            part.write(PIECES[i][500:])
            part.record({"error": i / 3})
    except ResourceError as full:
        part.leave(full)
        raise
    if stop < len(PIECES):
        part.write(PIECES[stop][:300])
        part.leave(error)
    else:
        part.publish()
        assert target.read_bytes() == WHOLE
        assert [path.name for path in target.parent.iterdir()] == [target.name]
    return taken


@pytest.mark.parametrize("error", [None, KeyboardInterrupt(), ResourceError("full"), OSError("gone"), MemoryError()])
@pytest.mark.parametrize("stop", range(1, 6))
def test_what_was_left_is_continued(tmp_path: Path, stop: int, error: BaseException | None) -> None:
    write(tmp_path / "x", stop=stop, error=error)
    assert not (tmp_path / "x").exists()
    assert write(tmp_path / "x") == list(range(stop))


def test_a_run_may_stop_more_than_once(tmp_path: Path) -> None:
    for stop in (2, 2, 1, 4):
        write(tmp_path / "x", stop=stop)
    assert write(tmp_path / "x") == [0, 1, 2, 3]


@pytest.mark.parametrize("error", [FileFormatError("damaged"), UnsupportedError("too large")])
def test_nothing_is_left_of_a_source_that_cannot_be(tmp_path: Path, error: LlmqError) -> None:
    write(tmp_path / "x", stop=3)
    write(tmp_path / "x", stop=4, error=error)
    assert not list(tmp_path.iterdir())


class Late:
    """In place of the thread: does what it is given when that is waited for, and the last thing at its end."""

    def __init__(self, _n_threads: int) -> None:
        self.work: Callable[[], None] | None = None

    def submit(self, function: Callable[[bytes], None], journal: bytes) -> "Late":
        self.work = lambda: function(journal)
        return self

    def result(self) -> None:
        work, self.work = self.work, None
        if work:
            work()

    shutdown = result


def test_a_journal_that_is_late_does_not_come_back(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(module, "ThreadPoolExecutor", Late)
    monkeypatch.setattr(module, "SAVE_SECONDS", 0)
    write(tmp_path / "x", stop=3, error=FileFormatError("damaged"))
    assert not list(tmp_path.iterdir())
    write(tmp_path / "x", stop=3)
    assert write(tmp_path / "x") == [0, 1, 2]


def test_nothing_is_left_where_no_piece_was_finished(tmp_path: Path) -> None:
    write(tmp_path / "x", stop=0)
    assert not list(tmp_path.iterdir())


def test_nothing_is_left_without_a_job(tmp_path: Path) -> None:
    write(tmp_path / "x", job="", stop=3)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("job", ["other", ""])
def test_what_another_job_left_is_replaced(tmp_path: Path, job: str) -> None:
    write(tmp_path / "x", stop=4)
    assert write(tmp_path / "x", job) == []


@pytest.mark.parametrize("stop", [1, 5])
def test_what_was_added_behind_does_not_stay(tmp_path: Path, stop: int) -> None:
    write(tmp_path / "x", stop=stop)
    with (tmp_path / "x.part").open("ab") as file:
        file.write(bytes(100_000))
    assert write(tmp_path / "x") == list(range(stop))


@pytest.mark.parametrize("piece", range(4))
def test_a_damaged_piece_and_all_after_it_are_written_again(tmp_path: Path, piece: int) -> None:
    write(tmp_path / "x", stop=4)
    with (tmp_path / "x.part").open("r+b") as file:
        file.seek(len(HEAD) + sum(map(len, PIECES[:piece])) + 7)
        file.write(b"\xff")
    assert write(tmp_path / "x") == list(range(piece))


def test_a_part_cut_anywhere_is_continued(tmp_path: Path) -> None:
    ends = [len(HEAD) + sum(map(len, PIECES[: i + 1])) for i in range(3)]
    for size in (0, 1, len(HEAD), *(end + off for end in ends for off in (-1, 0, 1))):
        write(tmp_path / "x", stop=4)
        os.truncate(tmp_path / "x.part", size)
        assert write(tmp_path / "x") == [i for i, end in enumerate(ends) if end <= size]
        (tmp_path / "x").unlink()


def test_a_damaged_journal_is_not_believed(tmp_path: Path) -> None:
    write(tmp_path / "x", stop=3)
    part, journal, _ = part_paths(tmp_path / "x")
    kept = part.read_bytes(), journal.read_bytes()
    for at in range(0, len(kept[1]), 7):
        flipped = kept[1][:at] + bytes([kept[1][at] ^ 1]) + kept[1][at + 1 :]
        for damaged in (kept[1][:at], flipped):
            part.write_bytes(kept[0])
            journal.write_bytes(damaged)
            assert write(tmp_path / "x") == []
            (tmp_path / "x").unlink()


def test_a_head_is_always_the_new_one(tmp_path: Path) -> None:
    """So that amending it, just before the end, does not cost the pieces when the process dies right then."""
    write(tmp_path / "x", stop=5)
    with (tmp_path / "x.part").open("r+b") as file:
        file.write(b"amended")
    assert write(tmp_path / "x") == [0, 1, 2, 3, 4]


def test_a_target_is_written_by_one_process(tmp_path: Path) -> None:
    first = PartFile(tmp_path / "x", "job")
    first.open(HEAD, len(WHOLE))
    program = (
        "import sys; from pathlib import Path; from llmq.part import PartFile; PartFile(Path(sys.argv[1])).open(b'', 0)"
    )
    second = subprocess.run(
        [sys.executable, "-c", program, tmp_path / "x"], capture_output=True, text=True, check=False
    )
    assert f"process {os.getpid()} is writing it" in second.stderr
    with pytest.raises(UsageError, match="is writing it"):
        write(tmp_path / "x")
    first.leave(None)
    write(tmp_path / "x")


@pytest.mark.parametrize("job", ["job", ""])
@pytest.mark.parametrize("new", [False, True])
@pytest.mark.parametrize("there", [b"another's", None])
def test_what_took_the_place_of_a_part_is_not_published(tmp_path: Path, job: str, new: bool, there: Any) -> None:
    part = PartFile(tmp_path / "x", job)
    part.open(HEAD, len(WHOLE))
    part.write(PIECES[0])
    part.record({})
    if there:
        (tmp_path / "y").write_bytes(there)
        (tmp_path / "y").rename(tmp_path / "x.part")
    else:
        (tmp_path / "x.part").unlink()
    with pytest.raises(UsageError, match=r"cannot write .*'x\.part' was removed or replaced meanwhile; do it again"):
        part.publish(new=new)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == ({"x.part": there} if there else {})


@pytest.mark.parametrize("name", ["y.part", "y.part.journal", "y.part.journal.new", "y.PART"])
def test_a_name_of_a_part_is_no_target(tmp_path: Path, name: str) -> None:
    """Nor is what a link of another name leads to."""
    (tmp_path / "x").symlink_to(name)
    for target in (tmp_path / name, tmp_path / "x"):
        with pytest.raises(UsageError, match="names that end so are those of files in the making; give another"):
            PartFile(target).open(HEAD, 1)
    assert [path.name for path in tmp_path.iterdir()] == ["x"]


def test_a_file_that_got_its_name_meanwhile_is_not_taken_for_a_part(tmp_path: Path, monkeypatch: Any) -> None:
    """The one who held the lock publishes between another's opening and locking."""
    first = PartFile(tmp_path / "x", "job")
    first.open(HEAD, 1)
    lock = locks.lock

    def late(descriptor: int) -> bool:
        monkeypatch.setattr(locks, "lock", lock)
        first.publish()
        return lock(descriptor)

    monkeypatch.setattr(locks, "lock", late)
    second = PartFile(tmp_path / "x", "job")
    second.open(b"another head", 1)
    assert (tmp_path / "x").read_bytes() == HEAD
    second.leave(None)
    assert [path.name for path in tmp_path.iterdir()] == ["x"]


@pytest.mark.parametrize("plant", ["symlink", "hard link", "pipe", "folder", "folder for the journal"])
def test_what_lies_in_the_way_is_not_written_to(tmp_path: Path, plant: str) -> None:
    precious, there = tmp_path / "precious", tmp_path / "x.part"
    precious.write_bytes(b"precious")
    match plant:
        case "symlink":
            there.symlink_to("precious")
        case "hard link":
            there.hardlink_to(precious)
        case "pipe":
            os.mkfifo(there)
        case "folder":
            there.mkdir()
        case _:
            there = tmp_path / "x.part.journal"
            there.mkdir()
    with pytest.raises(UsageError, match=f"cannot write {re.escape(repr(str(there)))}"):
        write(tmp_path / "x")
    assert precious.read_bytes() == b"precious"
    assert there.is_symlink() or there.exists()


def test_a_link_in_place_of_the_journal_is_replaced(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    precious = tmp_path / "precious"
    precious.write_bytes(b"precious")
    for path in part_paths(tmp_path / "folder" / "x")[1:]:
        path.symlink_to(precious)
    write(tmp_path / "folder" / "x")
    assert precious.read_bytes() == b"precious"


def test_a_pipe_in_place_of_the_journal_holds_nobody_up(tmp_path: Path) -> None:
    for path in part_paths(tmp_path / "x")[1:]:
        os.mkfifo(path)
    write(tmp_path / "x")


@pytest.mark.parametrize("plant", ["symlink", "hard link", "pipe", "another run's"])
def test_what_was_left_is_discarded_without_following_links(tmp_path: Path, plant: str) -> None:
    folder, precious = tmp_path / "folder", tmp_path / "precious"
    folder.mkdir()
    precious.write_bytes(b"precious")
    for path in part_paths(folder / "x"):
        match plant:
            case "symlink":
                path.symlink_to(precious)
            case "hard link":
                path.hardlink_to(precious)
            case "pipe":
                os.mkfifo(path)
            case _:
                path.write_bytes(b"left")
    (folder / "x").symlink_to(precious)  # whose own leftovers are not meant
    (tmp_path / "precious.part").write_bytes(b"of precious")
    assert not is_held(folder / "x.part")
    discard(folder / "x")
    assert [path.name for path in folder.iterdir()] == ["x"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["folder", "precious", "precious.part"]
    assert precious.read_bytes() == b"precious"


def test_what_a_process_holds_is_not_discarded(tmp_path: Path) -> None:
    part = PartFile(tmp_path / "x", "job")
    part.open(HEAD, len(WHOLE))
    assert is_held(tmp_path / "x.part")
    with pytest.raises(UsageError, match="is writing it"):
        discard(tmp_path / "x")
    part.leave(None)
    assert not is_held(tmp_path / "x.part")


def test_a_new_file_takes_no_others_name(tmp_path: Path) -> None:
    for taken in (False, True):
        part = PartFile(tmp_path / "x")
        part.open(HEAD, len(HEAD))
        if not taken:
            part.publish(new=True)
            continue
        with pytest.raises(UsageError, match="already"):
            part.publish(new=True)
    assert [path.name for path in tmp_path.iterdir()] == ["x"]
    assert (tmp_path / "x").read_bytes() == HEAD


def test_a_link_is_replaced_where_it_is_not_to_be_followed(tmp_path: Path) -> None:
    precious = tmp_path / "precious"
    precious.write_bytes(b"precious")
    (tmp_path / "x").symlink_to(precious)
    part = PartFile(tmp_path / "x", follow=False)
    part.open(HEAD, len(HEAD))
    part.publish()
    assert precious.read_bytes() == b"precious"
    assert not (tmp_path / "x").is_symlink()


def test_what_is_there_counts_as_room(tmp_path: Path, monkeypatch: Any) -> None:
    write(tmp_path / "x", stop=5)
    usage, there = shutil.disk_usage(tmp_path), sum(path.stat().st_size for path in tmp_path.iterdir())
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=len(WHOLE) - there - 1))
    with pytest.raises(ResourceError, match="of disk"):
        write(tmp_path / "x")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=len(WHOLE) - there))
    assert write(tmp_path / "x") == [0, 1, 2, 3, 4]


def test_a_disk_that_fills_up_keeps_what_was_finished(tmp_path: Path) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(WHOLE) - 9000, hard))
    try:
        with pytest.raises(ResourceError, match="make room"):
            write(tmp_path / "x")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert write(tmp_path / "x") == [0, 1, 2, 3]


def test_the_journal_is_saved_in_time(tmp_path: Path, monkeypatch: Any) -> None:
    """After so many bytes, and at once where no time may pass."""

    def saved(stop: int) -> int:
        part = PartFile(tmp_path / "x", "job")
        part.open(HEAD, len(WHOLE))
        for piece in PIECES[:stop]:
            part.write(piece)
            part.record({})
        part._wait()
        pieces = json.loads((tmp_path / "x.part.journal").read_bytes().partition(b"\n")[2])["pieces"]
        part.leave(FileFormatError(""))
        return len(pieces)

    monkeypatch.setattr(module, "SAVE_SECONDS", 1e9)
    assert [saved(i) for i in range(1, 6)] == [0, 0, 0, 0, 0]
    monkeypatch.setattr(module, "SAVE_BYTES", 3000)
    assert [saved(i) for i in range(1, 6)] == [0, 2, 3, 4, 5]
    monkeypatch.setattr(module, "SAVE_BYTES", 1e9)
    monkeypatch.setattr(module, "SAVE_SECONDS", 0)
    assert [saved(i) for i in range(1, 6)] == [1, 2, 3, 4, 5]


def test_data_is_on_disk_before_the_journal_tells_and_before_the_name(tmp_path: Path, monkeypatch: Any) -> None:
    done: list[tuple[str, str]] = []

    def seen(name: str) -> None:
        real = getattr(os, name)

        def call(what: Any, *rest: Any) -> Any:
            path = Path(f"/proc/self/fd/{what}").readlink() if isinstance(what, int) else Path(what)
            done.append((name, path.name))
            return real(what, *rest)

        monkeypatch.setattr(os, name, call)

    for name in ("fdatasync", "fsync", "replace", "unlink"):
        seen(name)
    write(tmp_path / "x")
    saved = [("fdatasync", "x.part"), ("unlink", "x.part.journal.new"), ("fsync", "x.part.journal.new")]
    saved.append(("replace", "x.part.journal.new"))
    assert done == [
        *saved,
        ("fsync", "x.part"),
        ("unlink", "x.part.journal.new"),
        ("unlink", "x.part.journal"),
        ("replace", "x.part"),
        ("fsync", tmp_path.name),
    ]
