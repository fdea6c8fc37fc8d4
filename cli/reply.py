"""One reply on the screen: its pieces as they come, Ctrl-C on the way, and the line of figures below it."""

import signal
import sys
from types import FrameType, TracebackType
from typing import TYPE_CHECKING, Self

from cli.screen import answer, note

if TYPE_CHECKING:
    from llmq.generate import Generation


class StopKey:
    """Ctrl-C while a reply runs. Before the first piece it raises KeyboardInterrupt, which ends the reading of the
    prompt; after it, it only asks, so that the piece being made is finished and kept.
    """

    def __init__(self) -> None:
        self.pressed = False
        self.speaking = False

    def __enter__(self) -> Self:
        self._before = signal.signal(signal.SIGINT, self.press)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        signal.signal(signal.SIGINT, self._before)

    def press(self, number: int, frame: FrameType | None) -> None:
        del number, frame
        first, self.pressed = not self.pressed, True
        if first and not self.speaking:
            raise KeyboardInterrupt


def speak(generation: "Generation", key: StopKey | None = None) -> str:
    """Writes the reply to stdout as it comes, ends it with a newline, and returns the text as the model made it.

    With a key, Ctrl-C ends the reply with what came until then; without one, KeyboardInterrupt goes on to the caller.
    """
    parts: list[str] = []
    try:
        for piece in generation:
            if key:
                key.speaking = True
            parts.append(piece)
            answer(piece)
            if key and key.pressed:
                break
    except KeyboardInterrupt:
        if key is None:
            raise
    finally:
        generation.close()
        text = "".join(parts)
        if text and not text.endswith("\n"):
            answer("\n")
    return text


def explain_stop(stop_reason: str, max_tokens: int, n_ctx: int) -> None:
    """Says why a reply that did not come to its own end was cut."""
    if stop_reason == "length":
        note(f"[cut after {max_tokens} tokens; a larger n allows more]")
    elif stop_reason == "context":
        note(f"[cut: the context of {n_ctx} tokens is full; a larger --ctx makes room]")
    elif stop_reason == "interrupted":
        note("[interrupted]")


def figures(generation: "Generation", n_ctx: int) -> str:
    """Speed and context use in one line; time spent on compiling is in none of the rates."""
    stats = generation.stats
    read = stats.prompt_tokens - stats.reused_tokens
    reused = f", {stats.reused_tokens} reused" if stats.reused_tokens else ""
    lookup = f", lookup {stats.accepted}/{stats.drafted}" if stats.drafted else ""
    return (
        f"[{len(generation.ids)} tokens, {rate(stats.tokens, stats.decode_seconds)} tok/s{lookup}; "
        f"prompt {read}, {rate(read, stats.prefill_seconds)} tok/s{reused}; "
        f"context {stats.prompt_tokens + len(generation.ids)} of {n_ctx}]"
    )


def rate(count: int, seconds: float) -> str:
    return f"{count / seconds:.1f}" if seconds > 0 else "-"


def show_figures(generation: "Generation", n_ctx: int) -> None:
    if sys.stderr.isatty():
        note(figures(generation, n_ctx))
