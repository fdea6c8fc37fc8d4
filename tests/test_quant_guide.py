"""What encoders are told of a tensor's inputs, and that the quantizer makes the best of it in the same bytes."""

import hashlib
import weakref
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import naive
import numpy as np
import pytest
from checkpoints import safetensors_bytes, stored, write_checkpoint
from tiny import tiny_gguf

from llmq.errors import FileFormatError
from llmq.formats import F32, Q3_K, Q4_K, dequantize
from llmq.gguf import open_gguf
from llmq.tokenizer import load_tokenizer
from quant import quantize as module
from quant.calibrate import calibrate, gather
from quant.encode import FAST, ROUNDS, encode
from quant.feedback import prepare
from quant.guide import Guide, Guides, Running, blend, guides_of, no_guide
from quant.quantize import TensorReport, quantize
from quant.recipe import parse_override
from quant.source import open_source

# Chunks of 48 tokens, so that a short text has some to hold out.
SMALL: dict[str, Any] = {"max_position_embeddings": 48, "num_hidden_layers": 1}
EXPERTS = {"model_type": "mixtral", "num_local_experts": 8, "num_experts_per_tok": 2}
TEXT = (
    "The sea was calm that night, and the keeper counted the ships as they passed. In the morning a letter came from "
    "the harbour: two boats were missing, and nobody knew whether the storm or the fog had taken them. "
) * 6


def run(source: Path, out: Path, preset: str, guides: Guides, **changes: Any) -> list[TensorReport]:
    return list(quantize(source, out, preset, guides=guides, guided_by="a text", **changes))


def tensors(path: Path) -> dict[str, bytes]:
    with open_gguf(path) as gguf:
        return {name: gguf.data(name).tobytes() for name in gguf.tensors}


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def importance_only(guides: Guides) -> Guides:
    def without(name: str) -> Guide | None:
        guide = guides(name)
        return guide and Guide(guide.importance)

    return without


def test_one_run_gives_all_that_is_asked_for_in_order(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, **SMALL | {"num_hidden_layers": 3})
    layers = list(calibrate(tmp_path, TEXT, threads=2, block=256))
    told: list[tuple[int, int]] = []
    running = Running(tmp_path, TEXT, "a text", threads=2, tell=lambda *layer: told.append(layer))
    assert told == []
    for i in range(3):
        assert running(f"blk.{i}.attn_norm.weight") is None
        assert told == [(k + 1, 3) for k in range(i)]
        for role in ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down"):
            name = f"blk.{i}.{role}.weight"
            guide = running(name)
            assert guide is not None
            assert (guide.importance == gather(layers).importance(name)).all()
            assert guide.held is layers[i].held[name] or (guide.held == layers[i].held[name]).all()
            (feedback,), expected = guide.feedback, prepare(layers[i].moments[name][0])
            assert (feedback.importance == expected.importance).all()
            assert (feedback.around == expected.around).all()
        # What reads the same thing is prepared once.
        assert running(f"blk.{i}.attn_q.weight") is running(f"blk.{i}.attn_v.weight")
        assert told == [(k + 1, 3) for k in range(i + 1)]
    assert running("token_embd.weight") is None
    assert running("output_norm.weight") is None
    output = running("output.weight")
    assert output is not None
    assert (output.importance == gather(layers).importance("output.weight")).all()
    with pytest.raises(AssertionError, match="after a later layer"):
        running("blk.0.attn_q.weight")
    assert running.finish().inputs.keys() == gather(layers).inputs.keys()


def test_a_run_may_begin_in_the_middle(tmp_path: Path) -> None:
    """As one that is continued does; what was passed over is in the calibration all the same."""
    write_checkpoint(tmp_path, **SMALL | {"num_hidden_layers": 2})
    whole = gather(calibrate(tmp_path, TEXT, threads=1), "some.txt")
    running = Running(tmp_path, TEXT, "some.txt", threads=2)
    guide = running("blk.1.attn_v.weight")
    assert guide is not None
    assert (guide.importance == whole.importance("blk.1.attn_v.weight")).all()
    ours = running.finish()
    assert (ours.dataset, ours.n_chunks, ours.chunk_size) == ("some.txt", whole.n_chunks, whole.chunk_size)
    assert ours.inputs.keys() == whole.inputs.keys()
    for name, inputs in whole.inputs.items():
        assert (ours.inputs[name].sum_squares == inputs.sum_squares).all()


