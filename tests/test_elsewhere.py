"""Files in other programs' folders: found by content alone, and never behind a link that leads out of the folder."""

import hashlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from llmq import elsewhere, files
from llmq.elsewhere import find_by_sha256, find_gguf_models, find_ollama_model, link_or_copy
from llmq.errors import FileFormatError, ResourceError, UsageError
from llmq.part import PartFile

CONTENT = bytes(range(256)) * 9000  # several blocks
DIGEST = hashlib.sha256(CONTENT).hexdigest()
WRONG = CONTENT[:-1] + b"\0"


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", "HF_HOME", "XDG_CACHE_HOME", "OLLAMA_MODELS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setattr(elsewhere, "OLLAMA_SERVICE", tmp_path / "service")
    return tmp_path / "home"


def put(path: Path, content: bytes = CONTENT) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return path


def hub_blob(root: Path, repo: str = "models--org--repo") -> Path:
    return root / repo / "blobs" / DIGEST


def ollama_blob(root: Path, digest: str = DIGEST) -> Path:
    return root / "blobs" / f"sha256-{digest}"


@pytest.mark.parametrize(
    ("variables", "folder"),
    [
        ({}, "home/.cache/huggingface/hub"),
        ({"XDG_CACHE_HOME": "xdg"}, "xdg/huggingface/hub"),
        ({"HF_HOME": "hf"}, "hf/hub"),
        ({"HF_HOME": "~/hf"}, "home/hf/hub"),
        ({"HF_HOME": "hf", "HF_HUB_CACHE": "cache"}, "cache"),
        ({"HF_HOME": "hf", "HUGGINGFACE_HUB_CACHE": "old"}, "old"),
        ({"HF_HUB_CACHE": ""}, "home/.cache/huggingface/hub"),
    ],
)
def test_the_hub_cache_is_where_its_variables_say(tmp_path, monkeypatch, variables, folder) -> None:
    monkeypatch.chdir(tmp_path)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert find_by_sha256(DIGEST, len(CONTENT)) is None
    blob = put(hub_blob(tmp_path / folder))
    assert find_by_sha256(DIGEST, len(CONTENT)) == blob


@pytest.mark.parametrize("folder", ["home/.ollama/models", "configured", "service"])
def test_ollamas_blobs_are_found(tmp_path, monkeypatch, folder) -> None:
    if folder == "configured":
        monkeypatch.setenv("OLLAMA_MODELS", str(tmp_path / folder))
    blob = put(ollama_blob(tmp_path / folder))
    if folder == "service" and sys.platform != "linux":
        assert find_by_sha256(DIGEST, len(CONTENT)) is None
    else:
        assert find_by_sha256(DIGEST, len(CONTENT)) == blob


def test_a_name_is_not_believed(home) -> None:
    """One bit, and the next candidate counts."""
    put(hub_blob(home / ".cache/huggingface/hub"), WRONG)
    assert find_by_sha256(DIGEST, len(CONTENT)) is None
    good = put(ollama_blob(home / ".ollama/models"))
    assert find_by_sha256(DIGEST, len(CONTENT)) == good
    better = put(hub_blob(home / ".cache/huggingface/hub", "models--org--z"))
    assert find_by_sha256(DIGEST, len(CONTENT)) == better


def test_nothing_is_read_of_another_size(home, monkeypatch) -> None:
    blob = put(hub_blob(home / ".cache/huggingface/hub"))

    def read(*_: Any, **__: Any) -> str:
        raise AssertionError("it was read")

    monkeypatch.setattr(elsewhere, "sha256_of", read)
    for n_bytes in (len(CONTENT) - 1, len(CONTENT) + 1, 0):
        assert find_by_sha256(DIGEST, n_bytes) is None
    with pytest.raises(AssertionError):
        find_by_sha256(DIGEST, len(CONTENT))
    assert blob.exists()


