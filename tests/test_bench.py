"""The bench's scripts: files with random weights are ones that the reader accepts and the model runs."""

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

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


synthetic = script("synthetic")
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
