"""llmq pull, from a hub on the loopback: what comes, from where, what is refused beforehand, and what is left."""

import contextlib
import hashlib
import json
import os
import random
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from checkpoints import write_checkpoint
from downloads import journalled
from hub import COMMIT, TOKEN, Hub
from pull_fake import INSTEAD, ROOT
from tiny import tiny_gguf

from cli import progress
from cli.main import execute
from llmq import elsewhere
from llmq.fetcher import CHUNK
from llmq.formats import Q4_K, Q8_0
from llmq.records import drop_record, read_record
from llmq.store import BUNDLED_PATH
from quant import remote
from quant.source import Source

PROGRAM = [sys.executable, str(ROOT / "tests" / "pull_fake.py")]
REPO, SOURCE = "org/Tiny-7B-GGUF", "org/Tiny-7B"
CATALOG = f"""
[tiny-7b]
aliases = ["tiny"]
repo = "{SOURCE}"
gguf = "{REPO}"
licence = "Apache-2.0"
tokenizer = "v1"
context_length = 4096
shape = {{ n_layers = 1, dim = 256, n_heads = 8, n_kv_heads = 2, head_dim = 32, ffn_dim = 512, vocab_size = 512 }}

[future-7b]
repo = "org/Future-7B"
gguf = "org/Future-7B-GGUF"
licence = "Apache-2.0"
tokenizer = "v3"
context_length = 4096
unsupported = "its vocabulary is of another kind"
shape = {{ n_layers = 1, dim = 256, n_heads = 8, n_kv_heads = 2, head_dim = 32, ffn_dim = 512, vocab_size = 512 }}
"""


@pytest.fixture(scope="session")
def contents(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """Models as files of types; the Q4_K_M one is the smallest, and "new" is another in the place of that."""
    folder, found = tmp_path_factory.mktemp("contents"), {}
    for name, arguments in {
        "Q4_K_M": {"format": Q4_K},
        "Q8_0": {"format": Q8_0},
        "new": {"format": Q4_K, "seed": 1},
        "F32": {},
    }.items():
        tiny_gguf(folder / name, n_layers=1, **arguments)  # type: ignore[arg-type]
        found[name] = (folder / name).read_bytes()
    return found


@pytest.fixture(autouse=True)
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, hub: Hub, contents: dict[str, bytes]) -> Iterator[Path]:
    """The folder of models; the hub has the tiny one in two types."""
    for name, folder in {"LLMQ_HOME": "home", "HF_HOME": "hf", "HF_HUB_CACHE": "hf/hub", "OLLAMA_MODELS": "o"}.items():
        monkeypatch.setenv(name, str(tmp_path / folder))
    for name in ("LLMQ_OFFLINE", "HF_HUB_OFFLINE", "LLMQ_DEBUG", "HUGGINGFACE_HUB_CACHE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HF_ENDPOINT", hub.url)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setattr(elsewhere, "OLLAMA_SERVICE", tmp_path / "service")
    for name, value in INSTEAD.items():
        monkeypatch.setattr(name, value)
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "models.toml").write_text(CATALOG)
    for kind in ("Q4_K_M", "Q8_0"):
        hub.add(REPO, f"Tiny-7B-{kind}.gguf", contents[kind])
    yield tmp_path / "home" / "models"
    assert not psutil.Process().children(), "a process is left"


@pytest.fixture
def source(hub: Hub, tmp_path: Path) -> None:
    """The weights of the tiny model, published."""
    write_checkpoint(tmp_path / "Tiny-7B")
    for file in (tmp_path / "Tiny-7B").iterdir():
        hub.add(SOURCE, file.name, file.read_bytes())
        if not file.name.endswith(".safetensors"):
            hub.small.add(file.name)


