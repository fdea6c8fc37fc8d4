import hashlib
import os
import stat
from pathlib import Path

import pytest

from llmq import store
from llmq.errors import UsageError


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("LLMQ_HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    return tmp_path / "home"


def put(name: str, content: bytes = b"GGUF") -> Path:
    folder = store.make_private(store.models_dir())
    path = folder / f"{name}.gguf"
    path.write_bytes(content)
    return path


TRAVERSALS = [
    "", ".", "..", "-x", ".hidden", "a" * 65, "a b", "a\nb", "a\x00b", "a\x1b[31m", "é", "a:b", "a%2fb", "$HOME", "~",
    "CON\u202e", "a\u2215b", "a;b", "a|b", "*", "?", "[a]", "'a'", '"', "\\", "a\\b", "\ud800",
]  # fmt: skip


@pytest.mark.parametrize("name", [*TRAVERSALS, "/etc/passwd", "../x", "a/b", "../../x.gguf", "a/../../x"])
def test_a_name_that_could_leave_the_store_is_refused(name: str) -> None:
    with pytest.raises(UsageError):
        store.model_path(name)
    with pytest.raises(UsageError):
        store.remove(name)


def test_a_name_stays_in_the_store(home: Path) -> None:
    for name in ("a", "mistral-7b_Q4.K-v0.3", "7b", "a" * 64, "a..b"):
        assert store.model_path(name).parent == home / "models"


def test_nothing_is_created_by_looking(home: Path) -> None:
    store.installed()
    with pytest.raises(UsageError):
        store.resolve("nothing")
    assert not home.exists()


@pytest.mark.skipif(os.name == "nt", reason="modes are POSIX")
@pytest.mark.parametrize("umask", [0o000, 0o077])
def test_the_store_is_the_users_own(umask: int) -> None:
    before = os.umask(umask)
    try:
        store.make_private(store.models_dir())
    finally:
        os.umask(before)
    assert stat.S_IMODE(store.models_dir().stat().st_mode) == 0o700


def test_names_resolve_to_the_store_and_paths_to_themselves(tmp_path: Path) -> None:
    stored = put("pebble")
    elsewhere = tmp_path / "other.gguf"
    elsewhere.write_bytes(b"GGUF")
    assert store.resolve("pebble") == stored
    assert store.resolve("other.gguf") == Path("other.gguf")
    assert store.resolve(elsewhere) == elsewhere
    assert store.resolve("storyteller") == store.BUNDLED_PATH


def test_a_stored_name_wins_over_a_folder_of_that_name(tmp_path: Path) -> None:
    (tmp_path / "pebble").mkdir()
    with pytest.raises(UsageError, match="llmq quantize"):
        store.resolve("pebble")
    stored = put("pebble")
    assert store.resolve("pebble") == stored


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("peble", "did you mean pebble"),
        ("zzz", "llmq list"),
        ("missing.gguf", "check the path"),
        ("./missing", "check the path"),
        (".", "llmq quantize"),
        ("", "llmq list"),
        ("x" * 500, "llmq list"),
    ],
)
def test_what_does_not_exist_is_refused_with_a_next_step(name: str, hint: str) -> None:
    put("pebble")
    with pytest.raises(UsageError, match=hint) as refused:
        store.resolve(name)
    assert len(str(refused.value)) <= 240
    assert str(refused.value).isprintable()


def test_installed_lists_what_a_name_could_mean() -> None:
    put("b", b"12")
    put("a")
    put(".hidden")
    put("a b")
    put("storyteller")
    (store.models_dir() / "c.gguf.tmp-1").write_bytes(b"")
    (store.models_dir() / "folder.gguf").mkdir()
    found = [entry for entry in store.installed() if entry.name != "storyteller"]
    assert [(entry.name, entry.n_bytes) for entry in found] == [("a", 4), ("b", 2)]
    assert all(entry.path == store.BUNDLED_PATH for entry in store.installed() if entry.name == "storyteller")


def test_remove_deletes_one_model_and_never_the_bundled_one() -> None:
    path = put("pebble", b"123")
    put("stone")
    assert store.remove("pebble") == store.Entry("pebble", path, 3)
    assert [entry.name for entry in store.installed() if entry.name != "storyteller"] == ["stone"]
    with pytest.raises(UsageError, match="no model"):
        store.remove("pebble")
    with pytest.raises(UsageError, match="part of llmq"):
        store.remove("storyteller")


def test_the_bundled_model_is_the_one_that_is_known() -> None:
    assert hashlib.sha256(store.BUNDLED_PATH.read_bytes()).hexdigest() == store.BUNDLED_SHA256


def test_remove_of_a_broken_link_removes_the_link(tmp_path: Path) -> None:
    store.make_private(store.models_dir())
    (store.models_dir() / "lost.gguf").symlink_to(tmp_path / "nowhere")
    assert store.installed()[1:] == []
    store.remove("lost")
    assert not list(store.models_dir().iterdir())


def test_a_folder_or_a_pipe_is_no_model() -> None:
    folder = store.make_private(store.models_dir())
    (folder / "a.gguf").mkdir()
    os.mkfifo(folder / "b.gguf")
    for name in ("a", "b"):
        with pytest.raises(UsageError, match="no model"):
            store.remove(name)
    assert len(list(folder.iterdir())) == 2


def test_remove_of_a_link_keeps_what_it_points_to(tmp_path: Path) -> None:
    real = tmp_path / "real.gguf"
    real.write_bytes(b"GGUF")
    store.make_private(store.models_dir())
    (store.models_dir() / "linked.gguf").symlink_to(real)
    store.remove("linked")
    assert real.exists()
    assert not (store.models_dir() / "linked.gguf").is_symlink()


def test_a_name_may_leave_the_type_away() -> None:
    short, other = put("mistral-7b-q4_k_m"), put("mistral-7b-v0.2-q4_k_m")
    assert store.resolve("mistral-7b") == store.resolve("Mistral-7B:Q4_K_M") == short
    assert store.resolve("mistral-7b-v0.2") == other
    for unknown in ("mistral", "mistral-7b:q5_k_m", "mistral-7b-q4", "mistral-7b:", "mistral-7b:m", ":q4_k_m"):
        with pytest.raises(UsageError, match="no model is named"):
            store.resolve(unknown)
    put("mistral-7b-iq4_xs")
    with pytest.raises(UsageError, match="is here as mistral-7b-iq4_xs and mistral-7b-q4_k_m; say which"):
        store.resolve("mistral-7b")
    assert store.resolve("mistral-7b:q4_k_m") == short
    exact = put("mistral-7b")
    assert store.resolve("mistral-7b") == exact
