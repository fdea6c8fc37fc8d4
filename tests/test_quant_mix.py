"""A mix of formats: what is counted, what a format's damage is, and that bytes go where they help."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from encoded import decoded
from tiny import tiny_gguf

from llmq.errors import FileFormatError, UsageError
from llmq.formats import BF16, F16, F32, IQ4_NL, Q2_K, Q3_K, Q4_0, Q4_K, Q8_0, Format
from llmq.gguf import GGUFWriter, TensorSpec, open_gguf
from llmq.model import load
from quant import evaluate as ev
from quant import mix as module
from quant.budget import Option
from quant.encode import FAST, ROUNDS, encode
from quant.feedback import prepare
from quant.guide import Guide
from quant.mix import NARROW, WIDE, best_mix, budget_of_bits, check_budget, file_bytes, matrix_budget, nearest_preset
from quant.quantize import file_metadata, quantize
from quant.receipt import settings
from quant.recipe import PRESETS, assign, parse_override
from quant.sensitivity import sensitivities
from quant.source import Source, open_source

TEXT = (
    "The sea was calm that night, and the keeper counted the ships as they passed. In the morning a letter came from "
    "the harbour: two boats were missing, and nobody knew whether the storm or the fog had taken them. "
) * 4
NARROW_MODEL = {"dim": 96, "n_heads": 3, "n_kv_heads": 1, "ffn_dim": 160}


def written_again(path: Path, out: Path, metadata: dict[str, Any], factors: dict[str, float]) -> Path:
    """The F32 file with more metadata, and with the tensors multiplied in whose names a key of `factors` is found."""
    with open_gguf(path) as gguf:
        specs = [TensorSpec(name, info.shape, info.format) for name, info in gguf.tensors.items()]
        with GGUFWriter(out, gguf.metadata | metadata, specs) as writer:
            for spec in specs:
                factor = math.prod(value for part, value in factors.items() if part in spec.name)
                writer.write(spec.name, gguf.data(spec.name).view(np.float32) * np.float32(factor))
    return out


def matrices(source: Source) -> dict[str, tuple[int, ...]]:
    return {
        weights.name: weights.shape
        for weights in source.weights
        if len(weights.shape) > 1 and "ffn_gate_inp" not in weights.name
    }


def bits(fmt: Format) -> float:
    """Of a weight."""
    return 8 * fmt.block_bytes / fmt.block_size


def largest_bytes(source: Source) -> int:
    return sum(math.prod(shape) for shape in matrices(source).values()) * 34 // 32


# ---- bytes
@pytest.mark.parametrize("alignment", [8, 32, 4096])
@pytest.mark.parametrize("changes", [{}, {"n_experts": 4}, NARROW_MODEL], ids=["dense", "experts", "narrow"])
def test_sizes_are_those_of_the_file(tmp_path: Path, changes: dict[str, Any], alignment: int) -> None:
    tiny_gguf(tmp_path / "a.gguf", n_layers=1, **changes)
    path = written_again(tmp_path / "a.gguf", tmp_path / "in.gguf", {"general.alignment": alignment}, {})
    source, out = open_source(path), tmp_path / "out.gguf"
    mix = {name: Q8_0 if "attn" in name else F16 for name in matrices(source)}
    formats = dict.fromkeys((weights.name for weights in source.weights), F32) | mix
    list(quantize(path, out, "q4_k_m", mix=mix, remarks=["a remark"], fast=True))
    metadata = file_metadata(source, "q4_k_m", settings(True, (), ["a remark"]), "", mixed=True)
    assert file_bytes(source, formats, metadata) == out.stat().st_size
    with open_gguf(out) as gguf:
        in_file = sum(math.ceil(gguf.tensors[name].n_bytes / alignment) * alignment for name in mix)
    assert matrix_budget(source, out.stat().st_size, metadata) == in_file
    assert matrix_budget(source, 0, metadata) == in_file - out.stat().st_size


@pytest.mark.parametrize(("alignment", "least"), [(32, 130_000), (4096, 175_000)])
def test_a_mix_stays_within_its_budget(tmp_path: Path, alignment: int, least: int) -> None:
    tiny_gguf(tmp_path / "a.gguf", n_layers=1, **NARROW_MODEL)
    path = written_again(tmp_path / "a.gguf", tmp_path / "in.gguf", {"general.alignment": alignment}, {})
    source = open_source(path)
    sensitivity = {name: 1 / (i + 1) for i, name in enumerate(matrices(source))}
    metadata = file_metadata(source, "q4_k_m", "", "")
    for size in range(least, least + 60_000, 17_777):
        mix = best_mix(source, sensitivity, matrix_budget(source, size, metadata))
        list(quantize(path, tmp_path / "out.gguf", "q4_k_m", mix=mix, fast=True))
        assert size * 0.85 < (tmp_path / "out.gguf").stat().st_size <= size


def test_bits_are_of_all_matrices(tmp_path: Path) -> None:
    tiny_gguf(tmp_path / "in.gguf", n_layers=1, n_experts=4)
    source = open_source(tmp_path / "in.gguf")
    n_weights = sum(math.prod(shape) for shape in matrices(source).values())
    assert budget_of_bits(source, 4.5) == n_weights * 9 // 16
    assert budget_of_bits(source, 1) == n_weights // 8
    mix = best_mix(source, dict.fromkeys(matrices(source), 1.0), budget_of_bits(source, 4.5))
    n_bits = sum(math.prod(shape) * bits(mix[name]) for name, shape in matrices(source).items())
    assert 4.4 < n_bits / n_weights <= 4.5


@pytest.mark.parametrize("preset", sorted(PRESETS.keys() - {"iq4_nl", "f16", "bf16", "f32"}))
def test_a_preset_is_nearest_to_itself(tmp_path: Path, preset: str) -> None:
    """Or to another of as many bytes."""
    tiny_gguf(tmp_path / "in.gguf", n_layers=8)
    source = open_source(tmp_path / "in.gguf")
    shapes = {weights.name: weights.shape for weights in source.weights}

    def n_bits(formats: dict[str, Format]) -> float:
        return sum(math.prod(shape) * bits(formats[name]) for name, shape in matrices(source).items())

    formats = assign(PRESETS[preset], shapes)
    mix = {name: formats[name] for name in matrices(source)}
    assert n_bits(assign(PRESETS[nearest_preset(source, mix)], shapes)) == n_bits(formats)


def test_floats_are_nearest_to_the_largest_quantized_preset(tmp_path: Path) -> None:
    tiny_gguf(tmp_path / "in.gguf", n_layers=1)
    source = open_source(tmp_path / "in.gguf")
    assert nearest_preset(source, dict.fromkeys(matrices(source), F32)) == "q8_0"
    assert nearest_preset(source, dict.fromkeys(matrices(source), Q2_K)) == "q2_k"


# ---- damage
def captured(monkeypatch: pytest.MonkeyPatch, *arguments: Any, **options: Any) -> dict[str, list[Option]]:
    """What best_mix hands to the search."""
    seen: dict[str, list[Option]] = {}
    monkeypatch.setattr(module, "allocate", lambda given, _budget: seen.update(given))
    best_mix(*arguments, **options)
    return seen


def error(fmt: Format, rows: np.ndarray, packed: np.ndarray) -> np.ndarray:
    return (decoded(fmt, packed).astype(np.float64) - rows) ** 2


@pytest.mark.parametrize(("fast", "rounds"), [(False, ROUNDS), (True, FAST)])
def test_damage_is_sensitivity_times_error_over_the_probes(
    tmp_path: Path, monkeypatch: Any, fast: bool, rounds: int
) -> None:
    """attn_v has 64 rows, all of which are sampled."""
    weights = tiny_gguf(tmp_path / "in.gguf", n_layers=1)
    source, name = open_source(tmp_path / "in.gguf"), "blk.0.attn_v.weight"
    options = captured(monkeypatch, source, dict.fromkeys(matrices(source), 0.25), 0, fast=fast)
    assert options.keys() == matrices(source).keys()
    rows = weights[name]
    probed = error(Q3_K, rows, encode(Q3_K, rows, rounds=FAST)).sum()
    for option, fmt in zip(options[name], WIDE, strict=True):
        assert option.format is fmt
        assert option.n_bytes == rows.size * bits(fmt) / 8
        expected = 0.25 * error(fmt, rows, encode(fmt, rows, rounds=rounds)).sum() / probed
        assert option.damage == pytest.approx(expected, rel=1e-5)


def test_guides_weigh_the_errors_of_every_expert(tmp_path: Path, monkeypatch: Any) -> None:
    """Of 4 experts, 16 rows each are sampled: every second one."""
    weights = tiny_gguf(tmp_path / "in.gguf", n_layers=1, n_experts=4, ffn_dim=32)
    source, name = open_source(tmp_path / "in.gguf"), "blk.0.ffn_up_exps.weight"
    importance = np.random.default_rng(1).uniform(0.1, 9, (4, 256)).astype(np.float32)
    options = captured(
        monkeypatch,
        source,
        dict.fromkeys(matrices(source), 1.0),
        0,
        guides={name: Guide(importance)}.get,
        overrides=[parse_override("up_exps=q4_k")],
    )
    found = probed = 0.0
    for expert, rows in enumerate(np.ascontiguousarray(weights[name][:, ::2])):
        found += (error(Q4_K, rows, encode(Q4_K, rows, importance[expert])) * importance[expert]).sum()
        probed += (error(Q3_K, rows, encode(Q3_K, rows, rounds=FAST)) * importance[expert]).sum()
    (option,) = options[name]
    assert option.damage == pytest.approx(found / probed, rel=1e-5)


def test_errors_are_those_of_products_held_out(tmp_path: Path, monkeypatch: Any) -> None:
    weights = tiny_gguf(tmp_path / "in.gguf", n_layers=1)
    source, name = open_source(tmp_path / "in.gguf"), "blk.0.attn_k.weight"
    inputs = np.random.default_rng(2).standard_normal((900, 256)) @ np.random.default_rng(3).standard_normal((256, 256))
    moments = (inputs.T @ inputs / 900)[None].astype(np.float32)
    guide = Guide(np.ones((1, 256), np.float32), (prepare(moments),), moments[None])
    sensitivity = dict.fromkeys(matrices(source), 1.0)
    rows = weights[name]
    packed = encode(Q4_K, rows, feedback=guide.feedback[0])
    products = np.square((decoded(Q4_K, packed).astype(np.float64) - rows) @ inputs.T).sum()
    probe = decoded(Q3_K, encode(Q3_K, rows, rounds=FAST)).astype(np.float64)
    expected = products / np.square((probe - rows) @ inputs.T).sum()
    overrides = [parse_override("attn_k=q4_k")]
    (option,) = captured(monkeypatch, source, sensitivity, 0, guides={name: guide}.get, overrides=overrides)[name]
    assert option.damage == pytest.approx(expected, rel=1e-3)
    # A text too short to hold anything out of: what columns weigh is all there is.
    short = Guide(guide.importance, guide.feedback, np.zeros_like(moments)[None])
    (option,) = captured(monkeypatch, source, sensitivity, 0, guides={name: short}.get, overrides=overrides)[name]
    alone = error(Q4_K, rows, encode(Q4_K, rows, guide.importance[0])).sum()
    assert option.damage == pytest.approx(alone / error(Q3_K, rows, encode(Q3_K, rows, rounds=FAST)).sum(), rel=1e-5)


def test_rows_that_are_zero_do_no_damage(tmp_path: Path) -> None:
    tiny_gguf(tmp_path / "a.gguf", n_layers=1)
    path = written_again(tmp_path / "a.gguf", tmp_path / "in.gguf", {}, {"ffn_up": 0.0})
    source = open_source(path)
    mix = best_mix(source, dict.fromkeys(matrices(source), 1.0), largest_bytes(source))
    assert {name for name, fmt in mix.items() if fmt is not Q8_0} == {"blk.0.ffn_up.weight"}
    assert mix["blk.0.ffn_up.weight"] is Q2_K


# ---- choices
@pytest.mark.parametrize(("dim", "n_heads", "formats"), [(96, 6, NARROW), (256, 16, WIDE)])
def test_formats_by_the_width_of_rows(
    tmp_path: Path, monkeypatch: Any, dim: int, n_heads: int, formats: tuple[Format, ...]
) -> None:
    tiny_gguf(tmp_path / "in.gguf", n_layers=1, dim=dim, n_heads=n_heads, n_kv_heads=1, head_dim=16, ffn_dim=dim)
    source = open_source(tmp_path / "in.gguf")
    options = captured(monkeypatch, source, dict.fromkeys(matrices(source), 1.0), 0)
    assert tuple(option.format for option in options["blk.0.ffn_up.weight"]) == formats


def test_overrides_are_kept_and_the_rest_shares_what_is_left(tmp_path: Path) -> None:
    tiny_gguf(tmp_path / "in.gguf", n_layers=1)
    source = open_source(tmp_path / "in.gguf")
    sensitivity = dict.fromkeys(matrices(source), 1.0)
    overrides = [parse_override("ffn_up=q4_0"), parse_override("ffn=bf16")]
    budget = largest_bytes(source)
    mix = best_mix(source, sensitivity, budget, overrides=overrides)
    assert mix["blk.0.ffn_up.weight"] is Q4_0
    assert mix["blk.0.ffn_down.weight"] is mix["blk.0.ffn_gate.weight"] is BF16
    assert set(mix.values()) - {Q4_0, BF16} <= set(WIDE)
    assert sum(math.prod(shape) * bits(mix[name]) / 8 for name, shape in matrices(source).items()) <= budget


@pytest.mark.parametrize(
    ("override", "said"),
    [("experts=q8_0", "'experts' matches no tensor"), ("ffn_down=q4_k", "rows of 160 are no multiple of 256")],
)
def test_overrides_that_cannot_be_are_refused_at_once(tmp_path: Path, override: str, said: str) -> None:
    tiny_gguf(tmp_path / "in.gguf", n_layers=1, **NARROW_MODEL)
    with pytest.raises(UsageError, match=said):
        check_budget(open_source(tmp_path / "in.gguf"), 10**9, [parse_override(override)])


def test_the_least_budget(tmp_path: Path) -> None:
    tiny_gguf(tmp_path / "in.gguf", n_layers=1, **NARROW_MODEL)
    source = open_source(tmp_path / "in.gguf")
    least = sum(math.ceil(math.prod(shape) * 18 / 32 / 32) * 32 for shape in matrices(source).values())
    check_budget(source, least)
    bits = 8 * least / sum(map(math.prod, matrices(source).values()))
    said = f"smallest types take {math.ceil(bits * 100) / 100:.2f} bits a weight, 1,234 bytes more .* a larger budget$"
    with pytest.raises(UsageError, match=said):
        check_budget(source, least - 1234)
    check_budget(source, budget_of_bits(source, math.ceil(bits * 100) / 100))
    mix = best_mix(source, dict.fromkeys(matrices(source), 1.0), least)
    assert set(mix.values()) == {IQ4_NL}


@pytest.mark.parametrize(("override", "spared"), [(".=f32", True), ("ffn_up=q4_0", False)])
def test_a_budget_that_overrides_use_up(tmp_path: Path, override: str, spared: bool) -> None:
    """Q4_0 takes no more than the smallest type of narrow rows does."""
    tiny_gguf(tmp_path / "in.gguf", n_layers=1, **NARROW_MODEL)
    with pytest.raises(UsageError, match="give a larger budget") as error:
        check_budget(open_source(tmp_path / "in.gguf"), 1000, [parse_override(override)])
    assert str(error.value).endswith("or leave out --tensor-type") == spared


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_weights_that_are_not_finite(tmp_path: Path, value: float) -> None:
    tiny_gguf(tmp_path / "a.gguf", n_layers=1)
    path = written_again(tmp_path / "a.gguf", tmp_path / "in.gguf", {}, {"ffn_up": value})
    source = open_source(path)
    with pytest.raises(FileFormatError, match=r"blk\.0\.ffn_up\.weight has weights that are not finite"):
        best_mix(source, dict.fromkeys(matrices(source), 1.0), 10**9)


def test_progress_counts_matrices(tmp_path: Path) -> None:
    tiny_gguf(tmp_path / "in.gguf", n_layers=1)
    source, told = open_source(tmp_path / "in.gguf"), []
    best_mix(source, dict.fromkeys(matrices(source), 1.0), 10**9, tell=lambda *step: told.append(step))
    assert told == [(i, 9) for i in range(1, 10)]


# ---- what comes of it
def test_the_tensor_that_matters_gets_the_bytes(tmp_path: Path) -> None:
    tiny_gguf(tmp_path / "in.gguf", n_layers=2)
    source = open_source(tmp_path / "in.gguf")
    for name in ("blk.0.ffn_up.weight", "blk.1.attn_q.weight", "output.weight"):
        sensitivity = dict.fromkeys(matrices(source), 0.001) | {name: 1.0}
        mix = best_mix(source, sensitivity, budget_of_bits(source, 4.0))
        assert mix[name] is Q8_0
        assert Q8_0 not in [fmt for other, fmt in mix.items() if other != name]


def divergence(path: Path, reference: Path) -> float:
    """Of a file's weights as F32, so that no activations are rounded and fewer kernels compiled."""
    list(quantize(path, path.with_suffix(".f32"), "f32"))
    with load(path.with_suffix(".f32"), n_ctx=256, threads=2) as model, load(reference, n_ctx=256, threads=2) as other:
        pieces = ev.chunks(model.encode(ev.held_text())[:1024], 256, model.tokenizer.bos_id)
        records = ev.compare(ev.log_probs(model, pieces), ev.log_probs(other, pieces), pieces)
        return ev.comparison(np.stack(list(records))).kl.value


