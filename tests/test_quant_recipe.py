"""Recipes: file sizes that llama.cpp's own files have, and single rules worked out by hand."""

import math
import re

import pytest

from llmq.errors import UsageError
from llmq.formats import (
    BF16,
    F16,
    F32,
    IQ4_NL,
    IQ4_XS,
    Q2_K,
    Q3_K,
    Q4_0,
    Q4_K,
    Q5_0,
    Q5_1,
    Q5_K,
    Q6_K,
    Q8_0,
    Format,
    row_bytes,
)
from quant.recipe import PRESETS, Shape, assign, parse_override

# layers, width, heads * head_dim, kv heads * head_dim, ffn, vocabulary, experts
MODELS = {
    "7B": (32, 4096, 4096, 1024, 14336, 32000, 0),
    "Nemo": (40, 5120, 4096, 1024, 14336, 131072, 0),
    "8x7B": (32, 4096, 4096, 1024, 14336, 32000, 8),
    "8x22B": (56, 6144, 6144, 1024, 16384, 32768, 8),
    "Large2": (88, 12288, 12288, 1024, 28672, 32768, 0),
}

# Gigabytes of weight data in the files that llama-quantize makes, IQ4_XS with an importance matrix.
PUBLISHED_TYPES = ("q2_k", "q3_k_m", "iq4_xs", "q4_k_s", "q4_k_m", "q5_k_s", "q5_k_m", "q6_k", "q8_0")
PUBLISHED = {
    "7B": (2.719, 3.518, 3.907, 4.140, 4.368, 4.997, 5.131, 5.941, 7.695),
    "Nemo": (4.783, 6.075, 6.735, 7.112, 7.469, 8.511, 8.720, 10.048, 13.014),
    "8x7B": (17.310, 22.546, 25.080, 26.745, 28.448, 32.231, 33.229, 38.380, 49.626),
    "8x22B": (52.113, 67.800, 75.485, 80.489, 85.598, 96.986, 99.980, 115.542, 149.430),
    "Large2": (45.196, 59.102, 65.434, 69.570, 73.219, 84.355, 86.488, 100.585, 130.280),
}

# llama-quantize --dry-run on small models: how many layers of attn_v, attn_output and ffn_down have which type, the
# first layer's before others. The models: 32 layers with four query heads to a KV head, 17 and 80 layers with two, and
# 16 layers with four and eight experts.
SMALL = {
    "32": (32, 256, 256, 64, 256, 608, 0),
    "17": (17, 256, 256, 128, 256, 608, 0),
    "80": (80, 256, 256, 128, 256, 608, 0),
    "8 experts": (16, 256, 256, 64, 256, 608, 8),
}
MIXES = {
    "q2_k": {
        "32": ("32 Q4_K", "32 Q3_K", "32 Q3_K"),
        "17": ("17 Q3_K", "17 Q3_K", "17 Q3_K"),
        "80": ("80 Q5_K", "80 Q3_K", "80 Q3_K"),
        "8 experts": ("16 Q8_0", "16 Q5_K", "16 Q3_K"),
    },
    "q3_k_s": {
        "32": ("32 Q3_K", "32 Q3_K", "32 Q3_K"),
        "17": ("17 Q3_K", "17 Q3_K", "17 Q3_K"),
        "80": ("80 Q5_K", "80 Q3_K", "80 Q3_K"),
        "8 experts": ("16 Q8_0", "16 Q5_K", "16 Q3_K"),
    },
    "q3_k_m": {
        "32": ("2 Q5_K 30 Q4_K", "32 Q4_K", "2 Q5_K 30 Q4_K"),
        "17": ("2 Q5_K 15 Q4_K", "17 Q4_K", "1 Q5_K 16 Q4_K"),
        "80": ("80 Q5_K", "80 Q4_K", "5 Q5_K 75 Q4_K"),
        "8 experts": ("16 Q8_0", "16 Q5_K", "1 Q5_K 15 Q4_K"),
    },
    "q3_k_l": {
        "32": ("32 Q5_K", "32 Q5_K", "32 Q5_K"),
        "17": ("17 Q5_K", "17 Q5_K", "17 Q5_K"),
        "80": ("80 Q5_K", "80 Q5_K", "80 Q5_K"),
        "8 experts": ("16 Q8_0", "16 Q3_K", "16 Q5_K"),
    },
    "iq4_xs": {
        "32": ("32 Q5_K", "32 IQ4_XS", "4 Q5_K 28 IQ4_XS"),
        "17": ("17 IQ4_XS", "17 IQ4_XS", "2 Q5_K 15 IQ4_XS"),
        "80": ("80 IQ4_XS", "80 IQ4_XS", "10 Q5_K 70 IQ4_XS"),
        "8 experts": ("16 Q8_0", "16 Q5_K", "2 Q5_K 14 IQ4_XS"),
    },
    "iq4_nl": {
        "32": ("32 Q5_K", "32 IQ4_NL", "4 Q5_K 28 IQ4_NL"),
        "17": ("17 IQ4_NL", "17 IQ4_NL", "2 Q5_K 15 IQ4_NL"),
        "80": ("80 IQ4_NL", "80 IQ4_NL", "10 Q5_K 70 IQ4_NL"),
        "8 experts": ("16 Q8_0", "16 Q5_K", "2 Q5_K 14 IQ4_NL"),
    },
    "q4_k_s": {
        "32": ("4 Q5_K 28 Q4_K", "32 Q4_K", "4 Q5_K 28 Q4_K"),
        "17": ("4 Q5_K 13 Q4_K", "17 Q4_K", "2 Q5_K 15 Q4_K"),
        "80": ("80 Q5_K", "80 Q4_K", "10 Q5_K 70 Q4_K"),
        "8 experts": ("16 Q8_0", "16 Q5_K", "2 Q5_K 14 Q4_K"),
    },
    "q4_k_m": {
        "32": ("16 Q6_K 16 Q4_K", "32 Q4_K", "16 Q6_K 16 Q4_K"),
        "17": ("9 Q6_K 8 Q4_K", "17 Q4_K", "9 Q6_K 8 Q4_K"),
        "80": ("40 Q6_K 40 Q5_K", "80 Q4_K", "40 Q6_K 40 Q4_K"),
        "8 experts": ("16 Q8_0", "16 Q5_K", "8 Q6_K 8 Q4_K"),
    },
    "q5_k_m": {
        "32": ("16 Q6_K 16 Q5_K", "32 Q5_K", "16 Q6_K 16 Q5_K"),
        "17": ("9 Q6_K 8 Q5_K", "17 Q5_K", "9 Q6_K 8 Q5_K"),
        "80": ("40 Q6_K 40 Q5_K", "80 Q5_K", "40 Q6_K 40 Q5_K"),
        "8 experts": ("16 Q8_0", "16 Q5_K", "8 Q6_K 8 Q5_K"),
    },
}


