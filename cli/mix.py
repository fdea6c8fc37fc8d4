"""A byte budget for llmq quantize: --optimize, --size and --bpw."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from cli.screen import note, size, status
from llmq.errors import UsageError

if TYPE_CHECKING:
    from llmq.formats import Format
    from quant.guide import Guides
    from quant.recipe import Override

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
        """In words, for the receipt."""
        if self.bits is not None:
            return f"{self.bits:g} bits a weight"
        return f"the bytes of {self.preset}" if self.n_bytes is None else f"{self.n_bytes} bytes"


def checked_budget(preset: str, optimize: bool, file_size: str | None, bits: float | None) -> Budget | None:
    """What is asked for; raises UsageError where it contradicts itself."""
    from quant.budget import parse_size

    if sum((optimize, file_size is not None, bits is not None)) > 1:
        raise UsageError("--optimize, --size and --bpw are three budgets; give one of them")
    if file_size is not None:
        return Budget(preset, parse_size(file_size), None, re.sub(r"\s", "", file_size).lower())
    if bits is not None:
        if not LEAST_BITS <= bits <= MOST_BITS:
            raise UsageError(f"--bpw takes {LEAST_BITS:g} to {MOST_BITS:g} bits a weight; 4.5 is usual")
        return Budget(preset, None, bits, f"{bits:g}bpw")
    return Budget(preset, None, None, f"{preset}-optimized") if optimize else None


def choose_mix(
    path: Path, budget: Budget, text: str, guides: "Guides", overrides: "Sequence[Override]"
) -> "tuple[dict[str, Format], str]":
    """The formats, and the preset that comes nearest in bytes."""
    from quant.guide import no_guide
    from quant.mix import best_mix, matrix_budget, nearest_preset
    from quant.sensitivity import sensitivities
    from quant.source import open_source

    source = open_source(path)
    calibrated = guides is not no_guide
    n_bytes = matrix_budget(source, budget.preset, size=budget.n_bytes, bits=budget.bits, calibrated=calibrated)
    found = sensitivities(path, text, tell=show_sensitivity)
    status.show("choosing types")
    mix = best_mix(source.weights, found, n_bytes, guides=guides, overrides=overrides)
    status.clear()
    note(f"matrices get {size(n_bytes)}: {summary(mix)}")
    return mix, nearest_preset(source, mix)


def show_sensitivity(done: int, total: int) -> None:
    status.show("measuring sensitivity", f"layer {done} of {total}")


def summary(mix: "dict[str, Format]") -> str:
    """How many matrices have which type, the largest type first."""
    from collections import Counter

    counts = Counter(fmt.name for fmt in mix.values())
    bits = {fmt.name: fmt.block_bytes / fmt.block_size for fmt in mix.values()}
    return ", ".join(f"{counts[name]} {name}" for name in sorted(counts, key=lambda name: -bits[name]))
