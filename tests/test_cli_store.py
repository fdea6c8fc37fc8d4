"""where, verify, import, rm and prune, and what list and show tell: small files, hostile names and planted links."""

import hashlib
import json
import os
import pty
import random
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from cli_fake import module as fake_model
from cli_runs import llmq
from tiny import tiny_gguf

import cli.store
from cli.models import ago
from llmq import elsewhere
from llmq.errors import ResourceError
from llmq.part import PartFile
from llmq.records import mark_used, read_record

ROOT = Path(__file__).parents[1]


@pytest.fixture(autouse=True)
def models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("LLMQ_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("OLLAMA_MODELS", str(tmp_path / "ollama"))
    monkeypatch.setattr(elsewhere, "OLLAMA_SERVICE", tmp_path / "service")
    monkeypatch.delenv("LLMQ_DEBUG", raising=False)
    folder = tmp_path / "home" / "models"
    folder.mkdir(parents=True)
    return folder


@pytest.fixture(scope="module")
def content(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    path = tmp_path_factory.mktemp("tiny") / "a.gguf"
    tiny_gguf(path, n_layers=1)
    return path.read_bytes()


@pytest.fixture
def file(tmp_path: Path, content: bytes) -> Path:
    path = tmp_path / "files" / "tiny.gguf"
    path.parent.mkdir()
    path.write_bytes(content)
    return path


def refused(capsys: pytest.CaptureFixture[str], *arguments: str | Path, code: int = 2) -> str:
    """The one line of a command that fails."""
    found, _, err = llmq(capsys, *arguments)
    assert found == code, err
    assert err.startswith("llmq: ")
    assert err.count("\n") == 1
    assert len(err) <= 241
    assert "bug in llmq" not in err
    assert err.rstrip("\n").isprintable()
    return err


def tree(folder: Path) -> dict[str, Any]:
    """Everything below a folder: kind, link, content and date."""
    found: dict[str, Any] = {}
    for path in sorted(folder.rglob("*")):
        status = path.lstat()
        what = path.readlink() if path.is_symlink() else path.read_bytes() if path.is_file() else None
        found[str(path)] = (status.st_mode, what, status.st_mtime_ns if path.is_file() else None)
    return found


def test_where_prints_the_folder_or_a_file_and_nothing_else(models, file, capsys) -> None:
    assert llmq(capsys, "where") == (0, f"{models}\n", "")
    llmq(capsys, "import", file)
    assert llmq(capsys, "where", "tiny") == (0, f"{models / 'tiny.gguf'}\n", "")
    assert llmq(capsys, "where", file) == (0, f"{file}\n", "")
    assert "no model" in refused(capsys, "where", "nobody")


def test_import_links_a_file_and_remembers_it(models, file, content, capsys) -> None:
    code, out, err = llmq(capsys, "import", file)
    assert (code, out) == (0, f"{models / 'tiny.gguf'}\n")
    assert "linked" in err
    assert "llmq chat tiny" in err
    assert (models / "tiny.gguf").samefile(file)
    record = read_record(models / "tiny.gguf")
    assert record
    assert (record.sha256, record.origin) == (hashlib.sha256(content).hexdigest(), str(file))
    assert abs(record.added - time.time()) < 1000
    for _ in range(2):
        code, out, err = llmq(capsys, "import", file)
        assert (code, out) == (0, f"{models / 'tiny.gguf'}\n")
        assert "in the store already" in err
    assert [path.name for path in models.iterdir()] == ["tiny.gguf"]


def test_import_copies_on_request(models, file, content, capsys) -> None:
    code, _, err = llmq(capsys, "import", file, "--copy", "--name", "other")
    assert code == 0
    assert "copied" in err
    assert not (models / "other.gguf").samefile(file)
    assert (models / "other.gguf").read_bytes() == content
    code, _, err = llmq(capsys, "import", file, "--name", "other")  # the same content by another file
    assert code == 0
    assert "in the store already" in err


def test_import_replaces_only_by_force(models, file, tmp_path, capsys) -> None:
    llmq(capsys, "import", file)
    mark_used(models / "tiny.gguf")
    second = tmp_path / "second" / "tiny.gguf"
    second.parent.mkdir()
    tiny_gguf(second, n_layers=1, seed=1)
    before = tree(tmp_path)
    assert "--force" in refused(capsys, "import", second)
    assert tree(tmp_path) == before
    for options in ([], ["--copy"]):
        code, _, err = llmq(capsys, "import", second, "--force", *options)
        assert code == 0, err
        assert (models / "tiny.gguf").read_bytes() == second.read_bytes()
        record = read_record(models / "tiny.gguf")
        assert record
        assert record.origin == str(second)
    assert not (models / "tiny.gguf").samefile(second)
    assert tree(file.parent) == {key: value for key, value in before.items() if key.startswith(str(file.parent) + "/")}
    assert [path.name for path in models.iterdir()] == ["tiny.gguf"]


def test_what_was_known_is_not_said_of_another_file(models, file, tmp_path, capsys, monkeypatch) -> None:
    """The new file has the name, and its record cannot be written."""
    llmq(capsys, "import", file)
    second = tmp_path / "tiny.gguf"
    tiny_gguf(second, n_layers=1, seed=1)

    def full(*_: Any) -> None:
        raise ResourceError("cannot write the record: no space; make room")

    with monkeypatch.context() as patch:
        patch.setattr(cli.store, "write_record", full)
        assert "make room" in refused(capsys, "import", second, "--force", code=3)
    assert (models / "tiny.gguf").samefile(second)
    code, out, _ = llmq(capsys, "verify", "tiny")
    assert code == 0
    assert "nothing was known" in out


def test_import_of_a_link_links_the_real_file(models, file, tmp_path, capsys) -> None:
    (tmp_path / "alias.gguf").symlink_to(file)
    assert llmq(capsys, "import", tmp_path / "alias.gguf")[0] == 0
    assert not (models / "alias.gguf").is_symlink()
    assert (models / "alias.gguf").samefile(file)
    record = read_record(models / "alias.gguf")
    assert record
    assert record.origin == str(file)


def ollama(tmp_path: Path, content: bytes) -> Path:
    digest = hashlib.sha256(content).hexdigest()
    layer = {"mediaType": elsewhere.MODEL_LAYER, "digest": f"sha256:{digest}", "size": len(content)}
    manifest = tmp_path / "ollama/manifests/registry.ollama.ai/library/mistral/7b"
    manifest.parent.mkdir(parents=True)
    manifest.write_text(json.dumps({"layers": [layer]}))
    blob = tmp_path / "ollama" / "blobs" / f"sha256-{digest}"
    blob.parent.mkdir()
    blob.write_bytes(content)
    return blob


def test_import_takes_a_model_from_ollama(models, tmp_path, content, capsys) -> None:
    blob = ollama(tmp_path, content)
    code, out, _ = llmq(capsys, "import", "ollama:mistral:7b")
    assert (code, out) == (0, f"{models / 'mistral-7b.gguf'}\n")
    assert (models / "mistral-7b.gguf").samefile(blob)
    record = read_record(models / "mistral-7b.gguf")
    assert record
    assert record.origin == "ollama:mistral:7b"
    assert "mistral:7b" in refused(capsys, "import", "ollama:mixtral")
    flipped = content[:-1] + bytes([content[-1] ^ 1])
    blob.write_bytes(flipped)
    assert "sha256" in refused(capsys, "import", "ollama:mistral:7b", "--name", "x", code=4)
    assert [path.name for path in models.iterdir()] == ["mistral-7b.gguf"]


@pytest.mark.parametrize(
    ("change", "code"),
    [
        (lambda _: b"", 4),
        (lambda _: b"not a model", 4),
        (lambda content: content[: len(content) // 2], 4),
        (lambda content: content[:4] + b"\x09" + content[5:], 1),
        (lambda content: content.replace(b"llama", b"lemma", 1), 1),
        (lambda content: content.replace(b"blk.0.attn_q", b"blk.0.attn_z", 1), 4),
        (lambda content: content.replace(b"tokenizer.ggml.model", b"tokenizer.ggml.other", 1), 4),
    ],
)
def test_import_takes_only_what_can_be_run(models, file, content, tmp_path, capsys, change, code) -> None:
    file.write_bytes(change(content))
    refused(capsys, "import", file, code=code)
    assert tree(tmp_path / "home") == tree(models.parent)
    assert not list(models.iterdir())
    assert not (tmp_path / "home" / "state").exists()


@pytest.mark.parametrize("restore", [False, True], ids=["touched", "date restored"])
def test_every_flipped_bit_is_found(models, file, content, capsys, restore) -> None:
    llmq(capsys, "import", file, "--copy")
    model = models / "tiny.gguf"
    before, rng = model.stat(), random.Random(5)
    for at in rng.sample(range(len(content)), 200):
        with model.open("r+b") as opened:
            opened.seek(at)
            opened.write(bytes([content[at] ^ 1 << rng.randrange(8)]))
        if restore:
            os.utime(model, ns=(before.st_atime_ns, before.st_mtime_ns))
        err = refused(capsys, "verify", "tiny", code=4)
        assert "llmq pull" in err
        assert "llmq rm tiny" in err
        assert ("is damaged" in err) == restore
        with model.open("r+b") as opened:
            opened.seek(at)
            opened.write(content[at : at + 1])
    assert llmq(capsys, "verify", "tiny")[0] == 0


def test_verify_remembers_what_was_not_known(models, file, content, capsys) -> None:
    (models / "byhand.gguf").write_bytes(content)
    digest = hashlib.sha256(content).hexdigest()
    for path in ("byhand", file):
        code, out, _ = llmq(capsys, "verify", path)
        assert code == 0
        assert "nothing was known" in out
        assert digest in out
        code, out, _ = llmq(capsys, "verify", path)
        assert (code, out) == (0, f"{path}: as it was, sha256 {digest}\n")
    os.utime(models / "byhand.gguf", (5, 5))
    assert "but for its date" in llmq(capsys, "verify", "byhand")[1]
    assert ": as it was," in llmq(capsys, "verify", "byhand")[1]
    (models / "cut.gguf").write_bytes(content[:-1])
    assert "cut short" in refused(capsys, "verify", "cut", code=4)
    assert read_record(models / "cut.gguf") is None


def test_verify_all_goes_on_after_a_damaged_one(models, file, content, capsys) -> None:
    for name in ("a", "b", "c"):
        llmq(capsys, "import", file, "--copy", "--name", name)
    (models / "b.gguf").write_bytes(content[:-1] + b"\xff")
    code, out, err = llmq(capsys, "verify", "--all")
    assert code == 4
    assert [line.split(":")[0] for line in out.splitlines()] == ["storyteller", "a", "b", "c"]
    assert "as it was packaged" in out
    assert err == "llmq: 1 of 4 models did not pass, as said above: b\n"
    for arguments in ([], ["--all", "a"]):
        assert "--all" in refused(capsys, "verify", *arguments)


def test_a_file_that_was_changed_on_purpose_can_be_accepted(models, file, content, capsys) -> None:
    llmq(capsys, "import", file, "--copy")
    llmq(capsys, "verify", file)
    for name, path in (("tiny", models / "tiny.gguf"), (str(file), file)):
        tiny_gguf(path, n_layers=1, seed=2)
        err = refused(capsys, "verify", name, code=4)
        assert "--accept" in err
        assert ("llmq rm tiny" in err) == (name == "tiny")
        assert "remembered as it is now" in llmq(capsys, "verify", name, "--accept")[1]
        assert llmq(capsys, "verify", name)[0] == 0
        path.write_bytes(content[:-1])
        assert "cut short" in refused(capsys, "verify", name, "--accept", code=4)


def test_import_of_what_is_linked_already_can_become_a_copy(models, file, content, capsys) -> None:
    llmq(capsys, "import", file)
    assert "in the store already" in llmq(capsys, "import", file, "--force")[2]
    assert "copied" in llmq(capsys, "import", file, "--force", "--copy")[2]
    assert not (models / "tiny.gguf").samefile(file)
    assert "copied" in llmq(capsys, "import", models / "tiny.gguf", "--force", "--copy")[2]
    assert (models / "tiny.gguf").read_bytes() == file.read_bytes() == content


def test_list_and_show_tell_what_is_known(models, file, content, capsys, monkeypatch) -> None:
    llmq(capsys, "import", file)
    (models / "byhand.gguf").write_bytes(content)
    (models / "damaged.gguf").write_bytes(b"GGUF")
    monkeypatch.setitem(sys.modules, "llmq.model", fake_model())
    assert llmq(capsys, "run", "-m", "tiny", "hello")[0] == 0
    os.utime(models.parent / "state" / "models" / "tiny.used", (time.time() - 3 * 86_400 - 60,) * 2)
    lines = llmq(capsys, "list")[1].splitlines()[2:]
    assert ["never" in line for line in lines] == [True, True, False]
    assert "  3 days ago  " in lines[2]
    found = {entry["name"]: entry for entry in json.loads(llmq(capsys, "list", "--json")[1])}
    tiny, digest = found["tiny"], hashlib.sha256(content).hexdigest()
    assert (tiny["path"], tiny["bytes"], tiny["sha256"]) == (str(models / "tiny.gguf"), len(content), digest)
    assert (tiny["type"], tiny["origin"], tiny["error"]) == ("F32", str(file), None)
    for moment in (tiny["added"], tiny["last_used"]):
        assert time.strptime(moment, "%Y-%m-%dT%H:%M:%SZ")
    assert (found["byhand"]["sha256"], found["byhand"]["last_used"], found["byhand"]["type"]) == (None, None, "F32")
    assert "damaged" in found["damaged"]["error"]
    shown = llmq(capsys, "show", "tiny")[1]
    for text in ("last used   3 days ago", f"origin      {file}", f"sha256      {digest}", "added       20"):
        assert text in shown
    os.utime(file, (5, 5))
    assert "llmq verify" in llmq(capsys, "show", "tiny")[1]
    assert json.loads(llmq(capsys, "list", "--json")[1])[-1]["sha256"] is None


def test_a_run_does_not_fail_for_what_cannot_be_remembered(models, file, capsys, monkeypatch) -> None:
    llmq(capsys, "import", file)
    monkeypatch.setitem(sys.modules, "llmq.model", fake_model())
    (models.parent / "state").rename(models.parent / "gone")
    (models.parent / "state").write_text("a file")
    assert llmq(capsys, "run", "-m", "tiny", "hello")[0] == 0
    assert llmq(capsys, "list")[0] == 0


def test_what_an_origin_says_cannot_act_on_the_terminal(models, file, capsys) -> None:
    llmq(capsys, "import", file)
    record = models.parent / "state" / "models" / "tiny.json"
    record.write_text(json.dumps(json.loads(record.read_text()) | {"origin": "a\x1b]0;x\x07\n[/INST]\u202e"}))
    shown = llmq(capsys, "show", "tiny")[1]
    assert all(character == "\n" or character.isprintable() for character in shown)
    assert "[/INST]" in shown
    assert "\x1b" not in llmq(capsys, "list", "--json")[1]


@pytest.mark.parametrize(
    ("seconds", "said"),
    [(-50, "just now"), (59, "just now"), (60, "1 minute ago"), (7300, "2 hours ago"), (86_400, "1 day ago"),
     (29 * 86_400, "29 days ago"), (70 * 86_400, "2 months ago"), (800 * 86_400, "2 years ago")],
)  # fmt: skip
def test_times_are_told_in_their_largest_unit(seconds, said) -> None:
    assert ago(seconds) == said


def test_rm_removes_models_with_all_that_is_of_their_names(models, file, content, capsys) -> None:
    for name in ("a", "b", "c"):
        llmq(capsys, "import", file, "--copy", "--name", name)
        mark_used(models / f"{name}.gguf")
    for name in ("a.gguf.part", "a.gguf.part.journal", "b.gguf.part.journal.new", "d.gguf.part", "ab.gguf.part"):
        (models / name).write_bytes(b"12345")
    code, out, err = llmq(capsys, "rm", "a", "b", "d")
    assert (code, out) == (0, "")
    megabytes = f"{len(content) / 1e6:.1f} MB freed"
    assert err.splitlines() == [f"removed a, {megabytes}", f"removed b, {megabytes}", "removed d, 5 B freed"]
    assert sorted(path.name for path in models.iterdir()) == ["ab.gguf.part", "c.gguf"]
    assert sorted(path.name for path in (models.parent / "state" / "models").iterdir()) == ["c.json", "c.used"]


def test_rm_removes_nothing_where_one_name_is_wrong(models, file, tmp_path, capsys) -> None:
    llmq(capsys, "import", file)
    (models / "storyteller.gguf.part").write_bytes(b"")
    before = tree(tmp_path)
    for wrong in ("nobody", "../tiny", "storyteller"):
        refused(capsys, "rm", "tiny", wrong)
        assert tree(tmp_path) == before


def test_rm_says_when_nothing_is_freed(models, file, capsys) -> None:
    llmq(capsys, "import", file)
    (models / "linked.gguf").symlink_to(file)
    _, _, err = llmq(capsys, "rm", "tiny", "linked")
    assert err.splitlines() == [
        f"removed {name}, 0 B freed; its file is still elsewhere" for name in ("tiny", "linked")
    ]
    assert file.exists()
    assert not list(models.iterdir())


def test_rm_and_prune_leave_what_a_process_is_writing(models, file, capsys) -> None:
    llmq(capsys, "import", file)
    part = PartFile(models / "tiny.gguf", "job")
    part.open(b"head", 100)
    part.write(b"x" * 50)
    part.record({})
    before = tree(models)
    assert "is writing tiny" in refused(capsys, "rm", "tiny")
    assert llmq(capsys, "prune", "--yes") == (0, "", "nothing to remove\n")
    assert tree(models) == before
    part.leave(None)
    code, out, err = llmq(capsys, "prune", "--yes")
    assert code == 0
    assert str(models / "tiny.gguf.part") in out
    assert "2 files" in err
    assert [path.name for path in models.iterdir()] == ["tiny.gguf"]


def test_prune_removes_leftovers_and_records_of_what_is_gone(models, file, tmp_path, capsys) -> None:
    for name in ("a", "b"):
        llmq(capsys, "import", file, "--copy", "--name", name)
    (models / "a.gguf").unlink()
    for name, length in (("x.gguf.part", 1000), ("x.gguf.part.journal", 10), ("y.gguf.part.journal", 7)):
        (models / name).write_bytes(bytes(length))
    precious = tmp_path / "precious"
    precious.write_text("precious")
    (models / "z.gguf.part").symlink_to(precious)
    (models / "w.gguf").symlink_to(precious)
    (tmp_path / "precious.part").write_text("of somebody else")
    (models / "w.gguf.part").write_bytes(b"")
    (models / "folder.part").mkdir()
    (models / ".part").write_bytes(b"")
    (models / "notes.partial").write_bytes(b"")
    refused(capsys, "prune")
    code, out, err = llmq(capsys, "prune", "--yes")
    assert code == 0
    assert [Path(line.split("  ")[0]).name for line in out.splitlines()] == [
        "w.gguf.part", "x.gguf.part", "x.gguf.part.journal", "y.gguf.part.journal", "z.gguf.part", "a.json",
    ]  # fmt: skip
    assert err.startswith("removed 6 files, 1.")
    left = sorted(path.name for path in models.iterdir())
    assert left == [".part", "b.gguf", "folder.part", "notes.partial", "w.gguf"]
    assert (precious.read_text(), (tmp_path / "precious.part").read_text()) == ("precious", "of somebody else")
    assert [path.name for path in (models.parent / "state" / "models").iterdir()] == ["b.json"]
    assert llmq(capsys, "prune") == (0, "", "nothing to remove\n")


@pytest.mark.skipif(os.name == "nt", reason="terminals are POSIX's")
@pytest.mark.parametrize(
    ("answer", "removed"), [("y", True), ("yes", True), ("n", False), ("", False), ("\x04", False)]
)
def test_prune_asks_on_a_terminal(models, answer, removed) -> None:
    (models / "x.gguf.part").write_bytes(b"12345")
    master, slave = pty.openpty()
    os.write(master, answer.encode() + b"\n")
    command = [sys.executable, "-m", "cli.main", "prune"]
    with subprocess.Popen(command, cwd=ROOT, stdin=slave, stdout=subprocess.PIPE, stderr=slave) as child:
        os.close(slave)
        assert child.stdout is not None
        assert b"x.gguf.part  5 B" in child.stdout.read()
    assert child.returncode == 0
    assert b"remove 1 file, 5 B? [y/N]" in os.read(master, 10_000)
    os.close(master)
    assert (models / "x.gguf.part").exists() != removed


TRAVERSALS = [
    "..", "../x", "../../x", "../../../../../../tmp/x", "/tmp/x", "//tmp/x", "a/../../x", "./x", "x/", "x/y", "~/x",
    "~", "$HOME/x", "..\\x", "C:\\x", "C:x", "\\\\host\\share", "%2e%2e%2fx", "..%2fx", "\u2025/x",
    "\uff0e\uff0e/x", "a\u2215b",
]  # fmt: skip
RESERVED = [
    "storyteller", ".", "-", "-x", "--", ".hidden", "...", "_x", " x", "x ", "x\t", "CON:", "nul:", "x:y", "x*", "x?",
]  # fmt: skip
ODD = [
    "", " ", "\n", "a\nb", "a\rb", "a\x1b[2Jb", "\x1b]0;t\x07", "a\x7fb", "a\x9bb", "a\u202eb", "a\ufeffb",
    "a\ud800b", "\udcff", "a\x00b", "\x00", "a" * 65, "a" * 255, "a" * 256, "a" * 5000, "é", "名", "\U000e0041",
    "a'b", 'a"b', "a;b", "a|b", "a&b", "a`b`", "$(x)", "a b", "[x]", "{x}", "<x>", "#x", "a,b", "a+b", "a@b", "a=b",
    "^x",
]  # fmt: skip
HOSTILE_NAMES = [*TRAVERSALS, *RESERVED, *ODD]
assert len(HOSTILE_NAMES) >= 60


@pytest.mark.parametrize("name", HOSTILE_NAMES, ids=lambda name: ascii(name)[:30])
def test_a_hostile_name_is_refused_and_nothing_is_written(file, tmp_path, capsys, monkeypatch, name) -> None:
    monkeypatch.chdir(tmp_path / "files")
    before = tree(tmp_path)
    if name:  # an empty --name means the file's own
        refused(capsys, "import", file, f"--name={name}")
        refused(capsys, "import", file, f"--name={name}", "--force", "--copy")
    for arguments in (["rm", "--", name], ["rm", "--", name, "storyteller"], ["verify", "--", name + ".x"]):
        refused(capsys, *arguments)
    if name != "storyteller":
        code, _, err = llmq(capsys, "where", "--", name)
        assert code in (0, 2), err
    if "\0" not in name and "/" not in name and name not in (".", ".."):
        refused(capsys, "import", "--", name + "\x01.gguf")
    refused(capsys, "import", f"ollama:{name}")
    assert tree(tmp_path) == before


PLANTS = ["link to a file", "broken link", "link to a folder", "pipe", "folder"]


@pytest.mark.parametrize("plant", PLANTS)
@pytest.mark.parametrize(
    "where", ["tiny.gguf", "tiny.gguf.part", "tiny.gguf.part.journal", "tiny.gguf.part.journal.new"]
)
def test_what_is_planted_in_the_store_leads_nowhere(models, file, tmp_path, capsys, where, plant) -> None:
    outside = tmp_path / "outside"
    (outside / "folder").mkdir(parents=True)
    (outside / "precious").write_text("precious")
    at = models / where

    def put() -> None:
        match plant:
            case "link to a file":
                at.symlink_to(outside / "precious")
            case "broken link":
                at.symlink_to(outside / "new")
            case "link to a folder":
                at.symlink_to(outside / "folder")
            case "pipe":
                os.mkfifo(at)
            case "folder":
                at.mkdir()

    before = tree(outside) | tree(file.parent)
    for arguments in (
        ["import", file], ["import", file, "--copy"], ["import", file, "--force"],
        ["import", file, "--copy", "--force"], ["list"], ["verify", "--all"], ["prune", "--yes"], ["rm", "tiny"],
    ):  # fmt: skip
        if not os.path.lexists(at):
            put()
        code, _, err = llmq(capsys, *arguments)
        assert code in (0, 2, 4), err
        assert "bug in llmq" not in err
        assert code == 0 or err.count("\n") == 1
        assert tree(outside) | tree(file.parent) == before


@pytest.mark.parametrize("arguments", [["import"], ["import", "--copy"], ["import", "--force"]])
def test_a_store_that_is_a_file_gets_one_line(models, file, capsys, arguments) -> None:
    models.rmdir()
    models.write_text("a file")
    refused(capsys, *arguments, file)
    assert models.read_text() == "a file"
    assert llmq(capsys, "list")[0] == 0
    assert llmq(capsys, "prune") == (0, "", "nothing to remove\n")
    refused(capsys, "rm", "tiny")


def test_a_folder_that_may_not_be_written_to_gets_one_line(models, file, tmp_path, capsys, monkeypatch) -> None:
    """As the system says it of a read-only disk, since modes do not bind root."""
    llmq(capsys, "import", file, "--name", "old")
    (models / "x.gguf.part").write_bytes(b"")

    def read_only(*_: Any, **__: Any) -> Any:
        raise OSError(30, "Read-only file system")

    real = os.open

    def only_reading(path: Any, flags: int, *rest: Any, **options: Any) -> int:
        return read_only() if flags & (os.O_WRONLY | os.O_RDWR) else real(path, flags, *rest, **options)

    for name in ("link", "unlink", "replace", "mkdir"):
        monkeypatch.setattr(os, name, read_only)
    monkeypatch.setattr(os, "open", only_reading)
    before = tree(tmp_path)
    for arguments in (["import", file], ["import", file, "--copy"], ["rm", "old"], ["prune", "--yes"]):
        assert "Read-only" in llmq(capsys, *arguments)[2]
    for arguments in (["list"], ["where"], ["verify", "old"], ["show", "old"]):
        assert llmq(capsys, *arguments)[0] == 0
    assert tree(tmp_path) == before


@pytest.mark.skipif(os.name == "nt", reason="redirections are POSIX")
@pytest.mark.parametrize("command", ["where", "list --json", "verify --all", "prune --yes", "show"])
def test_a_reader_that_leaves_is_no_error(models, command) -> None:
    (models / "x.gguf.part").write_bytes(b"")
    line = f'"{sys.executable}" -m cli.main {command} | true; exit ${{PIPESTATUS[0]}}'
    done = subprocess.run(["bash", "-c", line], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode in (0, 141)
    assert "Traceback" not in done.stderr
    assert "rror" not in done.stderr
    full = subprocess.run(["bash", "-c", f'"{sys.executable}" -m cli.main {command} > /dev/full'], cwd=ROOT,
                          capture_output=True, text=True)  # fmt: skip
    assert full.returncode == 1
    assert full.stderr.splitlines()[-1].startswith("llmq: ")
    assert (models / "x.gguf.part").exists() == (command != "prune --yes" or done.returncode == 141)
