"""llmq bench: how fast this machine runs a model, what bounds it, and what other models would do."""

import dataclasses
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cli import options
from cli.screen import is_terminal, one_line, size, status, table
from llmq.store import BUNDLED

if TYPE_CHECKING:
    from cli.forecast import Forecast
    from llmq.figures import Machine
    from llmq.speed import Rate, Speed
    from quant.size import Size

Predict = Annotated[
    list[str] | None,
    typer.Option(
        "--predict",
        metavar="SIZE",
        help="Predict this model, such as 13B:Q8_0, 47B/13B:Q4_K_M (all and used weights) or a name of llmq list "
        "--all; may be repeated.  [default: all published ones]",
        show_default=False,
    ),
]
Json = Annotated[bool, typer.Option("--json", help="One JSON object on stdout.")]

Row = tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Compiling:
    """What loading the model cost in compiling: kernels, and seconds; `cached` says whether they are kept."""

    compiled: int
    seconds: float
    cached: bool


@dataclass(frozen=True, slots=True)
class Bench:
    """All that was measured. `layer` is there where the model is too small to say anything of memory."""

    model: str
    n_threads: int
    isa: str
    cpu: str
    compiling: Compiling
    machine: "Machine"
    speed: "Speed"
    layer: "Speed | None"
    forecasts: "list[Forecast]"


def bench(
    model: options.ModelName = BUNDLED,
    predict: Predict = None,
    threads: options.Threads = None,
    json_output: Json = False,
) -> None:
    """Measure how fast a model runs here, and predict others."""
    from quant.size import catalog_sizes, parse_size

    sizes = [parse_size(options.utf8(text)) for text in predict] if predict else catalog_sizes()
    found = measure(model, threads, sizes)
    status.clear()
    if json_output:
        json.dump(as_json(found), sys.stdout)
        sys.stdout.write("\n")
    else:
        show(found)


def measure(model: str, threads: int | None, sizes: "Sequence[Size]") -> Bench:
    """Loads the model, then measures the machine, the model, and a layer of a larger one where the model is small."""
    import psutil

    from cli.forecast import forecast
    from llmq.cores import cpu_name, usable_cores
    from llmq.jit import cache_folder, compile_log
    from llmq.machine import measure_and_remember
    from llmq.simd import ISA
    from llmq.speed import measure_layer, measure_model

    with options.open_model(model, options.Engine(None, None, threads, "f16")) as loaded:
        show_measuring("this machine")
        machine = measure_and_remember(usable_cores(), None)
        speed = measure_model(loaded, show_measuring)
        name, n_threads = loaded.path.stem, loaded.n_threads
    layer = None if speed.is_memory_bound else measure_layer(n_threads, show_measuring)
    compiling = Compiling(compile_log.count, compile_log.seconds, cache_folder() is not None)
    memory_bytes = psutil.virtual_memory().total
    forecasts = [forecast(each, layer or speed, memory_bytes) for each in sizes]
    return Bench(one_line(name, 40), n_threads, ISA, cpu_name(), compiling, machine, speed, layer, forecasts)


def show_measuring(what: str) -> None:
    status.show("measuring", what)


def show(found: Bench) -> None:
    show_table([], facts(found))
    show_table(["MODEL", "WORK", "TOKENS/S", "FROM", "TO", "OF THE LIMIT"], rates(found))
    show_table(["MODEL", "TYPE", "WEIGHTS", "SIZE", "PROMPT TOKENS/S", "REPLY TOKENS/S"], predictions(found))


def facts(found: Bench) -> list[Row]:
    machine, compiling = found.machine, found.compiling
    by_threads = ", ".join(f"{rate:.1f} with {n}" for n, rate in machine.read_rates.items())
    compiled = f"{compiling.compiled} compiled in {compiling.seconds:.1f} s" if compiling.compiled else "from the cache"
    return [
        ("model", found.model),
        ("processor", f"{one_line(found.cpu, 60)}, {machine.n_cores} cores, {found.isa}"),
        ("threads", str(found.n_threads)),
        ("memory", f"reads GB/s: {by_threads}"),
        ("products", f"{machine.dot_rate:.0f} billion multiply-adds a second and core"),
        ("kernels", compiled + ("" if compiling.cached else "; not kept, as the cache folder cannot be used")),
    ]


