"""Weights quantized as they arrive: the very file that a downloaded snapshot gives, with less disk, or a sentence."""

import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from checkpoints import safetensors_bytes
from hub import Hub
from published import (
    SINGLE,
    WINDOW,
    asked_twice,
    left,
    make_small,
    most_twice,
    opened,
    publish,
    run,
    spread,
    stopped,
    tensors_of,
    written,
)

from llmq.part import part_paths
from quant import stream

EXPERTS = {
    "model_type": "mixtral", "num_local_experts": 8, "num_experts_per_tok": 2, "num_hidden_layers": 1,
    "intermediate_size": 256,
}  # fmt: skip


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    make_small(monkeypatch)


# ---- the same bytes
CASES: dict[str, dict[str, Any]] = {
    "dense": {},
    "dense, F32, shards": {"dtype": "F32", "shards": 3},
    "dense, F16, many shards": {"dtype": "F16", "shards": 12},
    "tied": {"tie_word_embeddings": True, "shards": 2},
    "one head": {"num_attention_heads": 1, "num_key_value_heads": 1, "head_dim": 1024, "num_hidden_layers": 1},
    "experts": EXPERTS,
    "experts, F32, shards": EXPERTS | {"dtype": "F32", "shards": 2},
    "12 experts, shards": EXPERTS | {"num_local_experts": 12, "shards": 5},
}


@pytest.mark.parametrize("kind", ["q4_k_m", "q8_0", "f16"])
@pytest.mark.parametrize("case", CASES)
def test_the_bytes_are_those_of_a_snapshot(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, case: str, kind: str
) -> None:
    folder = written(tmp_path, **CASES[case])
    publish(hub, folder, monkeypatch)
    expected = run(folder, tmp_path / "expected.gguf", kind)
    for threads in (1, 3):
        out = tmp_path / f"{threads}.gguf"
        reports = run(opened(), out, kind, threads)
        assert out.read_bytes() == (tmp_path / "expected.gguf").read_bytes()
        assert {each.name: each.rms_error for each in reports} == {each.name: each.rms_error for each in expected}


