"""The quantizer whole: weights arrive under their names, files are complete or absent, bytes are reproducible."""

import contextlib
import dataclasses
import hashlib
import json
import os
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from checkpoints import bf16, safetensors_bytes, write_checkpoint
from tiny import tiny_gguf

from llmq.errors import FileFormatError, LlmqError, ResourceError, UnsupportedError, UsageError
from llmq.formats import BF16, F32, Q4_K, Q6_K, Q8_0, dequantize
from llmq.gguf import open_gguf
from quant import quantize as module
from quant.quantize import TensorReport, in_order, quantize
from quant.recipe import PRESETS, parse_override

EXPERTS = {"model_type": "mixtral", "num_local_experts": 8, "num_experts_per_tok": 2}


def run(source: Path, out: Path, preset: str, threads: int | None = None) -> list[TensorReport]:
    return list(quantize(source, out, preset, threads=threads))


def weights_of(path: Path) -> dict[str, np.ndarray]:
    gguf = open_gguf(path)
    return {name: dequantize(info.format, gguf.data(name)).reshape(info.shape) for name, info in gguf.tensors.items()}


def packed(path: Path) -> dict[str, bytes]:
    gguf = open_gguf(path)
    return {name: gguf.data(name).tobytes() for name in gguf.tensors}


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def paired(weights: np.ndarray, heads: int) -> np.ndarray:
    """Rotary rows by loops: of each head, row i of the first half, then row i of the second."""
    head_dim = weights.shape[0] // heads
    rows = []
    for head in range(heads):
        for i in range(head_dim // 2):
            rows += [weights[head * head_dim + i], weights[head * head_dim + head_dim // 2 + i]]
    return np.array(rows)


def expected_weights(hf: dict[str, np.ndarray], n_experts: int) -> dict[str, np.ndarray]:
    simple = {
        "attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm", "attn_v": "self_attn.v_proj",
        "attn_output": "self_attn.o_proj", "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj",
        "ffn_down": "mlp.down_proj", "ffn_gate_inp": "block_sparse_moe.gate",
    }  # fmt: skip
    out = {
        "token_embd.weight": hf["model.embed_tokens.weight"],
        "output_norm.weight": hf["model.norm.weight"],
        "output.weight": hf["lm_head.weight"],
    }
    for i in range(2):
        for name, source in simple.items():
            if f"model.layers.{i}.{source}.weight" in hf:
                out[f"blk.{i}.{name}.weight"] = hf[f"model.layers.{i}.{source}.weight"]
        out[f"blk.{i}.attn_q.weight"] = paired(hf[f"model.layers.{i}.self_attn.q_proj.weight"], 4)
        out[f"blk.{i}.attn_k.weight"] = paired(hf[f"model.layers.{i}.self_attn.k_proj.weight"], 2)
        for name, w in (("ffn_gate_exps", "w1"), ("ffn_down_exps", "w2"), ("ffn_up_exps", "w3")):
            if n_experts:
                experts = [f"model.layers.{i}.block_sparse_moe.experts.{e}.{w}.weight" for e in range(n_experts)]
                out[f"blk.{i}.{name}.weight"] = np.stack([hf[expert] for expert in experts])
    return out


@pytest.mark.parametrize("dtype", ["BF16", "F16", "F32"])
@pytest.mark.parametrize("changes", [{}, EXPERTS], ids=["dense", "experts"])
def test_weights_arrive_exactly(tmp_path: Path, monkeypatch: Any, dtype: str, changes: dict[str, Any]) -> None:
    # Small chunks, so that they cross from expert to expert.
    monkeypatch.setattr(module, "CHUNK", 256 * 700)
    hf = write_checkpoint(tmp_path / "model", dtype, **changes)
    reports = run(tmp_path / "model", tmp_path / "out.gguf", "f32")
    ours = weights_of(tmp_path / "out.gguf")
    expected = expected_weights(hf, 8 if changes else 0)
    assert ours.keys() == expected.keys()
    for name, weights in expected.items():
        np.testing.assert_array_equal(ours[name], weights, err_msg=name)
    assert [report.name for report in reports] == list(ours)
    assert [report.index for report in reports] == list(range(len(ours)))
    assert {report.total for report in reports} == {len(ours)}
    assert {report.source for report in reports} == {dtype}
    assert {report.rms_error for report in reports} == {0.0}


@pytest.mark.parametrize("preset", PRESETS)
def test_presets_lose_what_their_formats_lose(tmp_path: Path, preset: str) -> None:
    hf = write_checkpoint(tmp_path / "model", **EXPERTS)
    reports = run(tmp_path / "model", tmp_path / "out.gguf", preset)
    ours, expected = weights_of(tmp_path / "out.gguf"), expected_weights(hf, 8)
    gguf = open_gguf(tmp_path / "out.gguf")
    assert gguf.metadata["general.file_type"] == PRESETS[preset].file_type
    assert gguf.metadata["general.quantization_version"] == 2
    losses = {"F32": 0, "BF16": 0, "F16": 1e-4, "Q8_0": 0.007, "Q6_K": 0.022, "Q5_K": 0.04, "Q4_K": 0.08}
    losses |= {"IQ4_NL": 0.085, "IQ4_XS": 0.085, "Q3_K": 0.165, "Q2_K": 0.32}
    for report in reports:
        off = ours[report.name].astype(np.float64) - expected[report.name]
        measured = np.sqrt((off**2).sum() / (expected[report.name].astype(np.float64) ** 2).sum())
        assert report.rms_error == pytest.approx(measured, rel=1e-6)
        assert measured <= losses[report.format.name], report.name
        info = gguf.tensors[report.name]
        assert (report.shape, report.format, report.n_bytes) == (info.shape, info.format, info.n_bytes)
        assert (info.format == F32) >= (len(info.shape) == 1 or "ffn_gate_inp" in report.name)


def test_overrides_change_the_tensors_they_match(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "model")
    overrides = [parse_override("attn_v=q8_0"), parse_override("^output=bf16")]
    list(quantize(tmp_path / "model", tmp_path / "out.gguf", "q6_k", overrides=overrides))
    gguf = open_gguf(tmp_path / "out.gguf")
    assert gguf.metadata["general.file_type"] == 18
    formats = {name: info.format for name, info in gguf.tensors.items() if "norm" not in name}
    assert formats.pop("output.weight") is BF16
    assert {name for name, fmt in formats.items() if fmt is Q8_0} == {"blk.0.attn_v.weight", "blk.1.attn_v.weight"}
    assert set(formats.values()) == {Q8_0, Q6_K}


def test_overrides_for_nothing_leave_no_file(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "model")
    with pytest.raises(UsageError, match="'experts' matches no tensor"):
        list(quantize(tmp_path / "model", tmp_path / "out.gguf", "q6_k", overrides=[parse_override("experts=q8_0")]))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model"]


def test_bytes_do_not_depend_on_threads_or_runs(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(module, "CHUNK", 256 * 50)
    write_checkpoint(tmp_path / "model", **EXPERTS)
    digests = set()
    for threads in (1, 2, 3, 2):
        run(tmp_path / "model", tmp_path / "out.gguf", "q4_k_m", threads)
        digests.add(digest(tmp_path / "out.gguf"))
    assert len(digests) == 1
    before = packed(tmp_path / "out.gguf")
    # The error in the receipt is of other chunks then, but the weights are the same.
    monkeypatch.setattr(module, "CHUNK", 1 << 18)
    run(tmp_path / "model", tmp_path / "out.gguf", "q4_k_m")
    assert packed(tmp_path / "out.gguf") == before


def test_shards_give_the_same_file(tmp_path: Path) -> None:
    for folder, shards in (("a/model", 1), ("b/model", 3)):
        (tmp_path / folder).parent.mkdir()
        write_checkpoint(tmp_path / folder, shards=shards)
        run(tmp_path / folder, tmp_path / f"{shards}.gguf", "q5_k_m")
    assert digest(tmp_path / "1.gguf") == digest(tmp_path / "3.gguf")


def test_tied_embeddings_have_no_output(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "model", tie_word_embeddings=True)
    run(tmp_path / "model", tmp_path / "out.gguf", "q4_k_m")
    tensors = open_gguf(tmp_path / "out.gguf").tensors
    assert "output.weight" not in tensors
    assert tensors["token_embd.weight"].format == Q6_K


def test_a_gguf_is_quantized_like_the_checkpoint_it_came_from(tmp_path: Path) -> None:
    """Its norms are F32, which the receipt's digest of the source tells."""
    write_checkpoint(tmp_path / "model", **EXPERTS)
    run(tmp_path / "model", tmp_path / "bf16.gguf", "bf16")
    run(tmp_path / "bf16.gguf", tmp_path / "by-two-steps.gguf", "q4_k_m")
    run(tmp_path / "model", tmp_path / "by-one.gguf", "q4_k_m")
    two, one = tmp_path / "by-two-steps.gguf", tmp_path / "by-one.gguf"
    assert packed(two) == packed(one)
    metadata, expected = open_gguf(two).metadata, open_gguf(one).metadata
    # All but the receipt, which names another source.
    assert metadata.keys() == expected.keys()
    for key in metadata:
        if not key.startswith("llmq.source"):
            np.testing.assert_array_equal(metadata[key], expected[key], err_msg=key)


def test_a_gguf_of_any_format_can_be_the_source(tmp_path: Path) -> None:
    mixed = {"attn_v.weight": Q6_K, "ffn_down.weight": Q8_0, "output.weight": BF16, "": Q4_K}
    weights = tiny_gguf(tmp_path / "in.gguf", format=mixed)
    before = digest(tmp_path / "in.gguf")
    run(tmp_path / "in.gguf", tmp_path / "out.gguf", "f32")
    ours = weights_of(tmp_path / "out.gguf")
    assert ours.keys() == weights.keys()
    for name, expected in weights.items():
        np.testing.assert_array_equal(ours[name], expected.reshape(ours[name].shape))
    source, out = open_gguf(tmp_path / "in.gguf").metadata, open_gguf(tmp_path / "out.gguf").metadata
    assert out["general.file_type"] == 0
    for key, value in source.items():
        np.testing.assert_array_equal(out[key], value)
    assert digest(tmp_path / "in.gguf") == before


def test_what_already_has_its_format_is_copied(tmp_path: Path) -> None:
    tiny_gguf(tmp_path / "in.gguf", format={"output.weight": Q6_K, "": Q4_K})
    reports = run(tmp_path / "in.gguf", tmp_path / "out.gguf", "q4_k_s")
    source, out = open_gguf(tmp_path / "in.gguf"), open_gguf(tmp_path / "out.gguf")
    copied = [report.name for report in reports if report.format == source.tensors[report.name].format]
    assert "blk.0.attn_q.weight" in copied
    for name in copied:
        np.testing.assert_array_equal(out.data(name), source.data(name))
    assert all(report.rms_error == 0 for report in reports if report.name in copied)


def test_llama_cpp_loads_the_result(tmp_path: Path) -> None:
    llama_cpp = pytest.importorskip("llama_cpp")
    write_checkpoint(tmp_path / "model", **EXPERTS)
    run(tmp_path / "model", tmp_path / "out.gguf", "q4_k_m")
    model = llama_cpp.Llama(str(tmp_path / "out.gguf"), n_ctx=64, verbose=False, n_threads=1)
    assert model.n_vocab() == 608
    model.close()


def damage(folder: Path, name: str, value: float) -> None:
    """One weight of one tensor is replaced in the file."""
    header = (folder / "model.safetensors").read_bytes()
    size = int.from_bytes(header[:8], "little")
    start = json.loads(header[8 : 8 + size])[name]["data_offsets"][0] + 8 + size
    with (folder / "model.safetensors").open("r+b") as file:
        file.seek(start + 2 * 300)
        file.write(bf16(np.array([value], np.float32)).tobytes())


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("preset", ["q4_k_m", "bf16"])
def test_weights_that_are_not_finite_leave_no_file(tmp_path: Path, value: float, preset: str) -> None:
    write_checkpoint(tmp_path / "model")
    damage(tmp_path / "model", "model.layers.1.mlp.up_proj.weight", value)
    with contextlib.closing(quantize(tmp_path / "model", tmp_path / "out.gguf", preset)) as reports:  # type: ignore[type-var]
        next(reports)
    assert (tmp_path / "out.gguf.part").exists()
    with pytest.raises(FileFormatError, match=r"blk\.1\.ffn_up\.weight has weights that are not finite"):
        run(tmp_path / "model", tmp_path / "out.gguf", preset)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model"]


def test_weights_too_large_for_half_floats_are_refused(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "model")
    damage(tmp_path / "model", "lm_head.weight", 1e6)
    for preset in ("f16", "q8_0"):
        with pytest.raises(UnsupportedError, match=r"output\.weight .* quantize to bf16"):
            run(tmp_path / "model", tmp_path / "out.gguf", preset)
    run(tmp_path / "model", tmp_path / "out.gguf", "bf16")


def stopped(source: Path, out: Path, preset: str, n_tensors: int) -> None:
    reports = quantize(source, out, preset, threads=2)
    for _ in range(n_tensors):
        assert not next(reports).resumed
    reports.close()  # type: ignore[attr-defined]


def test_stopping_early_keeps_what_was_there_and_what_was_done(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "model")
    whole = run(tmp_path / "model", tmp_path / "whole.gguf", "q4_k_m")
    (tmp_path / "out.gguf").write_bytes(b"before")
    stopped(tmp_path / "model", tmp_path / "out.gguf", "q4_k_m", 9)
    assert (tmp_path / "out.gguf").read_bytes() == b"before"
    reports = run(tmp_path / "model", tmp_path / "out.gguf", "q4_k_m", threads=1)
    assert [report.resumed for report in reports] == [index < 9 for index in range(len(whole))]
    assert [dataclasses.replace(report, resumed=False) for report in reports] == whole
    assert digest(tmp_path / "out.gguf") == digest(tmp_path / "whole.gguf")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "out.gguf", "whole.gguf"]


def test_a_gguf_file_is_continued_too(tmp_path: Path) -> None:
    tiny_gguf(tmp_path / "in.gguf", format=Q8_0)
    run(tmp_path / "in.gguf", tmp_path / "whole.gguf", "q4_k_m")
    stopped(tmp_path / "in.gguf", tmp_path / "out.gguf", "q4_k_m", 5)
    assert sum(report.resumed for report in run(tmp_path / "in.gguf", tmp_path / "out.gguf", "q4_k_m")) == 5
    assert digest(tmp_path / "out.gguf") == digest(tmp_path / "whole.gguf")


def touched(folder: Path) -> None:
    status = (folder / "model.safetensors").stat()
    os.utime(folder / "model.safetensors", ns=(status.st_atime_ns, status.st_mtime_ns + 1))


@pytest.mark.parametrize("change", ["preset", "fast", "guides", "date", "weights", "configuration", "code"])
def test_another_job_begins_anew(tmp_path: Path, monkeypatch: Any, change: str) -> None:
    write_checkpoint(tmp_path / "model")
    stopped(tmp_path / "model", tmp_path / "out.gguf", "q8_0", 9)
    settings: dict[str, Any] = {"preset": "q8_0"}
    match change:
        case "preset":
            settings["preset"] = "q4_k_m"
        case "fast":
            settings["fast"] = True
        case "guides":
            settings["guided_by"] = "0" * 64
        case "date":
            touched(tmp_path / "model")
        case "weights":
            damage(tmp_path / "model", "lm_head.weight", 0.5)
        case "configuration":
            write_checkpoint(tmp_path / "model", rope_theta=5000.0)
        case "code":
            monkeypatch.setattr(module, "source_stamp", lambda: "another version")
    assert not any(report.resumed for report in quantize(tmp_path / "model", tmp_path / "out.gguf", **settings))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "out.gguf"]


def test_the_input_is_never_overwritten(tmp_path: Path) -> None:
    tiny_gguf(tmp_path / "in.gguf")
    write_checkpoint(tmp_path / "model", shards=2)
    (tmp_path / "link.gguf").symlink_to("in.gguf")
    os.link(tmp_path / "in.gguf", tmp_path / "hard.gguf")
    os.link(tmp_path / "model" / "tokenizer.model", tmp_path / "vocab.gguf")
    before = {path: digest(path) for path in [*tmp_path.rglob("*.*")] if path.is_file()}
    targets = [(tmp_path / "in.gguf", tmp_path / name) for name in ("in.gguf", "link.gguf", "hard.gguf")]
    targets.append((tmp_path / "link.gguf", tmp_path / "in.gguf"))
    for suffix in ("part", "part.journal", "part.journal.new"):
        os.link(tmp_path / "in.gguf", tmp_path / f"{suffix}.gguf.{suffix}")
        targets.append((tmp_path / "in.gguf", tmp_path / f"{suffix}.gguf"))
    names = ["config.json", "tokenizer_config.json", "tokenizer.model", "model-00001-of-00002.safetensors"]
    names += ["model.safetensors.index.json", "../vocab.gguf"]
    targets += [(tmp_path / "model", tmp_path / "model" / name) for name in names]
    for source, out in targets:
        with pytest.raises(UsageError, match="is an input"):
            run(source, out, "q8_0")
    assert before == {path: digest(path) for path in before}


def test_targets_that_cannot_be_are_refused(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "model")
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "folder").mkdir()
    too_long = "x" * 255
    for target in ("pipe", "folder", "missing/out.gguf", "model/config.json/out.gguf", too_long):
        with pytest.raises(UsageError) as error:
            run(tmp_path / "model", tmp_path / target, "q8_0")
        assert len(str(error.value)) <= 240
    assert sorted(path.name for path in tmp_path.iterdir()) == ["folder", "model", "pipe"]


def test_a_link_as_target_is_followed(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "model")
    (tmp_path / "real.gguf").write_bytes(b"old")
    (tmp_path / "link.gguf").symlink_to("real.gguf")
    run(tmp_path / "model", tmp_path / "link.gguf", "q8_0")
    assert (tmp_path / "link.gguf").is_symlink()
    assert open_gguf(tmp_path / "real.gguf").metadata["general.file_type"] == 7


def test_a_full_disk_is_noticed_before_the_first_byte(tmp_path: Path, monkeypatch: Any) -> None:
    write_checkpoint(tmp_path / "model")
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _path: usage._replace(free=1000))
    with pytest.raises(ResourceError, match="disk"):
        run(tmp_path / "model", tmp_path / "out.gguf", "q8_0")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model"]