def llmq(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> tuple[int, str, str]:
    code = execute([str(argument) for argument in arguments])
    captured = capsys.readouterr()
    assert TOKEN not in captured.out + captured.err
    return code, captured.out, captured.err


def pulled(capsys: pytest.CaptureFixture[str], path: Path, *arguments: str | Path) -> str:
    """What is said of a pull that ends well: stdout has the path alone, and nothing else lies beside it."""
    code, out, err = llmq(capsys, "pull", *arguments)
    assert code == 0, err
    assert out == f"{path}\n"
    assert f"talk to it: llmq chat {path.stem}\n" in err
    assert not list(path.parent.glob("*.part*"))
    return err


def refused(capsys: pytest.CaptureFixture[str], *arguments: str | Path, code: int = 2) -> str:
    """The line of a pull that fails, the last one on stderr."""
    found, out, err = llmq(capsys, "pull", *arguments)
    assert (found, out) == (code, ""), err
    line = err.splitlines()[-1]
    assert line.startswith("llmq: ")
    assert len(line) <= 240
    assert "bug in llmq" not in line
    assert line.isprintable()
    return line


def paths(hub: Hub) -> set[str]:
    return {seen.path.partition("?")[0] for seen in hub.seen}


def n_sent(hub: Hub) -> int:
    return sum(seen.sent for seen in hub.seen)


# ---- ways to say what is wanted
@pytest.mark.parametrize(
    ("arguments", "name", "kind"),
    [
        (["tiny-7b"], "tiny-7b-q4_k_m", "Q4_K_M"),
        (["TINY"], "tiny-7b-q4_k_m", "Q4_K_M"),
        (["tiny:q8_0"], "tiny-7b-q8_0", "Q8_0"),
        (["tiny", "--type", "Q8_0"], "tiny-7b-q8_0", "Q8_0"),
        (["tiny", "-q", "q8_0", "--name", "mine"], "mine", "Q8_0"),
        ([REPO], "Tiny-7B-Q4_K_M", "Q4_K_M"),
        ([f"{REPO}:Q8_0"], "Tiny-7B-Q8_0", "Q8_0"),
        ([f"hf:{REPO}:q8_0"], "Tiny-7B-Q8_0", "Q8_0"),
        ([f"{REPO}@v1.0:Q8_0"], "Tiny-7B-Q8_0", "Q8_0"),
        ([f"https://huggingface.co/{REPO}/blob/main/Tiny-7B-Q8_0.gguf"], "Tiny-7B-Q8_0", "Q8_0"),
        ([f"hf.co/{REPO}/resolve/v1/Tiny-7B-Q8_0.gguf"], "Tiny-7B-Q8_0", "Q8_0"),
    ],
)
def test_a_model_comes_by_any_name(store, hub, contents, capsys, arguments: list[str], name: str, kind: str) -> None:
    path, digest = store / f"{name}.gguf", hashlib.sha256(contents[kind]).hexdigest()
    err = pulled(capsys, path, *arguments)
    assert path.read_bytes() == contents[kind]
    record = read_record(path)
    assert record
    assert (record.sha256, record.origin) == (digest, f"{REPO}@{COMMIT}/Tiny-7B-{kind}.gguf")
    assert "its sha256 is what was announced" in err
    assert "tokens/s" in err
    assert "disk: " in err
    wanted = "v1.0" if "@v1.0" in arguments[0] else "v1" if "/v1/" in arguments[0] else "main"
    assert f"/api/models/{REPO}/revision/{wanted}" in paths(hub)
    assert any(f"/resolve/{COMMIT}/" in path for path in paths(hub))
    assert llmq(capsys, "verify", name)[0] == 0
    assert llmq(capsys, "where", name)[1] == f"{path}\n"


def test_a_file_comes_from_a_plain_address(store, hub, contents, capsys) -> None:
    url = hub.add("org/other", "some-Q8_0.gguf", contents["Q8_0"]) + "?key=CANARY"
    err = pulled(capsys, store / "some-Q8_0.gguf", url)
    assert (store / "some-Q8_0.gguf").read_bytes() == contents["Q8_0"]
    assert "nobody announced its sha256" in err
    assert "CANARY" not in err
    assert not [seen for seen in hub.seen if "authorization" in seen.headers]
    record = read_record(store / "some-Q8_0.gguf")
    assert record
    assert record.origin == url.partition("?")[0]
    hub.reset()
    assert "there already" in pulled(capsys, store / "some-Q8_0.gguf", url)
    assert n_sent(hub) <= 1


def test_a_file_of_this_machine_is_imported(store, hub, tmp_path, contents, capsys) -> None:
    file = tmp_path / "mine.gguf"
    file.write_bytes(contents["Q8_0"])
    code, out, err = llmq(capsys, "pull", file)
    assert (code, out) == (0, f"{store / 'mine.gguf'}\n")
    assert "linked" in err
    assert (store / "mine.gguf").samefile(file)
    assert llmq(capsys, "pull", file, "--name", "two")[1] == f"{store / 'two.gguf'}\n"
    assert "llmq quantize" in refused(capsys, file, "--type", "q8_0")
    assert "there is no file" in refused(capsys, tmp_path / "nobody.gguf")
    assert hub.seen == []


def test_a_folder_of_this_machine_is_quantized(store, hub, tmp_path, capsys) -> None:
    write_checkpoint(tmp_path / "mine")
    code, out, err = llmq(capsys, "pull", f"{tmp_path}/mine", "--type", "q8_0")
    assert (code, out) == (0, f"{store / 'mine-q8_0.gguf'}\n"), err
    assert hub.seen == []


def test_what_is_of_this_machine_replaces_only_by_force(store, hub, tmp_path, capsys) -> None:
    write_checkpoint(tmp_path / "weights")
    tiny_gguf(tmp_path / "file.gguf", n_layers=1, format=Q4_K)
    store.mkdir()
    for what in (tmp_path / "weights", tmp_path / "file.gguf"):
        (store / "mine.gguf").write_bytes(b"the only copy of something")
        assert "there is another model named mine" in refused(capsys, what, "--name", "mine")
        assert (store / "mine.gguf").read_bytes() == b"the only copy of something"
        pulled(capsys, store / "mine.gguf", what, "--name", "mine", "--force")
    assert hub.seen == []


def test_what_verify_remembered_is_replaced_only_by_force(store, hub, tmp_path, capsys) -> None:
    """It knows of no place that the file came from."""
    store.mkdir()
    tiny_gguf(store / "mine.gguf", n_layers=1, format=Q4_K)
    assert llmq(capsys, "verify", "mine")[0] == 0
    before = (store / "mine.gguf").read_bytes()
    write_checkpoint(tmp_path / "weights")
    assert "there is another model named mine" in refused(capsys, tmp_path / "weights", "--name", "mine")
    assert (store / "mine.gguf").read_bytes() == before
    assert hub.seen == []


def test_a_damaged_file_that_nobody_vouches_for_is_mended_by_force(store, hub, contents, capsys) -> None:
    url, path = hub.add("org/plain", "plain-Q8_0.gguf", contents["Q8_0"]), store / "plain-Q8_0.gguf"
    pulled(capsys, path, url)
    status = path.stat()
    path.write_bytes(contents["Q8_0"][:-1] + bytes([contents["Q8_0"][-1] ^ 1]))
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert "is there already" in pulled(capsys, path, url)
    pulled(capsys, path, url, "--force")
    assert path.read_bytes() == contents["Q8_0"]


def test_advice_is_of_the_types_that_there_are(store, hub, contents, capsys, monkeypatch) -> None:
    monkeypatch.setattr("quant.fit.disk_free", lambda *_: 10**5)
    hub.add("org/one", "one-Q8_0.gguf", contents["Q8_0"])
    assert refused(capsys, "org/one:q8_0", code=3).endswith("free some disk space")
    assert not list(store.glob("*.part*"))


# ---- which type
def test_without_a_type_the_nearest_to_the_usual_one_comes(store, hub, contents, capsys) -> None:
    for kind in ("F32", "Q8_0", "Q6_K"):
        hub.add("org/few", f"few-{kind}.gguf", contents["Q8_0"])
    pulled(capsys, store / "few-Q6_K.gguf", "org/few")
    assert "has no q4_k_m; it has f32, q6_k, q8_0" in refused(capsys, "org/few:q4_k_m")


def test_any_type_that_a_repository_has_can_be_asked_for(store, hub, contents, capsys) -> None:
    hub.add("org/odd", "odd-Q4_K_L.gguf", contents["Q4_K_M"])
    hub.add("org/odd", "odd-Q4_0.gguf", contents["Q8_0"])
    hub.add("org/odd", "odd-fp16.gguf", contents["F32"])
    for asked, name in (("q4_k_l", "odd-Q4_K_L"), ("Q4_0", "odd-Q4_0"), ("fp16", "odd-fp16"), ("f16", "odd-fp16")):
        pulled(capsys, store / f"{name}.gguf", f"org/odd:{asked}")


@pytest.mark.parametrize("kind", ["q9", "model", "Q4_K_M.gguf", "../q4_k_m", " ", "x" * 5000, "\x1b[2J"])
def test_a_type_that_is_none_is_refused_before_anybody_is_asked(hub, capsys, kind: str) -> None:
    assert "no type" in refused(capsys, "tiny", "--type", kind)
    assert hub.seen == []


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["tiny", "--fast"], "--from-source"),
        (["./somewhere", "--fast"], "--from-source"),
        (["./somewhere", "--from-source"], "not an address or a path"),
        (["http://127.0.0.1:1/a.gguf", "--from-source"], "not an address or a path"),
        (["http://127.0.0.1:1/a.gguf", "--type", "q8_0"], "--type"),
        ([f"hf.co/{REPO}/blob/main/Tiny-7B-Q8_0.gguf", "--type", "q8_0"], "--type"),
        (["tiny", "--from-source", "--type", "q4_k_l"], "there is no type 'q4_k_l'; there are q2_k"),
        (["tiny", "--name", "storyteller"], "part of llmq"),
        (["tiny", "--name", "../tiny"], "not a model name"),
        (["tiny", "--ctx", "0"], "--ctx"),
        (["./somewhere", "--ctx", "5"], "--ctx goes with what is fetched"),
        (["tiny", "--name", ""], "what --name gives is empty"),
        (["tiny", "--type", ""], "what --type gives is empty"),
        (["tiny", "--name", "con"], "no name for a file everywhere"),
        (["tiny:q8_0", "--type", "q4_k_m"], "the name asks for q8_0 and --type for 'q4_k_m'; give one"),
        ([f"{REPO}:q8_0", "--type", "q4_k_m"], "give one"),
        (["tiny:q8_0", "--type", "q4_k_m", "--from-source"], "give one"),
        (["tinny"], "did you mean tiny"),
        (["tiny:"], "is no type"),
        ([], "MODEL"),
    ],
)
def test_what_cannot_be_is_refused_before_anybody_is_asked(hub, capsys, arguments: list[str], said: str) -> None:
    assert said in refused(capsys, *arguments)
    assert hub.seen == []