def shapes(layers: int, dim: int, q: int, kv: int, ffn: int, vocab: int, experts: int) -> dict[str, Shape]:
    out: dict[str, Shape] = {"token_embd.weight": (vocab, dim), "output_norm.weight": (dim,)}
    out["output.weight"] = (vocab, dim)
    stack: Shape = (experts,) if experts else ()
    suffix = "_exps" if experts else ""
    for i in range(layers):
        b = f"blk.{i}."
        out |= {b + "attn_norm.weight": (dim,), b + "ffn_norm.weight": (dim,)}
        out |= {b + "attn_q.weight": (q, dim), b + "attn_k.weight": (kv, dim), b + "attn_v.weight": (kv, dim)}
        out |= {b + "attn_output.weight": (dim, q), f"{b}ffn_down{suffix}.weight": (*stack, dim, ffn)}
        out |= {f"{b}ffn_{role}{suffix}.weight": (*stack, ffn, dim) for role in ("gate", "up")}
        if experts:
            out[b + "ffn_gate_inp.weight"] = (experts, dim)
    return out


def n_bytes(fmt: Format, shape: Shape) -> int:
    return math.prod(shape[:-1]) * row_bytes(fmt, shape[-1])


@pytest.mark.parametrize("model", MODELS)
def test_sizes_are_those_of_published_files(model: str) -> None:
    table = shapes(*MODELS[model])
    for preset, gigabytes in zip(PUBLISHED_TYPES, PUBLISHED[model], strict=True):
        formats = assign(PRESETS[preset], table, calibrated=True)
        total = sum(n_bytes(formats[name], shape) for name, shape in table.items())
        assert total / 1e9 == pytest.approx(gigabytes, abs=0.0006), preset


@pytest.mark.parametrize("preset", MIXES)
def test_mixes_are_those_of_llama_quantize(preset: str) -> None:
    for model, expected in MIXES[preset].items():
        formats = assign(PRESETS[preset], shapes(*SMALL[model]))
        for role, mix in zip(("attn_v", "attn_output", "ffn_down"), expected, strict=True):
            names = [fmt.name for name, fmt in formats.items() if role in name]
            assert " ".join(f"{names.count(name)} {name}" for name in dict.fromkeys(names)) == mix, (model, role)


def layers_of(formats: dict[str, Format], role: str, fmt: Format) -> list[int]:
    return [int(name.split(".")[1]) for name, f in formats.items() if f"{role}.weight" in name and f is fmt]


