"""Prompt lookup: what is guessed, against a search of the whole text; and that guessing changes nothing but the time.

The reply loop runs on a model made of a table: logits that depend on the last two tokens, the same bits in a batch or
alone, so that replies with lookup and without can be compared token by token. `tests/test_lookup.py` has real models.
"""

import itertools
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from test_generate import tokenizer

from llmq.draft import LONG, N_GRAMS, SHORT, Lookup
from llmq.generate import Generation
from llmq.sampler import Sampling, sample

EOS = 2


# ---- what is guessed
def latest(ids: Sequence[int], n: int) -> int | None:
    """The position after the latest occurrence of the last n ids that is not their own, by looking at all of them;
    none if it is one id that has several.
    """
    places = [end for end in range(n, len(ids)) if ids[end - n : end] == ids[len(ids) - n :]]
    return places[-1] if places and (n > 1 or len(places) == 1) else None


def naive_copy(ids: Sequence[int]) -> tuple[int, int]:
    """Where the text goes on copying from, and for how long it has: token by token, from the rule in words."""
    source, agreed = 0, 0
    for end in range(1, len(ids) + 1):
        if agreed and ids[source] == ids[end - 1]:
            source, agreed = source + 1, agreed + 1
        else:
            agreed = 0
        for n in sorted(N_GRAMS, reverse=True):
            if n > agreed and end >= n and (place := latest(ids[:end], n)) is not None:
                source, agreed = place, n
    return source, agreed


def naive_draft(ids: Sequence[int], limit: int) -> list[int]:
    source, agreed = naive_copy(ids)
    text = list(ids)
    for i in range(min(0 if agreed == 0 else SHORT if agreed <= SHORT else LONG, limit)):
        text.append(text[source + i])
    return text[len(ids) :]


few_ids = st.lists(st.integers(0, 2), max_size=60) | st.lists(st.integers(0, 9), max_size=60)


@settings(deadline=None, max_examples=500)
@given(start=few_ids, parts=st.lists(few_ids, max_size=6), limit=st.integers(0, 9))
def test_drafts_equal_those_of_a_search(start: list[int], parts: list[list[int]], limit: int) -> None:
    """However the text was cut into pieces between two questions."""
    ids = list(start)
    lookup = Lookup(ids)
    for part in [[], *parts]:
        ids += part
        assert lookup.draft(limit) == naive_draft(ids, limit)


@settings(deadline=None)
@given(ids=few_ids)
def test_a_draft_has_stood_in_the_text(ids: list[int]) -> None:
    """Behind what is at the end of the text: one token before a short draft, four before a long one."""
    draft = Lookup(ids).draft(LONG)
    assert len(draft) in (0, SHORT, LONG)
    text = ids + draft
    n = len(draft) + (1 if len(draft) == SHORT else SHORT + 1)
    assert not draft or any(text[at : at + n] == text[-n:] for at in range(len(text) - n))


def test_drafts_grow_when_they_are_right_and_begin_short_again() -> None:
    ids = [*range(100, 140), 7, 100]
    lookup = Lookup(ids)
    found = []
    for right in (True, True, True, False, True, True):
        draft = lookup.draft(LONG)
        found.append(len(draft))
        following = ids.index(ids[-1]) + 1
        assert draft == ids[following : following + len(draft)]
        ids += [*draft, ids[following + len(draft)]] if right else [draft[0], 8, 130]
    assert found == [3, 7, 7, 7, 3, 7]


def test_the_latest_place_is_taken() -> None:
    assert Lookup([1, 2, 3, 5, 1, 2, 3, 6, 1, 2, 3]).draft(1) == [6]
    assert Lookup([9, 2, 3, 5, 5, 1, 2, 3, 6, 6, 9, 2, 3]).draft(1) == [5], "three tokens count for more than two"
    assert Lookup([4, 4, 4]).draft(9) == [4, 4, 4], "a copy may run into itself"
    assert Lookup([1, 2, 1]).draft(9) == [2, 1, 2]
    for nothing in ([], [1], [1, 2], [1, 2, 1, 3, 1], [1, 2, 3, 4, 5]):
        assert Lookup(nothing).draft(9) == []


