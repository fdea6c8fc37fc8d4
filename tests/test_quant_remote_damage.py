"""Weights that are not what was announced, and repositories that are none to read: no file, and a sentence."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from checkpoints import safetensors_bytes
from hub import Hub
from published import INDEX, REPO, SINGLE, left, make_small, opened, publish, run, stopped, tensors_of, written
from test_quant_checkpoint import BAD_ENTRIES, BAD_FILES, NAMES, SOUND, small_tensors

from llmq.errors import FileFormatError, LlmqError, NetworkError, UnsupportedError, UsageError
from quant.source import DamagedStreamError, open_source


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    make_small(monkeypatch)


def weights_at(hub: Hub, number: int, share: float) -> tuple[str, int]:
    """The file of that number in the index, and a byte of its data."""
    index = json.loads(hub.repos[REPO][INDEX])["weight_map"]
    name = list(dict.fromkeys(index.values()))[number]
    raw = hub.repos[REPO][name]
    start = 8 + int.from_bytes(raw[:8], "little")
    return name, start + int(share * (len(raw) - start - 1))


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_a_flipped_bit_is_caught(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, share: float) -> None:
    folder = written(tmp_path, shards=3)
    publish(hub, folder, monkeypatch)
    run(folder, tmp_path / "expected.gguf")
    name, at = weights_at(hub, 1, share)
    before = len(tensors_of(hub.repos[REPO][weights_at(hub, 0, 0)[0]]))
    hub.fail("flip", at=at, n=3, times=1, where=name)
    out = tmp_path / "out.gguf"
    with pytest.raises(DamagedStreamError, match=f"{name} arrived damaged") as error:
        run(opened(), out)
    assert isinstance(error.value, NetworkError)
    assert not out.exists()
    used = [each.resumed for each in run(opened(), out)]
    assert 0 < sum(used) <= before
    assert out.read_bytes() == (tmp_path / "expected.gguf").read_bytes()
    assert hub.faults[0].fired == 1


def test_a_flipped_bit_in_the_first_file_leaves_nothing(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    publish(hub, written(tmp_path / "it", shards=2), monkeypatch)
    name, at = weights_at(hub, 0, 0.5)
    hub.fail("flip", at=at, where=name)
    for _ in range(2):
        with pytest.raises(DamagedStreamError):
            run(opened(), tmp_path / "out.gguf")
        assert left(tmp_path) == ["it"]


def test_damage_before_a_stop_is_caught_after_it(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The state of the hash remembers."""
    folder = written(tmp_path)
    publish(hub, folder, monkeypatch)
    out, raw = tmp_path / "out.gguf", hub.repos[REPO][SINGLE]
    hub.fail("flip", at=int.from_bytes(raw[:8], "little") + 100, n=2, times=1, where=SINGLE)
    assert stopped(out, 5) == 5
    with pytest.raises(DamagedStreamError):
        run(opened(), out)
    run(opened(), out)
    run(folder, tmp_path / "expected.gguf")
    assert out.read_bytes() == (tmp_path / "expected.gguf").read_bytes()


