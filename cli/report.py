"""The page that llmq quantize --report writes: the file, how it was made, and how far the model is from its source."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from cli.eval import Row, collect, tables
from cli.screen import note, one_line
from llmq.errors import LlmqError, UsageError
from llmq.gguf import open_gguf
from llmq.part import PartFile

if TYPE_CHECKING:
    from quant.quantize import TensorReport

# From 8 chunks on, an interval is that of other texts.
N_CHUNKS, CHUNK_TOKENS = 8, 512
NOT_RUN = "Not measured, since the model was not run: --calibrate runs it, and llmq eval --against compares two files."


def check_page(path: Path) -> None:
    if path.suffix.lower() not in (".html", ".htm"):
        raise UsageError(f"{path.name[:70]!a} is no name for a web page; give --report a name that ends in .html")


def write_page(
    path: Path, source: Path, out: Path, reports: "Sequence[TensorReport]", *, run: bool, calibrated: bool
) -> None:
    """Writes the page whole or not at all. `run`: the model may be run; `calibrated`: columns had an importance."""
    from quant.report import build_page

    figures, about = measure(source, out) if run else ([], NOT_RUN)
    with open_gguf(out) as gguf:
        page = build_page(gguf.metadata, out.stat().st_size, reports, figures, about, calibrated=calibrated).encode()
    file = PartFile(path)
    file.open(page, len(page))
    file.publish()


def measure(source: Path, out: Path) -> tuple[Sequence[Sequence[Row]], str]:
    """What compare() gives. Where the models cannot be run the page says why, since making the file took its time."""
    try:
        return compare(source, out)
    except LlmqError as error:
        note(f"not compared with its source: {one_line(str(error))}")
        return [], f"Not measured: {error}."


def compare(source: Path, out: Path) -> tuple[Sequence[Sequence[Row]], str]:
    """Tables of figures on the text that is kept for this, and a sentence about them."""
    from llmq.config import read_config
    from llmq.cores import usable_cores
    from llmq.model import load
    from quant.evaluate import chunks, compare, comparison, held_text, log_probs
    from quant.reference import source_log_probs

    with open_gguf(out) as gguf:
        n_ctx = min(CHUNK_TOKENS, read_config(gguf).context_length)
    with load(out, n_ctx=n_ctx, threads=usable_cores()) as model:
        bos_id = model.tokenizer.bos_id if model.tokenizer.add_bos else None
        pieces = chunks(model.encode(held_text()), n_ctx, bos_id)[:N_CHUNKS]
        parts = compare(log_probs(model, pieces), source_log_probs(source, pieces), pieces)
        found = comparison(collect(parts, len(pieces)))
    scored, *figures = tables(found, [], n_ctx)
    about = (
        f"Measured on {scored[0][1]}, of a text that no calibration reads. FROM and TO are the ends of a 95 % "
        "confidence interval. The KL divergence is how far the model's probabilities are from its source's, in nats."
    )
    return figures, about
