"""llmq fit: whether a model will run here, in which type and how fast, before anything of it is downloaded."""

import json
import shlex
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cli import options
from cli.bench import Json, Row, number, show_table
from cli.screen import note, one_line, show_loading, size, status
from llmq.errors import ResourceError, UnsupportedError
from llmq.store import models_dir, resolve

if TYPE_CHECKING:
    from llmq.config import ModelConfig
    from llmq.figures import Machine
    from quant.fit import Here, Verdict
    from quant.size import Size

# F32 and F16 say no more than BF16 does, and IQ4_NL is for rows that IQ4_XS does not divide.
TYPES = (
    "q2_k", "q3_k_s", "q3_k_m", "q3_k_l", "iq4_xs", "q4_k_s", "q4_k_m", "q5_k_s", "q5_k_m", "q6_k", "q8_0", "bf16",
)  # fmt: skip
CONTEXTS = (4096, 8192, 32768)

Model = Annotated[
    str,
    typer.Argument(
        metavar="MODEL",
        help="A name of llmq list or llmq list --available, the path of a .gguf file, org/repo, an address, or "
        "weights: 13B, or 47B/13B for all and used ones.",
        show_default=False,
        autocompletion=options.complete_model,
    ),
]
Contexts = Annotated[
    list[int] | None,
    typer.Option(
        "--ctx",
        metavar="N",
        min=1,
        help="Tokens of conversation to hold; may be repeated.  [default: 4096, 8192 and 32768]",
        show_default=False,
    ),
]


@dataclass(frozen=True, slots=True)
class Asked:
    """What MODEL means, in each type that is asked for, of the `types` that it can be had in; `program` gets it, or
    runs what is there, or is "". With `by_type` it takes a type behind a colon."""

    sizes: "list[Size]"
    types: Sequence[str]
    is_there: bool
    program: str
    by_type: bool

    def command(self, kind: str) -> str:
        return f"{self.program}:{kind}" if self.by_type else self.program


@dataclass(frozen=True, slots=True)
class Fit:
    """`table` has a row for each type and a column for each context; `command` runs the best one, or gets it."""

    size: "Size"
    at: "Here"
    table: "list[list[Verdict]]"
    best: "Verdict | None"
    command: str


def fit(model: Model, contexts: Contexts = None, json_output: Json = False) -> None:
    """Tell whether a model will run here, in which type and how fast."""
    from quant.fit import best_type, here, judge_with_advice, verdicts

    asked = find_sizes(options.utf8(model))
    columns = choose_contexts(asked.sizes[0].config, contexts)
    at = here(known_machine(), models_dir())
    status.clear()
    table = verdicts(asked.sizes, columns, at, is_there=asked.is_there)
    best = best_type([row[0] for row in table])
    found = Fit(asked.sizes[0], at, table, best, asked.command(best.type) if best else "")
    if json_output:
        json.dump(as_json(found), sys.stdout)
        sys.stdout.write("\n")
    else:
        show(found)
    if not any(verdict.fits for row in table for verdict in row):
        least = min(asked.sizes, key=lambda each: each.n_bytes)
        already = round(least.n_bytes) if asked.is_there else 0
        raise ResourceError(refusal(judge_with_advice(least, columns[0], at, already=already, types=asked.types)))


# ---- what is asked for
def find_sizes(text: str) -> Asked:
    """A published model or weights in each type, or in the one behind a colon; what a repository or an address has; or
    the file that there is.

    Raises UsageError for text that means no model, what open_gguf() raises for a file, and NetworkError.
    """
    from cli.published import sizes_offered
    from llmq.catalog import find_entry
    from llmq.reference import Repo, Url, parse_reference
    from quant.size import config_of, kind_of, parse_weights, planned, scaled, size_of_file

    what, colon, kind = text.partition(":")
    entry = find_entry(what)
    weights = parse_weights(what)
    kinds = [kind_of(kind)] if colon and (entry or weights) else TYPES
    if entry:
        if entry.unsupported:
            raise UnsupportedError(f"llmq cannot run {entry.name} yet: {entry.unsupported}")
        command = f"llmq pull {what}" if entry.gguf else f"llmq pull --from-source {what}"
        return Asked([planned(config_of(entry), each) for each in kinds], TYPES, False, command, True)
    if weights:
        return Asked([scaled(what, *weights, each) for each in kinds], TYPES, False, "", False)
    wanted = parse_reference(text) if "/" in text and not is_file(text) else None
    if isinstance(wanted, Repo | Url):
        offered = sizes_offered(wanted, TYPES)
        address = f"{wanted.repo}{'@' * bool(wanted.revision)}{wanted.revision}" if isinstance(wanted, Repo) else text
        by_type = isinstance(wanted, Repo) and not wanted.file
        program = f"llmq pull {'--from-source ' * offered.to_make}{address if by_type else shlex.quote(one_line(text))}"
        return Asked(offered.sizes, offered.types, False, program, by_type)
    path = resolve(text)
    program = f"llmq chat {shlex.quote(one_line(text))}"
    return Asked([size_of_file(path, one_line(path.stem, 40))], (), True, program, False)


def is_file(text: str) -> bool:
    try:
        return Path(text).is_file()
    except (OSError, ValueError):  # what no system takes for a path
        return False


def choose_contexts(config: "ModelConfig", wanted: Sequence[int] | None) -> list[int]:
    """Ascending. Raises UsageError for more than the model knows."""
    from llmq.config import choose_context

    if wanted:
        return sorted({choose_context(config, n) for n in wanted})
    most = config.context_length
    return sorted({min(n, most) for n in CONTEXTS})


