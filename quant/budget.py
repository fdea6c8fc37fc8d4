"""A byte budget spent where it helps: a format for every tensor, so that together they do the least damage.

Damage is the KL divergence that a tensor's error causes. Divergences of single tensors very nearly add up, so the best
mix for a budget lies on each tensor's convex hull of bytes and damage: all steps along all hulls are sorted by damage
saved for a byte, and taken while bytes are left. That is the Lagrangian solution (Everett 1963; for bits: Shoham and
Gersho 1988), with the rest of the budget filled: no mix is better by more than one step.
"""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from decimal import Decimal
from itertools import pairwise

from llmq.errors import UsageError
from llmq.formats import Format

_SIZE = re.compile(r"(\d{1,9}(?:\.\d{1,9})?)\s*(?:([KMGT])(i?))?B?", re.ASCII | re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class Option:
    """One format for a tensor: its bytes, and the divergence in nats that it causes."""

    format: Format
    n_bytes: int
    damage: float


Mix = dict[str, Option]


def parse_size(text: str) -> int:
    """Bytes of a size such as 4.1GB (1000s) or 3800MiB (1024s). Raises UsageError."""
    match = _SIZE.fullmatch(text.strip())
    if not match:
        raise UsageError(f"{text[:40]!a} is not a size; give one like 4.1GB or 3800MiB")
    base = 1024 if match[3] else 1000
    return int(Decimal(match[1]) * base ** " KMGT".index((match[2] or " ").upper()))


def allocate(options: Mapping[str, list[Option]], budget: int) -> dict[str, Format]:
    """A format for every tensor with at most `budget` bytes together.

    Raises UsageError where the smallest formats are more than that.
    """
    hulls = {name: hull(each) for name, each in options.items()}
    smallest = {name: line[0] for name, line in hulls.items()}
    least = _bytes(smallest)
    if least > budget:
        raise UsageError(
            f"the matrices take at least {least:,} bytes, and the budget leaves them {max(budget, 0):,}; "
            "give a larger one"
        )
    formats = sorted({option.format for each in options.values() for option in each}, key=lambda fmt: fmt.id)
    mixes = [_climbed(hulls, budget), *(_uniform(options, smallest, fmt) for fmt in formats)]
    best = min((mix for mix in mixes if _bytes(mix) <= budget), key=_damage)
    return {name: option.format for name, option in best.items()}


def _climbed(hulls: Mapping[str, list[Option]], budget: int) -> Mix:
    """Up the hulls from the smallest formats, the steps that save most for a byte first."""
    chosen = {name: line[0] for name, line in hulls.items()}
    left = budget - _bytes(chosen)
    steps = [(_saved(a, b), name, a, b) for name, line in hulls.items() for a, b in pairwise(line)]
    # A hull's own steps come in its order, because each saves less for a byte than the one before.
    for _rate, name, before, after in sorted(steps, key=lambda step: (-step[0], step[1], step[2].n_bytes)):
        cost = after.n_bytes - before.n_bytes
        if chosen[name] is before and cost <= left:
            chosen[name] = after
            left -= cost
    return chosen


def _uniform(options: Mapping[str, list[Option]], smallest: Mix, fmt: Format) -> Mix:
    """One format for all that can have it: better where a step of one tensor is much of the budget."""
    return {
        name: next((option for option in each if option.format is fmt), smallest[name])
        for name, each in options.items()
    }


def _bytes(mix: Mix) -> int:
    return sum(option.n_bytes for option in mix.values())


def _damage(mix: Mix) -> float:
    return math.fsum(option.damage for option in mix.values())


def hull(options: list[Option]) -> list[Option]:
    """The options on the lower convex hull of bytes and damage, from the smallest to the least damaging."""
    line: list[Option] = []
    for option in sorted(options, key=lambda each: (each.n_bytes, each.damage)):
        if line and option.damage >= line[-1].damage:
            continue
        while len(line) > 1 and _saved(line[-2], line[-1]) <= _saved(line[-1], option):
            line.pop()
        line.append(option)
    return line


def _saved(before: Option, after: Option) -> float:
    """Damage saved for each byte more."""
    return (before.damage - after.damage) / (after.n_bytes - before.n_bytes)
