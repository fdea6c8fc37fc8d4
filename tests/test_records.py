"""What is remembered of a file, and that nothing is believed that was not written."""

import hashlib
import json
import os
import stat
from pathlib import Path

import pytest

from llmq import records, store
from llmq.errors import LlmqError, UsageError
from llmq.records import Record, drop_record, last_used, lost_records, mark_used, read_record, write_record

DIGEST = hashlib.sha256(b"content").hexdigest()


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("LLMQ_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


@pytest.fixture
def model(home: Path) -> Path:
    path = home / "models" / "a.gguf"
    path.parent.mkdir(parents=True)
    path.write_bytes(b"content")
    return path


def test_a_record_comes_back_as_it_was(model: Path, home: Path) -> None:
    write_record(model, DIGEST, "org/repo@0123/a.gguf", 12.5)
    status = model.stat()
    assert read_record(model) == Record(DIGEST, 7, status.st_mtime_ns, "org/repo@0123/a.gguf", 12.5)
    assert (home / "state" / "models" / "a.json").is_file()
    drop_record(model)
    assert read_record(model) is None
    drop_record(model)


def test_files_elsewhere_have_records_by_their_real_path(tmp_path: Path, home: Path) -> None:
    path, link = tmp_path / "b.gguf", tmp_path / "link.gguf"
    path.write_bytes(b"content")
    link.symlink_to(path)
    write_record(link, DIGEST, "here")
    found = read_record(path)
    assert found
    assert found == read_record(link)
    name = hashlib.sha256(os.fsencode(os.path.realpath(path))).hexdigest()
    assert [file.name for file in (home / "state" / "files").iterdir()] == [f"{name}.json"]


def test_a_name_in_the_store_counts_even_if_it_is_a_link(tmp_path: Path, model: Path, home: Path) -> None:
    (tmp_path / "far.gguf").write_bytes(b"content")
    (model.parent / "near.gguf").symlink_to(tmp_path / "far.gguf")
    write_record(model.parent / "near.gguf", DIGEST, "x")
    (tmp_path / "models").symlink_to(model.parent)
    write_record(tmp_path / "models" / "a.gguf", DIGEST, "y")
    assert sorted(path.name for path in (home / "state" / "models").iterdir()) == ["a.json", "near.json"]


@pytest.mark.skipif(os.name == "nt", reason="modes are POSIX")
@pytest.mark.parametrize("umask", [0o000, 0o077])
def test_records_are_the_users_own(model: Path, home: Path, umask: int) -> None:
    before = os.umask(umask)
    try:
        write_record(model, DIGEST, "x")
        mark_used(model)
    finally:
        os.umask(before)
    folder = home / "state" / "models"
    assert [stat.S_IMODE(path.stat().st_mode) for path in (home / "state", folder)] == [0o700, 0o700]
    assert {stat.S_IMODE(path.stat().st_mode) for path in folder.iterdir()} == {0o600}
    assert {path.name for path in folder.iterdir()} == {"a.json", "a.used"}


@pytest.mark.skipif(os.name == "nt", reason="modes are POSIX")
def test_a_folder_that_others_may_write_to_holds_no_records(model: Path, home: Path) -> None:
    folder = home / "state" / "models"
    folder.mkdir(parents=True)
    folder.chmod(0o777)
    with pytest.raises(UsageError, match="others may write"):
        write_record(model, DIGEST, "x")
    folder.rmdir()
    folder.symlink_to(model.parent)
    with pytest.raises(UsageError, match="others may write"):
        write_record(model, DIGEST, "x")
    assert list(model.parent.iterdir()) == [model]


def test_a_record_is_stale_when_size_or_date_is_another(model: Path) -> None:
    write_record(model, DIGEST, "x")
    record = read_record(model)
    assert record
    assert record.fits(model)
    assert records.current_record(model) == record
    status = model.stat()
    os.utime(model, ns=(status.st_atime_ns, status.st_mtime_ns + 1))
    assert not record.fits(model)
    assert read_record(model) == record
    assert records.current_record(model) is None
    model.write_bytes(b"contents")
    os.utime(model, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert not record.fits(model)
    model.unlink()
    assert not record.fits(model)


GOOD = {"sha256": DIGEST, "n_bytes": 7, "mtime_ns": 5, "origin": "x", "added": 1.5, "file": "/a"}


@pytest.mark.parametrize(
    "change",
    [
        {"sha256": DIGEST.upper()}, {"sha256": DIGEST[:-1]}, {"sha256": DIGEST + "0"}, {"sha256": DIGEST + "\n"},
        {"sha256": 5}, {"sha256": None}, {"n_bytes": -1}, {"n_bytes": "7"}, {"n_bytes": 7.0}, {"n_bytes": True},
        {"n_bytes": 2**63}, {"mtime_ns": None}, {"mtime_ns": 1.0}, {"mtime_ns": -5}, {"origin": ["x"]},
        {"origin": None}, {"origin": "x" * 4097}, {"added": float("nan")}, {"added": float("inf")}, {"added": -1.0},
        {"added": "1"}, {"added": 1e300}, {"added": True},
    ],
)  # fmt: skip
def test_a_record_of_other_values_is_none(model: Path, home: Path, change: dict[str, object]) -> None:
    write_record(model, DIGEST, "x")
    file = home / "state" / "models" / "a.json"
    file.write_text(json.dumps(GOOD))
    assert read_record(model) == Record(DIGEST, 7, 5, "x", 1.5)
    file.write_text(json.dumps(GOOD | change))
    assert read_record(model) is None


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"[]", b"null", b"7", b"\xff\xfe", b"[" * 100_000, b'{"a":' * 10_000, b"\x00" * 50,
     json.dumps(GOOD).encode() + b" " * 200_000, b"9" * 10_000],
)  # fmt: skip
def test_a_file_that_is_no_record_is_none(model: Path, home: Path, content: bytes) -> None:
    write_record(model, DIGEST, "x")
    (home / "state" / "models" / "a.json").write_bytes(content)
    assert read_record(model) is None
    lost_records()