@pytest.mark.usefixtures("source")
@pytest.mark.parametrize("more", [[], ["--from-source"]])
def test_a_record_that_cannot_be_written_is_known_beforehand(hub, capsys, monkeypatch, tmp_path, more) -> None:
    (tmp_path / "state").mkdir()
    (tmp_path / "state" / "models").write_text("a file where a folder is wanted")
    monkeypatch.setattr("llmq.records.state_dir", lambda: tmp_path / "state")
    assert "cannot write" in refused(capsys, "tiny", *more)
    assert hub.answers() == []


# ---- what is there already
def test_what_is_there_is_not_fetched_again(store, hub, capsys) -> None:
    path = store / "tiny-7b-q4_k_m.gguf"
    pulled(capsys, path, "tiny")
    before = path.stat()
    hub.reset()
    assert "is there already" in pulled(capsys, path, "tiny")
    assert hub.answers() == []
    os.utime(path, (5, 5))  # the record is no longer that of this file: it is read
    assert "is there already" in pulled(capsys, path, "tiny")
    assert hub.answers() == []
    assert path.stat().st_ino == before.st_ino
    assert "as it was, " in llmq(capsys, "verify", path)[1]


def test_a_damaged_file_is_replaced(store, contents, capsys) -> None:
    path = store / "tiny-7b-q4_k_m.gguf"
    pulled(capsys, path, "tiny")
    path.write_bytes(contents["Q4_K_M"][:-1] + b"\xff")
    assert "is replaced when the new one is there" in pulled(capsys, path, "tiny")
    assert path.read_bytes() == contents["Q4_K_M"]


