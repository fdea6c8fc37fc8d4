"""llmq eval: how well a model predicts a text, and how far it is from the model that it was made from."""

import contextlib
import dataclasses
import json
import math
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cli import options
from cli.screen import one_line, status, table
from cli.text import read_text
from llmq.store import BUNDLED

if TYPE_CHECKING:
    import numpy as np

    from llmq.model import Model
    from quant.evaluate import Comparison, Evaluation
    from quant.statistics import Estimate


Against = Annotated[
    str | None,
    typer.Option(
        "--against",
        metavar="REF",
        help="Compare with this model, such as the one before it was quantized: a name or a .gguf file.",
        show_default=False,
        autocompletion=options.complete_model,
    ),
]
Text = Annotated[
    str | None,
    typer.Option(
        "--text", metavar="FILE", help="Read this text; - is stdin.  [default: one that comes with llmq]",
        show_default=False,
    ),
]  # fmt: skip
Context = Annotated[int, typer.Option("--ctx", metavar="N", min=32, help="Tokens in a chunk of text.")]
Json = Annotated[bool, typer.Option("--json", help="One JSON object on stdout.")]

Row = tuple[str, ...]


def evaluate(
    model: options.ModelName = BUNDLED,
    against: Against = None,
    text: Text = None,
    ctx: Context = 512,
    window: options.Window = None,
    threads: options.Threads = None,
    json_output: Json = False,
) -> None:
    """Measure how well a model predicts a text, and how far it is from another."""
    from quant.evaluate import held_text

    words = held_text() if text is None else read_text(text)
    names = [model] if against is None else [model, against]
    with contextlib.ExitStack() as opened:
        engine = options.Engine(ctx, window, threads, "f16")
        models = [opened.enter_context(options.open_model(name, engine)) for name in names]
        found = measure(models, words, ctx)
        stems = [each.path.stem for each in models]
    status.clear()
    if json_output:
        head = {"model": stems[0], "against": stems[1] if against is not None else None, "ctx": ctx}
        json.dump(head | finite(dataclasses.asdict(found)), sys.stdout, allow_nan=False)
        sys.stdout.write("\n")
    else:
        sys.stdout.write("\n\n".join(map(table, tables(found, stems, ctx))) + "\n")


def finite(found: Any) -> Any:
    """Figures with None for what is not finite, which JSON has no number for."""
    if isinstance(found, dict):
        return {key: finite(value) for key, value in found.items()}
    return None if isinstance(found, float) and not math.isfinite(found) else found


def measure(models: "list[Model]", text: str, n_ctx: int) -> "Evaluation":
    """Of one model; a Comparison where there is a second to compare it with."""
    from quant.evaluate import chunks, compare, comparison, evaluate, evaluation, log_probs, shared_ids

    tokenizer = models[0].tokenizer
    pieces = chunks(shared_ids(models, text), n_ctx, tokenizer.bos_id if tokenizer.add_bos else None)
    found = [log_probs(model, pieces) for model in models]
    if len(found) == 1:
        return evaluation(collect(evaluate(found[0], pieces), len(pieces)))
    return comparison(collect(compare(found[0], found[1], pieces), len(pieces)))


def collect(parts: "Iterator[np.ndarray]", total: int) -> "np.ndarray":
    """Results of all chunks, stacked, with a line on stderr that counts them."""
    import numpy as np

    done = []
    status.show("evaluating", f"chunk 1 of {total}")
    for part in parts:
        done.append(part)
        status.show("evaluating", f"chunk {min(len(done) + 1, total)} of {total}")
    return np.stack(done)


def tables(found: "Evaluation", stems: list[str], n_ctx: int) -> Iterator[list[Row]]:
    """What was read, figures with their intervals, and how divergences are spread."""
    from quant.evaluate import Comparison

    names = zip(("model", "against"), stems, strict=False)
    chunks = f"{found.n_chunks} chunk{'s' * (found.n_chunks != 1)} of up to {n_ctx} tokens"
    yield [*((label, one_line(stem, 70)) for label, stem in names), ("scored", f"{found.n_tokens} tokens in {chunks}")]
    figures: list[Row] = [("FIGURE", "VALUE", "FROM", "TO"), ("perplexity", *digits(found.perplexity))]
    if not isinstance(found, Comparison):
        yield figures
        return
    yield figures + differences(found)
    spread = [(quantile_name(share), f"{kl:z.5f}") for share, kl in found.kl_quantiles.items()]
    yield [("KL DIVERGENCE UP TO", "NATS"), *spread]


def differences(found: "Comparison") -> list[Row]:
    return [
        ("perplexity of the reference", *digits(found.reference_perplexity)),
        ("perplexity ratio", *digits(found.perplexity_ratio)),
        ("mean KL divergence, nats", *digits(found.kl, "z.5f")),
        ("same first choice", *digits(found.top1, "z.2%")),
        ("right token's probability, mean difference", *digits(found.p_difference, "z.3%")),
        ("right token's probability, RMS difference", *digits(found.p_rms, "z.3%")),
    ]


def digits(estimate: "Estimate", form: str = "z.4f") -> Row:
    return tuple(format(end, form) for end in (estimate.value, estimate.low, estimate.high))


def quantile_name(share: float) -> str:
    if share == 1:
        return "all positions"
    return "half of positions" if share == 0.5 else f"{100 * share:g} % of positions"
