"""A source's probabilities, run layer by layer, against the engine that runs whole models."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from checkpoints import safetensors_bytes, stored, write_checkpoint
from tiny import tiny_gguf

from llmq import load
from llmq.errors import FileFormatError
from llmq.formats import BF16, F16, F32, Q6_K, Q8_0
from quant import reference as module
from quant.evaluate import log_probs
from quant.quantize import quantize
from quant.reference import source_log_probs

EXPERTS = {"model_type": "mixtral", "num_local_experts": 8, "num_experts_per_tok": 2}


def pieces(vocab_size: int = 512) -> list[list[int]]:
    """Of several lengths, odd and even, the longest not first."""
    rng = np.random.default_rng(5)
    return [[1, *rng.integers(3, vocab_size, n - 1).tolist()] for n in (90, 131, 32, 33)]


def whole(path: Path, chunks: list[list[int]]) -> list[np.ndarray]:
    with load(path, n_ctx=160, threads=2) as model:
        return list(log_probs(model, chunks))


def differences(found: list[np.ndarray], expected: list[np.ndarray]) -> float:
    assert [each.shape for each in found] == [each.shape for each in expected]
    assert {each.dtype for each in found} == {np.dtype(np.float64)}
    return max(float(np.abs(a - b).max()) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize(
    "arguments",
    [{}, {"n_experts": 4}, {"window": 24}, {"tied": True}, {"format": BF16}, {"format": F16, "n_layers": 3}],
    ids=["dense", "experts", "window", "tied", "bf16", "f16"],
)
def test_it_is_what_the_whole_model_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: Any) -> None:
    # Fewer rows than the output matrix has, and no divisor of them.
    monkeypatch.setattr(module, "OUTPUT_ROWS", 200)
    tiny_gguf(tmp_path / "in.gguf", **arguments)
    found = list(source_log_probs(tmp_path / "in.gguf", pieces(), threads=2))
    assert [len(each) for each in found] == [44, 65, 15, 16]
    assert differences(found, whole(tmp_path / "in.gguf", pieces())) < 1e-5


def test_a_quantized_source(tmp_path: Path) -> None:
    """The engine takes activations as bytes for integer weights; here the output matrix gets them as floats."""
    tiny_gguf(tmp_path / "in.gguf", format={"output.weight": Q6_K, "": Q8_0})
    found = list(source_log_probs(tmp_path / "in.gguf", pieces(), threads=2))
    assert differences(found, whole(tmp_path / "in.gguf", pieces())) < 0.05


@pytest.mark.parametrize("changes", [{}, EXPERTS, {"tie_word_embeddings": True}], ids=["dense", "experts", "tied"])
def test_a_checkpoint_is_run_where_it_lies(tmp_path: Path, changes: dict[str, Any]) -> None:
    """Rotary pairs lie otherwise there, and experts apart; the file made of it goes through the whole engine."""
    write_checkpoint(tmp_path / "model", **changes)
    list(quantize(tmp_path / "model", tmp_path / "f32.gguf", "f32"))
    found = list(source_log_probs(tmp_path / "model", pieces(600), threads=2))
    # Half floats of keys and values now and then round the other way.
    assert differences(found, whole(tmp_path / "f32.gguf", pieces(600))) < 2e-4


def test_chunks_do_not_see_each_other(tmp_path: Path) -> None:
    tiny_gguf(tmp_path / "in.gguf", format=F32)
    together = list(source_log_probs(tmp_path / "in.gguf", pieces(), threads=1))
    for piece, expected in zip(pieces(), together, strict=True):
        (alone,) = source_log_probs(tmp_path / "in.gguf", [piece], threads=3)
        np.testing.assert_array_equal(alone, expected)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("model.layers.1.mlp.down_proj.weight", "not numbers"),
        ("lm_head.weight", r"output\.weight has weights that are not finite"),
    ],
)
def test_weights_that_give_no_numbers_are_refused(tmp_path: Path, name: str, said: str) -> None:
    hf = write_checkpoint(tmp_path / "model")
    hf[name][7, 3] = np.nan
    tensors = {key: stored(value, "F32") for key, value in hf.items()}
    (tmp_path / "model" / "model.safetensors").write_bytes(safetensors_bytes(tensors))
    with pytest.raises(FileFormatError, match=said):
        list(source_log_probs(tmp_path / "model", pieces(600)))


def test_nothing_is_written(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "model", **EXPERTS)
    before = {path.name: path.read_bytes() for path in (tmp_path / "model").iterdir()}
    list(source_log_probs(tmp_path / "model", pieces(600)))
    assert {path.name: path.read_bytes() for path in (tmp_path / "model").iterdir()} == before
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