@pytest.mark.parametrize("preset", ["q9_k", "", "Q4_K_M", "\x1b[2J"])
def test_unknown_presets_are_refused(tmp_path: Path, preset: str) -> None:
    with pytest.raises(UsageError, match="choose from q2_k") as error:
        run(tmp_path, tmp_path / "out.gguf", preset)
    assert str(error.value).isprintable()


def test_sources_that_are_no_models_are_refused(tmp_path: Path) -> None:
    (tmp_path / "text.gguf").write_text("hello, this is not a model at all")
    (tmp_path / "empty").mkdir()
    (tmp_path / "alone.safetensors").write_bytes(safetensors_bytes({"a": ("F32", np.zeros(4, np.float32))}))
    for name in ("missing.gguf", "text.gguf", "empty", "alone.safetensors"):
        with pytest.raises(LlmqError):
            run(tmp_path / name, tmp_path / "out.gguf", "q8_0")
    assert not (tmp_path / "out.gguf").exists()


def test_in_order_keeps_order_and_bounds_what_runs_ahead() -> None:
    taken = []

    def jobs() -> Any:
        for i in range(50):
            taken.append(i)
            yield i

    with ThreadPoolExecutor(3) as pool:
        results = in_order(pool, lambda i: i * i, jobs(), ahead=4)
        assert next(results) == 0
        assert len(taken) == 5
        assert list(results) == [i * i for i in range(1, 50)]
