"""A reply, token by token: read the prompt, then sample, show, and feed back, until something ends it."""

import time
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np

from llmq.draft import Lookup
from llmq.sampler import Sampling, sample
from llmq.tokenizer import Tokenizer


@dataclass(frozen=True, slots=True)
class Stats:
    """Counts in tokens, times in seconds; compiling is in neither time.

    `reused_tokens` of the prompt were cached; `tokens` were read back in `decode_seconds`, one fewer than were made
    where the reply was cut. With lookup, `drafted` tokens were guessed and read ahead, and `accepted` of them stayed.
    """

    prompt_tokens: int = 0
    reused_tokens: int = 0
    prefill_seconds: float = 0.0
    tokens: int = 0
    decode_seconds: float = 0.0
    drafted: int = 0
    accepted: int = 0


class Context(Protocol):
    """What a reply needs of a model: one conversation that can be continued."""

    @property
    def tokenizer(self) -> Tokenizer: ...

    @property
    def room(self) -> int:
        """Positions left in the context."""

    def start(self, ids: Sequence[int]) -> int:
        """Go back to where the cache and `ids` part; the number of ids that stay cached."""

    def read(self, ids: Sequence[int], n_last: int = 1) -> np.ndarray:
        """Append ids; logits f32 [n_last, vocab_size] after each of the last `n_last`."""

    def take_back(self, n: int) -> None:
        """Remove the last `n` ids of those that the last `read` appended, but not all of them."""


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
        lookup: bool = False,
    ) -> None:
        self.ids: list[int] = []
        self.stop_reason = "interrupted"
        self.stats = Stats(prompt_tokens=len(prompt))
        self._context = context
        self._sampling = sampling
        self._max_tokens = max_tokens
        self._lookup = lookup
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
        """Read a token and what may follow it, sample row after row while the guess was right, take the rest back.

        This is speculative sampling (Leviathan et al. 2023, arXiv 2211.17192) with a draft that is certain of one
        token: there, such a token is kept with its probability under the model, and otherwise one is drawn from the
        others. Drawing from the model and comparing does the same in one step; it also uses the random numbers of
        plain decoding, one a token, so that a seed gives the same reply with lookup and without.
        """
        rng = np.random.default_rng(self._sampling.seed)
        seen, draft = list(prompt), list[int]()
        lookup = Lookup(seen) if self._lookup else None
        rows = self._read_prompt(prompt)
        while self.stop_reason == "interrupted":
            accepted = 0
            try:
                for accepted, logits in enumerate(rows):
                    token = sample(logits, self._sampling, seen, rng)
                    seen.append(token)
                    ready = self._take(token, stop, len(draft) - accepted)
                    if ready:
                        yield ready
                    if self.stop_reason != "interrupted" or accepted == len(draft) or token != draft[accepted]:
                        break
            finally:  # also when nobody asks for more: what stays cached is the reply
                self._settle(len(draft), accepted)
            if self.stop_reason == "interrupted":
                limit = min(self._context.room, self._max_tokens - len(self.ids)) - 1
                draft = lookup.draft(limit) if lookup else []
                rows = self._read_tokens([token, *draft])
        if self.stop_reason != "stop":
            rest, found = stop.flush(self._decoder.flush())
            if found:
                self.stop_reason = "stop"
            if rest:
                yield rest

    def _take(self, token: int, stop: "StopTexts", ahead: int) -> str:
        """Adds a token to the reply, notes if that ends it, and returns the text that can be shown.

        `ahead`: how many ids the context holds beyond the one that this token follows.
        """
        if token == self._context.tokenizer.eos_id:
            self.stop_reason = "eos"
            return ""
        self.ids.append(token)
        ready, found = stop.feed(self._decoder.feed(token))
        if found:
            self.stop_reason = "stop"
        elif len(self.ids) >= self._max_tokens:
            self.stop_reason = "length"
        elif self._context.room + ahead == 0:
            self.stop_reason = "context"
        return ready

    def _settle(self, drafted: int, accepted: int) -> None:
        if drafted:
            self._context.take_back(drafted - accepted)
            old = self.stats
            self.stats = replace(
                old, tokens=old.tokens + accepted, drafted=old.drafted + drafted, accepted=old.accepted + accepted
            )

    def _read_prompt(self, prompt: list[int]) -> np.ndarray:
        start = time.perf_counter()
        reused = self._context.start(prompt)
        logits = self._context.read(prompt[reused:])
        self.stats = Stats(len(prompt), reused, time.perf_counter() - start)
        return logits

    def _read_tokens(self, ids: list[int]) -> np.ndarray:
        start, old = time.perf_counter(), self.stats
        logits = self._context.read(ids, len(ids))
        taken = old.decode_seconds + time.perf_counter() - start
        self.stats = replace(old, tokens=old.tokens + 1, decode_seconds=taken)
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
