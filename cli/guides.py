"""What llmq quantize knows of tensors' inputs: --calibrate, --text, --imatrix and --save-imatrix."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from cli.screen import one_line, status
from cli.text import read_text
from llmq.errors import UsageError

if TYPE_CHECKING:
    from quant.guide import Guides

Calibrate = Annotated[
    bool,
    typer.Option("--calibrate", help="Run the model over a text first, to see which errors matter; takes minutes."),
]
Text = Annotated[
    str | None,
    typer.Option(
        "--text",
        metavar="FILE",
        help="The text that is read for --calibrate, --optimize, --size or --bpw.  [default: one that comes with llmq]",
    ),
]
Imatrix = Annotated[
    Path | None,
    typer.Option("--imatrix", metavar="FILE", help="Importance of columns, from llama-imatrix or --save-imatrix."),
]
SaveImatrix = Annotated[
    Path | None,
    typer.Option("--save-imatrix", metavar="FILE", help="Keep what --calibrate saw, for llama.cpp or another run."),
]


@dataclass(frozen=True, slots=True)
class Words:
    text: str
    name: str


@dataclass(frozen=True, slots=True)
class Knowledge:
    """Guides, the sha256 of what they come from (empty for none), and words about them."""

    guides: "Guides"
    sha256: str
    remarks: tuple[str, ...]


def checked_guides(calibrate: bool, text: str | None, imatrix: Path | None, save_imatrix: Path | None) -> bool:
    """Whether there is to be a calibration: --calibrate asks for one, or a `text` that is for nothing else."""
    asked = "--calibrate" if calibrate else "--text" if text is not None else ""
    if asked and imatrix:
        raise UsageError(f"{asked} and --imatrix are two sources for one thing; give one of them")
    if save_imatrix and not asked:
        raise UsageError("--save-imatrix keeps what a calibration saw; add --calibrate")
    return bool(asked)


def read_words(text: str | None) -> Words:
    """What --text names, or the text that comes with llmq."""
    from quant.calibration import DEFAULT_TEXT

    if text == "-":
        return Words(read_text(text), "stdin")
    path = DEFAULT_TEXT if text is None else Path(text)
    return Words(read_text(str(path)), one_line(path.name))


def open_guides(source: Path, words: Words | None, imatrix: Path | None) -> Knowledge:
    """From a run over `words`, made as it is needed, or from a file."""
    from llmq.tokenizer import load_tokenizer
    from quant.guide import Running, digest, guides_of, no_guide
    from quant.imatrix import read_imatrix
    from quant.source import open_source

    if imatrix:
        shapes = {weights.name: weights.shape for weights in open_source(source).weights}
        known = read_imatrix(imatrix, shapes)
        remark = f"importance from {one_line(imatrix.name)}, {known.n_chunks * known.chunk_size} tokens"
        return Knowledge(guides_of(known), digest(imatrix.read_bytes()), (remark,))
    if words is None:
        return Knowledge(no_guide, "", ())
    n_tokens = len(load_tokenizer(open_source(source).metadata).encode(words.text))
    remark = f"calibrated on {words.name}, {n_tokens} tokens"
    guides = Running(source, words.text, words.name, tell=show_calibrating)
    return Knowledge(guides, digest(words.text.encode()), (remark, *guides.remarks))


def show_calibrating(layer: int, n_layers: int) -> None:
    status.show("calibrating", f"layer {layer} of {n_layers}")