def rates(found: Bench) -> list[Row]:
    rows = speed_rows(found.model, found.speed, found)
    return rows + (speed_rows("7B layer", found.layer, found) if found.layer else [])


def speed_rows(name: str, speed: "Speed", found: Bench) -> list[Row]:
    """The share of the products that are possible is that of the longest prompt."""
    shares = [*("" for _ in speed.prefill[1:]), f"{product_share(speed, found):.0%} of products"]
    memory = f"{memory_share(speed, found):.0%} of memory" if speed.is_memory_bound else "in the cache"
    prompts = zip(speed.prefill, shares, strict=True)
    return [
        *((name, f"prompt of {rate.n_tokens}", *numbers(rate), share) for rate, share in prompts),
        (name, "reply", *numbers(speed.decode), memory),
    ]


def numbers(rate: "Rate") -> Row:
    """Median, least and most."""
    return number(rate.median), number(min(rate.runs)), number(max(rate.runs))


def memory_share(speed: "Speed", found: Bench) -> float:
    return speed.read_rate / found.machine.read_rate


def product_share(speed: "Speed", found: Bench) -> float:
    return speed.product_rate / (found.machine.dot_rate * found.n_threads)


def predictions(found: Bench) -> list[Row]:
    return [
        (
            each.size.name,
            each.size.type.upper(),
            f"{each.size.n_weights / 1e9:.1f} B",
            size(round(each.size.n_bytes)),
            number(each.prefill) if each.prefill else "needs more memory",
            number(each.decode) if each.decode else "-",
        )
        for each in found.forecasts
    ]


def number(value: float) -> str:
    """Three digits that say something."""
    return f"{value:.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def show_table(header: Sequence[str], rows: list[Row]) -> None:
    """On a terminal with rules, elsewhere plain columns; a blank line before all but the first."""
    if not is_terminal(sys.stdout):
        lines = [tuple(header), *rows] if header else rows
        sys.stdout.write(("\n" if header else "") + table(lines) + "\n")
        return
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    shown = Table(*header, box=SIMPLE_HEAD, show_header=bool(header), pad_edge=False)
    for row in rows:
        shown.add_row(*(Text(cell) for cell in row))
    Console(highlight=False).print(shown)


def as_json(found: Bench) -> dict[str, Any]:
    machine = dataclasses.asdict(found.machine) | {"cpu": found.cpu, "isa": found.isa}
    machine["read_rates"] = {str(n): rate for n, rate in found.machine.read_rates.items()}
    measured = {"model": found.speed} | ({"layer": found.layer} if found.layer else {})
    return {
        "model": found.model,
        "threads": found.n_threads,
        "machine": machine,
        "kernels": dataclasses.asdict(found.compiling),
        "speed": {name: speed_json(speed, found) for name, speed in measured.items()},
        "predictions": [forecast_json(each) for each in found.forecasts],
    }


def speed_json(speed: "Speed", found: Bench) -> dict[str, Any]:
    return {
        "bytes_per_token": speed.work.n_bytes,
        "products_per_token": speed.work.n_products,
        "prefill": [rate_json(rate) for rate in speed.prefill],
        "decode": rate_json(speed.decode),
        "product_share": product_share(speed, found),
        "memory_share": memory_share(speed, found) if speed.is_memory_bound else None,
    }


def rate_json(rate: "Rate") -> dict[str, Any]:
    return {"tokens": rate.n_tokens, "median": rate.median, "runs": rate.runs}


def forecast_json(each: "Forecast") -> dict[str, Any]:
    return {
        "model": each.size.name,
        "type": each.size.type,
        "weights": each.size.n_weights,
        "bytes": each.size.n_bytes,
        "fits": each.fits,
        "prefill": each.prefill,
        "decode": each.decode,
    }