@pytest.mark.parametrize("digest", ["", "../" * 20 + "etc/passwd", "*", "[0-9a-f]" * 8, DIGEST.upper(), DIGEST + "\n"])
def test_what_is_no_digest_finds_nothing(home, digest) -> None:
    put(hub_blob(home / ".cache/huggingface/hub"))
    assert find_by_sha256(digest, len(CONTENT)) is None


@pytest.mark.parametrize("plant", ["link", "folder link", "repository link", "pipe", "folder", "broken link"])
def test_a_blob_must_lie_in_its_cache(home, tmp_path, plant) -> None:
    outside = put(tmp_path / "outside" / "blobs" / DIGEST)
    hub = home / ".cache" / "huggingface" / "hub"
    blob = hub_blob(hub)
    blob.parent.parent.mkdir(parents=True)
    if plant == "folder link":
        blob.parent.symlink_to(outside.parent)
    elif plant == "repository link":
        blob.parent.parent.rmdir()
        blob.parent.parent.symlink_to(outside.parent.parent)
    else:
        blob.parent.mkdir()
    match plant:
        case "link":
            blob.symlink_to(outside)
        case "broken link":
            blob.symlink_to(tmp_path / "nowhere")
        case "pipe":
            os.mkfifo(blob)
        case "folder":
            blob.mkdir()
    assert find_by_sha256(DIGEST, len(CONTENT)) is None


def test_a_cache_on_another_disk_counts_through_its_own_link(home, tmp_path) -> None:
    put(hub_blob(tmp_path / "disk"))
    link = home / ".cache" / "huggingface" / "hub"
    link.parent.mkdir(parents=True)
    link.symlink_to(tmp_path / "disk")
    assert find_by_sha256(DIGEST, len(CONTENT)) == hub_blob(link)


def test_progress_tells_of_every_byte(home, tmp_path) -> None:
    source = put(hub_blob(home / ".cache/huggingface/hub"))
    told: list[int] = []
    find_by_sha256(DIGEST, len(CONTENT), told.append)
    assert sum(told) == len(CONTENT)
    link_or_copy(source, tmp_path / "copy", copy=True, on_bytes=told.append)
    assert sum(told) == 2 * len(CONTENT)


def test_a_link_costs_no_disk(tmp_path) -> None:
    source, target = put(tmp_path / "a"), tmp_path / "b"
    assert link_or_copy(source, target, DIGEST) == "linked"
    assert source.samefile(target)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b"]


def no_links(monkeypatch: pytest.MonkeyPatch, number: int = 18) -> None:
    def link(*_: Any, **__: Any) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "link", link)


@pytest.mark.parametrize("number", sorted(elsewhere.NO_LINK))
def test_where_no_link_can_be_it_is_copied(tmp_path, monkeypatch, number) -> None:
    no_links(monkeypatch, number)
    source, target = put(tmp_path / "a"), tmp_path / "b"
    assert link_or_copy(source, target, DIGEST) == "copied"
    assert target.read_bytes() == CONTENT
    assert not source.samefile(target)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b"]


@pytest.mark.skipif(not os.path.ismount("/dev/shm"), reason="needs a second file system")
def test_another_file_system_is_copied_to(tmp_path) -> None:
    source = put(tmp_path / "a")
    target = Path("/dev/shm") / f"llmq-test-{os.getpid()}"
    try:
        assert link_or_copy(source, target, DIGEST) == "copied"
        assert target.read_bytes() == CONTENT
    finally:
        target.unlink(missing_ok=True)


def test_another_users_file_is_copied(tmp_path, monkeypatch) -> None:
    source = put(tmp_path / "a")
    monkeypatch.setattr(os, "getuid", lambda: source.stat().st_uid + 1, raising=False)
    assert link_or_copy(source, tmp_path / "b", DIGEST) == "copied"


