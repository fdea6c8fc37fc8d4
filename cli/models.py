"""llmq list, show and rm: what is installed, what is in a file, and getting rid of it. Headers only, no kernels."""

import math
import sys
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from cli import options
from cli.available import list_available
from cli.screen import note, one_line, size, table
from llmq.errors import LlmqError, UsageError
from llmq.store import BUNDLED, installed, models_dir, remove, resolve

if TYPE_CHECKING:
    from llmq.config import ModelConfig
    from llmq.gguf import GGUF

Available = Annotated[
    bool, typer.Option("--available", "--all", "-a", help="List the published models that can be fetched instead.")
]
Json = Annotated[bool, typer.Option("--json", help="With --available: one JSON array with all that is known of them.")]
Name = Annotated[
    str,
    typer.Argument(
        metavar="NAME",
        help="Name of an installed model, as in llmq list.",
        show_default=False,
        autocompletion=options.complete_model,
    ),
]


def list_models(available: Available = False, json_output: Json = False) -> None:
    """List the installed models."""
    if available:
        list_available(json_output)
        return
    if json_output:
        raise UsageError("--json goes with --available")
    rows = [(entry.name, size(entry.n_bytes), headline(entry.path)) for entry in installed()]
    if rows:
        sys.stdout.write(table(rows) + "\n")
    note(f"in {one_line(str(models_dir()), 4096)}")


def headline(path: Path) -> str:
    """A model in a few words; a damaged file says so in its line and does not hide the others."""
    from llmq.config import read_config
    from llmq.gguf import open_gguf

    try:
        with open_gguf(path) as gguf:
            config = read_config(gguf)
            return f"{shape(gguf, config)}, mostly {main_type(gguf)}"
    except LlmqError as error:
        return one_line(str(error), 120)


def show(model: options.ModelName = BUNDLED) -> None:
    """Show what is in a model file."""
    from llmq.config import check_tensors, read_config
    from llmq.gguf import open_gguf
    from quant.receipt import describe as describe_receipt

    path = resolve(model)
    with open_gguf(path) as gguf:
        config = read_config(gguf)
        check_tensors(gguf, config)
        rows = [("file", one_line(str(path), 4096)), ("size", size(path.stat().st_size)), *describe(gguf, config)]
        rows += [(label, one_line(text)) for label, text in describe_receipt(gguf.metadata)]
    sys.stdout.write(table(rows) + "\n")


def describe(gguf: "GGUF", config: "ModelConfig") -> list[tuple[str, str]]:
    per_token = 2 * config.n_layers * config.n_kv_heads * config.head_dim * 2
    held = min(config.window or config.context_length, config.context_length)
    counts = Counter(info.format.name for info in gguf.tensors.values())
    window = f"{config.window} tokens" if config.window else "none in the file; --window sets one"
    return [
        ("name", one_line(config.name)),
        ("shape", shape(gguf, config)),
        ("layers", str(config.n_layers)),
        ("width", f"{config.dim}, feed-forward {config.ffn_dim}"),
        ("heads", f"{config.n_heads} of {config.head_dim}, {config.n_kv_heads} for keys and values"),
        ("vocabulary", f"{config.vocab_size} tokens"),
        ("context", f"{config.context_length} tokens"),
        ("window", window),
        ("cache", f"{size(per_token)} a token, {size(per_token * held)} when full"),
        ("tensors", ", ".join(f"{count} {name}" for name, count in counts.most_common())),
    ]


def shape(gguf: "GGUF", config: "ModelConfig") -> str:
    """Number of weights, and dense or how many experts."""
    weights = sum(math.prod(info.shape) for info in gguf.tensors.values())
    count = f"{weights / 1e9:.1f} B" if weights >= 10**9 else f"{weights / 1e6:.1f} M"
    experts = f"{config.n_experts} experts, {config.n_experts_used} used a token" if config.n_experts else "dense"
    return f"{count} weights, {experts}"


def main_type(gguf: "GGUF") -> str:
    """The format that holds most of the file's bytes."""
    n_bytes: Counter[str] = Counter()
    for info in gguf.tensors.values():
        n_bytes[info.format.name] += info.n_bytes
    return n_bytes.most_common(1)[0][0] if n_bytes else "nothing"


def rm(name: Name) -> None:
    """Delete a model from the store."""
    entry = remove(name)
    note(f"removed {entry.name}, {size(entry.n_bytes)} freed")