# ---- the reply
class Table:
    """A model whose logits are a table of the last two tokens, and which knows what is cached."""

    def __init__(self, n: int, seed: int, n_ctx: int = 1000, sharpness: float = 3.0) -> None:
        self.tokenizer, self.n_ctx = tokenizer(), n_ctx
        self.words = [EOS, *range(300, 299 + n)]
        rng = np.random.default_rng(seed)
        self.table = rng.normal(0, sharpness, (n, n, n)).astype(np.float32)
        self.cached: list[int] = []
        self.reads: list[int] = []
        self.breaks_at = -1

    @property
    def room(self) -> int:
        return self.n_ctx - len(self.cached)

    def start(self, ids: Sequence[int]) -> int:
        pairs = zip(self.cached, ids[:-1], strict=False)
        same = len(list(itertools.takewhile(lambda pair: pair[0] == pair[1], pairs)))
        del self.cached[same:]
        return same

    def read(self, ids: Sequence[int], n_last: int = 1) -> np.ndarray:
        assert 0 < len(ids) <= self.room, "the context is overrun"
        assert n_last == 1 or len(ids) <= LONG + 1
        if len(self.reads) == self.breaks_at:
            raise KeyboardInterrupt
        self.reads.append(len(ids))
        self.cached += ids
        ends = range(len(self.cached) - n_last + 1, len(self.cached) + 1)
        return np.stack([self.logits(self.cached[:end]) for end in ends])

    def logits(self, ids: Sequence[int]) -> np.ndarray:
        row = np.full(self.tokenizer.n_vocab, -np.inf, np.float32)
        row[self.words] = self.table[self.words.index(ids[-2]) if len(ids) > 1 else 0, self.words.index(ids[-1])]
        return row

    def take_back(self, n: int) -> None:
        assert 0 <= n < self.reads[-1]
        del self.cached[len(self.cached) - n :]


def reply(table: Table, prompt: Sequence[int], **options: Any) -> Generation:
    settings_ = {"sampling": Sampling(seed=1), "max_tokens": 60, "stop": (), "continues": True, **options}
    return Generation(table, prompt, **settings_)


words = st.integers(300, 303)
samplings = st.builds(
    Sampling,
    temperature=st.sampled_from([0.0, 0.3, 1.0, 3.0]),
    top_k=st.sampled_from([0, 2]),
    top_p=st.sampled_from([1.0, 0.8]),
    repetition_penalty=st.sampled_from([1.0, 1.3]),
    penalty_last_n=st.sampled_from([2, 64]),
    seed=st.integers(0, 1000),
)


@settings(deadline=None, max_examples=400)
@given(
    prompt=st.lists(words, min_size=1, max_size=30),
    seed=st.integers(0, 50),
    sampling=samplings,
    max_tokens=st.integers(1, 60),
    room=st.integers(0, 60),
    stop=st.lists(st.lists(words, min_size=1, max_size=4), max_size=1),
)
def test_a_reply_is_the_same_with_lookup(
    prompt: list[int], seed: int, sampling: Sampling, max_tokens: int, room: int, stop: list[list[int]]
) -> None:
    """Its ids, its text, why it ended, and what stays cached: at the end of the text, of the tokens asked for and of
    the context, at a stop text, and under penalties that depend on what was said just before.
    """
    texts = [tokenizer().decode(ids, dummy_prefix=False) for ids in stop]
    found = []
    for lookup in (False, True):
        table = Table(5, seed, len(prompt) + room)
        made = reply(table, prompt, sampling=sampling, max_tokens=max_tokens, stop=texts, lookup=lookup)
        text = "".join(made)
        found.append((made.ids, text, made.stop_reason, table.cached))
        assert made.stats.tokens == len(table.cached) - len(prompt)
        assert made.stats.accepted == made.stats.tokens - (len(table.reads) - 1)
        assert made.stats.drafted == sum(table.reads[1:]) - (len(table.reads) - 1)
    assert found[0] == found[1]


def copying(run: Sequence[int], n_ctx: int = 1000) -> Table:
    """A model that says the words of a run, each after the one before."""
    table = Table(40, 0, n_ctx)
    for word, following in itertools.pairwise(run):
        table.table[:, table.words.index(word)] = 20 * (np.array(table.words) == following)
    return table


def test_accepted_runs() -> None:
    """Eight words make a step when all seven guesses are right, and the last one reads no more than can be of use."""
    loop = [300, 301, 302, 303]
    table = copying([*loop, 300])
    made = reply(table, loop * 2, max_tokens=50, lookup=True)
    list(made)
    assert table.reads[1:] == [8, 8, 8, 8, 8, 8, 1]
    assert made.stats.accepted == made.stats.drafted == 42
    assert made.stats.tokens == len(table.cached) - 8 == 49
    assert made.stop_reason == "length"


@pytest.mark.parametrize("length", range(1, 30))
@pytest.mark.parametrize("ending", ["eos", "stop", "length", "context"])
def test_each_end_within_an_accepted_run(ending: str, length: int) -> None:
    """At every place of a run: the end is where it is without lookup, and nothing behind it is cached."""
    run = [*range(300, 302 + length if ending == "eos" else 338), EOS]
    prompt = [*run, 300, 301]
    said = prompt[2 : 2 + length]
    options: dict[str, Any] = {}
    if ending == "stop":
        options["stop"] = [tokenizer().decode(said, dummy_prefix=False)]
    if ending == "length":
        options["max_tokens"] = length
    for lookup in (False, True):
        table = copying(run, len(prompt) + (length - 1 if ending == "context" else 100))
        made = reply(table, prompt, sampling=Sampling(temperature=0), lookup=lookup, **options)
        text = "".join(made)
        assert (made.ids, made.stop_reason) == (said, ending)
        assert text == ("" if ending == "stop" else tokenizer().decode(said, dummy_prefix=False))
        assert table.cached == prompt + said[: length if ending == "eos" else -1]
    assert made.stats.accepted == length - len(table.reads[1:]) - (ending != "eos")