@pytest.mark.parametrize("copy", [False, True])
@pytest.mark.parametrize("plant", ["file", "link", "broken link", "pipe", "folder"])
def test_a_name_that_is_taken_is_left(tmp_path, plant, copy) -> None:
    source, target, precious = put(tmp_path / "a"), tmp_path / "b", put(tmp_path / "precious", b"precious")
    match plant:
        case "file":
            put(target, b"old")
        case "link":
            target.symlink_to(precious)
        case "broken link":
            target.symlink_to(tmp_path / "nowhere")
        case "pipe":
            os.mkfifo(target)
        case "folder":
            target.mkdir()
    before = sorted(path.name for path in tmp_path.iterdir())
    with pytest.raises(UsageError):
        link_or_copy(source, target, DIGEST, copy=copy)
    assert sorted(path.name for path in tmp_path.iterdir()) == before
    assert precious.read_bytes() == b"precious"
    assert plant != "file" or target.read_bytes() == b"old"


@pytest.mark.parametrize("copy", [False, True])
@pytest.mark.parametrize("plant", ["file", "link", "broken link"])
def test_replacing_follows_no_link(tmp_path, plant, copy) -> None:
    source, target, precious = put(tmp_path / "a"), tmp_path / "b", put(tmp_path / "precious", b"precious")
    match plant:
        case "file":
            put(target, b"old")
        case "link":
            target.symlink_to(precious)
        case _:
            target.symlink_to(tmp_path / "nowhere")
    done = link_or_copy(source, target, DIGEST, replace=True, copy=copy)
    assert done == ("copied" if copy else "linked")
    assert target.read_bytes() == CONTENT
    assert not target.is_symlink()
    assert precious.read_bytes() == b"precious"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b", "precious"]


@pytest.mark.parametrize("plant", ["link", "pipe", "folder", "nothing"])
def test_a_source_must_be_a_file(tmp_path, plant) -> None:
    source = tmp_path / "a"
    match plant:
        case "link":
            source.symlink_to(put(tmp_path / "real"))
        case "pipe":
            os.mkfifo(source)
        case "folder":
            source.mkdir()
    before = sorted(path.name for path in tmp_path.iterdir())
    with pytest.raises(UsageError, match="cannot read"):
        link_or_copy(source, tmp_path / "b")
    assert sorted(path.name for path in tmp_path.iterdir()) == before


@pytest.mark.parametrize("replace", [False, True])
def test_a_copy_of_another_content_gets_no_name(tmp_path, replace) -> None:
    source = put(tmp_path / "a", WRONG)
    with pytest.raises(FileFormatError, match="sha256"):
        link_or_copy(source, tmp_path / "b", DIGEST, copy=True, replace=replace)
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_a_source_that_is_swapped_is_noticed(tmp_path, monkeypatch) -> None:
    source, other, link = put(tmp_path / "a"), put(tmp_path / "other", WRONG), os.link

    def late(path: Any, name: Any, **options: Any) -> None:
        other.replace(source)
        link(path, name, **options)

    monkeypatch.setattr(os, "link", late)
    with pytest.raises(UsageError, match="replaced while"):
        link_or_copy(source, tmp_path / "b", DIGEST)
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_a_full_disk_is_told_before_copying(tmp_path, monkeypatch) -> None:
    source, usage = put(tmp_path / "a"), shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=len(CONTENT) - 1))
    with pytest.raises(ResourceError, match="of disk"):
        link_or_copy(source, tmp_path / "b", copy=True)
    assert link_or_copy(source, tmp_path / "b") == "linked"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b"]