def test_another_model_is_not_replaced_unless_asked_to(store, capsys) -> None:
    path = store / "tiny-7b-q4_k_m.gguf"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"the only copy of something")
    assert "there is another model named tiny-7b-q4_k_m" in refused(capsys, "tiny", code=2)
    assert path.read_bytes() == b"the only copy of something"
    pulled(capsys, store / "mine.gguf", "tiny", "--name", "mine")
    pulled(capsys, path, "tiny", "--force")


def test_the_old_file_stays_until_a_new_one_is_whole(store, hub, contents, capsys) -> None:
    path = store / "tiny-7b-q4_k_m.gguf"
    pulled(capsys, path, "tiny")
    hub.add(REPO, "Tiny-7B-Q4_K_M.gguf", contents["new"])
    hub.fail("status", n=403)
    assert "refuses access" in refused(capsys, "tiny", code=5)
    assert path.read_bytes() == contents["Q4_K_M"]
    hub.reset()
    hub.fail("flip", at=len(contents["new"]) - 1)
    assert "sha256 differed twice" in refused(capsys, "tiny", code=4)
    assert path.read_bytes() == contents["Q4_K_M"]
    assert "as it was, " in llmq(capsys, "verify", path)[1]
    hub.reset()
    assert "is replaced when the new one is there" in pulled(capsys, path, "tiny")
    assert path.read_bytes() == contents["new"]
    record = read_record(path)
    assert record
    assert record.sha256 == hashlib.sha256(contents["new"]).hexdigest()


@pytest.mark.parametrize("where", ["hf/hub/models--someone--else/blobs", "o/blobs"])
def test_what_another_program_has_is_linked(store, hub, tmp_path, contents, capsys, where: str) -> None:
    digest = hashlib.sha256(contents["Q4_K_M"]).hexdigest()
    blob = tmp_path / where / (digest if where.startswith("hf") else f"sha256-{digest}")
    blob.parent.mkdir(parents=True)
    blob.write_bytes(contents["Q4_K_M"])
    path = store / "tiny-7b-q4_k_m.gguf"
    assert "linked from " in pulled(capsys, path, "tiny")
    assert path.samefile(blob)
    assert hub.answers() == []
    record = read_record(path)
    assert record
    assert record.origin == f"{REPO}@{COMMIT}/Tiny-7B-Q4_K_M.gguf"
    path.unlink()
    blob.write_bytes(contents["Q4_K_M"][:-1] + b"\xff")
    pulled(capsys, path, "tiny")
    assert path.read_bytes() == contents["Q4_K_M"]
    assert hub.n_sent() >= len(contents["Q4_K_M"])


def other_architecture(content: bytes) -> bytes:
    return content.replace(b"llama", b"lemma", 1)


def other_vocabulary(content: bytes) -> bytes:
    before, key, after = content.partition(b"tokenizer.ggml.model")
    return before + key + after.replace(b"llama", b"gpt-2", 1)


def test_what_came_while_another_program_was_looked_at_stays(
    store, hub, tmp_path, contents, capsys, monkeypatch
) -> None:
    data = contents["Q4_K_M"]
    hub.add("org/other", "other-Q4_K_M.gguf", data)
    blob = tmp_path / "o" / "blobs" / f"sha256-{hashlib.sha256(data).hexdigest()}"
    blob.parent.mkdir(parents=True)
    blob.write_bytes(data)
    real = elsewhere.find_by_sha256

    def slow(*given: Any) -> Path | None:
        (store / "other-Q4_K_M.gguf").write_bytes(b"the only copy of something")
        return real(*given)

    monkeypatch.setattr(elsewhere, "find_by_sha256", slow)
    assert "there is another model named" in refused(capsys, "org/other")
    assert (store / "other-Q4_K_M.gguf").read_bytes() == b"the only copy of something"


@pytest.mark.parametrize("change", [other_architecture, other_vocabulary])
def test_what_another_program_has_and_cannot_be_run_is_not_linked(
    store, hub, tmp_path, contents, capsys, change
) -> None:
    data = change(contents["Q4_K_M"])
    hub.add("org/other", "other-Q4_K_M.gguf", data)
    blob = tmp_path / "o" / "blobs" / f"sha256-{hashlib.sha256(data).hexdigest()}"
    blob.parent.mkdir(parents=True)
    blob.write_bytes(data)
    refused(capsys, "org/other", code=1)
    assert not list(store.iterdir())


# ---- refused beforehand
@pytest.mark.parametrize(
    ("change", "code", "said"),
    [
        (other_architecture, 1, "lemma"),
        (other_vocabulary, 1, "tokenizer is 'gpt-2'"),
        (lambda content: content[:4] + b"\x09" + content[5:], 1, "version"),
        (lambda content: content.replace(b"blk.0.attn_q", b"blk.0.attn_z", 1), 4, "attn_z"),
        (lambda _: b"<html>not a model</html>", 4, "not a GGUF file"),
    ],
)
def test_what_cannot_be_run_is_refused_by_its_header(store, hub, contents, capsys, change, code: int, said) -> None:
    rest = random.Random(3).randbytes(30 << 20)
    hub.add("org/other", "other-Q4_K_M.gguf", change(contents["Q4_K_M"]) + rest)
    assert said in refused(capsys, "org/other", code=code)
    assert hub.n_sent() <= 1 << 20
    assert not list(store.iterdir())


def test_a_model_that_is_known_not_to_run_is_refused_before_anybody_is_asked(hub, capsys) -> None:
    for arguments in (["future-7b"], ["future-7b:q8_0"], ["future-7b", "--from-source"], ["future-7b", "--force"]):
        line = refused(capsys, *arguments, code=1)
        assert line == "llmq: llmq cannot run future-7b yet: its vocabulary is of another kind"
    assert hub.seen == []


