"""llmq run: one prompt, one answer."""

import dataclasses
import json
import sys
from typing import Annotated

import typer

from cli import options
from cli.reply import explain_stop, show_figures, speak
from llmq.errors import UsageError
from llmq.store import BUNDLED

STDIN_LIMIT = 16_000_000

Prompt = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="PROMPT",
        help="What to say; - stands for the text on stdin, as does no prompt at all.",
        show_default=False,
    ),
]
Raw = Annotated[bool, typer.Option("--raw", help="Continue the text as it is, without the chat format.")]
Json = Annotated[bool, typer.Option("--json", help="One JSON object on stdout: text, stop_reason, model, stats.")]


def run(
    prompt: Prompt = None,
    model: options.ModelOption = BUNDLED,
    system: options.System = "",
    raw: Raw = False,
    json_output: Json = False,
    max_tokens: options.MaxTokens = options.MAX_TOKENS,
    stop: options.Stop = None,
    temp: options.Temperature = None,
    top_k: options.TopK = None,
    top_p: options.TopP = None,
    min_p: options.MinP = None,
    repeat_penalty: options.RepeatPenalty = None,
    seed: options.Seed = None,
    lookup: options.Lookup = False,
    ctx: options.Context = None,
    window: options.Window = None,
    kv_type: options.KVType = "f16",
    threads: options.Threads = None,
) -> None:
    """Answer one prompt and leave."""
    from llmq.prompt import Message

    if raw and system:
        raise UsageError("--raw has no chat format and so no place for --system; leave one of them out")
    text = read_prompt(prompt or ["-"])
    sampling = options.sampling(temp, top_k, top_p, min_p, repeat_penalty, seed)
    with options.open_model(model, options.Engine(ctx, window, threads, kv_type)) as loaded:
        if raw:
            generation = loaded.generate(text, sampling=sampling, max_tokens=max_tokens, stop=stop or [], lookup=lookup)
        else:
            messages = [Message("system", options.utf8(system))] if system else []
            messages.append(Message("user", text))
            generation = loaded.chat(messages, sampling=sampling, max_tokens=max_tokens, stop=stop or [], lookup=lookup)
        if json_output:
            reply = {"text": "".join(generation), "stop_reason": generation.stop_reason, "model": loaded.path.stem}
            json.dump(reply | {"stats": dataclasses.asdict(generation.stats)}, sys.stdout)
            sys.stdout.write("\n")
        else:
            speak(generation)
        explain_stop(generation.stop_reason, max_tokens, loaded.n_ctx)
        show_figures(generation, loaded.n_ctx)


def read_prompt(words: list[str]) -> str:
    """The words joined by spaces, with stdin's text in the place of a dash. UsageError where that is nothing."""
    if words == ["-"] and sys.stdin.isatty():
        raise UsageError('there is no prompt; give one, as in llmq run "Tell me a story.", or pipe one in')
    text = " ".join(read_stdin() if word == "-" else options.utf8(word) for word in words).strip()
    if not text:
        raise UsageError("the prompt is empty; say something, or pipe a text in")
    return text


def read_stdin() -> str:
    text = sys.stdin.read(STDIN_LIMIT + 1)
    if len(text) > STDIN_LIMIT:
        raise UsageError(f"stdin holds more than {STDIN_LIMIT // 10**6} million characters; give a shorter text")
    return text
