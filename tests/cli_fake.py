"""A stand-in for llmq.model, for tests of the command line: what it says depends on what it is asked.

`python tests/cli_fake.py chat` is the llmq program with this model in the place of the engine.
"""

import os
import signal
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import GeneratorType, ModuleType, SimpleNamespace
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from llmq.errors import ResourceError
from llmq.store import resolve

N_CTX = 64


@dataclass
class Stats:
    prompt_tokens: int
    reused_tokens: int
    prefill_seconds: float
    tokens: int
    decode_seconds: float
    drafted: int = 0
    accepted: int = 0


class Generation:
    def __init__(self, pieces: Iterator[str], stop_reason: str, prompt_tokens: int) -> None:
        self.pieces = pieces
        self.stop_reason = stop_reason
        self.stats = Stats(prompt_tokens, 1, 0.5, 0, 0.25)
        self.ids: list[int] = []
        self.closed = False

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        piece = next(self.pieces)
        self.ids.append(0)
        self.stats.tokens += 1
        return piece

    def close(self) -> None:
        self.closed = True
        if isinstance(self.pieces, GeneratorType):
            self.pieces.close()


def wait_for_signal(reader: int) -> None:
    """Returns once a signal has been handled, whether it came before this call or during it."""
    os.read(reader, 1)


def replies(question: str, turns: int) -> Iterator[str]:
    """To "wait" it says two words with a pause between, to "think" it pauses before the first, else it just answers."""
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    before = signal.set_wakeup_fd(writer)
    try:
        if question == "think":
            os.write(2, b"hm, ")
            wait_for_signal(reader)
        yield "one "
        if question == "wait":
            wait_for_signal(reader)
        yield "two."
        yield f" [{turns}: {question}]"
    finally:
        signal.set_wakeup_fd(before)
        os.close(reader)
        os.close(writer)


@dataclass
class Model:
    path: Path
    asked: dict[str, Any]
    replies: dict[str, list[str]] = field(default_factory=dict)
    stop_reasons: dict[str, str] = field(default_factory=dict)
    calls: list[dict[str, Any]] = field(default_factory=list)
    generations: list[Generation] = field(default_factory=list)
    n_threads: int = 2
    n_ctx: int = N_CTX
    closed: bool = False

    def __post_init__(self) -> None:
        self.config = SimpleNamespace(name="Fake 1B\x1b[31m", context_length=N_CTX, window=0)

    def __enter__(self) -> "Model":
        return self

    def __exit__(self, *error: object) -> None:
        self.closed = True

    def chat(self, messages: Sequence[Any], **options: Any) -> Generation:
        self.calls.append({"messages": [(message.role, message.content) for message in messages], **options})
        return self.reply(messages[-1].content, len(messages))

    def generate(self, prompt: str, **options: Any) -> Generation:
        self.calls.append({"prompt": prompt, **options})
        return self.reply(prompt, 0)

    def reply(self, question: str, turns: int) -> Generation:
        if question == "overflow":
            raise ResourceError("the prompt has 99 tokens: the context holds 64; shorten it or set a larger --ctx")
        if question == "crash":
            raise RuntimeError("wires\x1b[2J crossed")
        if question == "interrupt":
            raise KeyboardInterrupt
        pieces = iter(self.replies[question]) if question in self.replies else replies(question, turns)
        generation = Generation(pieces, self.stop_reasons.get(question, "eos"), 10 * turns)
        self.generations.append(generation)
        return generation


def module() -> ModuleType:
    """A module llmq.model whose load() keeps the models it makes in `loaded`; `prepare` may change each."""
    fake = ModuleType("llmq.model")
    fake.loaded = []
    fake.prepare = lambda _model: None

    def load(name_or_path: str, **options: Any) -> Model:
        model = Model(resolve(name_or_path), options)
        fake.prepare(model)
        fake.loaded.append(model)
        return model

    fake.load = load
    fake.Model = Model
    return fake


if __name__ == "__main__":
    from cli.main import main

    sys.modules["llmq.model"] = module()
    main()