def test_two_at_once_do_not_overwrite_each_other(tmp_path, monkeypatch) -> None:
    """The name is taken while the copy is made, and while it gets its name."""
    source = put(tmp_path / "a")
    with pytest.raises(UsageError, match="already"):
        link_or_copy(source, tmp_path / "b", copy=True, on_bytes=lambda _: (tmp_path / "b").write_bytes(b"first"))
    assert (tmp_path / "b").read_bytes() == b"first"
    held = PartFile(tmp_path / "c")
    held.open(b"", 1)
    with pytest.raises(UsageError, match="is writing it"):
        link_or_copy(source, tmp_path / "c", copy=True)
    held.leave(None)
    no_links(monkeypatch)  # and where names cannot be linked either
    with pytest.raises(UsageError, match="already"):
        link_or_copy(source, tmp_path / "d", on_bytes=lambda _: (tmp_path / "d").write_bytes(b"first"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b", "d"]


KILLED = """
import os, signal, sys
from pathlib import Path
from llmq.elsewhere import link_or_copy
left = int(sys.argv[1])
def watched(real):
    def call(*arguments, **options):
        global left
        if left == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        left -= 1
        return real(*arguments, **options)
    return call
for name in ("open", "write", "link", "unlink", "replace", "fsync", "ftruncate", "close"):
    setattr(os, name, watched(getattr(os, name)))
source, target, copy, replace = Path(sys.argv[2]), Path(sys.argv[3]), sys.argv[4] == "1", sys.argv[5] == "1"
link_or_copy(source, target, copy=copy, replace=replace)
"""


@pytest.mark.skipif(os.name == "nt", reason="signals are POSIX's")
@pytest.mark.parametrize(("copy", "replace"), [(True, False), (True, True), (False, False), (False, True)])
def test_killed_anywhere_the_name_is_absent_old_or_whole(tmp_path, copy, replace) -> None:
    source, target = put(tmp_path / "source"), tmp_path / "store" / "b"
    for calls in range(100):
        shutil.rmtree(target.parent, ignore_errors=True)
        target.parent.mkdir()
        if replace:
            target.write_bytes(b"old")
        command = [
            sys.executable,
            "-c",
            KILLED,
            str(calls),
            str(source),
            str(target),
            str(int(copy)),
            str(int(replace)),
        ]
        done = subprocess.run(command, capture_output=True, text=True)
        found = target.read_bytes() if target.exists() else None
        assert found in ((b"old", CONTENT) if replace else (None, CONTENT))
        assert source.read_bytes() == CONTENT
        if done.returncode == 0:
            break
        if found != CONTENT:
            link_or_copy(source, target, copy=copy, replace=replace)
            assert target.read_bytes() == CONTENT
            assert [path.name for path in target.parent.iterdir()] == ["b"]
        else:
            again = PartFile(target)  # as any later command of this name
            again.open(b"", 1)
            again.leave(None)
            assert [path.name for path in target.parent.iterdir()] == ["b"]
    assert done.returncode == 0, done.stderr
    assert calls >= 3


def test_what_is_copied_is_on_disk_before_it_has_its_name(tmp_path, monkeypatch) -> None:
    source, done = put(tmp_path / "a"), []
    for name in ("fsync", "link"):
        real = getattr(os, name)

        def call(what, *rest, name=name, real=real, **options):
            done.append((name, Path(f"/proc/self/fd/{what}").readlink().name if isinstance(what, int) else what.name))
            return real(what, *rest, **options)

        monkeypatch.setattr(os, name, call)
    link_or_copy(source, tmp_path / "b", copy=True)
    assert done == [("fsync", "b.part"), ("link", "b.part"), ("fsync", tmp_path.name)]
    done.clear()
    link_or_copy(source, tmp_path / "c")
    assert done == [("link", "a"), ("fsync", tmp_path.name)]


def manifest(root: Path, name: str = "registry.ollama.ai/library/mistral/7b", **change: Any) -> Path:
    layer = {"mediaType": elsewhere.MODEL_LAYER, "digest": f"sha256:{DIGEST}", "size": len(CONTENT)} | change
    other = {"mediaType": "application/vnd.ollama.image.license", "digest": f"sha256:{'0' * 64}", "size": 5}
    content = {"schemaVersion": 2, "config": other, "layers": [other, layer]}
    return put(root / "manifests" / name, json.dumps(content).encode())


def test_ollamas_models_are_known_by_its_names(home) -> None:
    root = home / ".ollama" / "models"
    blob = put(ollama_blob(root))
    for name in (
        "registry.ollama.ai/library/mistral/7b",
        "registry.ollama.ai/library/mistral/latest",
        "registry.ollama.ai/someone/mistral/7b",
        "hf.co/org/Mistral-GGUF/Q4_K_M",
        "hf.co/library/x/latest",
    ):
        manifest(root, name)
    names = [model.name for model in find_gguf_models()]
    assert names == ["hf.co/library/x:latest", "hf.co/org/Mistral-GGUF:Q4_K_M", "mistral:7b", "mistral:latest",
                     "someone/mistral:7b"]  # fmt: skip
    model = find_ollama_model("mistral:7b")
    assert (model.path, model.sha256, model.n_bytes) == (blob, DIGEST, len(CONTENT))
    assert find_ollama_model("mistral").name == "mistral:latest"
    with pytest.raises(UsageError, match=r"no model 'mistral:70b' here; found: hf\.co"):
        find_ollama_model("mistral:70b")


@pytest.mark.parametrize(
    "change",
    [
        {"digest": f"sha256:{DIGEST.upper()}"}, {"digest": DIGEST}, {"digest": f"sha256:{DIGEST}/../x"}, {"digest": 5},
        {"digest": "sha256:../../../../etc/passwd"}, {"digest": None}, {"size": len(CONTENT) + 1}, {"size": -1},
        {"size": True}, {"size": str(len(CONTENT))}, {"size": float(len(CONTENT))}, {"mediaType": "x"},
        {"mediaType": "application/vnd.ollama.image.license"},
    ],
)  # fmt: skip
def test_a_manifest_of_other_values_names_nothing(home, change) -> None:
    root = home / ".ollama" / "models"
    put(ollama_blob(root))
    manifest(root, **change)
    assert find_gguf_models() == []
    manifest(root)
    assert len(find_gguf_models()) == 1


@pytest.mark.parametrize(
    "content",
    [b"", b"[]", b"{}", b'{"layers": 5}', b'{"layers": [5, null]}', b"[" * 100_000, b"\xff",
     b'{"layers": []' + b" " * 2_000_000 + b"}"],
)  # fmt: skip
def test_a_file_that_is_no_manifest_names_nothing(home, content) -> None:
    put(home / ".ollama/models/manifests/registry.ollama.ai/library/mistral/7b", content)
    assert find_gguf_models() == []


def test_a_manifest_with_two_models_or_a_hostile_name_names_nothing(home, tmp_path) -> None:
    root = home / ".ollama" / "models"
    put(ollama_blob(root))
    path = manifest(root)
    content = json.loads(path.read_bytes())
    path.write_text(json.dumps(content | {"layers": content["layers"] * 2}))
    for name in ("a b/library/x/y", "registry.ollama.ai/library/-x/y", "registry.ollama.ai/library/x\x1b[31m/y"):
        manifest(root, name)
    (root / "manifests/registry.ollama.ai/library/linked").mkdir()
    (root / "manifests/registry.ollama.ai/library/linked/7b").symlink_to(manifest(tmp_path / "far"))
    os.mkfifo(root / "manifests/registry.ollama.ai/library/linked/pipe")
    assert find_gguf_models() == []


def test_an_ollama_blob_behind_a_link_is_not_a_model(home, tmp_path) -> None:
    root = home / ".ollama" / "models"
    manifest(root)
    ollama_blob(root).parent.mkdir()
    ollama_blob(root).symlink_to(put(tmp_path / "outside"))
    assert find_gguf_models() == []


def test_a_file_that_changes_while_it_is_read_is_refused(tmp_path, monkeypatch) -> None:
    source = put(tmp_path / "a")
    with pytest.raises(UsageError, match="is being written"):
        files.sha256_of(source, lambda _: source.write_bytes(CONTENT + b"more"))
    monkeypatch.setattr(files, "BLOCK", 1000)
    assert files.sha256_of(put(tmp_path / "b")) == DIGEST
