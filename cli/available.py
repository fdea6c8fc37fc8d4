"""llmq list --available: the catalog for people, two lines a model, and for scripts."""

import dataclasses
import json
import sys
import textwrap
from collections.abc import Iterator
from itertools import groupby
from typing import TYPE_CHECKING

from cli.screen import one_line, size, table

if TYPE_CHECKING:
    from llmq.catalog import CatalogEntry

HEAD = ("NAME", "WEIGHTS", "Q4_K_M", "CONTEXT", "FORMAT", "LICENCE", "GATED")
WIDTH = 100


def list_available(as_json: bool) -> None:
    from llmq.catalog import catalog

    entries = catalog()
    if as_json:
        json.dump([as_object(entry) for entry in entries], sys.stdout)
        sys.stdout.write("\n")
    else:
        sys.stdout.write("\n".join(lines(entries)) + "\n")


def as_object(entry: "CatalogEntry") -> dict[str, object]:
    """All fields of an entry, and what follows from them."""
    return dataclasses.asdict(entry) | {"n_weights": entry.n_weights, "q4_k_m_bytes": entry.q4_k_m_bytes}


def lines(entries: "list[CatalogEntry]") -> Iterator[str]:
    """A line of figures for each model, below it where it is published and what else it is called. Models that cannot
    run yet come last, by their reasons.
    """
    reasons = ["", *dict.fromkeys(entry.unsupported for entry in entries)]
    entries = sorted(entries, key=lambda entry: reasons.index(entry.unsupported))
    figures = iter(table([HEAD, *(row(entry) for entry in entries)]).splitlines())
    yield next(figures)
    for reason, group in groupby(entries, lambda entry: entry.unsupported):
        if reason:
            yield f"\nNOT YET RUN BY LLMQ: {one_line(reason)}"
        for entry in group:
            yield next(figures)
            yield names(entry)


def row(entry: "CatalogEntry") -> tuple[str, ...]:
    weights = f"{entry.n_weights / 1e9:.1f} B"
    context = f"{entry.context_length // 1024}k" if entry.context_length >= 1024 else str(entry.context_length)
    version = one_line(entry.tokenizer, 20) if entry.instruct else "base"
    licence, gated = one_line(entry.licence, 20), "yes" if entry.gated else ""
    return (entry.name, weights, size(entry.q4_k_m_bytes), context, version, licence, gated)


def names(entry: "CatalogEntry") -> str:
    """The repository and the aliases, indented, in as many lines as they take."""
    also = f"; also {', '.join(entry.aliases)}" if entry.aliases else ""
    wrapper = textwrap.TextWrapper(
        WIDTH, initial_indent="  ", subsequent_indent="    ", break_long_words=False, break_on_hyphens=False
    )
    return wrapper.fill(entry.repo + also)