def test_guides_of_one_layer_are_in_memory_at_a_time(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, **SMALL | {"num_hidden_layers": 3})
    running = Running(tmp_path, TEXT, "a text", threads=2)
    earlier: list[weakref.ref[np.ndarray]] = []
    for name in ("blk.0.attn_q.weight", "blk.1.ffn_down.weight", "blk.2.attn_v.weight", "output.weight"):
        guide = running(name)
        assert guide is not None
        assert guide.held is not None
        assert [array() for array in earlier] == [None] * len(earlier)
        earlier = [weakref.ref(array) for array in (guide.held, guide.importance, guide.feedback[0].around)]
        del guide


@pytest.mark.parametrize("n_chunks", [4, 5])
def test_feedback_is_spoken_of_where_it_is_not_used(tmp_path: Path, n_chunks: int) -> None:
    """It is where moments of text held out are there to compare by."""
    write_checkpoint(tmp_path, **SMALL)
    running = Running(tmp_path, "x" * 46 * n_chunks, "a text", threads=2)
    guide = running("blk.0.attn_q.weight")
    assert guide is not None
    assert guide.held is not None
    assert running.calibration.n_chunks == n_chunks
    assert guide.held.any() == (n_chunks == 5) == (not running.remarks)


def test_routers_have_no_guide(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, **SMALL, **EXPERTS)
    running = Running(tmp_path, TEXT, "a text", threads=2)
    assert running("blk.0.ffn_gate_inp.weight") is None
    gate, down = running("blk.0.ffn_gate_exps.weight"), running("blk.0.ffn_down_exps.weight")
    assert gate is not None
    assert down is not None
    assert len(gate.feedback) == len(down.feedback) == 8
    assert gate.importance.shape == (8, 256)
    assert down.importance.shape == (8, 512)


def test_tied_embeddings_have_what_the_output_reads(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, **SMALL, tie_word_embeddings=True)
    *_, last = calibrate(tmp_path, TEXT, threads=2, block=256)
    guide = Running(tmp_path, TEXT, "a text", threads=2)("token_embd.weight")
    assert guide is not None
    assert (guide.held == last.held["token_embd.weight"]).all()
    assert (guide.importance == gather([last]).importance("token_embd.weight")).all()


def test_guides_of_another_programs_file(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, **SMALL)
    calibration = gather(calibrate(tmp_path, TEXT, threads=2))
    del calibration.inputs["output.weight"]
    guides = guides_of(calibration)
    assert guides("output.weight") is None
    guide = guides("blk.0.ffn_down.weight")
    assert guide is not None
    assert (guide.importance == calibration.importance("blk.0.ffn_down.weight")).all()
    assert guide.feedback == ()


def test_an_expert_with_few_tokens_borrows_from_the_mean() -> None:
    """Two experts: 96 tokens and none, moments 4 and 0, so 4 on average; 32 tokens of that are borrowed."""
    moments = np.zeros((3, 1, 2, 2), np.float32)
    moments[0] = 4
    moments[1] = 8
    assert (blend(moments, np.array([96, 0, 0])) == 4).all()
    # The mean of 96 tokens with 4 and 32 with 8 is 5: (96 * 4 + 32 * 5) / 128, (32 * 8 + 32 * 5) / 64, 5.
    blended = blend(moments, np.array([96, 32, 0]))
    assert np.allclose(blended, np.array([4.25, 6.5, 5]).reshape(3, 1, 1, 1), rtol=1e-12)
    assert (blend(moments, np.zeros(3, np.int64)) == moments).all()
    assert (blend(moments[:1], np.array([1])) == 4).all()


def stop_after(source: Path, out: Path, n_tensors: int, guides: Guides, guided_by: str = "a text") -> None:
    with closing(quantize(source, out, "q3_k_m", threads=2, guides=guides, guided_by=guided_by)) as reports:  # type: ignore[type-var]
        for _ in range(n_tensors):
            next(reports)


