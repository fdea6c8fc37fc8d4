"""A byte budget for llmq quantize: --optimize, --size and --bpw."""

from collections.abc import Sequence
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


def checked_budget(optimize: bool, file_size: str | None, bits: float | None) -> int | None:
    """Bytes of the file where --size gives them; refuses what contradicts itself."""
    from quant.budget import parse_size

    if sum((optimize, file_size is not None, bits is not None)) > 1:
        raise UsageError("--optimize, --size and --bpw are three budgets; give one of them")
    if bits is not None and not LEAST_BITS <= bits <= MOST_BITS:
        raise UsageError(f"--bpw takes {LEAST_BITS:g} to {MOST_BITS:g} bits a weight; 4.5 is usual")
    return parse_size(file_size) if file_size is not None else None


def choose_mix(
    path: Path,
    preset: str,
    text: str,
    guides: "Guides",
    overrides: "Sequence[Override]",
    *,
    file_size: int | None,
    bits: float | None,
) -> "tuple[dict[str, Format], str]":
    """The formats, and the preset that comes nearest in bytes."""
    from quant.guide import no_guide
    from quant.mix import best_mix, matrix_budget, nearest_preset
    from quant.sensitivity import sensitivities
    from quant.source import open_source

    source = open_source(path)
    budget = matrix_budget(source, preset, size=file_size, bits=bits, calibrated=guides is not no_guide)
    found = sensitivities(
        path, text, tell=lambda done, total: status.show(f"measuring sensitivity, layer {done} of {total}")
    )
    status.show("choosing types")
    mix = best_mix(source.weights, found, budget, guides=guides, overrides=overrides)
    status.clear()
    note(f"matrices get {size(budget)}: {summary(mix)}")
    return mix, nearest_preset(source, mix)


def show_sensitivity(done: int, total: int) -> None:
    status.show(f"measuring sensitivity, layer {done} of {total}")


def summary(mix: "dict[str, Format]") -> str:
    """How many matrices have which type, the largest type first."""
    from collections import Counter

    counts = Counter(fmt.name for fmt in mix.values())
    bits = {fmt.name: fmt.block_bytes / fmt.block_size for fmt in mix.values()}
    return ", ".join(f"{counts[name]} {name}" for name in sorted(counts, key=lambda name: -bits[name]))
