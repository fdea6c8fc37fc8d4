"""Calibration against a naive pass in float64 that keeps what every matrix reads."""

from collections import defaultdict
from pathlib import Path
from typing import Any

import naive
import numpy as np
import pytest
from checkpoints import safetensors_bytes, stored, write_checkpoint

from llmq.config import ModelConfig
from llmq.errors import FileFormatError, UnsupportedError, UsageError
from llmq.gguf import open_gguf
from llmq.tokenizer import load_tokenizer
from quant.calibrate import LayerStatistics, calibrate, gather
from quant.calibration import DEFAULT_TEXT, Calibration, Inputs
from quant.model import open_model
from quant.quantize import quantize

# Chunks of 96 tokens go past the window of 64, and the last chunk is a short one.
SMALL: dict[str, Any] = {"max_position_embeddings": 96}
EXPERTS = {"model_type": "mixtral", "num_local_experts": 8, "num_experts_per_tok": 2}
TEXT = "Nobody had told the lighthouse keeper's daughter that the storm would last for nine days. " * 3
Seen = dict[str, dict[int, list[np.ndarray]]]


def run(source: Path, text: str = TEXT, threads: int = 2, block: int = 0) -> list[LayerStatistics]:
    return list(calibrate(source, text, threads=threads, block=block))


def by_gguf_name(hf: dict[str, np.ndarray], config: ModelConfig) -> dict[str, np.ndarray]:
    """Rows of q and k stay as they are; experts are stacked."""
    names = {
        "attn_norm": "input_layernorm", "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj",
        "attn_v": "self_attn.v_proj", "attn_output": "self_attn.o_proj", "ffn_norm": "post_attention_layernorm",
    }  # fmt: skip
    if config.n_experts:
        names["ffn_gate_inp"] = "block_sparse_moe.gate"
    else:
        names |= {"ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj"}
    found = {"token_embd.weight": hf["model.embed_tokens.weight"], "output_norm.weight": hf["model.norm.weight"]}
    for i in range(config.n_layers):
        layer = f"model.layers.{i}."
        found |= {f"blk.{i}.{ours}.weight": hf[f"{layer}{theirs}.weight"] for ours, theirs in names.items()}
        for ours, theirs in ("ffn_gate", "w1"), ("ffn_down", "w2"), ("ffn_up", "w3"):
            experts = [hf[f"{layer}block_sparse_moe.experts.{e}.{theirs}.weight"] for e in range(config.n_experts)]
            if experts:
                found[f"blk.{i}.{ours}_exps.weight"] = np.array(experts)
    return {name: value.astype(np.float64) for name, value in found.items()}


def chunks_of(source: Path, text: str, size: int) -> list[list[int]]:
    tokenizer = load_tokenizer(open_model(source).gguf.metadata)
    ids, chunks = tokenizer.encode(text), []
    while ids:
        chunks.append([tokenizer.bos_id, *ids[: size - 1]])
        ids = ids[size - 1 :]
    return chunks


