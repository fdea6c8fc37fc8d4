"""llmq quantize: a checkpoint or a GGUF file in, a smaller GGUF file out."""

import contextlib
import functools
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, cast

import typer

from cli.guides import Calibrate, Imatrix, Knowledge, SaveImatrix, Text, checked_guides, open_guides, read_words
from cli.mix import Bpw, Optimize, Size, checked_budget, choose_mix, expected_bytes, remark_of
from cli.output import (
    Making,
    chat_command,
    check_folders,
    check_idle,
    check_replaced,
    check_room,
    default_out,
    in_store,
    quantized_type,
    remember,
    why_not_run,
    written,
)
from cli.progress import show_reports
from cli.screen import note, one_line, show_compiling, size
from llmq.catalog import is_repository
from llmq.errors import UsageError, quoted
from llmq.part import part_paths
from llmq.store import resolve

if TYPE_CHECKING:
    from collections.abc import Generator, Iterator

    from quant.quantize import TensorReport
    from quant.source import Source as Opened

Source = Annotated[
    Path,
    typer.Argument(
        metavar="SOURCE",
        help="A Hugging Face checkpoint folder, a .gguf file, or the name of an installed model.",
        show_default=False,
    ),
]
Out = Annotated[
    Path | None,
    typer.Option(
        "--out",
        "-o",
        metavar="FILE",
        help="File to write.  [default: <source>-<type> in the store]",
        show_default=False,
    ),
]
Type = Annotated[
    str,
    typer.Option(
        "--type",
        "-q",
        help="q2_k, q3_k_s, q3_k_m, q3_k_l, iq4_xs, iq4_nl, q4_k_s, q4_k_m, q5_k_s, q5_k_m, q6_k, q8_0, f16, bf16 "
        "or f32.",
        metavar="TYPE",
    ),
]
TensorType = Annotated[
    list[str] | None,
    typer.Option(
        "--tensor-type",
        metavar="REGEX=TYPE",
        help="Another type for tensors with REGEX in their name, as in ffn_down=q6_k; may be repeated.",
    ),
]
Report = Annotated[
    Path | None,
    typer.Option("--report", metavar="FILE", help="Also write a web page about the result; FILE ends in .html."),
]
Fast = Annotated[bool, typer.Option("--fast", help="Search less: about half the time, a little more error.")]
Force = Annotated[bool, typer.Option("--force", help="Replace another model of that name.")]


def quantize(
    source: Source,
    out: Out = None,
    preset: Type = "q4_k_m",
    tensor_type: TensorType = None,
    calibrate: Calibrate = False,
    text: Text = None,
    imatrix: Imatrix = None,
    save_imatrix: SaveImatrix = None,
    optimize: Optimize = False,
    file_size: Size = None,
    bpw: Bpw = None,
    fast: Fast = False,
    report: Report = None,
    force: Force = False,
) -> None:
    """Make a GGUF file of a checkpoint, or a smaller one of a GGUF file."""
    from cli.report import check_page, write_page
    from llmq.jit import compile_log
    from quant.outputs import check_outputs
    from quant.quantize import quantize as quantize_tensors
    from quant.receipt import settings
    from quant.recipe import parse_override
    from quant.size import kind_of
    from quant.source import open_source

    source = find_source(source)
    preset = kind_of(preset)
    overrides = [parse_override(text) for text in tensor_type or ()]
    budget = checked_budget(preset, optimize, file_size, bpw)
    calibrate = checked_guides(calibrate, text if not budget else None, imatrix, save_imatrix)
    label = budget.label if budget else preset
    out = out or default_out(source, label)
    if report:
        check_page(report)
    opened = open_source(source)
    outputs = [path for path in (out, save_imatrix, report) if path]
    check_outputs(outputs, [*opened.files, *(Path(name) for name in (text, imatrix) if name)])
    check_folders(outputs)
    compile_log.listener = show_compiling

    words = read_words(text) if calibrate or budget else None
    knowledge = open_guides(source, words if calibrate else None, imatrix)
    remarks = [*knowledge.remarks, *([remark_of(budget, words)] if words and budget else ())]
    if was := quantized_type(opened):
        remarks.insert(0, f"from weights that were {was}")
    making = Making(out, source, label, settings(fast, overrides, remarks), knowledge.sha256)
    check = functools.partial(check_replaced, making, force=force)
    check()
    check_room(out, expected_bytes(opened, preset, budget, overrides, calibrated=bool(knowledge.sha256)))
    trouble = tell_of_source(opened, was)
    mix = None
    if words and budget:
        check_idle(out)
        # Guides of its own, since those of a run are given once, layer by layer; they go when it has chosen.
        guides = functools.partial(open_guides, source, words if calibrate else None, imatrix)
        chosen = choose_mix(source, budget, words, guides(), overrides, fast=fast)
        mix, preset = chosen.mix, chosen.preset
    quantized = quantize_tensors(
        source,
        out,
        preset,
        overrides=overrides,
        guides=knowledge.guides,
        guided_by=knowledge.sha256,
        fast=fast,
        mix=mix,
        remarks=remarks,
        follow=not in_store(out),
        held=check,
    )
    again = f"the same command goes on from here{', given the same text' if text == '-' else ''}"
    done = follow(quantized, f"{one_line(source.name, 40)} to {label}", out, again)
    remember(making)
    if save_imatrix:
        keep_importance(save_imatrix, knowledge)
    if report:
        write_page(report, source, out, done, run=words is not None, calibrated=bool(knowledge.sha256))
    tell_made(out, runs=not trouble)


def tell_of_source(source: "Opened", was: str) -> str:
    """Notes of what to know before it is quantized: that it `was` of a type already, and, given back too, why llmq
    cannot run what is made of it."""
    if was:
        note(f"{one_line(source.name, 60)} is {was} already: errors are measured against its weights as they are")
    trouble = why_not_run(source)
    if trouble:
        note(f"{one_line(trouble)}; what is made is for other programs")
    return trouble


def tell_made(out: Path, *, runs: bool) -> None:
    note(f"{size(out.stat().st_size)} written{f'; talk to it: {chat_command(out)}' if runs else ''}")
    sys.stdout.write(f"{one_line(str(out), 4096)}\n")  # last, since whoever reads it may have left
    sys.stdout.flush()


def keep_importance(path: Path, knowledge: Knowledge) -> None:
    from quant.guide import Running
    from quant.imatrix import write_imatrix

    assert isinstance(knowledge.guides, Running)
    write_imatrix(path, knowledge.guides.finish())


def find_source(given: Path) -> Path:
    """A path, with a name where it has none, as `.` has; or the file of a model of the store, by its name."""
    if given.name in ("", ".."):
        return Path(os.path.realpath(given))
    if os.path.lexists(given):
        return given
    if is_repository(str(given)):
        raise UsageError(
            f"there is no file or folder {quoted(str(given))}; `llmq pull {given} --from-source` makes a model of a "
            "repository"
        )
    return resolve(given)


def follow(
    quantized: "Iterator[TensorReport]", title: str, out: Path, again: str = "the same command goes on from here"
) -> "list[TensorReport]":
    """Shows it to its end; stopped before, it leaves what is finished for another run, and says so."""
    try:
        with contextlib.closing(cast("Generator[TensorReport]", quantized)) as reports:
            return show_reports(reports, title)
    except (KeyboardInterrupt, SystemExit):
        note(f"stopped; {again}" if part_paths(written(out))[0].exists() else "stopped; nothing of it was done yet")
        raise
