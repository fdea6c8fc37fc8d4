"""llmq quantize: a checkpoint or a GGUF file in, a smaller GGUF file out."""

import contextlib
import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, cast

import typer

from cli.report import check_page, write_page
from cli.screen import is_terminal, note, one_line, show_compiling, size
from cli.text import read_text
from llmq.errors import UsageError
from llmq.store import NAME, make_private, model_path, models_dir

if TYPE_CHECKING:
    from collections.abc import Generator, Iterator

    from quant.guide import Guides
    from quant.quantize import TensorReport

Source = Annotated[
    Path,
    typer.Argument(metavar="SOURCE", help="A Hugging Face checkpoint folder, or a .gguf file.", show_default=False),
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


Calibrate = Annotated[
    bool,
    typer.Option("--calibrate", help="Run the model over a text first, to see which errors matter; takes minutes."),
]
Text = Annotated[
    str | None,
    typer.Option("--text", metavar="FILE", help="The text for --calibrate.  [default: one that comes with llmq]"),
]
Imatrix = Annotated[
    Path | None,
    typer.Option("--imatrix", metavar="FILE", help="Importance of columns, from llama-imatrix or --save-imatrix."),
]
SaveImatrix = Annotated[
    Path | None,
    typer.Option("--save-imatrix", metavar="FILE", help="Keep what --calibrate saw, for llama.cpp or another run."),
]
Report = Annotated[
    Path | None,
    typer.Option("--report", metavar="FILE", help="Also write a web page about the result, to FILE.html."),
]
Fast = Annotated[bool, typer.Option("--fast", help="Search less: several times faster, a little more error.")]


def quantize(
    source: Source,
    out: Out = None,
    preset: Type = "q4_k_m",
    tensor_type: TensorType = None,
    calibrate: Calibrate = False,
    text: Text = None,
    imatrix: Imatrix = None,
    save_imatrix: SaveImatrix = None,
    fast: Fast = False,
    report: Report = None,
) -> None:
    """Make a GGUF file of a checkpoint, or a smaller one of a GGUF file."""
    from llmq.jit import compile_log
    from quant.guide import Running
    from quant.imatrix import write_imatrix
    from quant.quantize import quantize as quantize_tensors
    from quant.recipe import PRESETS, parse_override

    preset = preset.lower()
    if preset not in PRESETS:
        raise UsageError(f"there is no type {preset[:40]!a}; there are {', '.join(PRESETS)}")
    overrides = [parse_override(text) for text in tensor_type or ()]
    if out is None:
        out = default_out(source, preset)
    if report:
        check_page(report, out)
    compile_log.listener = show_compiling
    guides, guided_by, knowledge = open_guides(source, calibrate or text is not None, text, imatrix)
    if save_imatrix and not isinstance(guides, Running):
        raise UsageError("--save-imatrix keeps what a calibration saw; add --calibrate")
    reports = cast(
        "Generator[TensorReport]",
        quantize_tensors(
            source,
            out,
            preset,
            overrides=overrides,
            guides=guides,
            guided_by=guided_by,
            knowledge=knowledge,
            fast=fast,
        ),
    )
    try:
        with contextlib.closing(reports):
            done = show_reports(reports, f"{one_line(source.name, 40)} to {preset}")
    except (KeyboardInterrupt, SystemExit):
        note("stopped; the same command goes on from here")
        raise
    if save_imatrix and isinstance(guides, Running):
        write_imatrix(save_imatrix, guides.finish())
    if report:
        write_page(report, source, out, done, run=isinstance(guides, Running), known=bool(guided_by))
    name = out.stem if out.parent == models_dir() else str(out)
    note(f"{size(out.stat().st_size)} written; talk to it: llmq chat {one_line(name)}")
    sys.stdout.write(f"{one_line(str(out), 4096)}\n")


def open_guides(source: Path, calibrate: bool, text: str | None, imatrix: Path | None) -> "tuple[Guides, str, str]":
    """What tells the encoders which errors matter, a name for it that another text or file does not have, and words."""
    from llmq.tokenizer import load_tokenizer
    from quant.calibration import DEFAULT_TEXT
    from quant.guide import Running, digest, guides_of, no_guide
    from quant.imatrix import read_imatrix
    from quant.source import open_source

    if calibrate and imatrix:
        raise UsageError("--calibrate and --imatrix are two sources for one thing; give one of them")
    if imatrix:
        shapes = {weights.name: weights.shape for weights in open_source(source).weights}
        known = read_imatrix(imatrix, shapes)
        n_tokens = known.n_chunks * known.chunk_size
        return guides_of(known), digest(imatrix.read_bytes()), f"importance from {imatrix.name}, {n_tokens} tokens"
    if not calibrate:
        return no_guide, "", ""
    words, name = read_text(text or str(DEFAULT_TEXT)), Path(text or DEFAULT_TEXT).name
    n_tokens = len(load_tokenizer(open_source(source).metadata).encode(words))
    return Running(source, words, name), digest(words.encode()), f"calibrated on {name}, {n_tokens} tokens"


def default_out(source: Path, preset: str) -> Path:
    """<source>-<type> in the store; a GGUF's name loses the type at its end, so that none is piled on another."""
    stem = source.absolute().name if source.is_dir() else source.stem
    stem = re.sub(r"[-.](f16|bf16|f32|fp16|fp32)$", "", stem, flags=re.IGNORECASE)
    if not NAME.fullmatch(f"{stem}-{preset}"):
        raise UsageError(f"{f'{stem}-{preset}'[:70]!a} is not a model name; give the file to write with -o")
    path = model_path(f"{stem}-{preset}")
    make_private(path.parent)
    return path


def show_reports(reports: "Iterator[TensorReport]", title: str) -> "list[TensorReport]":
    """A progress bar on a terminal; elsewhere, one line per tensor. Returns them."""
    done = []
    if not is_terminal(sys.stderr):
        for report in reports:
            note(describe(report))
            done.append(report)
        return done
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

    # The tensor's name comes from a file: markup stays off for it.
    columns = (
        TextColumn("{task.fields[title]}", markup=False),
        BarColumn(),
        TextColumn("{task.completed}/{task.total}"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.description}", markup=False),
    )
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("", total=None, title=title)
        for report in reports:
            progress.update(task, completed=report.index + 1, total=report.total, description=describe(report))
            done.append(report)
    return done


def describe(report: "TensorReport") -> str:
    return (
        f"{one_line(report.name, 64)} {'x'.join(map(str, report.shape))} {one_line(report.source, 10)} -> "
        f"{report.format.name}, {size(report.n_bytes)}, error {report.rms_error:.2%}"
        f"{', done before' if report.resumed else ''}"
    )