@pytest.mark.parametrize("kind", ["q8_0", "bf16"])
def test_weights_that_became_impossible_on_their_way(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    """An infinity is the network's doing unless the sha256 says otherwise; then it is an error of the source."""
    publish(hub, written(tmp_path / "it", shards=2), monkeypatch)
    name, at = weights_at(hub, 1, 0.5)
    right, out = hub.repos[REPO][name], tmp_path / "out.gguf"
    at += at % 2 != len(right) % 2  # all that is behind the header are pairs of bytes
    wrong = right[:at] + b"\x80\x7f" + right[at + 2 :]
    announced, listing = hub.listing(REPO), Hub.listing
    monkeypatch.setattr(Hub, "listing", lambda _self, _repo: announced)
    hub.repos[REPO][name] = wrong
    with pytest.raises(DamagedStreamError):
        run(opened(), out, kind)
    hub.repos[REPO][name] = right
    assert any(each.resumed for each in run(opened(), out, kind))
    out.unlink()
    hub.repos[REPO][name] = wrong
    monkeypatch.setattr(Hub, "listing", listing)
    with pytest.raises(FileFormatError, match="not finite"):
        run(opened(), out, kind)
    assert left(tmp_path) == ["it"]


def exchanged(raw: bytes) -> bytes:
    """The file with another header: two tensors of one shape change places."""
    n_header = 8 + int.from_bytes(raw[:8], "little")
    a, b = b"layers.0.mlp.gate_proj", b"layers.0.mlp.up_proj"
    header = raw[:n_header].replace(a, b"@").replace(b, a).replace(b"@", b)
    assert header != raw[:n_header]
    assert len(header) == n_header
    return header + raw[n_header:]


def test_a_header_is_not_believed_before_it_passes(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is another one in what is read first; the stream is right, and its sha256 too."""
    publish(hub, written(tmp_path / "it", num_hidden_layers=1), monkeypatch)
    raw, answer = hub.repos[REPO][SINGLE], Hub.answer
    n_header, wrong = 8 + int.from_bytes(raw[:8], "little"), exchanged(raw)

    def changed(self: Hub, url: str, wanted: str) -> Any:
        right = answer(self, url, wanted)
        if url.endswith(SINGLE) and right.stop <= n_header:
            right.body = wrong[right.start : right.stop]
        return right

    monkeypatch.setattr(Hub, "answer", changed)
    with pytest.raises(DamagedStreamError):
        run(opened(), tmp_path / "out.gguf")
    assert left(tmp_path) == ["it"]


def test_another_header_is_another_job(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    publish(hub, written(tmp_path), monkeypatch)
    identity, announced = opened().identity, hub.listing(REPO)
    monkeypatch.setattr(Hub, "listing", lambda _self, _repo: announced)
    hub.repos[REPO][SINGLE] = exchanged(hub.repos[REPO][SINGLE])
    assert opened().identity != identity


# ---- refused
def refused(hub: Hub, folder: Path, patch: pytest.MonkeyPatch) -> LlmqError:
    """The error, of the kind that the same files in a folder give; no file, and no weights asked for."""
    publish(hub, folder, patch)
    out = folder.parent / "out.gguf"
    with pytest.raises(LlmqError) as there:
        open_source(folder)
    with pytest.raises(LlmqError) as here:
        run(opened(), out)
    assert type(here.value) is type(there.value)
    assert str(here.value).isprintable()
    assert len(str(here.value)) <= 240
    assert left(folder.parent) == [folder.name]
    return here.value


def asked_for(hub: Hub) -> set[str]:
    """Files of weights."""
    return {seen.path.rpartition("/")[2] for seen in hub.seen if "safetensors" in seen.path} - {INDEX}


@pytest.mark.parametrize("case", BAD_ENTRIES)
def test_damaged_entries(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, case: str) -> None:
    folder = written(tmp_path, num_hidden_layers=1)
    (folder / SINGLE).write_bytes(safetensors_bytes(small_tensors(), a=BAD_ENTRIES[case]))
    with pytest.raises(LlmqError) as there:
        open_source(folder)
    assert str(refused(hub, folder, monkeypatch)) == str(there.value)


@pytest.mark.parametrize("case", BAD_FILES)
def test_damaged_files(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, case: str) -> None:
    folder = written(tmp_path, num_hidden_layers=1)
    (folder / SINGLE).write_bytes(BAD_FILES[case])
    refused(hub, folder, monkeypatch)


@pytest.mark.parametrize("name", NAMES, ids=lambda name: ascii(name)[:30])
def test_an_index_leads_to_files_of_the_repository_only(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: Any
) -> None:
    folder = written(tmp_path, shards=2)
    index = json.loads((folder / INDEX).read_text())
    index["weight_map"]["a"] = name
    (folder / INDEX).write_text(json.dumps(index))
    assert isinstance(refused(hub, folder, monkeypatch), FileFormatError)
    assert not asked_for(hub)


@pytest.mark.parametrize("weight_map", [{"a": "x.safetensors"}, dict.fromkeys("abc", "x.safetensors"), {}, [], None])
def test_an_index_that_is_not_right(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, weight_map: Any) -> None:
    folder = written(tmp_path, shards=2)
    (folder / "x.safetensors").write_bytes(SOUND)
    (folder / INDEX).write_text(json.dumps({"weight_map": weight_map}))
    assert isinstance(refused(hub, folder, monkeypatch), FileFormatError)


def without(*patterns: str) -> Callable[[Path], None]:
    def remove(folder: Path) -> None:
        for pattern in patterns:
            for path in folder.glob(pattern):
                path.unlink()

    return remove


def instead_of_weights(*names: str) -> Callable[[Path], None]:
    def replace(folder: Path) -> None:
        without("*.safetensors*")(folder)
        for name in names:
            (folder / name).write_bytes(b"x")

    return replace


@pytest.mark.parametrize(
    ("change", "kind", "words"),
    [
        (without("tokenizer.model"), UnsupportedError, "'org/model' has no tokenizer.model"),
        (instead_of_weights("pytorch_model.bin"), UnsupportedError, "'org/model' has its weights only as pickles"),
        (instead_of_weights("consolidated.safetensors"), UnsupportedError, "only consolidated weights"),
        (instead_of_weights(), UsageError, "'org/model' has neither model.safetensors nor"),
        (without("l.safetensors"), FileFormatError, "org/model has no 'l.safetensors', which holds weights"),
    ],
)
def test_repositories_that_are_no_checkpoints(
    hub: Hub,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    change: Callable[[Path], None],
    kind: type[LlmqError],
    words: str,
) -> None:
    folder = written(tmp_path, shards=3)
    change(folder)
    error = refused(hub, folder, monkeypatch)
    assert isinstance(error, kind)
    assert words in str(error)
    assert not asked_for(hub)


def test_weights_whose_sha256_nobody_tells(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = written(tmp_path, shards=3)
    publish(hub, folder, monkeypatch)
    hub.small.add(weights_at(hub, 2, 0)[0])
    with pytest.raises(FileFormatError, match=r"does not tell the sha256 of 'n\.safetensors'"):
        opened()
    assert not asked_for(hub)