def known_machine() -> "Machine":
    """The machine's figures as remembered; where there are none it is measured, which takes about a second."""
    from llmq.cores import usable_cores
    from llmq.figures import machines_folder, remembered

    folder, n_cores = machines_folder(), usable_cores()
    known = remembered(folder, n_cores) if folder else None
    if known:
        return known
    from llmq.machine import measure_and_remember

    return measure_and_remember(n_cores, show_loading)


# ---- what is shown
def show(found: Fit) -> None:
    at, config = found.at, found.size.config
    weights = found.size.n_weights
    count = f"{weights / 1e9:.1f} B" if weights >= 1e9 else f"{weights / 1e6:.1f} M"
    sys.stdout.write(
        f"{found.size.name}: {count} weights, context of {config.context_length} tokens\n"
        f"free: {size(at.memory_free)} of memory, {size(at.disk_free)} of disk\n"
    )
    header = ["TYPE", "FILE", "REPLY/S", "PROMPT/S", *(f"CTX {n}" for n in (each.n_ctx for each in found.table[0]))]
    show_table(header, [cells(row) for row in found.table])
    if found.best:
        then = f": {found.command}" if found.command else ""
        sys.stdout.write(f"\nbest for {found.best.n_ctx} tokens is {found.best.type}{then}\n")


def cells(row: "Sequence[Verdict]") -> Row:
    """No speed for what would be read from disk over and over."""
    first = row[0]
    speeds = (number(first.decode), number(first.prefill)) if first.answer != "no memory" else ("-", "-")
    return first.type, size(first.file_bytes), *speeds, *map(cell, row)


def cell(verdict: "Verdict") -> str:
    """The memory that is needed, and whether it is there."""
    needed = size(verdict.memory.total)
    return {"no memory": f"needs {needed}", "no disk": "no disk"}.get(verdict.answer, f"{verdict.answer} {needed}")


def as_json(found: Fit) -> dict[str, Any]:
    return {
        "model": found.size.name,
        "weights": found.size.n_weights,
        "context_length": found.size.config.context_length,
        "here": asdict(found.at),
        "types": [type_json(row) for row in found.table],
        "best": {"type": found.best.type, "n_ctx": found.best.n_ctx} if found.best else None,
        "command": found.command or None,
    }


def type_json(row: "Sequence[Verdict]") -> dict[str, Any]:
    first = row[0]
    return {
        "type": first.type,
        "file_bytes": first.file_bytes,
        "disk_needed": first.disk_needed,
        "prefill": first.prefill,
        "decode": first.decode,
        "contexts": [
            {"n_ctx": each.n_ctx, "answer": each.answer, "memory": asdict(each.memory) | {"total": each.memory.total}}
            for each in row
        ],
    }


# ---- before a download
def judge_download(
    size: "Size", n_ctx: int | None, folder: Path, already: int = 0, types: Sequence[str] = TYPES
) -> "Verdict":
    """Of a file that is to come into `folder`, where `already` bytes of it are; `n_ctx` None is what a run would take,
    and `types` are those that it could be had in.

    Raises UsageError for a context that the model does not know.
    """
    from llmq.config import choose_context
    from quant.fit import here, judge_with_advice

    at = here(known_machine(), folder)
    status.clear()
    return judge_with_advice(size, choose_context(size.config, n_ctx), at, already=already, types=types)


def check_fit(verdict: "Verdict", force: bool) -> None:
    """Tells what a download takes and what there is.

    Raises ResourceError where it cannot work. With `force` missing memory is only told: what one asks for is one's own
    affair, but what the disk has no room for cannot come.
    """
    note(
        f"{verdict.model} as {verdict.type}: {size(verdict.file_bytes)}; about {number(verdict.decode)} tokens/s in "
        f"replies, {number(verdict.prefill)} in prompts"
    )
    note(
        f"disk: {size(verdict.disk_needed)} needed, {size(verdict.disk_free)} free; memory for {verdict.n_ctx} tokens: "
        f"{size(verdict.memory.total)} needed, {size(verdict.memory_free)} free"
        + (", which is tight" if verdict.answer == "tight" else "")
    )
    if verdict.fits:
        return
    if verdict.answer == "no disk":
        raise ResourceError(refusal(verdict))
    if not force:
        raise ResourceError(f"{refusal(verdict)}, or --force to try all the same")
    note(f"it goes on all the same: {refusal(verdict)}")


def refusal(verdict: "Verdict") -> str:
    """What is missing, and what would work instead."""
    what = f"{verdict.model} as {verdict.type}"
    if verdict.answer == "no memory":
        what += f" with a context of {verdict.n_ctx}"
        lacking = f"{size(verdict.memory.total)} of memory and {size(verdict.memory_free)} are free"
    else:
        lacking = f"{size(verdict.disk_needed)} of disk and {size(verdict.disk_free)} are free"
    return f"{what} needs {lacking}; {advice(verdict)}"


def advice(verdict: "Verdict") -> str:
    other = verdict.instead
    if other is None:
        return "free some disk space" if verdict.answer == "no disk" else "choose a smaller model"
    ways = [f"choose {other.type}"] if other.type != verdict.type else []
    ways += [f"give --ctx {other.n_ctx}"] if other.n_ctx != verdict.n_ctx else []
    disk, memory = f"{size(other.disk_needed)} of disk", f"{size(other.memory.total)} of memory"
    return f"{' and '.join(ways)}, which needs {disk if verdict.answer == 'no disk' else memory}"
