"""A byte budget for llmq quantize: --optimize, --size and --bpw."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cli.screen import note, size, status
from llmq.errors import UsageError

if TYPE_CHECKING:
    from cli.guides import Knowledge, Words
    from llmq.formats import Format
    from quant.recipe import Override
    from quant.source import Source

Optimize = Annotated[
    bool,
    typer.Option("--optimize", help="The bytes of --type, spent where the model is sensitive; takes minutes."),
]
Size = Annotated[
    str | None,
    typer.Option("--size", metavar="SIZE", help="The best mix of types for a file of at most SIZE, as in 4.1GB."),
]
Bpw = Annotated[
    float | None,
    typer.Option("--bpw", metavar="BITS", help="The best mix of types for so many bits a weight, as in 4.5."),
]

LEAST_BITS, MOST_BITS = 1.0, 32.0


@dataclass(frozen=True, slots=True)
class Budget:
    """`n_bytes` of the file, or `bits` a weight, or else what `preset` takes; `label` ends a file's name."""

    preset: str
    n_bytes: int | None
    bits: float | None
    label: str

    @property
    def goal(self) -> str:
        """In words."""
        if self.bits is not None:
            return f"{self.bits:g} bits a weight"
        return f"the bytes of {self.preset}" if self.n_bytes is None else f"{self.n_bytes} bytes"


@dataclass(frozen=True, slots=True)
class Chosen:
    """The formats of all matrices, and the preset that the file is named after."""

    mix: "dict[str, Format]"
    preset: str


def checked_budget(preset: str, optimize: bool, file_size: str | None, bits: float | None) -> Budget | None:
    """What is asked for; raises UsageError where it contradicts itself."""
    from llmq.formats import Q8_0
    from quant.budget import parse_size
    from quant.recipe import PRESETS

    if sum((optimize, file_size is not None, bits is not None)) > 1:
        raise UsageError("--optimize, --size and --bpw are three budgets; give one of them")
    if file_size is not None:
        return Budget(preset, parse_size(file_size), None, re.sub(r"\s", "", file_size).lower())
    if bits is not None:
        if not LEAST_BITS <= bits <= MOST_BITS:
            raise UsageError(f"--bpw takes {LEAST_BITS:g} to {MOST_BITS:g} bits a weight; 4.5 is usual")
        return Budget(preset, None, bits, f"{bits:g}bpw")
    base = PRESETS[preset].base
    if optimize and (base is Q8_0 or base.block_size == 1):
        raise UsageError(f"--optimize mixes types of up to 8 bits, so there is nothing to choose for {preset}; drop it")
    return Budget(preset, None, None, f"{preset}-optimized") if optimize else None


def choose_mix(
    path: Path, budget: Budget, words: "Words", knowledge: "Knowledge", overrides: "Sequence[Override]", *, fast: bool
) -> Chosen:
    """Measures and searches; the guides of `knowledge` are used up."""
    from quant.mix import best_mix, check_budget, nearest_preset
    from quant.sensitivity import sensitivities
    from quant.source import open_source

    source = open_source(path)
    n_bytes = bytes_for_matrices(source, budget, knowledge, overrides, remark_of(budget, words), fast=fast)
    check_budget(source, n_bytes, overrides)
    found = sensitivities(path, words.text, tell=show_sensitivity)
    mix = best_mix(source, found, n_bytes, guides=knowledge.guides, overrides=overrides, fast=fast, tell=show_choosing)
    status.clear()
    note(f"matrices get {size(n_bytes)}: {summary(mix)}")
    is_preset = budget.n_bytes is None and budget.bits is None
    return Chosen(mix, budget.preset if is_preset else nearest_preset(source, mix))


def remark_of(budget: Budget, words: "Words") -> str:
    """For the receipt."""
    return f"types chosen to fit {budget.goal}, by sensitivity on {words.name}"


def bytes_for_matrices(
    source: "Source",
    budget: Budget,
    knowledge: "Knowledge",
    overrides: "Sequence[Override]",
    remark: str,
    *,
    fast: bool,
) -> int:
    """What the budget leaves for all matrices together; the whole file is no larger than what was asked for."""
    from quant.guide import no_guide
    from quant.mix import budget_of_bits, file_bytes, matrix_budget
    from quant.quantize import file_metadata
    from quant.receipt import settings
    from quant.recipe import PRESETS, assign

    def metadata(preset: str, *more: str) -> "dict[str, Any]":
        words = settings(fast, overrides, [*knowledge.remarks, *more])
        return file_metadata(source, preset, words, knowledge.sha256, mixed=bool(more))

    if budget.bits is not None:
        return budget_of_bits(source, budget.bits)
    whole = budget.n_bytes
    if whole is None:
        shapes = {weights.name: weights.shape for weights in source.weights}
        formats = assign(PRESETS[budget.preset], shapes, calibrated=knowledge.guides is not no_guide)
        whole = file_bytes(source, formats, metadata(budget.preset))
    # Which preset the file will be named after is not known yet.
    return matrix_budget(source, whole, metadata(max(PRESETS, key=len), remark))


def expected_bytes(
    source: "Source", preset: str, budget: Budget | None, overrides: "Sequence[Override]", *, calibrated: bool
) -> int:
    """About what the file takes on disk, known before anything is measured."""
    from quant.mix import budget_of_bits, file_bytes
    from quant.recipe import PRESETS, assign

    is_free = budget is not None and (budget.n_bytes is not None or budget.bits is not None)
    shapes = {weights.name: weights.shape for weights in source.weights}
    formats = assign(PRESETS["q8_0" if is_free else preset], shapes, overrides=overrides, calibrated=calibrated)
    most = file_bytes(source, formats, source.metadata)
    if budget is None or not is_free:
        return most
    asked = budget_of_bits(source, budget.bits) if budget.bits is not None else budget.n_bytes
    return most if asked is None else min(most, asked)


def show_sensitivity(step: int, total: int) -> None:
    status.show("measuring sensitivity", f"step {step} of {total}")


def show_choosing(at: int, total: int) -> None:
    status.show("choosing types", f"tensor {at} of {total}")


def summary(mix: "dict[str, Format]") -> str:
    """How many matrices have which type, the largest type first."""
    from collections import Counter

    counts = Counter(fmt.name for fmt in mix.values())
    bits = {fmt.name: fmt.block_bytes / fmt.block_size for fmt in mix.values()}
    return ", ".join(f"{counts[name]} {name}" for name in sorted(counts, key=lambda name: -bits[name]))