@pytest.mark.parametrize(
    ("what", "said"), [("memory", "of memory and 1.0 MB are free"), ("disk", "of disk and 100.0 kB")]
)
def test_a_verdict_comes_before_the_download(store, hub, capsys, monkeypatch, what: str, said: str) -> None:
    monkeypatch.setattr(f"quant.fit.{what}_free", lambda *_: 10**6 if what == "memory" else 10**5)
    assert said in refused(capsys, "tiny", code=3)
    assert hub.n_sent() <= 1 << 20
    assert not list(store.iterdir())
    hub.reset()
    if what == "disk":
        assert said in refused(capsys, "tiny", "--force", code=3)
        assert not list(store.iterdir())
        return
    err = pulled(capsys, store / "tiny-7b-q4_k_m.gguf", "tiny", "--force")
    assert "it goes on all the same: " in err
    assert said in err


def test_a_context_is_judged_and_one_that_is_unknown_refused(store, capsys, monkeypatch) -> None:
    monkeypatch.setattr("quant.fit.memory_free", lambda: 170 * 10**6)
    assert "memory for 1024 tokens" in pulled(capsys, store / "tiny-7b-q4_k_m.gguf", "tiny", "--ctx", "1024")
    assert "trained for 4096" in refused(capsys, "tiny:q8_0", "--ctx", "5000")


@pytest.mark.parametrize(
    ("status", "headers", "said"),
    [
        (403, {"X-Error-Code": "GatedRepo"}, "is gated: accept its terms at "),
        (401, {"X-Error-Code": "GatedRepo"}, "HF_TOKEN"),
        (401, {}, "not for everybody"),
        (404, {"X-Error-Code": "RepoNotFound"}, "check the name"),
    ],
)
def test_a_repository_that_is_not_for_us_is_one_sentence(store, hub, capsys, status: int, headers, said: str) -> None:
    hub.fail("status", n=status, where="^/api/", headers=headers)
    for arguments in (["tiny"], [REPO], [SOURCE, "--from-source"]):
        assert said in refused(capsys, *arguments, code=5)
    assert len(hub.seen) == 3
    assert not store.exists()


def test_a_file_that_is_not_there_or_no_longer(store, hub, capsys) -> None:
    assert "has no file 'nobody.gguf'" in refused(capsys, f"hf.co/{REPO}/blob/main/nobody.gguf", code=5)
    del hub.repos[REPO]["Tiny-7B-Q8_0.gguf"]
    assert "has no q8_0; it has q4_k_m" in refused(capsys, "tiny:q8_0")
    hub.fail("status", n=404, where="/resolve/")
    assert "no such file" in refused(capsys, "tiny", code=5)
    assert not list(store.iterdir())


# ---- offline
@pytest.mark.parametrize("name", ["LLMQ_OFFLINE", "HF_HUB_OFFLINE"])
def test_offline_nobody_is_asked(hub, capsys, monkeypatch, name: str) -> None:
    monkeypatch.setenv(name, "1")
    for arguments in (["tiny"], [REPO], [f"{hub.url}/a.gguf"], ["tiny", "--from-source"]):
        assert "unset it" in refused(capsys, *arguments, code=5)
    assert hub.connections == []


WATCHED = """
import sys
def watch(event, _arguments):
    assert not event.startswith("socket."), event
sys.addaudithook(watch)
from cli.main import execute
sys.exit(execute(sys.argv[1:]))
"""


