"""A reply, token by token: read the prompt, then sample, show, and feed back, until something ends it."""

import time
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from llmq.sampler import Sampling, sample
from llmq.tokenizer import Tokenizer


@dataclass(frozen=True, slots=True)
class Stats:
    """Counts in tokens, times in seconds; compiling is in neither time.

    `reused_tokens` of the prompt were cached; `tokens` were read back in `decode_seconds`, one fewer than were made
    where the reply was cut.
    """

    prompt_tokens: int = 0
    reused_tokens: int = 0
    prefill_seconds: float = 0.0
    tokens: int = 0
    decode_seconds: float = 0.0


class Context(Protocol):
    """What a reply needs of a model: one conversation that can be continued."""

    @property
    def tokenizer(self) -> Tokenizer: ...

    @property
    def room(self) -> int:
        """Positions left in the context."""

    def start(self, ids: Sequence[int]) -> int:
        """Go back to where the cache and `ids` part; the number of ids that stay cached."""

    def read(self, ids: Sequence[int]) -> np.ndarray:
        """Append ids; logits f32 [vocab_size] after the last."""


class Generation:
    """An iterator of text pieces. What it made is in `ids`, how it ended in `stop_reason`, its figures in `stats`.

    stop_reason: "eos", "length" (max_tokens), "stop" (a stop text, which is not part of the pieces), "context" (full),
    or "interrupted" (closed early, or KeyboardInterrupt).
    """

    def __init__(
        self,
        context: Context,
        prompt: Sequence[int],
        *,
        sampling: Sampling,
        max_tokens: int,
        stop: Sequence[str],
        continues: bool,
    ) -> None:
        self.ids: list[int] = []
        self.stop_reason = "interrupted"
        self.stats = Stats(prompt_tokens=len(prompt))
        self._context = context
        self._sampling = sampling
        self._max_tokens = max_tokens
        # `continues`: the text goes on from the prompt's, so that a leading space counts.
        self._decoder = context.tokenizer.decoder(dummy_prefix=not continues)
        self._pieces = self._run(list(prompt), StopTexts(stop))

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        return next(self._pieces)

    def close(self) -> None:
        """End it here; what has been made stays in the cache."""
        self._pieces.close()

    def _run(self, prompt: list[int], stop: "StopTexts") -> Generator[str, None, None]:
        rng = np.random.default_rng(self._sampling.seed)
        logits = self._read_prompt(prompt)
        seen = list(prompt)
        while self.stop_reason == "interrupted":
            token = sample(logits, self._sampling, seen, rng)
            if token == self._context.tokenizer.eos_id:
                self.stop_reason = "eos"
                break
            self.ids.append(token)
            seen.append(token)
            ready, found = stop.feed(self._decoder.feed(token))
            if found:
                self.stop_reason = "stop"
            elif len(self.ids) >= self._max_tokens:
                self.stop_reason = "length"
            elif self._context.room == 0:
                self.stop_reason = "context"
            if ready:
                yield ready
            if self.stop_reason == "interrupted":
                logits = self._read_token(token)
        if self.stop_reason != "stop":
            rest, found = stop.flush(self._decoder.flush())
            if found:
                self.stop_reason = "stop"
            if rest:
                yield rest

    def _read_prompt(self, prompt: list[int]) -> np.ndarray:
        start = time.perf_counter()
        reused = self._context.start(prompt)
        logits = self._context.read(prompt[reused:])
        self.stats = Stats(len(prompt), reused, time.perf_counter() - start)
        return logits

    def _read_token(self, token: int) -> np.ndarray:
        start, old = time.perf_counter(), self.stats
        logits = self._context.read([token])
        taken = old.decode_seconds + time.perf_counter() - start
        self.stats = Stats(old.prompt_tokens, old.reused_tokens, old.prefill_seconds, old.tokens + 1, taken)
        return logits


class StopTexts:
    """Watches a text that comes in pieces for any of several texts, and holds back what may become one."""

    def __init__(self, texts: Sequence[str]) -> None:
        self._texts = [text for text in texts if text]
        self._held = ""

    def feed(self, piece: str) -> tuple[str, bool]:
        """What can be shown now, and whether a stop text was met; that one and all behind it are not shown.

        The one that is complete first counts, the longest of those, however the text was cut into pieces.
        """
        self._held += piece
        found = [(at + len(text), at) for text in self._texts if (at := self._held.find(text)) >= 0]
        if found:
            return self._held[: min(found)[1]], True
        keep = max((self._overlap(text) for text in self._texts), default=0)
        ready, self._held = self._held[: len(self._held) - keep], self._held[len(self._held) - keep :]
        return ready, False

    def flush(self, rest: str) -> tuple[str, bool]:
        """What is left to show at the end, and whether `rest` completed a stop text."""
        ready, found = self.feed(rest)
        return (ready, True) if found else (ready + self._held, False)

    def _overlap(self, text: str) -> int:
        """Length of the longest end of what is held that begins `text`."""
        longest = min(len(text) - 1, len(self._held))
        return next((n for n in range(longest, 0, -1) if self._held.endswith(text[:n])), 0)
