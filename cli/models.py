"""llmq list and show: what is installed, and what is in a file. Headers only, no kernels."""

import json
import math
import sys
import textwrap
import time
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cli import options
from cli.available import list_available
from cli.screen import note, one_line, size, table
from llmq.errors import LlmqError
from llmq.records import current_record, last_used, read_record
from llmq.store import BUNDLED, BUNDLED_PATH, BUNDLED_SHA256, Entry, installed, models_dir, resolve

if TYPE_CHECKING:
    from llmq.config import ModelConfig
    from llmq.gguf import GGUF

DAY = 86_400
# Of what a file says of itself: characters in a line, and altogether.
WIDTH, TEXT_LIMIT = 100, 2000

Available = Annotated[
    bool, typer.Option("--available", "--all", "-a", help="List the published models that can be fetched instead.")
]
Json = Annotated[bool, typer.Option("--json", help="One JSON array on stdout, with all that is known.")]


def list_models(available: Available = False, json_output: Json = False) -> None:
    """List the installed models."""
    if available:
        list_available(json_output)
        return
    if json_output:
        json.dump([as_json(entry) for entry in installed()], sys.stdout)
        sys.stdout.write("\n")
        return
    rows = [(entry.name, size(entry.n_bytes), used(entry.path), headline(entry.path)) for entry in installed()]
    if rows:
        sys.stdout.write(table([("NAME", "SIZE", "LAST USED", "MODEL"), *rows]) + "\n")
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


def as_json(entry: Entry) -> dict[str, Any]:
    """All that is known of a model; null where it is not."""
    from llmq.gguf import open_gguf

    record, used_at = current_record(entry.path), last_used(entry.path)
    found: dict[str, Any] = {
        "name": entry.name,
        "path": str(entry.path),
        "bytes": entry.n_bytes,
        "type": None,
        "weights": None,
        "sha256": BUNDLED_SHA256 if entry.path == BUNDLED_PATH else record.sha256 if record else None,
        "origin": (record.origin or None) if record else None,
        "added": iso_time(record.added) if record else None,
        "last_used": iso_time(used_at) if used_at is not None else None,
        "error": None,
    }
    try:
        with open_gguf(entry.path) as gguf:
            return found | {"type": main_type(gguf), "weights": n_weights(gguf)}
    except LlmqError as error:
        return found | {"error": str(error)}


def used(path: Path) -> str:
    """When a model was last loaded: "3 days ago", or "never"."""
    moment = last_used(path)
    return ago(time.time() - moment) if moment is not None else "never"


def ago(seconds: float) -> str:
    """Like "3 days ago": the largest unit of which at least one has passed."""
    for unit, length in (("year", 365 * DAY), ("month", 30 * DAY), ("day", DAY), ("hour", 3600), ("minute", 60)):
        if seconds >= length:
            count = int(seconds // length)
            return f"{count} {unit}{'' if count == 1 else 's'} ago"
    return "just now"


def iso_time(moment: float) -> str:
    """Seconds since 1970 as ISO 8601 in UTC."""
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(moment))


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
        for label, text in describe_receipt(gguf.metadata):
            rows += wrapped(label, text)
    rows += describe_record(path)
    sys.stdout.write(table(rows) + "\n")


def wrapped(label: str, text: str) -> list[tuple[str, str]]:
    """As many rows as the text takes; the label is in the first."""
    first, *rest = textwrap.wrap(one_line(text, TEXT_LIMIT), WIDTH) or [""]
    return [(label, first), *(("", line) for line in rest)]


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


def describe_record(path: Path) -> list[tuple[str, str]]:
    """What is remembered of a file."""
    rows = [("last used", used(path))]
    if path == BUNDLED_PATH:
        return [*rows, ("sha256", BUNDLED_SHA256)]
    record = read_record(path)
    if record is None:
        return rows
    if record.origin:
        rows.append(("origin", one_line(record.origin)))
    known = record.sha256 if record.fits(path) else "the file has changed since; `llmq verify` tells"
    return [*rows, ("added", iso_time(record.added)), ("sha256", known)]


def shape(gguf: "GGUF", config: "ModelConfig") -> str:
    """Number of weights, and dense or how many experts."""
    weights = n_weights(gguf)
    count = f"{weights / 1e9:.1f} B" if weights >= 10**9 else f"{weights / 1e6:.1f} M"
    experts = f"{config.n_experts} experts, {config.n_experts_used} used a token" if config.n_experts else "dense"
    return f"{count} weights, {experts}"


def n_weights(gguf: "GGUF") -> int:
    return sum(math.prod(info.shape) for info in gguf.tensors.values())


def main_type(gguf: "GGUF") -> str:
    """The format that holds most of the file's bytes."""
    n_bytes: Counter[str] = Counter()
    for info in gguf.tensors.values():
        n_bytes[info.format.name] += info.n_bytes
    return n_bytes.most_common(1)[0][0] if n_bytes else "nothing"
