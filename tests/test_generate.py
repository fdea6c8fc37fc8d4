"""The loop around a model: stop texts, reasons to stop, seeds, interrupts. A script of ids stands in for the model."""

from collections.abc import Sequence
from functools import cache
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import vocabulary

from llmq.generate import Generation, StopTexts
from llmq.sampler import Sampling
from llmq.tokenizer import Tokenizer, load_tokenizer

GREEDY = Sampling(temperature=0)


# ---- stop texts
def naive_stop(text: str, stops: Sequence[str]) -> tuple[str, bool]:
    """Letter by letter: the text up to the first stop text to be complete (the longest, of two that end together)."""
    for end in range(1, len(text) + 1):
        found = [end - len(stop) for stop in stops if stop and text[:end].endswith(stop)]
        if found:
            return text[: min(found)], True
    return text, False


def watched(pieces: Sequence[str], stops: Sequence[str]) -> tuple[str, bool]:
    watcher, shown = StopTexts(stops), ""
    for piece in pieces:
        ready, found = watcher.feed(piece)
        shown += ready
        if found:
            return shown, True
    rest, found = watcher.flush("")
    return shown + rest, found


few_letters = st.text("ab", max_size=12)


@settings(deadline=None, max_examples=1500)
@given(pieces=st.lists(few_letters, max_size=8), stops=st.lists(st.text("ab", max_size=4), max_size=3))
def test_stop_texts_do_not_depend_on_pieces(pieces: list[str], stops: list[str]) -> None:
    assert watched(pieces, stops) == naive_stop("".join(pieces), stops)


def test_what_may_become_a_stop_text_is_held_back() -> None:
    watcher = StopTexts(["</end>", "STOP"])
    assert watcher.feed("one <") == ("one ", False)
    assert watcher.feed("/en") == ("", False)
    assert watcher.feed("tity") == ("</entity", False)
    assert watcher.feed("S") == ("", False)
    assert watcher.flush("T") == ("ST", False)


def test_the_last_piece_may_complete_a_stop_text() -> None:
    watcher = StopTexts(["\ufffd!"])
    assert watcher.feed("a\ufffd") == ("a", False)
    assert watcher.flush("! b") == ("", True)


# ---- the loop
@cache
def tokenizer() -> Tokenizer:
    metadata = vocabulary(512)
    return load_tokenizer(metadata | {"tokenizer.ggml.tokens": [t.encode() for t in metadata["tokenizer.ggml.tokens"]]})


class Script:
    """A conversation whose most likely tokens are given; it notes what it is asked to read."""

    def __init__(self, ids: Sequence[int], n_ctx: int = 1000, breaks_at: int = -1) -> None:
        self.tokenizer, self.ids, self.n_ctx, self.breaks_at = tokenizer(), list(ids), n_ctx, breaks_at
        self.given: list[list[int]] = []
        self.length = 0

    @property
    def room(self) -> int:
        return self.n_ctx - self.length

    def start(self, ids: Sequence[int]) -> int:
        self.length = min(2, len(ids) - 1)
        return self.length

    def read(self, ids: Sequence[int], n_last: int = 1) -> np.ndarray:
        assert n_last == 1, "nothing is guessed unless it is asked for"
        if len(self.given) == self.breaks_at:
            raise KeyboardInterrupt
        assert len(ids) <= self.room, "the context is overrun"
        self.given.append(list(ids))
        self.length += len(ids)
        logits = np.zeros((1, self.tokenizer.n_vocab), np.float32)
        logits[0, self.ids[len(self.given) - 1]] = 5
        return logits

    def take_back(self, n: int) -> None:
        raise AssertionError(f"{n} ids that were not guessed are taken back")


def reply(script: Script, **options: Any) -> Generation:
    settings_ = {"sampling": GREEDY, "max_tokens": 100, "stop": (), "continues": True, **options}
    return Generation(script, [1, 300, 301, 302], **settings_)


def ids_of(text: str) -> list[int]:
    return tokenizer().encode(text, dummy_prefix=False)


EOS = 2