@pytest.mark.parametrize("plant", ["symlink", "pipe", "folder", "file for the folder"])
def test_what_lies_in_a_records_place_is_neither_read_nor_written(tmp_path, model, home, plant) -> None:
    precious = tmp_path / "precious"
    precious.write_text(json.dumps(GOOD))
    folder = home / "state" / "models"
    folder.mkdir(parents=True, mode=0o700)
    for name in ("a.json", "a.used"):
        match plant:
            case "symlink":
                (folder / name).symlink_to(precious)
            case "pipe":
                os.mkfifo(folder / name)
            case "folder":
                (folder / name).mkdir()
    if plant == "file for the folder":
        folder.rmdir()
        folder.write_text("")
    before = precious.stat()
    assert read_record(model) is None
    mark_used(model)
    assert plant == "file for the folder" or last_used(model) is None
    if plant in ("symlink", "pipe"):
        write_record(model, DIGEST, "x")
        assert read_record(model)
    else:
        with pytest.raises(LlmqError, match="cannot write"):
            write_record(model, DIGEST, "x")
    assert (precious.read_text(), precious.stat().st_mtime_ns) == (json.dumps(GOOD), before.st_mtime_ns)


def test_the_last_use_is_dated(model: Path, home: Path) -> None:
    assert last_used(model) is None
    assert not (home / "state").exists()
    mark_used(model)
    os.utime(home / "state" / "models" / "a.used", (100, 100))
    assert last_used(model) == 100
    mark_used(model)
    found = last_used(model)
    assert found
    assert found > 100
    write_record(model, DIGEST, "x")
    assert last_used(model) == found
    drop_record(model)
    assert last_used(model) is None


def test_the_bundled_model_has_a_date_too(home: Path) -> None:
    mark_used(store.BUNDLED_PATH)
    assert last_used(store.BUNDLED_PATH)
    assert [path.name for path in (home / "state" / "models").iterdir()] == ["storyteller.used"]


def test_files_elsewhere_are_dated_where_they_are_known(tmp_path: Path, home: Path) -> None:
    path = tmp_path / "b.gguf"
    path.write_bytes(b"content")
    mark_used(path)
    assert not (home / "state").exists()
    write_record(path, DIGEST, "x")
    mark_used(path)
    assert last_used(path)


def test_a_state_folder_that_cannot_be_made_stops_no_chat(model: Path, home: Path) -> None:
    (home / "state").write_text("a file")
    mark_used(model)
    assert last_used(model) is None
    assert read_record(model) is None
    with pytest.raises(UsageError, match="cannot write"):
        write_record(model, DIGEST, "x")
    drop_record(model)


def test_records_of_files_that_are_gone_are_lost(tmp_path: Path, model: Path, home: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    paths = [model, model.with_name("b.gguf"), tmp_path / "c.gguf", disk / "d.gguf"]
    for path in paths:
        path.write_bytes(b"content")
        write_record(path, DIGEST, "x")
        mark_used(path)
    mark_used(store.BUNDLED_PATH)
    assert lost_records() == []
    for path in paths[1:]:
        path.unlink()
    disk.rmdir()  # as if it were not mounted
    lost = lost_records()
    assert [path.name for path in lost if path.parent.name == "models"] == ["b.json", "b.used"]
    assert {path.suffix for path in lost if path.parent.name == "files"} == {".json", ".used"}
    assert len(lost) == 4
    young, old = (home / "state" / "models" / name for name in (".new-young", ".new-old"))
    young.touch()
    old.touch()
    os.utime(old, (0, 0))
    assert old in lost_records()
    assert young not in lost_records()


def test_a_full_disk_keeps_the_record_before(model: Path, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_record(model, DIGEST, "before")

    def full(_descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(LlmqError, match="make room"):
        write_record(model, DIGEST, "after")
    record = read_record(model)
    assert record
    assert record.origin == "before"
    assert [path.name for path in (home / "state" / "models").iterdir()] == ["a.json"]


def test_a_record_is_on_disk_before_it_has_its_name(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    done = []
    for name in ("fsync", "replace"):
        real = getattr(os, name)

        def call(what, *rest, name=name, real=real):
            path = Path(f"/proc/self/fd/{what}").readlink() if isinstance(what, int) else Path(what)
            done.append((name, "folder" if path.is_dir() else path.name[:5]))
            return real(what, *rest)

        monkeypatch.setattr(os, name, call)
    write_record(model, DIGEST, "x")
    assert done == [("fsync", ".new-"), ("replace", ".new-"), ("fsync", "folder")]