def test_better_layers_of_a_32_layer_model() -> None:
    table = shapes(*MODELS["7B"])
    better = [0, 1, 2, 3, 6, 9, 12, 15, 18, 21, 24, 27, 28, 29, 30, 31]
    medium = assign(PRESETS["q4_k_m"], table)
    assert layers_of(medium, "ffn_down", Q6_K) == layers_of(medium, "attn_v", Q6_K) == better
    small = assign(PRESETS["q4_k_s"], table)
    assert layers_of(small, "ffn_down", Q5_K) == layers_of(small, "attn_v", Q5_K) == [0, 1, 2, 3]
    assert {fmt for name, fmt in medium.items() if "attn_q" in name or "ffn_up" in name} == {Q4_K}


def test_early_layers_of_small_mixes() -> None:
    table = shapes(*MODELS["7B"])
    q3 = assign(PRESETS["q3_k_m"], table)
    assert layers_of(q3, "ffn_down", Q5_K) == layers_of(q3, "attn_v", Q5_K) == [0, 1]
    iq4 = assign(PRESETS["iq4_xs"], table)
    assert layers_of(iq4, "ffn_down", Q5_K) == [0, 1, 2, 3]
    assert layers_of(assign(PRESETS["iq4_xs"], table, calibrated=True), "ffn_down", Q5_K) == []
    assert {fmt for name, fmt in iq4.items() if "attn_q" in name or "token_embd" in name} == {IQ4_XS}


def test_calibration_changes_nothing_else() -> None:
    table = shapes(*MODELS["7B"])
    for preset in PRESETS.values():
        rest = [name for name in table if preset.base not in (IQ4_XS, IQ4_NL) or "ffn_down" not in name]
        with_, without = assign(preset, table, calibrated=True), assign(preset, table)
        assert [with_[name] for name in rest] == [without[name] for name in rest]


def test_eight_experts_keep_small_attention_tensors_fine() -> None:
    formats = assign(PRESETS["q4_k_m"], shapes(8, 256, 256, 64, 512, 1000, 8))
    assert formats["blk.3.attn_v.weight"] is formats["blk.3.attn_k.weight"] is Q8_0
    assert formats["blk.3.attn_output.weight"] is Q5_K
    assert formats["blk.3.ffn_gate_inp.weight"] is formats["blk.3.attn_norm.weight"] is F32
    assert formats["blk.0.ffn_down_exps.weight"] is Q6_K
    assert formats["blk.1.ffn_down_exps.weight"] is Q4_K
    assert assign(PRESETS["q6_k"], shapes(8, 256, 256, 64, 512, 1000, 8))["blk.3.attn_output.weight"] is Q6_K
    four = assign(PRESETS["q4_k_m"], shapes(8, 256, 256, 64, 512, 1000, 4))
    assert four["blk.3.attn_k.weight"] is four["blk.3.attn_output.weight"] is Q4_K


def test_eighty_grouped_layers_spare_attn_v() -> None:
    formats = assign(PRESETS["q4_k_m"], shapes(80, 256, 256, 64, 512, 1000, 0))
    assert {f for name, f in formats.items() if "attn_v" in name} == {Q5_K, Q6_K}
    ungrouped = assign(PRESETS["q4_k_m"], shapes(80, 256, 256, 256, 512, 1000, 0))
    assert {f for name, f in ungrouped.items() if "attn_v" in name} == {Q4_K, Q6_K}


def test_tied_embeddings_are_treated_as_the_output() -> None:
    table = shapes(2, 256, 256, 64, 512, 1000, 0)
    assert assign(PRESETS["q4_k_m"], table)["token_embd.weight"] is Q4_K
    del table["output.weight"]
    assert assign(PRESETS["q4_k_m"], table)["token_embd.weight"] is Q6_K
    assert assign(PRESETS["q8_0"], table)["token_embd.weight"] is Q8_0


FALLBACKS = [
    ("q2_k", Q4_0), ("q3_k_m", Q4_0), ("iq4_xs", IQ4_NL), ("iq4_nl", IQ4_NL),
    ("q4_k_m", Q5_0), ("q5_k_m", Q5_1), ("q6_k", Q8_0), ("q8_0", Q8_0),
]  # fmt: skip


@pytest.mark.parametrize(("preset", "fmt"), FALLBACKS)
def test_rows_of_32s_fall_back(preset: str, fmt: Format) -> None:
    formats = assign(PRESETS[preset], shapes(2, 96, 96, 32, 160, 1000, 0))
    assert formats["blk.0.attn_q.weight"] is formats["token_embd.weight"] is fmt
    assert formats["output.weight"] is Q8_0


@pytest.mark.parametrize("preset", [preset for preset in PRESETS if preset not in ("bf16", "f32")])
def test_rows_of_anything_fall_back_to_f16(preset: str) -> None:
    formats = assign(PRESETS[preset], shapes(2, 80, 80, 16, 100, 1000, 0))
    assert {f for name, f in formats.items() if "norm" not in name} == {F16}