def test_end_of_text() -> None:
    script = Script([*ids_of(" the end"), EOS])
    made = reply(script)
    assert "".join(made) == " the end"
    assert made.ids == ids_of(" the end"), "the end token is not part of the reply"
    assert made.stop_reason == "eos"
    assert (made.stats.prompt_tokens, made.stats.reused_tokens) == (4, 2)
    assert made.stats.tokens == len(made.ids)
    assert script.given[0] == [301, 302], "what is cached is not read again"
    assert script.given[1:] == [[i] for i in made.ids]


@pytest.mark.parametrize("limit", [1, 2, 5])
def test_as_many_tokens_as_asked_for(limit: int) -> None:
    script = Script(ids_of("abcdefghij"))
    made = reply(script, max_tokens=limit)
    assert "".join(made) == tokenizer().decode(ids_of("abcdefghij")[:limit], dummy_prefix=False)
    assert (len(made.ids), made.stop_reason) == (limit, "length")
    assert len(script.given) == limit, "the last token is not read: nothing comes after it"


def test_a_full_context() -> None:
    """Ten positions, four of the prompt: six more are read, and the seventh token needs none."""
    made = reply(Script(ids_of("q" * 40), n_ctx=10))
    list(made)
    assert (len(made.ids), made.stop_reason) == (7, "context")


def test_a_prompt_that_fills_the_context() -> None:
    made = reply(Script(ids_of("q" * 40), n_ctx=4))
    assert "".join(made) == "q"
    assert made.stop_reason == "context"


def test_a_stop_text_across_tokens() -> None:
    ids = ids_of("one, two; three, four")
    made = reply(Script([*ids, EOS]), stop=["zzz", "o; th"])
    assert "".join(made) == "one, tw"
    assert made.stop_reason == "stop"
    assert len(made.ids) < len(ids)


def test_half_a_character_is_shown_at_the_end_only() -> None:
    byte = {b: 3 + b for b in range(256)}
    euro = [byte[b] for b in "€".encode()]
    assert list(reply(Script([*euro, EOS]))) == ["€"]
    assert list(reply(Script([*euro[:2], EOS]))) == ["\ufffd\ufffd"]


def test_the_leading_space_of_a_reply() -> None:
    ids = [*tokenizer().encode("the"), EOS]
    assert "".join(reply(Script(ids), continues=False)) == "the"
    assert "".join(reply(Script(ids), continues=True)) == " the"


def test_closing_early() -> None:
    script = Script(ids_of("abcdefgh"))
    made = reply(script)
    next(made)
    made.close()
    assert made.stop_reason == "interrupted"
    assert list(made) == []
    assert len(script.given) == 1, "nothing is computed that nobody asked for"


@pytest.mark.parametrize("at", [0, 1, 3])
def test_an_interrupt_passes_through(at: int) -> None:
    made = reply(Script(ids_of("abcdefgh"), breaks_at=at))
    with pytest.raises(KeyboardInterrupt):
        list(made)
    assert made.stop_reason == "interrupted"
    assert len(made.ids) == at


def test_seeds() -> None:
    """One seed, one reply; other seeds, others. Logits of 5 against 511 zeros: now and then something else is drawn."""
    warm = lambda seed: Sampling(temperature=2, top_p=1, seed=seed)  # noqa: E731
    texts = ["".join(reply(Script([300] * 30), sampling=warm(seed), max_tokens=30)) for seed in (1, 1, 2, 3)]
    assert texts[0] == texts[1]
    assert len(set(texts)) == 3


def test_the_repetition_penalty_sees_prompt_and_reply() -> None:
    """Token 300 stands in the prompt, so that an equal one without a penalty wins; then that one has been used too."""

    class Two(Script):
        def read(self, ids: Sequence[int], n_last: int = 1) -> np.ndarray:
            logits = super().read(ids, n_last)
            logits[0, [300, 310]] = 5
            return logits

    made = reply(Two([300] * 9), sampling=Sampling(temperature=0, repetition_penalty=1.5), max_tokens=3)
    list(made)
    assert made.ids[0] == 310
    assert made.ids[1] == 300, "both penalized: the first of equals"
