"""The bench's scripts: files with random weights are models, and what compare.py times is what it says."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from llmq import load
from llmq.formats import dequantize
from llmq.gguf import open_gguf

BENCH = Path(__file__).parents[1] / "bench"


def script(name: str) -> ModuleType:
    """A script of bench/ as a module; the folder is no package."""
    spec = importlib.util.spec_from_file_location(f"bench_{name}", BENCH / f"{name}.py")
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


synthetic, table, worker = script("synthetic"), script("table"), script("worker")
SMALL = {
    "n_layers": 2, "dim": 256, "n_heads": 4, "n_kv_heads": 2, "head_dim": 64, "ffn_dim": 512, "vocab_size": 1000,
    "rms_eps": 2.0**-17,  # the same in float32
}  # fmt: skip


@pytest.mark.parametrize("kind", synthetic.TYPES)
@pytest.mark.parametrize("n_experts", [0, 8])
def test_a_synthetic_file_is_a_model(
    kind: str, n_experts: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(synthetic, "CHUNK_BYTES", 10_000)  # several chunks, the last one shorter
    path = tmp_path / "x.gguf"
    config = synthetic.shape("x", **SMALL, n_experts=n_experts, n_experts_used=2 if n_experts else 0)
    synthetic.write(path, config, synthetic.TYPES[kind])
    with open_gguf(path) as gguf:
        for name, info in gguf.tensors.items():
            weights = dequantize(info.format, gguf.data(name))
            if len(info.shape) > 1:
                assert abs(weights.std() * info.shape[-1] ** 0.5 - 1) < 0.05, (name, info.format.name)
                assert abs(weights.mean()) < 0.05 * weights.std(), (name, info.format.name)
        mixed = {info.format.name for info in gguf.tensors.values()}
    assert {kind.removesuffix("_M"), "F32"} <= mixed
    with load(path, n_ctx=64, threads=1) as model:
        assert model.config == config
        logits = model.logits(np.random.default_rng(0).integers(0, 1000, 20).tolist())
    assert np.isfinite(logits).all()
    assert 0.3 < logits.std() < 3


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("bench") / "small.gguf"
    synthetic.write(path, synthetic.shape("small", **SMALL), synthetic.TYPES["Q4_K_M"])
    return path


def test_a_kept_context_is_the_one_that_was_read(small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker, "FILL_WORTH_KEEPING", 8)
    ids = np.random.default_rng(1).integers(3, 1000, 40).tolist()
    logits = []
    for turn in range(2):
        engine = worker.Llmq(str(small), 1, 64, 0, set())
        kept = worker.kept_at(engine, small, str(tmp_path), 32)
        assert kept.exists() == bool(turn)
        worker.fill(engine, ids[:32], kept)
        assert engine.length == 32
        logits.append(engine.model.read(ids[32:]))
        engine.model.close()
    np.testing.assert_array_equal(*logits)


@pytest.mark.parametrize("kind", ["prefill", "decode", "batch"])
def test_a_task_leaves_the_context_as_it_was(kind: str, small: Path) -> None:
    ids = np.random.default_rng(2).integers(3, 1000, 40).tolist()
    engine = worker.Llmq(str(small), 1, 64, 0, set())
    expected = engine.model.logits([*ids[:20], 5], all_positions=False)[0]
    worker.fill(engine, ids[:20], None)
    found = worker.measure(engine, {"kind": kind, "n": 4, "depth": 20, "seconds": 0.01}, ids)
    assert engine.length == 20
    assert found["speed"] > 0
    assert ("of_one" in found) == (kind == "batch")
    # A batch and one token add up in other orders: 2e-6 of logits around 1. That may round an activation the other way,
    # by 1/127 of its group's largest, about 3, times a weight of at most about 4/16 (their deviation is 1/sqrt(256)).
    np.testing.assert_allclose(engine.model.read([5])[0], expected, atol=0.01)
    engine.model.close()


def test_compare_writes_what_table_reads(small: Path, tmp_path: Path) -> None:
    command = [sys.executable, str(BENCH / "compare.py"), str(small), "--engines", "llmq", "--seconds", "0"]
    command += ["--threads", "1", "--rounds", "2", "--json", str(tmp_path / "x.json")]
    command += ["--tasks", "prefill:30", "decode:3@20", "batch:2"]
    environment = {**os.environ, "PYTHONPATH": str(BENCH.parent)}
    subprocess.run(command, env=environment, check=True, timeout=200)
    report = json.loads((tmp_path / "x.json").read_text())
    assert [len(task["rounds"]["llmq"]) for task in report["tasks"]] == [2, 2, 2]
    sizes = {name: info.n_bytes for name, info in open_gguf(small).tensors.items()}
    assert report["token_bytes"] == sum(sizes.values()) - sizes["token_embd.weight"]
    command = [sys.executable, str(BENCH / "table.py"), str(tmp_path / "x.json")]
    shown = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    assert "| small.gguf | prefill of 30 | 1 |" in shown


REPORT = {
    "file": "x.gguf", "bytes": 2**29, "token_bytes": 1_000_000_000, "kv_bytes_per_position": 250_000, "isa": None,
    "engines": {},
}  # fmt: skip


def answers(speeds: list[float], of_one: list[float] | None = None) -> list[dict[str, float]]:
    if of_one is None:
        return [{"speed": speed} for speed in speeds]
    return [{"speed": speed, "of_one": times} for speed, times in zip(speeds, of_one, strict=True)]


@pytest.mark.parametrize(
    ("task", "rounds", "expected"),
    [
        (  # 2e9 bytes a token in the middle: 90 % and 80 %, 50 % and 32 %
            {"kind": "decode", "n": 32, "depth": 3984},
            {"llmq": answers([9, 10]), "llama.cpp": answers([5, 4]), "read": [20e9, 25e9], "elsewhere": [0.01, 0.02]},
            ["decode at 3984", "2", "9.5", "4.5", "2.15 (1.80-2.50)", "85% and 41% of the streaming read"],
        ),
        (
            {"kind": "batch", "n": 4, "depth": 64},
            {
                "llmq": answers([40, 44], [1.5, 1.7]), "llama.cpp": answers([20, 20], [2.4, 3.0]),
                "read": [20e9, 25e9], "elsewhere": [0.01, 0.02],
            },
            ["4 at once", "2", "42", "20", "2.10 (2.00-2.20)", "1.60 and 2.70 times one token"],
        ),
        (
            {"kind": "prefill", "n": 512, "depth": 0},
            {
                "llmq": answers([1200, 1400]), "llama.cpp": answers([500, 400]),
                "read": [20e9, 25e9], "elsewhere": [0.01, 0.2],
            },
            [
                "prefill of 512", "2", "1,300", "450", "2.95 (2.40-3.50)",
                "up to 20% of the processors taken by others",
            ],
        ),
    ],
)  # fmt: skip
def test_what_a_row_says(task: dict[str, Any], rounds: dict[str, Any], expected: list[str]) -> None:
    assert table.cells(REPORT, task | {"threads": 2, "rounds": rounds}) == ["x.gguf", *expected]