@pytest.mark.skipif(not BUNDLED_PATH.is_file(), reason=f"{BUNDLED_PATH.name} is not in the package")
def test_offline_what_is_there_runs_without_a_socket(store, hub, capsys) -> None:
    """With the real engine; the model is the bundled one under another name."""
    hub.add("org/stories", "stories-Q5_K_M.gguf", BUNDLED_PATH.read_bytes())
    pulled(capsys, store / "stories-Q5_K_M.gguf", "org/stories:q5_k_m")
    for name in ("LLMQ_OFFLINE", "HF_HUB_OFFLINE"):
        command = [sys.executable, "-c", WATCHED, "run", "-m", "stories-Q5_K_M", "--temp", "0", "-n", "8", "Hello"]
        done = subprocess.run(command, cwd=ROOT, env=os.environ | {name: "1"}, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert done.stdout


# ---- names that lead elsewhere
HOSTILE = [
    "..", "../x", "../../x", "../x.gguf", "a/../../x.gguf", "/x", "/etc/x.gguf", "//x", "~/x", "~root/x.gguf", ".x",
    ".x.gguf", "-x", "--x", "a\\..\\x", "C:\\x.gguf", "C:x", "con", "nul.gguf", "a\0b", "a\nb.gguf", "a\rb", "a\tb",
    "a b.gguf", " ", "\u202ex.gguf", "\u2066a", "\x1b[2Jx.gguf", "a" * 65, "a" * 255, "a" * 300 + ".gguf", "a" * 5000,
    "a/" * 40 + "x.gguf", "a:b", "a:b:c", "a;rm -rf x", "$(touch x).gguf", "`touch x`", "a?x", "a*", "a<x", "a>x",
    '"x', "'x", "%2e%2e/x.gguf", "%00", "a%2fb.gguf", "\u00e9", "\udc80", "a\udcff.gguf", "\uff0e\uff0e/x",
    "hf:../x", "hf:a/..", "hf.co/../x", "https://../x.gguf", "file:///etc/x.gguf", "http://127.0.0.1:1/../x.gguf",
    "org/repo@../x", "org/repo:../x", "org/../x", "org/.x", "https://huggingface.co/a/b/blob/main/../../x.gguf",
]  # fmt: skip


def tree(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for path in sorted(folder.rglob("*")):
        status = path.lstat()
        found[str(path)] = (status.st_mode, path.read_bytes() if path.is_file() else None)
    return found


@pytest.fixture
def surroundings(tmp_path: Path, store: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Nothing outside the store and what is remembered changes; the current folder is beside the home."""
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    store.mkdir()
    (store / "planted.gguf").symlink_to(tmp_path / "victim")
    (tmp_path / "victim").write_text("precious")
    before = {name: what for name, what in tree(tmp_path).items() if "/state" not in name}
    yield
    after = {name: what for name, what in tree(tmp_path).items() if "/state" not in name}
    inside = str(store) + os.sep
    assert {name: after[name] for name in after if not name.startswith(inside)} == {
        name: before[name] for name in before if not name.startswith(inside)
    }


@pytest.mark.usefixtures("surroundings")
def test_hostile_names_write_nothing_outside(store, capsys) -> None:
    assert len(HOSTILE) >= 60
    for name in HOSTILE:
        typed = name.replace("\0", "\x01")  # what no argument holds
        code, out, err = llmq(capsys, "pull", "--name", typed, "tiny")
        if code:
            assert (code, out) == (2, ""), name
        else:
            assert Path(out.rstrip("\n")).parent == store, name
        assert "bug in llmq" not in err, name
        if name.startswith("-"):
            continue
        code, out, err = llmq(capsys, "pull", typed)
        assert (code, out) in ((2, ""), (5, "")), name
        assert "bug in llmq" not in err, name
        assert len(err.splitlines()[-1]) <= 240
    assert all(path.parent == store for path in store.rglob("*"))


@pytest.mark.usefixtures("surroundings")
def test_hostile_names_in_a_listing_write_nothing_outside(store, hub, contents, capsys) -> None:
    for name in HOSTILE:
        hub.add("org/hostile", f"{name}-Q8_0.gguf", contents["new"])
    found, _, err = llmq(capsys, "pull", "org/hostile:q8_0")
    assert found in (0, 2), err
    hub.add("org/hostile", "good-Q4_K_M.gguf", contents["Q4_K_M"])
    pulled(capsys, store / "good-Q4_K_M.gguf", "org/hostile")
    assert all(path.parent == store for path in store.rglob("*"))


@pytest.mark.usefixtures("surroundings")
def test_a_link_where_a_model_is_to_come_is_not_followed(store, tmp_path, contents, capsys) -> None:
    assert "there is another model named planted" in refused(capsys, "tiny", "--name", "planted", code=2)
    assert (store / "planted.gguf").is_symlink()
    pulled(capsys, store / "planted.gguf", "tiny", "--name", "planted", "--force")
    assert not (store / "planted.gguf").is_symlink()
    assert (store / "planted.gguf").read_bytes() == contents["Q4_K_M"]
    assert (tmp_path / "victim").read_text() == "precious"


# ---- what is shown
def test_lines_are_sparse_without_a_terminal(store, capsys, monkeypatch) -> None:
    err = pulled(capsys, store / "tiny-7b-q4_k_m.gguf", "tiny")
    assert "\r" not in err
    assert "\x1b" not in err
    assert len(err.splitlines()) <= 5
    monkeypatch.setattr(progress, "SECONDS_A_LINE", 0.0)
    err = pulled(capsys, store / "tiny-7b-q8_0.gguf", "tiny:q8_0")
    assert "tiny-7b-q8_0: 0 B of 885.6 kB, 0 B/s\n" in err


def large(content: bytes, mebibytes: int) -> bytes:
    """A model with so much behind its last tensor."""
    return content + random.Random(5).randbytes(mebibytes << 20)


@contextlib.contextmanager
def program(*arguments: str) -> Iterator[subprocess.Popen[str]]:
    started = subprocess.Popen(
        [*PROGRAM, *arguments], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=os.environ
    )
    with started:
        try:
            yield started
        finally:
            started.kill()


def read_until(started: subprocess.Popen[str], text: str) -> str:
    assert started.stderr
    seen = ""
    for line in started.stderr:
        seen += line
        if text in line:
            return seen
    raise AssertionError(seen)


def children(started: subprocess.Popen[str]) -> list[psutil.Process]:
    return psutil.Process(started.pid).children(recursive=True)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_a_pull_that_is_stopped_goes_on(store, hub, contents, capsys, number: signal.Signals) -> None:
    """Whatever stops it, no process is left, and what had come does not come again."""
    data = large(contents["Q4_K_M"], 12)
    hub.add("org/large", "large-Q4_K_M.gguf", data)
    hub.fail("stall", at=8 << 20)
    path = store / "large-Q4_K_M.gguf"
    with program("pull", "org/large") as started:
        read_until(started, "large-Q4_K_M: 0 B of 1")
        while len(journalled(path)) < 4:
            assert started.poll() is None
        compiling = children(started)
        assert len(compiling) == 1
        started.send_signal(number)
        out, err = started.communicate()
    _, alive = psutil.wait_procs(compiling, timeout=30)
    assert not alive
    assert out == ""
    expected = {signal.SIGINT: 130, signal.SIGTERM: 143, signal.SIGKILL: -9}
    assert started.returncode == expected[number]
    assert ("stopped; the same command goes on from here" in err) == (number != signal.SIGKILL)
    assert TOKEN not in err
    kept = sum(len(data[index * CHUNK : (index + 1) * CHUNK]) for index in journalled(path))
    hub.reset()
    pulled(capsys, path, "org/large")
    assert path.read_bytes() == data
    assert hub.n_sent() == len(data) - kept + (1 << 20)  # with the header, which is looked at first


def test_two_pulls_of_one_model_are_one_download(store, hub, contents) -> None:
    data = large(contents["Q4_K_M"], 48)
    hub.add("org/large", "large-Q4_K_M.gguf", data)
    hub.bytes_per_second = 1 << 21
    with program("pull", "org/large") as first:
        read_until(first, "large-Q4_K_M: 0 B of ")
        with program("pull", "org/large") as second:
            assert f"process {first.pid} fetches this already" in read_until(second, "waiting for it")
            hub.bytes_per_second = 0
            for each in (first, second):
                out, err = each.communicate()
                assert each.returncode == 0, err
                assert out == f"{store / 'large-Q4_K_M.gguf'}\n"
    assert (store / "large-Q4_K_M.gguf").read_bytes() == data
    assert hub.n_sent() <= 1.05 * len(data)
    assert [path.name for path in store.iterdir()] == ["large-Q4_K_M.gguf"]


def test_two_pulls_of_different_models_are_both_right(store, hub, contents) -> None:
    names = {"one": contents["Q4_K_M"], "two": contents["Q8_0"]}
    for name, content in names.items():
        hub.add(f"org/{name}", f"{name}-Q4_K_M.gguf", large(content, 4))
    with program("pull", "org/one") as first, program("pull", "org/two") as second:
        for each in (first, second):
            _, err = each.communicate()
            assert each.returncode == 0, err
    for name, content in names.items():
        assert (store / f"{name}-Q4_K_M.gguf").read_bytes() == large(content, 4)


pexpect = pytest.importorskip("pexpect")


def test_a_terminal_gets_a_bar_and_ctrl_c_a_sentence(store, hub, contents, monkeypatch) -> None:
    hub.add("org/large", "large-Q4_K_M.gguf", large(contents["Q4_K_M"], 12))
    monkeypatch.setenv("TERM", "xterm")
    hub.bytes_per_second = 1 << 20
    started = pexpect.spawn(PROGRAM[0], [PROGRAM[1], "pull", "org/large"], cwd=str(ROOT), encoding="utf-8", timeout=30)
    started.setwinsize(24, 120)
    started.expect(r"large-Q4_K_M .*/13.\d MB")
    started.expect("MB/s")
    started.sendintr()
    started.expect("stopped; the same command goes on from here")
    started.expect(pexpect.EOF)
    started.wait()
    assert started.exitstatus == 130
    hub.bytes_per_second = 0
    started = pexpect.spawn(PROGRAM[0], [PROGRAM[1], "pull", "org/large"], cwd=str(ROOT), encoding="utf-8", timeout=30)
    started.setwinsize(24, 200)
    started.expect_exact(f"{store / 'large-Q4_K_M.gguf'}")
    started.expect(pexpect.EOF)
    started.wait()
    assert started.exitstatus == 0


# ---- from source
FROM_SOURCE = ("tiny", "--from-source", "--type", "q8_0")


@pytest.mark.usefixtures("source")
def test_a_model_made_from_its_source_is_made_once(store, hub, tmp_path, capsys) -> None:
    path = store / "tiny-7b-q8_0.gguf"
    err = pulled(capsys, path, *FROM_SOURCE)
    assert "the sha256 of all its files was checked" in err
    assert not list(tmp_path.rglob("home/**/*.safetensors"))
    hub.reset()
    assert "is there already" in pulled(capsys, path, *FROM_SOURCE)
    assert hub.answers() == []
    assert "was checked" in pulled(capsys, path, *FROM_SOURCE, "--fast")
    origin = json.loads(llmq(capsys, "list", "--json")[1])[-1]["origin"]
    assert origin == f"{SOURCE}@{COMMIT}, quantized as q8_0, --fast"


@pytest.mark.usefixtures("source")
def test_what_was_made_and_not_yet_remembered_is_known_by_its_receipt(store, hub, capsys) -> None:
    """As after a kill while the finished file is read for its record."""
    path = store / "tiny-7b-q8_0.gguf"
    pulled(capsys, path, *FROM_SOURCE)
    record = read_record(path)
    drop_record(path)
    hub.reset()
    assert "is there already" in pulled(capsys, path, *FROM_SOURCE)
    assert hub.answers() == []
    found = read_record(path)
    assert record
    assert found
    assert (found.sha256, found.origin) == (record.sha256, record.origin)
    drop_record(path)
    # Made otherwise, it is another model, and nobody's to replace.
    assert "there is another model" in refused(capsys, *FROM_SOURCE, "--fast")


@pytest.mark.usefixtures("source")
def test_what_was_made_and_then_damaged_is_made_again(store, capsys) -> None:
    path = store / "tiny-7b-q8_0.gguf"
    pulled(capsys, path, *FROM_SOURCE)
    whole = path.read_bytes()
    path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    os.utime(path, (5, 5))
    assert "was checked" in pulled(capsys, path, *FROM_SOURCE)
    assert path.read_bytes() == whole


@pytest.mark.usefixtures("source")
def test_two_that_make_one_model_make_it_once(store, hub, tmp_path) -> None:
    hub.bytes_per_second = 1 << 17
    with program("pull", *FROM_SOURCE) as first:
        read_until(first, "blk.0.")
        with program("pull", *FROM_SOURCE) as second:
            assert f"process {first.pid} is writing a model of this name; waiting" in read_until(
                second, "waiting for it"
            )
            hub.bytes_per_second = 0
            for each in (first, second):
                out, err = each.communicate()
                assert each.returncode == 0, err
                assert out == f"{store / 'tiny-7b-q8_0.gguf'}\n"
    assert [path.name for path in store.iterdir()] == ["tiny-7b-q8_0.gguf"]
    weights = [seen for seen in hub.answers() if seen.path.endswith(".safetensors")]
    n_bytes = (tmp_path / "Tiny-7B" / "model.safetensors").stat().st_size
    assert sum(seen.stop - seen.start for seen in weights) <= n_bytes + 2 * CHUNK  # both look at its header


@pytest.mark.usefixtures("source")
def test_one_that_waits_takes_over(store, hub) -> None:
    hub.bytes_per_second = 1 << 17
    with program("pull", *FROM_SOURCE) as first:
        read_until(first, "blk.0.")
        with program("pull", *FROM_SOURCE) as second:
            read_until(second, "waiting for it")
            first.kill()
            hub.bytes_per_second = 0
            _, err = second.communicate()
            assert second.returncode == 0, err
    assert "done before" in err
    assert [path.name for path in store.iterdir()] == ["tiny-7b-q8_0.gguf"]
    record = read_record(store / "tiny-7b-q8_0.gguf")
    assert record
    assert record.sha256 == hashlib.sha256((store / "tiny-7b-q8_0.gguf").read_bytes()).hexdigest()


@pytest.mark.usefixtures("source")
def test_what_is_made_while_one_looks_is_not_made_again(store, hub, capsys, monkeypatch) -> None:
    """Another process has it ready between the look at the store and the lock."""
    path = store / "tiny-7b-q8_0.gguf"
    pulled(capsys, path, *FROM_SOURCE)
    whole = path.read_bytes()
    path.unlink()
    drop_record(path)
    real = remote.open_remote

    def slow(*given: Any) -> Source:
        path.write_bytes(whole)
        return real(*given)

    monkeypatch.setattr(remote, "open_remote", slow)
    hub.reset()
    pulled(capsys, path, *FROM_SOURCE)
    assert sum(seen.stop - seen.start for seen in hub.answers() if "safetensors" in seen.path) <= CHUNK  # its header
    assert read_record(path)


@pytest.mark.usefixtures("source")
def test_a_new_date_makes_nothing_new(store, hub, capsys) -> None:
    path = store / "tiny-7b-q8_0.gguf"
    pulled(capsys, path, *FROM_SOURCE)
    os.utime(path, (5, 5))
    hub.reset()
    assert "is there already" in pulled(capsys, path, *FROM_SOURCE)
    assert hub.answers() == []


@pytest.mark.usefixtures("source")
@pytest.mark.parametrize("arguments", [("tiny",), FROM_SOURCE])
def test_a_flipped_bit_that_only_verify_finds_is_mended_by_force(store, capsys, arguments: tuple[str, ...]) -> None:
    path = store / f"tiny-7b-{'q8_0' if len(arguments) > 1 else 'q4_k_m'}.gguf"
    pulled(capsys, path, *arguments)
    whole, status = path.read_bytes(), path.stat()
    path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert "llmq pull --force" in llmq(capsys, "verify", path.stem)[2]
    assert "is there already" in pulled(capsys, path, *arguments)
    pulled(capsys, path, *arguments, "--force")
    assert path.read_bytes() == whole
    assert "is there already" in pulled(capsys, path, *arguments, "--force")


@pytest.mark.usefixtures("source")
@pytest.mark.parametrize("there", [True, False])
def test_a_link_where_a_model_is_made_is_not_followed(store, tmp_path, capsys, there: bool) -> None:
    store.mkdir()
    outside, path = tmp_path / "outside", store / "tiny-7b-q8_0.gguf"
    if there:
        outside.write_bytes(b"the only copy of something")
    path.symlink_to(outside)
    assert "there is another model named" in refused(capsys, *FROM_SOURCE)
    pulled(capsys, path, *FROM_SOURCE, "--force")
    assert outside.exists() == there
    assert not there or outside.read_bytes() == b"the only copy of something"
    assert not path.is_symlink()


@pytest.mark.usefixtures("source")
@pytest.mark.parametrize(
    ("one", "other"),
    [
        (("org/one",), ("org/two",)),
        (FROM_SOURCE, ("tiny", "--from-source", "--type", "q6_k")),
    ],
)
def test_two_models_of_one_name_do_not_replace_each_other(
    store, hub, contents, one: tuple[str, ...], other: tuple[str, ...]
) -> None:
    hub.add("org/one", "one-Q4_K_M.gguf", large(contents["Q4_K_M"], 8))
    hub.add("org/two", "two-Q4_K_M.gguf", large(contents["Q8_0"], 8))
    hub.bytes_per_second = 1 << 17
    with program("pull", *one, "--name", "x") as first:
        read_until(first, "blk.0." if len(one) > 1 else "x: 0 B of ")
        with program("pull", *other, "--name", "x") as second:
            read_until(second, "waiting for it")
            hub.bytes_per_second = 0
            assert first.communicate()[0] == f"{store / 'x.gguf'}\n"
            content = (store / "x.gguf").read_bytes()
            _, err = second.communicate()
            assert (second.returncode, err.splitlines()[-1][:37]) == (2, "llmq: there is another model named x;")
    assert (store / "x.gguf").read_bytes() == content
    assert [path.name for path in store.iterdir()] == ["x.gguf"]


def test_what_has_no_weights_is_not_made_of_them(store, capsys) -> None:
    assert "has no safetensors to quantize" in refused(capsys, REPO, "--from-source")
    assert not store.exists()
