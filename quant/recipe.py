"""Which format each tensor gets: llama.cpp's layer-wise mixes, from nothing but names and shapes.

Roles and conditions: llama.cpp, `llama-quant.cpp`. A preset has a base format and exceptions for the tensors that hurt
most: attn_v, ffn_down, the output, and in eight-expert models the small attention tensors.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from llmq.formats import BF16, F16, F32, Q4_K, Q5_0, Q5_1, Q5_K, Q6_K, Q8_0, Format

Shape = tuple[int, ...]
Rule = Callable[[int, int], bool]


def early_late_and_thirds(layer: int, n_layers: int) -> bool:
    """The first and last eighth of the layers, and every third one between."""
    eighth = n_layers // 8
    return layer < eighth or layer >= 7 * n_layers // 8 or (layer - eighth) % 3 == 2


def first_four(layer: int, n_layers: int) -> bool:  # noqa: ARG001
    return layer < 4


def first_eighth(layer: int, n_layers: int) -> bool:
    return layer < n_layers // 8


@dataclass(frozen=True, slots=True)
class Preset:
    """`file_type` is the number in general.file_type; `exceptions` gives the layers of a role another format."""

    name: str
    file_type: int
    base: Format
    exceptions: Mapping[str, tuple[Rule, Format]] = field(default_factory=dict)
    moe_attn_output: Format | None = None


PRESETS = {
    preset.name: preset
    for preset in (
        Preset("q4_k_m", 15, Q4_K, dict.fromkeys(("attn_v", "ffn_down"), (early_late_and_thirds, Q6_K)), Q5_K),
        Preset("q4_k_s", 14, Q4_K, {"attn_v": (first_four, Q5_K), "ffn_down": (first_eighth, Q5_K)}, Q5_K),
        Preset("q5_k_m", 17, Q5_K, dict.fromkeys(("attn_v", "ffn_down"), (early_late_and_thirds, Q6_K))),
        Preset("q6_k", 18, Q6_K),
        Preset("q8_0", 7, Q8_0),
        Preset("f16", 1, F16),
        Preset("bf16", 32, BF16),
        Preset("f32", 0, F32),
    )
}

# Where rows are not whole blocks: the next format, then F16.
FALLBACKS = {Q4_K: Q5_0, Q5_K: Q5_1, Q6_K: Q8_0}

_LAYER = re.compile(r"blk\.(\d+)\.(attn_v|attn_k|attn_output|ffn_down|ffn_down_exps)\.weight")


@dataclass(frozen=True, slots=True)
class _Model:
    """What the rules ask of a model."""

    n_layers: int
    n_experts: int
    is_70b: bool
    tied: bool


def assign(preset: Preset, shapes: Mapping[str, Shape]) -> dict[str, Format]:
    """The format of every tensor, by name; shapes have rows first, and experts first of all."""
    model = _describe(shapes)
    return {name: _format(preset, name, shape, model) for name, shape in shapes.items()}


def _describe(shapes: Mapping[str, Shape]) -> _Model:
    n_layers = sum(name.endswith(".attn_v.weight") for name in shapes)
    experts = shapes.get("blk.0.ffn_down_exps.weight", (0,))
    grouped = shapes.get("blk.0.attn_q.weight", (0,))[0] != shapes.get("blk.0.attn_v.weight", (0,))[0]
    # llama.cpp knows Llama 2 70B by its depth and grouped heads, and spares its small attn_v.
    is_70b = n_layers == 80 and grouped
    return _Model(n_layers, experts[0], is_70b, "output.weight" not in shapes)


def _format(preset: Preset, name: str, shape: Shape, model: _Model) -> Format:
    if len(shape) == 1 or name.endswith(("_norm.weight", "ffn_gate_inp.weight")):
        return F32
    if preset.base.block_size == 1:
        return preset.base
    return _fitting(_wanted(preset, name, shape, model), shape[-1])


def _wanted(preset: Preset, name: str, shape: Shape, model: _Model) -> Format:
    if name == "output.weight" or (model.tied and name == "token_embd.weight"):
        whole = shape[-1] % preset.base.block_size == 0
        return Q6_K if whole and preset.base is not Q8_0 else Q8_0
    match = _LAYER.fullmatch(name)
    if match is None:
        return preset.base
    layer, role = int(match[1]), match[2].removesuffix("_exps")
    if model.n_experts == 8:
        if role in ("attn_v", "attn_k"):
            return Q8_0
        if role == "attn_output" and preset.moe_attn_output:
            return preset.moe_attn_output
    fmt = preset.base
    if role in preset.exceptions:
        applies, other = preset.exceptions[role]
        fmt = other if applies(layer, model.n_layers) else fmt
    return Q5_K if role == "attn_v" and model.is_70b and fmt is Q4_K else fmt


def _fitting(fmt: Format, n_cols: int) -> Format:
    if n_cols % fmt.block_size and fmt in FALLBACKS:
        fmt = FALLBACKS[fmt]
    return F16 if n_cols % fmt.block_size else fmt