def test_a_mix_is_better_than_the_preset_of_its_bytes(tmp_path: Path) -> None:
    """A model whose second layer hardly adds anything, on a text that was not measured on."""
    tiny_gguf(tmp_path / "a.gguf", n_layers=2)
    factors = {"blk.1.attn_output": 0.02, "blk.1.ffn_down": 0.02, "blk.0": 2.0}
    path = written_again(tmp_path / "a.gguf", tmp_path / "in.gguf", {}, factors)
    source = open_source(path)
    formats = assign(PRESETS["q4_k_m"], {weights.name: weights.shape for weights in source.weights})
    metadata = file_metadata(source, "q4_k_m", "", "")
    budget = matrix_budget(source, file_bytes(source, formats, metadata), metadata)
    mix = best_mix(source, sensitivities(path, TEXT, threads=2), budget)
    for role in ("attn_q", "attn_v", "ffn_up", "ffn_down"):
        first, second = (bits(mix[f"blk.{i}.{role}.weight"]) for i in (0, 1))
        assert first > second + 1, role
    for out, chosen in (tmp_path / "preset.gguf", None), (tmp_path / "mix.gguf", mix):
        list(quantize(path, out, "q4_k_m", mix=chosen))
    assert (tmp_path / "mix.gguf").stat().st_size <= (tmp_path / "preset.gguf").stat().st_size
    assert divergence(tmp_path / "mix.gguf", path) < 0.6 * divergence(tmp_path / "preset.gguf", path)
