"""The options that chat and run share, and what becomes of them."""

import dataclasses
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cli.screen import show_loading
from llmq.store import BUNDLED, installed

if TYPE_CHECKING:
    from llmq.model import Model
    from llmq.sampler import Sampling

MAX_TOKENS = 1024


def complete_model(incomplete: str) -> list[str]:
    return [entry.name for entry in installed() if entry.name.startswith(incomplete)]


MODEL_HELP = f"Name of an installed model, or path of a .gguf file.  [default: {BUNDLED}]"
ModelName = Annotated[
    str, typer.Argument(metavar="MODEL", help=MODEL_HELP, show_default=False, autocompletion=complete_model)
]
ModelOption = Annotated[
    str,
    typer.Option("--model", "-m", metavar="MODEL", help=MODEL_HELP, show_default=False, autocompletion=complete_model),
]
System = Annotated[
    str, typer.Option("--system", "-s", metavar="TEXT", help="System prompt: how the model should behave.")
]
MaxTokens = Annotated[int, typer.Option("--max-tokens", "-n", metavar="N", min=1, help="Most tokens in one reply.")]
Stop = Annotated[
    list[str] | None, typer.Option("--stop", metavar="TEXT", help="End the reply before this text; may be repeated.")
]
Temperature = Annotated[
    float | None,
    typer.Option("--temp", metavar="X", help="0 always takes the likeliest token; higher is freer.  [default: 0.7]"),
]
TopK = Annotated[int | None, typer.Option("--top-k", metavar="N", help="Sample from the k likeliest tokens; 0 is off.")]
TopP = Annotated[
    float | None,
    typer.Option("--top-p", metavar="X", help="Sample from the likeliest tokens of this total.  [default: 0.95]"),
]
MinP = Annotated[
    float | None, typer.Option("--min-p", metavar="X", help="Drop tokens below this share of the likeliest; 0 is off.")
]
RepeatPenalty = Annotated[
    float | None,
    typer.Option("--repeat-penalty", metavar="X", help="Above 1 makes recent tokens less likely; 1 is off."),
]
Seed = Annotated[int | None, typer.Option("--seed", metavar="N", help="Same seed, same reply.")]
Lookup = Annotated[
    bool,
    typer.Option("--lookup", help="Guess from the context what comes: the same reply, sooner where it repeats."),
]
Context = Annotated[
    int | None,
    typer.Option("--ctx", metavar="N", min=1, help="Tokens of conversation to hold.  [default: the model's]"),
]
Window = Annotated[
    int | None,
    typer.Option(
        "--window", metavar="N", min=0, help="Attend to the last tokens only; 0 is off.  [default: the model's]"
    ),
]
Threads = Annotated[
    int | None, typer.Option("--threads", "-t", metavar="N", min=1, help="Threads.  [default: one per physical core]")
]
KVType = Annotated[
    str,
    typer.Option("--kv-type", metavar="TYPE", help="Keys and values as f16, or as q8_0 in about half the memory."),
]


@dataclass(frozen=True, slots=True)
class Engine:
    """What a model is loaded with; None leaves it to the model."""

    n_ctx: int | None
    window: int | None
    threads: int | None
    kv_type: str


def sampling(
    temperature: float | None,
    top_k: int | None,
    top_p: float | None,
    min_p: float | None,
    repetition_penalty: float | None,
    seed: int | None,
) -> "Sampling":
    """The sampler's own defaults, but for what was given. UsageError for a value out of range."""
    from llmq.sampler import Sampling

    given: dict[str, Any] = {
        "temperature": temperature,
        "top_k": top_k,
        "top_p": top_p,
        "min_p": min_p,
        "repetition_penalty": repetition_penalty,
        "seed": seed,
    }
    return dataclasses.replace(Sampling(), **{name: value for name, value in given.items() if value is not None})


def open_model(name: str, engine: Engine) -> "Model":
    """Loads the model; what has to be done first, once for this machine, is told on stderr."""
    from llmq.model import load
    from llmq.records import mark_used

    model = load(
        name,
        n_ctx=engine.n_ctx,
        window=engine.window,
        threads=engine.threads,
        kv_type=engine.kv_type,
        on_event=show_loading,
    )
    mark_used(model.path)
    return model


def utf8(text: str) -> str:
    """Text from the command line, where bytes that are not UTF-8 hide as lone surrogates, with those replaced."""
    return text.encode("utf-8", "surrogateescape").decode("utf-8", "replace")
