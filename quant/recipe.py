"""Which format each tensor gets: llama.cpp's layer-wise mixes, from nothing but names and shapes.

Roles and conditions: llama.cpp, `llama-quant.cpp`. A preset has a base format and rules for the tensors that hurt
most: attn_v, ffn_down, the output, and in eight-expert models the small attention tensors.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from llmq.errors import UsageError
from llmq.formats import (
    BF16,
    F16,
    F32,
    FORMATS,
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
)
from llmq.gguf import quoted

Shape = tuple[int, ...]
Override = tuple[re.Pattern[str], Format]


@dataclass(frozen=True, slots=True)
class Model:
    """What the rules ask of a model; `queries_per_kv` is the number of query heads to a key and value head."""

    n_layers: int
    n_experts: int
    queries_per_kv: int
    tied: bool
    calibrated: bool


Condition = Callable[[int, Model], bool]


def everywhere(_layer: int, _model: Model) -> bool:
    return True


def first(n: int) -> Condition:
    return lambda layer, _model: layer < n


def first_part(parts: int) -> Condition:
    return lambda layer, model: layer < model.n_layers // parts


def first_eighth_uncalibrated(layer: int, model: Model) -> bool:
    return not model.calibrated and layer < model.n_layers // 8


def early_late_and_thirds(layer: int, model: Model) -> bool:
    """The first and last eighth of the layers, and every third one between."""
    eighth = model.n_layers // 8
    return layer < eighth or layer >= 7 * model.n_layers // 8 or (layer - eighth) % 3 == 2


def four_queries_per_kv(_layer: int, model: Model) -> bool:
    return model.queries_per_kv >= 4


def eight_experts(_layer: int, model: Model) -> bool:
    return model.n_experts == 8


@dataclass(frozen=True, slots=True)
class Rule:
    """Tensors of a role get `format` in the layers and models where the condition holds."""

    role: str
    format: Format
    where: Condition = everywhere


@dataclass(frozen=True, slots=True)
class Preset:
    """`file_type` is the number in general.file_type; the first rule that applies wins, and `base` is for the rest."""

    name: str
    file_type: int
    base: Format
    rules: tuple[Rule, ...] = ()


SMALL_OF_EIGHT = (Rule("attn_v", Q8_0, eight_experts), Rule("attn_k", Q8_0, eight_experts))
OUTPUT_OF_EIGHT = Rule("attn_output", Q5_K, eight_experts)

Q2_MIX = (
    Rule("attn_v", Q4_K, four_queries_per_kv), Rule("attn_v", Q3_K), Rule("ffn_down", Q3_K),
    OUTPUT_OF_EIGHT, Rule("attn_output", Q3_K),
)  # fmt: skip
Q3_MEDIUM = (
    Rule("attn_v", Q5_K, first(2)), Rule("attn_v", Q4_K),
    Rule("ffn_down", Q5_K, first_part(16)), Rule("ffn_down", Q4_K),
    OUTPUT_OF_EIGHT, Rule("attn_output", Q4_K),
)  # fmt: skip
Q3_LARGE = (
    Rule("attn_v", Q5_K), Rule("ffn_down", Q5_K),
    Rule("attn_output", Q3_K, eight_experts), Rule("attn_output", Q5_K),
)  # fmt: skip
IQ4_MIX = (
    Rule("attn_v", Q5_K, four_queries_per_kv), Rule("ffn_down", Q5_K, first_eighth_uncalibrated), OUTPUT_OF_EIGHT,
)  # fmt: skip
Q4_SMALL = (Rule("attn_v", Q5_K, first(4)), Rule("ffn_down", Q5_K, first_part(8)), OUTPUT_OF_EIGHT)
MEDIUM = (Rule("attn_v", Q6_K, early_late_and_thirds), Rule("ffn_down", Q6_K, early_late_and_thirds))

PRESETS = {
    preset.name: preset
    for preset in (
        Preset("q2_k", 10, Q2_K, Q2_MIX),
        Preset("q3_k_s", 11, Q3_K, (OUTPUT_OF_EIGHT,)),
        Preset("q3_k_m", 12, Q3_K, Q3_MEDIUM),
        Preset("q3_k_l", 13, Q3_K, Q3_LARGE),
        Preset("iq4_xs", 30, IQ4_XS, IQ4_MIX),
        Preset("iq4_nl", 25, IQ4_NL, IQ4_MIX),
        Preset("q4_k_s", 14, Q4_K, Q4_SMALL),
        Preset("q4_k_m", 15, Q4_K, (*MEDIUM, OUTPUT_OF_EIGHT)),
        Preset("q5_k_s", 16, Q5_K),
        Preset("q5_k_m", 17, Q5_K, MEDIUM),
        Preset("q6_k", 18, Q6_K),
        Preset("q8_0", 7, Q8_0),
        Preset("f16", 1, F16),
        Preset("bf16", 32, BF16),
        Preset("f32", 0, F32),
    )
}

# Where rows are not whole blocks: the next format, then F16.
FALLBACKS = {Q2_K: Q4_0, Q3_K: Q4_0, IQ4_XS: IQ4_NL, Q4_K: Q5_0, Q5_K: Q5_1, Q6_K: Q8_0}

# Ends of the names of norms and routers, which stay as they are.
UNTYPED = ("_norm.weight", "ffn_gate_inp.weight")

_LAYER = re.compile(r"blk\.(\d+)\.(attn_v|attn_k|attn_output|ffn_down|ffn_down_exps)\.weight")
_TYPES = {fmt.name.lower(): fmt for fmt in FORMATS.values()}


def parse_override(text: str) -> Override:
    """REGEX=TYPE, as in `ffn_down=q6_k`; the type in any case. Raises UsageError."""
    pattern, equals, name = text.rpartition("=")
    if not (pattern and equals):
        raise UsageError(f"{quoted(text)} is no tensor type; give REGEX=TYPE, as in ffn_down=q6_k")
    if name.lower() not in _TYPES:
        raise UsageError(f"there is no tensor type {quoted(name)}; choose from {', '.join(_TYPES)}")
    try:
        return re.compile(pattern), _TYPES[name.lower()]
    except (re.error, OverflowError, RecursionError) as error:
        raise UsageError(f"{quoted(pattern)} is no regular expression: {error}; correct it or escape it") from error


def assign(
    preset: Preset,
    shapes: Mapping[str, Shape],
    *,
    overrides: Sequence[Override] = (),
    calibrated: bool = False,
) -> dict[str, Format]:
    """The format of every tensor, by name; shapes have rows first, and experts first of all.

    `calibrated` says that the weights' importance is known. Of `overrides` the first whose expression is found in a
    name decides; norms and the experts' router stay F32 all the same.

    Raises UsageError where an override is for no tensor that is quantized, or its format does not fit one's rows.
    """
    quantized = [name for name, shape in shapes.items() if takes_type(name, shape)]
    for pattern, _format in overrides:
        if not any(pattern.search(name) for name in quantized):
            raise UsageError(
                f"{quoted(pattern.pattern)} matches no tensor that is quantized; correct it or leave it out"
            )
    model = _describe(shapes, calibrated)
    formats = dict.fromkeys(shapes, F32)
    for name in quantized:
        chosen = override_of(name, overrides)
        formats[name] = _checked(name, shapes[name], chosen) if chosen else _mixed(preset, name, shapes[name], model)
    return formats


def override_of(name: str, overrides: Sequence[Override]) -> Format | None:
    return next((fmt for pattern, fmt in overrides if pattern.search(name)), None)


def takes_type(name: str, shape: Shape) -> bool:
    """Whether a tensor is quantized at all; norms and routers are not."""
    return len(shape) > 1 and not name.endswith(UNTYPED)


def _describe(shapes: Mapping[str, Shape], calibrated: bool) -> Model:
    n_layers = sum(name.endswith(".attn_v.weight") for name in shapes)
    experts = shapes.get("blk.0.ffn_down_exps.weight", (0,))
    queries_per_kv = shapes["blk.0.attn_q.weight"][0] // shapes["blk.0.attn_v.weight"][0]
    return Model(n_layers, experts[0], queries_per_kv, "output.weight" not in shapes, calibrated)


def _checked(name: str, shape: Shape, fmt: Format) -> Format:
    if shape[-1] % fmt.block_size:
        raise UsageError(
            f"{quoted(name)} cannot be {fmt.name}: its rows of {shape[-1]} are no multiple of {fmt.block_size}; "
            "give it another type"
        )
    return fmt


def _mixed(preset: Preset, name: str, shape: Shape, model: Model) -> Format:
    if preset.base.block_size == 1:
        return preset.base
    fmt, n_cols = _wanted(preset, name, shape, model), shape[-1]
    if n_cols % fmt.block_size and fmt in FALLBACKS:
        fmt = FALLBACKS[fmt]
    return F16 if n_cols % fmt.block_size else fmt


def _wanted(preset: Preset, name: str, shape: Shape, model: Model) -> Format:
    if name == "output.weight" or (model.tied and name == "token_embd.weight"):
        whole = shape[-1] % preset.base.block_size == 0
        return Q6_K if whole and preset.base is not Q8_0 else Q8_0
    match = _LAYER.fullmatch(name)
    if match is None:
        return preset.base
    layer, role = int(match[1]), match[2].removesuffix("_exps")
    rules = (rule for rule in (*SMALL_OF_EIGHT, *preset.rules) if rule.role == role and rule.where(layer, model))
    fmt = next((rule.format for rule in rules), preset.base)
    # llama.cpp knows Llama 2 70B by its depth and grouped heads, and spares its small attn_v.
    is_70b = model.n_layers == 80 and model.queries_per_kv > 1
    return Q5_K if role == "attn_v" and is_70b and fmt in (Q3_K, Q4_K) else fmt