@settings(deadline=None, max_examples=200)
@given(prompt=st.lists(words, min_size=4, max_size=20), seed=st.integers(0, 50), pieces=st.integers(1, 40))
def test_a_reply_that_is_closed_leaves_what_it_said(prompt: list[int], seed: int, pieces: int) -> None:
    """After any number of pieces the cache holds the prompt and the reply up to its last token, as without lookup."""
    table = Table(5, seed)
    made = reply(table, prompt, sampling=Sampling(temperature=0), lookup=True)
    shown = list(itertools.islice(made, pieces))
    made.close()
    assert table.cached in (prompt + made.ids, prompt + made.ids[:-1])
    assume(made.stop_reason == "interrupted")
    assert len(made.ids) == len(shown) == pieces
    assert table.cached == prompt + made.ids[:-1]
    rest = list(itertools.islice(reply(table, prompt + made.ids, sampling=Sampling(temperature=0), lookup=True), 9))
    whole = list(itertools.islice(reply(Table(5, seed), prompt, sampling=Sampling(temperature=0)), pieces + 9))
    assert shown + rest == whole


@pytest.mark.parametrize("at", range(6))
def test_an_interrupt_while_reading(at: int) -> None:
    """Nothing of the batch that was interrupted is cached, and all that was said before is."""
    prompt = [300, 301, 302, 303] * 3
    table = copying([*prompt, 300])
    table.breaks_at = at
    made = reply(table, prompt, lookup=True)
    with pytest.raises(KeyboardInterrupt):
        list(made)
    assert made.stop_reason == "interrupted"
    assert table.cached == (prompt + made.ids[:-1] if at else [])
    assert len(made.ids) == (8 * at - 7 if at else 0)


def test_an_interrupt_between_two_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C while a row is sampled: the rows behind it are taken back."""
    prompt = [300, 301] * 5
    whole = reply(Table(5, 3), prompt, lookup=True)
    list(whole)
    for calls in range(1, len(whole.ids)):
        count = itertools.count(1)

        def interrupted(*arguments: Any, calls: int = calls, count: Iterator[int] = count) -> int:
            if next(count) > calls:
                raise KeyboardInterrupt
            return sample(*arguments)

        monkeypatch.setattr("llmq.generate.sample", interrupted)
        table = Table(5, 3)
        made = reply(table, prompt, lookup=True)
        with pytest.raises(KeyboardInterrupt):
            list(made)
        assert made.ids == whole.ids[:calls]
        assert table.cached == prompt + made.ids


def exact(table: Table, prompt: list[int], length: int) -> dict[tuple[int, ...], float]:
    """Probability of each continuation of `length` tokens, from the table by the definition of softmax."""
    found: dict[tuple[int, ...], float] = {(): 1.0}
    for _ in range(length):
        longer = {}
        for said, probability in found.items():
            if said[-1:] == (EOS,):
                longer[said] = probability
                continue
            ids = [*prompt, *said]
            before, last = (table.words.index(word) for word in ids[-2:])
            weights = np.exp(table.table[before, last].astype(np.float64))
            for word, weight in zip(table.words, weights / weights.sum(), strict=True):
                longer[*said, word] = probability * weight
        found = longer
    return found


@pytest.mark.parametrize("lookup", [False, True])
def test_replies_have_the_distribution_of_the_model(lookup: bool) -> None:
    """Chi-square of 6,000 replies against exact probabilities, where drafts are often right and often wrong."""
    table = Table(3, 11, sharpness=1.0)
    prompt = [300, 301, 300, 301, 300, 300, 301, 301, 300, 301, 300]
    expected = exact(table, prompt, 5)
    assert len(expected) > 40
    assert sum(expected.values()) == pytest.approx(1)
    n, drafted, accepted = 6000, 0, 0
    counts: Counter[tuple[int, ...]] = Counter()
    for seed in range(n):
        table.cached, table.reads = [], []
        sampling = Sampling(temperature=1.0, top_p=1.0, seed=seed)
        made = reply(table, prompt, sampling=sampling, max_tokens=5, lookup=lookup)
        list(made)
        counts[tuple(made.ids) + ((EOS,) if made.stop_reason == "eos" else ())] += 1
        drafted, accepted = drafted + made.stats.drafted, accepted + made.stats.accepted
    assert not lookup or min(accepted, drafted - accepted) > n / 3
    likely = {said: p for said, p in expected.items() if n * p >= 5}
    rare = n * (1 - sum(likely.values()))
    square = sum((counts[said] - n * p) ** 2 / (n * p) for said, p in likely.items())
    square += (n - sum(counts[said] for said in likely) - rare) ** 2 / max(rare, 1)
    freedom = len(likely)
    # Wilson and Hilferty's normal approximation; 3.1 standard deviations are passed once in a thousand.
    deviations = ((square / freedom) ** (1 / 3) - (1 - 2 / (9 * freedom))) / (2 / (9 * freedom)) ** 0.5
    assert deviations < 3.1