def test_orders_of_tensors(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """However tensors lie in however many files."""
    folder = written(tmp_path, **EXPERTS | {"num_local_experts": 11})
    run(folder, tmp_path / "expected.gguf", "q8_0")
    whole = (folder / SINGLE).read_bytes()
    for seed in range(6):
        (folder / SINGLE).write_bytes(whole)
        spread(folder, 2 + 2 * seed, seed)
        publish(hub, folder, monkeypatch)
        run(opened(), tmp_path / "out.gguf")
        assert (tmp_path / "out.gguf").read_bytes() == (tmp_path / "expected.gguf").read_bytes()
        for path in folder.glob("?.safetensors"):
            path.unlink()


def test_one_file_comes_before_an_index(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a folder that has both."""
    folder = written(tmp_path, num_hidden_layers=1)
    whole = (folder / SINGLE).read_bytes()
    spread(folder, 3)
    (folder / SINGLE).write_bytes(whole)
    publish(hub, folder, monkeypatch)
    run(folder, tmp_path / "expected.gguf")
    run(opened(), tmp_path / "out.gguf")
    assert (tmp_path / "out.gguf").read_bytes() == (tmp_path / "expected.gguf").read_bytes()
    assert {seen.path.rpartition("/")[2] for seen in hub.answers()} == {SINGLE, "tokenizer.model"}


def test_what_is_never_used_may_be_larger_than_the_window(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An embedding's copy and nothing at all in the middle, and a header with much in it that nobody asked for."""
    folder = written(tmp_path, tie_word_embeddings=True, num_hidden_layers=1)
    tensors = tensors_of((folder / SINGLE).read_bytes())
    nothing = {"model.layers.0.self_attn.rotary_emb.inv_freq": ("F32", np.empty(0, np.float32))}
    tensors |= nothing | {"lm_head.weight": tensors["model.embed_tokens.weight"]}
    first = ("model.norm.weight", "lm_head.weight", "model.embed_tokens.weight", *nothing)
    tensors = {name: tensors.pop(name) for name in first} | tensors
    metadata = {"long": " " * 3 * WINDOW}
    (folder / SINGLE).write_bytes(safetensors_bytes(tensors, __metadata__=metadata))
    publish(hub, folder, monkeypatch)
    run(folder, tmp_path / "expected.gguf")
    run(opened(), tmp_path / "out.gguf", threads=3)
    assert (tmp_path / "out.gguf").read_bytes() == (tmp_path / "expected.gguf").read_bytes()


def test_faults_on_the_way_change_nothing(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = written(tmp_path, shards=3)
    publish(hub, folder, monkeypatch)
    run(folder, tmp_path / "expected.gguf")
    for name, arguments in {"cut": {"times": 2}, "status": {"n": 503, "times": 2}, "ignore_range": {}}.items():
        hub.reset()
        hub.fail(name, where=r"^/cdn/.*safetensors$", **arguments)
        run(opened(), tmp_path / "out.gguf")
        assert (tmp_path / "out.gguf").read_bytes() == (tmp_path / "expected.gguf").read_bytes()


def test_nothing_but_the_result_is_written(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """At every read: the file in the making and its journals in the one folder, a few small files in the other."""
    folder = written(tmp_path, "F32", shards=3)
    publish(hub, folder, monkeypatch)
    run(folder, tmp_path / "expected.gguf")
    size = (tmp_path / "expected.gguf").stat().st_size
    out, temporary = tmp_path / "out" / "x.gguf", tmp_path / "temporary"
    out.parent.mkdir()
    temporary.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(temporary))
    seen = []

    def watched(self: stream.Stream, start: int, end: int, read: Any = stream.Stream.read) -> bytes:
        part, *journals = part_paths(out)
        assert set(left(out.parent)) <= {path.name for path in (part, *journals)}
        assert not left(temporary)
        seen.append(part.stat().st_size)
        return read(self, start, end)

    monkeypatch.setattr(stream.Stream, "read", watched)
    run(opened(), out)
    assert len(seen) > 50
    assert max(seen) <= size
    assert (left(out.parent), left(temporary)) == (["x.gguf"], [])
    assert out.read_bytes() == (tmp_path / "expected.gguf").read_bytes()


# ---- going on
@pytest.mark.parametrize("changes", [{"shards": 1}, {"shards": 3}, EXPERTS | {"shards": 3, "num_local_experts": 3}])
def test_closed_at_every_tensor(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any]
) -> None:
    folder = written(tmp_path, **{"num_hidden_layers": 1, **changes})
    publish(hub, folder, monkeypatch)
    n_tensors = len(run(folder, tmp_path / "expected.gguf"))
    out = tmp_path / "out.gguf"
    for n in range(1, n_tensors):
        hub.reset()
        assert stopped(out, n) == n
        assert not out.exists()
        reports = run(opened(), out)
        assert sum(each.resumed for each in reports) >= n
        assert out.read_bytes() == (tmp_path / "expected.gguf").read_bytes()
        assert asked_twice(hub, folder) <= most_twice(folder, tensors=1)
        out.unlink()


def test_stopped_and_continued_many_times(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = written(tmp_path, shards=4)
    publish(hub, folder, monkeypatch)
    n_tensors = len(run(folder, tmp_path / "expected.gguf"))
    for n in range(1, n_tensors):
        assert stopped(tmp_path / "out.gguf", n) == 1
    assert [each.resumed for each in run(opened(), tmp_path / "out.gguf")] == [True] * (n_tensors - 1) + [False]
    assert (tmp_path / "out.gguf").read_bytes() == (tmp_path / "expected.gguf").read_bytes()


def test_another_commit_begins_anew(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = written(tmp_path, shards=2)
    publish(hub, folder, monkeypatch)
    stopped(tmp_path / "out.gguf", 9)
    listing = Hub.listing
    monkeypatch.setattr(Hub, "listing", lambda self, repo: listing(self, repo) | {"sha": "f" * 40})
    assert not any(each.resumed for each in run(opened(), tmp_path / "out.gguf"))
    folder.rename(folder.with_name("f" * 40))
    run(folder.with_name("f" * 40), tmp_path / "expected.gguf")
    assert (tmp_path / "out.gguf").read_bytes() == (tmp_path / "expected.gguf").read_bytes()