@pytest.mark.parametrize(("preset", "fmt"), [("f16", F16), ("bf16", BF16), ("f32", F32)])
def test_plain_presets_have_one_format(preset: str, fmt: Format) -> None:
    formats = assign(PRESETS[preset], shapes(4, 256, 256, 64, 512, 1000, 8))
    assert {f for name, f in formats.items() if "norm" not in name and "gate_inp" not in name} == {fmt}


def test_file_types_are_those_of_the_format() -> None:
    numbers = {
        "f32": 0, "f16": 1, "q8_0": 7, "q2_k": 10, "q3_k_s": 11, "q3_k_m": 12, "q3_k_l": 13, "q4_k_s": 14, "q4_k_m": 15,
        "q5_k_s": 16, "q5_k_m": 17, "q6_k": 18, "iq4_nl": 25, "iq4_xs": 30, "bf16": 32,
    }  # fmt: skip
    assert {preset.name: preset.file_type for preset in PRESETS.values()} == numbers


@pytest.mark.parametrize("preset", ["q4_k_m", "f16"])
def test_the_first_override_that_matches_decides(preset: str) -> None:
    table = shapes(8, 256, 256, 64, 512, 1000, 0)
    texts = (r"blk\.[01]\.attn=Q8_0", "attn_v=iq4_xs", "attn=q5_k", r"^output=f16", "embd=Q3_k")
    formats = assign(PRESETS[preset], table, overrides=[parse_override(text) for text in texts])
    assert formats["blk.1.attn_v.weight"] is formats["blk.0.attn_q.weight"] is Q8_0
    assert formats["blk.2.attn_v.weight"] is IQ4_XS
    assert formats["blk.2.attn_output.weight"] is Q5_K
    assert formats["output.weight"] is F16
    assert formats["token_embd.weight"] is Q3_K
    assert formats["blk.7.attn_norm.weight"] is F32
    plain = assign(PRESETS[preset], table)
    assert {name for name in table if "ffn" in name and plain[name] is not formats[name]} == set()


def test_overrides_leave_norms_and_routers() -> None:
    table = shapes(4, 256, 256, 64, 512, 1000, 8)
    formats = assign(PRESETS["q4_k_m"], table, overrides=[parse_override(".*=q2_k")])
    kept = {name for name, fmt in formats.items() if fmt is F32}
    assert kept == {name for name in table if "norm" in name or "gate_inp" in name}
    assert set(formats.values()) == {F32, Q2_K}


@pytest.mark.parametrize("pattern", ["attn_x", "norm", "ffn_gate_inp", "^attn_v"])
def test_overrides_for_nothing_are_refused(pattern: str) -> None:
    overrides = [parse_override(".*=q6_k"), parse_override(f"{pattern}=q8_0")]
    with pytest.raises(UsageError, match=rf"'{re.escape(pattern)}' matches no tensor that is quantized"):
        assign(PRESETS["q4_k_m"], shapes(2, 256, 256, 64, 512, 1000, 8), overrides=overrides)


def test_overrides_that_do_not_fit_are_refused() -> None:
    table = shapes(2, 96, 96, 32, 160, 1000, 0)
    assert assign(PRESETS["q4_k_m"], table, overrides=[parse_override("attn_v=q4_0")])["blk.0.attn_v.weight"] is Q4_0
    with pytest.raises(UsageError, match=r"'blk.0.attn_v.weight' cannot be Q4_K: its rows of 96 .* 256"):
        assign(PRESETS["q4_k_m"], table, overrides=[parse_override("attn_v=q4_k")])


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("attn_v", "give REGEX=TYPE"),
        ("=q8_0", "give REGEX=TYPE"),
        ("", "give REGEX=TYPE"),
        ("attn_v=", "no tensor type ''"),
        ("attn_v=q9_k", "no tensor type 'q9_k'; choose from f32, f16"),
        ("attn_v=q4_k_m", "no tensor type 'q4_k_m'"),
        ("attn_v=\x1b[2J", "no tensor type"),
        ("attn_(v=q8_0", r"'attn_\(v' is no regular expression: missing \)"),
        ("a{99999999999999}=q8_0", "is no regular expression"),
        ("(" * 30000 + "=q8_0", "is no regular expression"),
    ],
    ids=range(10),
)
def test_overrides_that_cannot_be_read_are_refused(text: str, said: str) -> None:
    with pytest.raises(UsageError, match=said) as error:
        parse_override(text)
    assert str(error.value).isprintable()
    assert len(str(error.value)) <= 240


def test_an_expression_may_contain_equals_signs() -> None:
    pattern, fmt = parse_override("(?=blk).*attn_v=Bf16")
    assert pattern.pattern == "(?=blk).*attn_v"
    assert fmt is BF16