def observe(config: ModelConfig, weights: dict[str, np.ndarray], ids: list[int], seen: Seen) -> None:
    """A conversation token by token; each vector that a matrix reads goes to seen[name][expert]."""
    n_rep, hd = config.n_heads // config.n_kv_heads, config.head_dim
    hidden = [weights["token_embd.weight"][token] for token in ids]
    for i in range(config.n_layers):
        keys: list[np.ndarray] = []
        values: list[np.ndarray] = []

        def read(name: str, x: np.ndarray, expert: int = 0, i: int = i) -> np.ndarray:
            full = f"blk.{i}.{name}.weight"
            seen[full][expert].append(x)
            return (weights[full][expert] if weights[full].ndim == 3 else weights[full]) @ x

        def turn(heads: np.ndarray, position: int) -> np.ndarray:
            return np.array([naive.rope(h, position, config.rope_base, False) for h in heads.reshape(-1, hd)])

        for position, x in enumerate(hidden):
            normed = naive.rms_norm(x, weights[f"blk.{i}.attn_norm.weight"], config.rms_eps)
            q = turn(read("attn_q", normed), position)
            keys.append(turn(read("attn_k", normed), position).astype(np.float16).astype(np.float64))
            values.append(read("attn_v", normed).reshape(-1, hd).astype(np.float16).astype(np.float64))
            k, v = np.array(keys), np.array(values)
            heads = [
                naive.attend(q[h], position, k[:, h // n_rep], v[:, h // n_rep], config.window)
                for h in range(config.n_heads)
            ]
            x = x + read("attn_output", np.concatenate(heads))
            normed = naive.rms_norm(x, weights[f"blk.{i}.ffn_norm.weight"], config.rms_eps)
            if config.n_experts:
                choice = naive.route(normed, weights[f"blk.{i}.ffn_gate_inp.weight"], config.n_experts_used)
            else:
                choice = [(0, 1.0)]
            end = "_exps" if config.n_experts else ""
            for e, weight in choice:
                inner = naive.silu_mul(read(f"ffn_gate{end}", normed, e), read(f"ffn_up{end}", normed, e))
                x = x + weight * read(f"ffn_down{end}", inner, e)
            hidden[position] = x
    output = "token_embd.weight" if config.tied_embeddings else "output.weight"
    for x in hidden:
        seen[output][0].append(naive.rms_norm(x, weights["output_norm.weight"], config.rms_eps))


def expected(source: Path, hf: dict[str, np.ndarray], text: str = TEXT) -> tuple[ModelConfig, Seen]:
    config = open_model(source).config
    seen: Seen = defaultdict(lambda: defaultdict(list))
    for chunk in chunks_of(source, text, 96):
        observe(config, by_gguf_name(hf, config), chunk, seen)
    return config, seen


def close(got: np.ndarray, wanted: np.ndarray) -> bool:
    assert got.shape == wanted.shape
    return bool(np.linalg.norm(got - wanted) < 3e-4 * np.linalg.norm(wanted))


@pytest.mark.parametrize(
    ("dtype", "changes"),
    [("BF16", {}), ("F16", EXPERTS), ("F32", {"tie_word_embeddings": True, "num_hidden_layers": 1})],
    ids=["dense", "mixture", "tied"],
)
def test_sums_and_moments_equal_a_naive_pass(tmp_path: Path, dtype: str, changes: dict[str, Any]) -> None:
    """Keys and values are half floats on both sides; now and then one rounds the other way, which close() allows."""
    hf = write_checkpoint(tmp_path, dtype, **SMALL, **changes)
    config, seen = expected(tmp_path, hf)
    layers = run(tmp_path, block=64)
    assert [(layer.index, layer.total) for layer in layers] == [(i, len(layers)) for i in range(config.n_layers + 1)]
    inputs = gather(layers).inputs
    moments = {name: array for layer in layers for name, array in layer.moments.items()}
    assert inputs.keys() == moments.keys() == seen.keys()
    for name, experts in seen.items():
        n_experts = config.n_experts if "_exps" in name else 1
        assert inputs[name].counts.tolist() == [len(experts[e]) for e in range(n_experts)]
        for e in range(n_experts):
            rows = np.array(experts[e])
            assert close(inputs[name].sum_squares[e], (rows**2).sum(axis=0)), name
            for b, block in enumerate(moments[name][e]):
                part = rows[:, 64 * b : 64 * b + 64]
                assert close(block, sum(np.outer(row, row) for row in part) / len(part)), name


def test_a_checkpoint_and_its_gguf_file_give_the_same(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "model", **SMALL, **EXPERTS)
    list(quantize(tmp_path / "model", tmp_path / "f32.gguf", "f32"))
    ours, theirs = gather(run(tmp_path / "model")), gather(run(tmp_path / "f32.gguf"))
    assert (ours.n_chunks, ours.chunk_size) == (theirs.n_chunks, theirs.chunk_size)
    assert ours.inputs.keys() == theirs.inputs.keys()
    for name, inputs in ours.inputs.items():
        assert (inputs.counts == theirs.inputs[name].counts).all()
        assert close(inputs.sum_squares, theirs.inputs[name].sum_squares)


def test_experts_of_several_types(tmp_path: Path) -> None:
    """They are brought to F32; the weights are the same numbers, so what is read is too."""
    hf = write_checkpoint(tmp_path, **SMALL, **EXPERTS)
    before = gather(run(tmp_path))
    tensors = {name: stored(value, "F32" if ".experts.1." in name else "BF16") for name, value in hf.items()}
    (tmp_path / "model.safetensors").write_bytes(safetensors_bytes(tensors))
    for name, inputs in gather(run(tmp_path)).inputs.items():
        assert close(inputs.sum_squares, before.inputs[name].sum_squares)


def test_the_same_bytes_for_any_number_of_threads(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, **SMALL, **EXPERTS)
    one, three = run(tmp_path, threads=1, block=256), run(tmp_path, threads=3, block=256)
    for a, b in zip(one, three, strict=True):
        for name in a.inputs:
            assert a.inputs[name].sum_squares.tobytes() == b.inputs[name].sum_squares.tobytes()
            assert a.moments[name].tobytes() == b.moments[name].tobytes()


def test_experts_that_read_nothing(tmp_path: Path) -> None:
    changes = EXPERTS | {"num_local_experts": 32, "num_hidden_layers": 1}
    hf = write_checkpoint(tmp_path, **SMALL, **changes)
    text = "a" * 70
    _config, seen = expected(tmp_path, hf, text)
    layers = run(tmp_path, text, block=256)
    name = "blk.0.ffn_down_exps.weight"
    inputs, calibration = layers[0].inputs[name], gather(layers)
    idle = [e for e in range(32) if e not in seen[name]]
    assert 0 < len(idle) < 32
    assert not inputs.counts[idle].any()
    assert not inputs.sum_squares[idle].any()
    assert not layers[0].moments[name][idle].any()
    mean = inputs.sum_squares.sum(axis=0) / inputs.counts.sum()
    assert close(calibration.importance(name)[idle[0]], np.maximum(mean, 1e-6 * mean.mean()))


@pytest.mark.parametrize(("block", "size"), [(128, 128), (96, 32), (256, 256), (1000, 256)])
def test_blocks_that_do_not_divide_the_width(tmp_path: Path, block: int, size: int) -> None:
    write_checkpoint(tmp_path, **SMALL, num_hidden_layers=1)
    layers = run(tmp_path, "a few words " * 8, block=block)
    inputs, moments = layers[0].inputs["blk.0.attn_q.weight"], layers[0].moments["blk.0.attn_q.weight"]
    assert moments.shape == (1, 256 // size, size, size)
    diagonal = np.diagonal(moments, axis1=2, axis2=3).reshape(1, 256)
    assert close(diagonal, inputs.sum_squares / inputs.counts[:, None])


def test_importance_by_hand() -> None:
    """Two experts: 32 tokens, as many as are borrowed, and none; mean squares over both are 2, 0 and 4."""
    inputs = {
        "w": Inputs(np.array([[64, 0, 128], [0, 0, 0]], np.float32), np.array([32, 0])),
        "uneven": Inputs(np.array([[96, 32], [0, 0]], np.float32), np.array([32, 32])),
        "unlike": Inputs(np.array([[6400, 0], [64, 0]], np.float32), np.array([32, 32])),
        "unread": Inputs(np.zeros((2, 3), np.float32), np.array([0, 0])),
        "silent": Inputs(np.zeros((1, 3), np.float32), np.array([9])),
    }
    calibration = Calibration(inputs, "", 1, 64)
    least = 2e-6
    assert np.allclose(calibration.importance("w"), [[2, least, 4], [2, least, 4]], rtol=1e-6)
    # The mean is 1.5 and 0.5: (96 + 32 * 1.5) / 64 and (0 + 32 * 1.5) / 64, and a third of those.
    assert np.allclose(calibration.importance("uneven"), [[2.25, 0.75], [0.75, 0.25]])
    # The mean is 101; a column that is always 0 has a millionth of its own expert's mean.
    assert np.allclose(calibration.importance("unlike"), [[150.5, 75.25e-6], [51.5, 25.75e-6]], rtol=1e-6)
    assert (calibration.importance("unread") == np.ones((2, 3))).all()
    assert (calibration.importance("silent") == np.ones((1, 3))).all()
    assert calibration.importance("w").dtype == np.float32


def test_refusals(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hf = write_checkpoint(tmp_path / "model", **SMALL)
    with pytest.raises(UsageError, match="no tokens"):
        run(tmp_path / "model", "")
    word = "x" * 30
    assert [len(chunk) for chunk in chunks_of(tmp_path / "model", word, 64)] == [32]
    run(tmp_path / "model", word)
    with pytest.raises(UsageError, match=r"has 31 of the 32 tokens that it needs; give a longer one"):
        run(tmp_path / "model", word[:-1])
    with monkeypatch.context() as patch:
        patch.setattr("quant.calibrate.MAX_TOKENS", 20)
        with pytest.raises(UsageError, match=r"has \d+ tokens; give one of up to 20"):
            run(tmp_path / "model")
    for name, value, theirs in (
        ("model.layers.1.mlp.down_proj.weight", np.nan, "blk.1.ffn_down.weight"),
        ("model.layers.0.input_layernorm.weight", np.nan, "blk.0.attn_norm.weight"),
        ("model.embed_tokens.weight", np.inf, "token_embd.weight"),
    ):
        changed = hf[name].copy()
        changed[..., 5] = value
        damaged = {name: stored(value, "F32") for name, value in (hf | {name: changed}).items()}
        (tmp_path / "model" / "model.safetensors").write_bytes(safetensors_bytes(damaged))
        with pytest.raises(FileFormatError, match=f"^tensor {theirs} has weights that are not finite"):
            run(tmp_path / "model", block=64)
    write_checkpoint(tmp_path / "odd", hidden_size=80, head_dim=40, num_attention_heads=2, intermediate_size=96)
    with pytest.raises(UnsupportedError, match="head size is 40"):
        run(tmp_path / "odd")


def test_nothing_is_written(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "model", **SMALL)
    before = sorted(tmp_path.rglob("*"))
    run(tmp_path / "model", "a few words " * 8)
    assert sorted(tmp_path.rglob("*")) == before


def test_the_default_text() -> None:
    text = DEFAULT_TEXT.read_text("utf-8")
    assert 30_000 <= len(text.encode()) <= 50_000
    lines = [line for line in text.splitlines() if len(line) > 30]
    assert len(set(lines)) == len(lines)
    for sample in ("def ", "SELECT ", '{"', "été", "für", "¿Quién", "não", "perché", "что", "的", "です", "من"):
        assert sample in text, sample


def test_a_quantized_file(tmp_path: Path) -> None:
    """It can be run as well; what its matrices read is nearly what the checkpoint's do."""
    write_checkpoint(tmp_path / "model", **SMALL, num_hidden_layers=1)
    list(quantize(tmp_path / "model", tmp_path / "q8.gguf", "q8_0"))
    assert open_gguf(tmp_path / "q8.gguf").tensors["blk.0.attn_q.weight"].format.name == "Q8_0"
    ours, theirs = gather(run(tmp_path / "model")), gather(run(tmp_path / "q8.gguf"))
    for name, inputs in ours.inputs.items():
        ratio = theirs.inputs[name].sum_squares.sum() / inputs.sum_squares.sum()
        assert 0.9 < ratio < 1.1, name