def test_the_same_bytes_for_any_number_of_threads_and_after_a_stop(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(module, "CHUNK", 256 * 60)
    source = tmp_path / "model"
    smaller = {"num_hidden_layers": 2, "num_local_experts": 4, "intermediate_size": 256}
    write_checkpoint(source, **SMALL | EXPERTS | smaller)
    run(source, tmp_path / "one.gguf", "q3_k_m", Running(source, TEXT, "a text", threads=1), threads=1)
    run(source, tmp_path / "three.gguf", "q3_k_m", Running(source, TEXT, "a text", threads=3), threads=3)
    assert digest(tmp_path / "one.gguf") == digest(tmp_path / "three.gguf")
    run(source, tmp_path / "plain.gguf", "q3_k_m", no_guide)
    guided, plain = tensors(tmp_path / "one.gguf"), tensors(tmp_path / "plain.gguf")
    same = {name.removeprefix("blk.0.").removeprefix("blk.1.") for name in plain if plain[name] == guided[name]}
    unguided = {"attn_norm.weight", "ffn_norm.weight", "ffn_gate_inp.weight", "output_norm.weight", "token_embd.weight"}
    assert same == unguided
    # In the middle of the second layer.
    stop_after(source, tmp_path / "out.gguf", 14, Running(source, TEXT, "a text", threads=2))
    reports = run(source, tmp_path / "out.gguf", "q3_k_m", Running(source, TEXT, "a text", threads=2))
    assert [report.resumed for report in reports] == [index < 14 for index in range(len(reports))]
    assert digest(tmp_path / "out.gguf") == digest(tmp_path / "one.gguf")


@pytest.mark.parametrize("other", ["another text", ""])
def test_another_text_starts_over(tmp_path: Path, other: str) -> None:
    tiny_gguf(tmp_path / "in.gguf", n_layers=1)
    stop_after(tmp_path / "in.gguf", tmp_path / "out.gguf", 4, no_guide, guided_by="a text")
    reports = quantize(tmp_path / "in.gguf", tmp_path / "out.gguf", "q3_k_m", guided_by=other)
    assert not any(report.resumed for report in reports)


def product_error(path: Path, weights: dict[str, np.ndarray], name: str, inputs: np.ndarray) -> float:
    """Mean square of what a matrix's products with `inputs` [n, n_cols] are off."""
    with open_gguf(path) as gguf:
        ours = dequantize(gguf.tensors[name].format, gguf.data(name)).reshape(weights[name].shape)
    return float(np.square(inputs @ (ours.astype(np.float64) - weights[name]).T).mean())


def test_products_with_another_text_come_out_better(tmp_path: Path) -> None:
    """What the first layer's matrices read is the normed embedding of a token: computed here without the engine."""
    source = tmp_path / "in.gguf"
    weights = tiny_gguf(source, n_layers=1)
    text = TEXT * 3
    with open_gguf(source) as gguf:
        ids = load_tokenizer(gguf.metadata).encode(
            "A keeper told the harbour that the fog had passed in the night. " * 9
        )
    normed = np.array(
        [naive.rms_norm(weights["token_embd.weight"][i], weights["blk.0.attn_norm.weight"], 1e-5) for i in ids]
    )
    run(source, tmp_path / "plain.gguf", "q3_k_m", no_guide)
    run(source, tmp_path / "alone.gguf", "q3_k_m", importance_only(Running(source, text, "", threads=2)))
    run(source, tmp_path / "both.gguf", "q3_k_m", Running(source, text, "", threads=2))
    for name in ("blk.0.attn_q.weight", "blk.0.attn_k.weight"):
        plain, alone, both = (
            product_error(tmp_path / f"{kind}.gguf", weights, name, normed) for kind in ("plain", "alone", "both")
        )
        assert both < 0.7 * alone, name
        assert alone < 1.05 * plain, name


def test_feedback_goes_where_it_is_worse_on_text_held_out(tmp_path: Path, monkeypatch: Any) -> None:
    """Inputs that go together in the text and have nothing in common in what is held out, for one of two experts. There
    each column counts by itself, as plain rounding takes it.
    """
    monkeypatch.setattr(module, "CHUNK", 256 * 64)
    name = "blk.0.ffn_gate_exps.weight"
    weights = tiny_gguf(tmp_path / "in.gguf", n_layers=1, n_experts=2, ffn_dim=256)
    together = np.full((1, 256, 256), 0.9) + 0.1 * np.eye(256)
    apart = np.eye(256)[None]
    importance, feedback = np.ones((2, 256), np.float32), prepare(together)

    def made(*held: np.ndarray) -> bytes:
        guide = Guide(importance, (feedback, feedback), np.array(held, np.float32))
        guides = {name: guide}.get
        overrides = [parse_override("gate_exps=q4_k")]
        list(quantize(tmp_path / "in.gguf", tmp_path / "out.gguf", "q4_k_m", guides=guides, overrides=overrides))
        return tensors(tmp_path / "out.gguf")[name]

    fed = [encode(Q4_K, rows, feedback=feedback).tobytes() for rows in weights[name].reshape(2, 256, 256)]
    alone = [encode(Q4_K, rows, importance[0]).tobytes() for rows in weights[name].reshape(2, 256, 256)]
    assert made(together, together) == fed[0] + fed[1]
    assert made(together, apart) == fed[0] + alone[1]
    assert made(apart, together) == alone[0] + fed[1]
    # Nothing was held out of a short text, and an expert may read nothing of what was.
    assert made(np.zeros((1, 256, 256)), together) == alone[0] + fed[1]


def test_a_checkpoint_and_its_gguf_file_give_nearly_the_same(tmp_path: Path) -> None:
    """Rotary pairs lie apart in a checkpoint, so its scores are summed in another order: of what reads the embeddings
    nearly all bytes are the same, and of what comes after attention all but a few.
    """
    source, converted = tmp_path / "model", tmp_path / "f32.gguf"
    write_checkpoint(source, **SMALL)
    list(quantize(source, converted, "f32"))
    for origin, out in (source, "a.gguf"), (converted, "b.gguf"):
        run(origin, tmp_path / out, "q4_k_m", Running(origin, TEXT, "", threads=2))
    ours, theirs = tensors(tmp_path / "a.gguf"), tensors(tmp_path / "b.gguf")
    assert ours.keys() == theirs.keys()
    off = {name: np.mean(np.frombuffer(ours[name], np.uint8) != np.frombuffer(theirs[name], np.uint8)) for name in ours}
    assert all(off[f"blk.0.{role}.weight"] < 0.005 for role in ("attn_q", "attn_k", "attn_v"))
    assert max(off.values()) < 0.03


@pytest.mark.parametrize("preset", ["q4_k_m", "q3_k_m", "iq4_xs", "q8_0"])
def test_widths_that_are_no_multiple_of_256(tmp_path: Path, preset: str) -> None:
    """There importance is all: formats of 32 columns, and rows of 384 that K formats do not divide."""
    source = tmp_path / "model"
    write_checkpoint(source, **SMALL, hidden_size=96, head_dim=32, num_attention_heads=3, num_key_value_heads=1)
    running = Running(source, TEXT, "", threads=2)
    guide = running("blk.0.attn_q.weight")
    assert guide is not None
    assert guide.feedback == ()
    run(source, tmp_path / "out.gguf", preset, Running(source, TEXT, "", threads=2))
    run(source, tmp_path / "alone.gguf", preset, importance_only(Running(source, TEXT, "", threads=2)))
    run(source, tmp_path / "plain.gguf", preset, no_guide)
    ours, alone, plain = (tensors(tmp_path / f"{name}.gguf") for name in ("out", "alone", "plain"))
    name = "blk.0.attn_q.weight"
    assert ours[name] == alone[name]
    assert (ours[name] == plain[name]) == (preset == "q8_0")


def test_experts_that_read_nothing_go_by_what_all_read(tmp_path: Path) -> None:
    source, name, text = tmp_path / "model", "blk.0.ffn_down_exps.weight", "a" * 70
    write_checkpoint(source, **SMALL | EXPERTS | {"num_local_experts": 12, "intermediate_size": 256})
    inputs = next(calibrate(source, text, threads=2)).inputs[name]
    assert 0 < (inputs.counts == 0).sum() < 12
    guide = Running(source, text, "", threads=2)(name)
    assert guide is not None
    for feedback in guide.feedback:
        assert all(np.isfinite(part).all() for part in (feedback.importance, feedback.forward, feedback.around))
        assert (feedback.importance > 0).all()
    reports = run(source, tmp_path / "out.gguf", "q4_k_m", Running(source, text, "", threads=2))
    assert all(report.rms_error < 0.12 for report in reports)
    mean = inputs.sum_squares.sum(axis=0, dtype=np.float64) / inputs.counts.sum()
    weights = next(weights for weights in open_source(source).weights if weights.name == name)
    made = np.split(np.frombuffer(tensors(tmp_path / "out.gguf")[name], np.uint8), 12)
    fmt = next(report.format for report in reports if report.name == name)
    for expert, (sums, count) in enumerate(zip(inputs.sum_squares, inputs.counts, strict=True)):
        rows = weights.rows(256 * expert, 256 * (expert + 1))
        blended = (sums + 32 * mean) / (count + 32)
        expected = encode(fmt, rows, np.maximum(blended, 1e-6 * blended.mean()).astype(np.float32))
        assert (made[expert] == expected.ravel()).all()


@pytest.mark.parametrize("preset", ["f16", "bf16", "f32", "q8_0"])
def test_formats_without_a_search_are_as_they_are_without_a_guide(tmp_path: Path, preset: str) -> None:
    write_checkpoint(tmp_path / "model", **SMALL)
    run(tmp_path / "model", tmp_path / "guided.gguf", preset, Running(tmp_path / "model", TEXT, "", threads=2))
    run(tmp_path / "model", tmp_path / "plain.gguf", preset, no_guide)
    assert tensors(tmp_path / "guided.gguf") == tensors(tmp_path / "plain.gguf")


def test_fast_has_more_error(tmp_path: Path) -> None:
    tiny_gguf(tmp_path / "in.gguf", n_layers=1)
    thorough = run(tmp_path / "in.gguf", tmp_path / "a.gguf", "q3_k_m", no_guide)
    fast = run(tmp_path / "in.gguf", tmp_path / "b.gguf", "q3_k_m", no_guide, fast=True)
    quantized = [(a.rms_error, b.rms_error) for a, b in zip(thorough, fast, strict=True) if a.format is not F32]
    assert all(a < b for a, b in quantized)


@pytest.mark.parametrize("fed", [False, True])
def test_fast_is_fast_with_a_guide_too(tmp_path: Path, fed: bool) -> None:
    name = "blk.0.attn_q.weight"
    rows = tiny_gguf(tmp_path / "in.gguf", n_layers=1)[name]
    moments = np.full((1, 256, 256), 0.9) + 0.1 * np.eye(256)
    importance, feedback = np.linspace(1, 9, 256, dtype=np.float32), prepare(moments) if fed else None
    guide = Guide(importance[None], (feedback,) if feedback else (), moments[None].astype(np.float32))
    fast, thorough = (encode(Q3_K, rows, importance, feedback, rounds=rounds).tobytes() for rounds in (FAST, ROUNDS))
    for is_fast, expected in (True, fast), (False, thorough):
        run(tmp_path / "in.gguf", tmp_path / "out.gguf", "q3_k_m", {name: guide}.get, fast=is_fast)
        assert tensors(tmp_path / "out.gguf")[name] == expected
    assert fast != thorough


def order(reports: Iterator[TensorReport]) -> list[str]:
    return [report.name for report in reports]


def test_layers_come_first_and_in_their_order(tmp_path: Path) -> None:
    """The tenth after the ninth, whatever the order in the source."""
    tiny_gguf(tmp_path / "in.gguf", n_layers=11, dim=32, n_heads=1, n_kv_heads=1, ffn_dim=32)
    names = order(quantize(tmp_path / "in.gguf", tmp_path / "out.gguf", "q8_0"))
    assert [int(name.split(".")[1]) for name in names[:-3]] == [i for i in range(11) for _ in range(9)]
    assert sorted(names[-3:]) == ["output.weight", "output_norm.weight", "token_embd.weight"]
    assert list(open_gguf(tmp_path / "out.gguf").tensors) == names


def test_weights_that_make_inputs_too_large(tmp_path: Path) -> None:
    """Values whose squares are no float32 numbers, which the next matrix brings back."""
    source = tmp_path / "model"
    hf = write_checkpoint(source, **SMALL)
    for name, factor, where in (
        ("model.layers.0.self_attn.v_proj.weight", 1e24, "layer 0"),
        ("model.norm.weight", 1e24, "the last norm"),
    ):
        changed = hf | {name: hf[name] * factor, "model.layers.0.self_attn.o_proj.weight": np.full((256, 256), 1e-26)}
        data = safetensors_bytes({name: stored(value, "F32") for name, value in changed.items()})
        (source / "model.safetensors").write_bytes(data)
        with pytest.raises(FileFormatError, match=f"{where} of 'model' gives values that are too large"):
            run(source, tmp_path / "out.gguf", "f32", Running(source, TEXT, "", threads=2))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model"]
