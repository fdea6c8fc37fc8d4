"""Sampler against a twin of loops over Python numbers, and against the distribution that it claims to draw from."""

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmq.errors import FileFormatError, UsageError
from llmq.sampler import Sampling, sample

OFF = Sampling(temperature=1.0, top_p=1.0)
LOGIT = st.floats(-30, 30, width=32) | st.integers(-3, 3).map(float) | st.just(-math.inf)


def survivors(logits: Sequence[float], sampling: Sampling, recent: Sequence[int]) -> list[tuple[int, float]]:
    """(id, logit minus the highest) of the tokens that may be drawn, by falling logit, then by id."""
    scores = [float(x) for x in logits]
    if sampling.penalty_last_n:
        for i in set(recent[-sampling.penalty_last_n :]):
            rate = sampling.repetition_penalty
            scores[i] = scores[i] / rate if scores[i] > 0 else scores[i] * rate
    top = max(scores)
    kept = sorted(((i, s - top) for i, s in enumerate(scores) if s > -math.inf), key=lambda pair: (-pair[1], pair[0]))
    if sampling.top_k:
        kept = kept[: sampling.top_k]
    if sampling.top_p < 1:
        total = sum(math.exp(s) for _, s in kept)
        reached, nucleus = 0.0, []
        for pair in kept:
            nucleus.append(pair)
            reached += math.exp(pair[1])
            if reached >= sampling.top_p * total:
                break
        kept = nucleus
    if sampling.min_p:
        kept = [(i, s) for i, s in kept if s >= math.log(sampling.min_p)]
    return kept


def naive_sample(logits: Sequence[float], sampling: Sampling, recent: Sequence[int], rng: np.random.Generator) -> int:
    kept = survivors(logits, sampling, recent)
    if sampling.temperature == 0 or len(kept) == 1:
        return kept[0][0]
    kept.sort()
    weights = [math.exp(s / sampling.temperature) for _, s in kept]
    target, reached = rng.random() * sum(weights), 0.0
    for (i, _), weight in zip(kept, weights, strict=True):
        reached += weight
        if reached > target:
            return i
    raise AssertionError("the weights do not add up")


def draws(sampling: Sampling, logits: Sequence[float], recent: Sequence[int] = (), n: int = 400) -> list[int]:
    rng = np.random.default_rng(sampling.seed)
    array = np.array(logits, np.float32)
    return [sample(array, sampling, recent, rng) for _ in range(n)]


@settings(max_examples=500, deadline=None)
@given(
    logits=st.lists(LOGIT, min_size=1, max_size=60).filter(lambda xs: max(xs) > -math.inf),
    temperature=st.sampled_from([0.0, 1e-300, 0.1, 0.7, 1.0, 1.7, 100.0]),
    top_k=st.integers(0, 70),
    top_p=st.integers(0, 100).map(lambda n: n / 100) | st.just(0.9999),
    min_p=st.integers(0, 100).map(lambda n: n / 100),
    penalty=st.sampled_from([1.0, 1.3, 0.8, 100.0]),
    last_n=st.integers(0, 8),
    data=st.data(),
)
def test_draws_as_the_twin(
    logits: list[float],
    temperature: float,
    top_k: int,
    top_p: float,
    min_p: float,
    penalty: float,
    last_n: int,
    data: st.DataObject,
) -> None:
    sampling = Sampling(temperature, top_k, top_p, min_p, penalty, last_n)
    recent = data.draw(st.lists(st.integers(0, len(logits) - 1), max_size=10))
    array = np.array(logits, np.float32)
    before = array.copy()
    ours, twin = np.random.default_rng(3), np.random.default_rng(3)
    for _ in range(4):
        assert sample(array, sampling, recent, ours) == naive_sample(array.tolist(), sampling, recent, twin)
    assert np.array_equal(array, before)


@pytest.mark.parametrize("spread", [0.1, 3.0])
@pytest.mark.parametrize("sampling", [Sampling(), Sampling(top_k=40), Sampling(top_p=1.0), Sampling(min_p=0.05)])
def test_draws_as_the_twin_from_a_whole_vocabulary(sampling: Sampling, spread: float) -> None:
    logits = (np.random.default_rng(8).standard_normal(32_000) * spread).astype(np.float32)
    ours, twin = np.random.default_rng(4), np.random.default_rng(4)
    for _ in range(3):
        assert sample(logits, sampling, [1, 2], ours) == naive_sample(logits.tolist(), sampling, [1, 2], twin)


@pytest.mark.parametrize(
    ("sampling", "probabilities"),
    [
        (OFF, [1 / 10, 2 / 10, 3 / 10, 4 / 10]),
        (replace(OFF, temperature=0.5), [1 / 30, 4 / 30, 9 / 30, 16 / 30]),
        (replace(OFF, top_k=2), [0, 0, 3 / 7, 4 / 7]),
        (replace(OFF, top_p=0.8), [0, 2 / 9, 3 / 9, 4 / 9]),
        (replace(OFF, min_p=0.6), [0, 0, 3 / 7, 4 / 7]),
        (replace(OFF, temperature=0.5, top_p=0.65), [0, 0, 9 / 25, 16 / 25]),
    ],
)
def test_frequencies_follow_the_distribution(sampling: Sampling, probabilities: list[float]) -> None:
    n = 20_000
    drawn = draws(replace(sampling, seed=11), [math.log(w) for w in (1, 2, 3, 4)], n=n)
    counts = [drawn.count(i) for i in range(4)]
    assert [c > 0 for c in counts] == [p > 0 for p in probabilities]
    chi_square = sum((c - n * p) ** 2 / (n * p) for c, p in zip(counts, probabilities, strict=True) if p)
    assert chi_square < 16.3  # one in a thousand at three degrees of freedom


@pytest.mark.parametrize(
    "change",
    [
        {"temperature": 0.0},
        {"temperature": 3.0},
        {"top_k": 2},
        {"top_p": 0.5},
        {"min_p": 0.5},
        {"repetition_penalty": 1.5},
        {"seed": 2},
    ],
)
def test_every_parameter_changes_the_draws(change: dict[str, Any]) -> None:
    base = Sampling(temperature=1.0, top_p=0.99, seed=1)
    logits, recent = [2.0, 1.5, 1.0, -0.5, -1.0], [0, 1, 3]
    assert draws(base, logits, recent) == draws(base, logits, recent)
    assert draws(replace(base, **change), logits, recent) != draws(base, logits, recent)


def test_penalty_counts_only_the_last_n_and_each_token_once() -> None:
    logits = [2.0, 1.9, -1.0]
    greedy = Sampling(temperature=0, repetition_penalty=1.1, penalty_last_n=2)
    assert draws(greedy, logits, [0, 2, 2], n=1) == [0]
    assert draws(greedy, logits, [0, 0], n=1) == [1]
    assert draws(greedy, [2.0, 1.7], [0, 0], n=1) == [0]  # 2 / 1.1 > 1.7 > 2 / 1.1 / 1.1
    assert draws(replace(greedy, penalty_last_n=0), logits, [0, 0], n=1) == [0]
    assert draws(greedy, [-1.0, -1.05], [0], n=1) == [1]
    assert draws(greedy, logits, [], n=1) == [0]


def test_greedy_takes_the_first_of_equals_and_no_random_number() -> None:
    rng = np.random.default_rng(5)
    assert sample(np.array([0, 7, 7, -1], np.float32), Sampling(temperature=0), [], rng) == 1
    assert sample(np.array([0, 7, 1], np.float32), Sampling(top_k=1), [], rng) == 1
    assert rng.random() == np.random.default_rng(5).random()


def test_top_k_of_equals_takes_the_lowest_ids() -> None:
    assert set(draws(replace(OFF, top_k=3, seed=1), [1.0] * 10)) == {0, 1, 2}
    assert set(draws(replace(OFF, top_k=3, seed=1), [0.0, 1.0, 1.0, 2.0, 1.0])) == {1, 2, 3}


def test_edges_of_the_parameters() -> None:
    logits = [1.0, 3.0, 2.0, -math.inf]
    assert set(draws(replace(OFF, top_k=1000, seed=1), logits, n=2000)) == {0, 1, 2}
    assert set(draws(replace(OFF, top_p=0.0, seed=1), logits)) == {1}
    assert set(draws(replace(OFF, min_p=1.0, seed=1), logits)) == {1}
    assert set(draws(replace(OFF, temperature=5e-324, seed=1), logits)) == {1}
    assert set(draws(replace(OFF, temperature=100.0, seed=1), [80.0, -math.inf, 80.0])) == {0, 2}
    assert draws(OFF, [-math.inf, 0.0, -math.inf], n=3) == [1, 1, 1]
    assert draws(OFF, [5.0], n=1) == [0]


class Fixed(np.random.Generator):
    """A generator that gives one number only."""

    def __init__(self, value: float) -> None:
        super().__init__(np.random.PCG64(0))
        self.value = value

    def random(self) -> float:  # type: ignore[override]
        return self.value


@pytest.mark.parametrize(("drawn", "expected"), [(0.0, 1), (0.5, 2), (math.nextafter(1, 0), 2)])
def test_a_token_of_no_weight_is_never_drawn(drawn: float, expected: int) -> None:
    logits = np.array([-800, 0, 0, -800], np.float32)  # exp(-800) is 0
    assert sample(logits, OFF, [], Fixed(drawn)) == expected


@pytest.mark.parametrize("temperature", [0.0, 0.7])
@pytest.mark.parametrize(
    "logits", [[0.0, math.nan, 1.0], [1.0, math.inf], [-math.inf, -math.inf], [math.nan, -math.inf], [math.inf] * 2]
)
def test_broken_logits_are_refused(logits: list[float], temperature: float) -> None:
    with pytest.raises(FileFormatError, match="not numbers"):
        draws(Sampling(temperature=temperature), logits, n=1)


@pytest.mark.parametrize(
    "bad",
    [
        {"temperature": -0.1},
        {"temperature": math.nan},
        {"temperature": math.inf},
        {"top_k": -1},
        {"top_p": 1.1},
        {"top_p": -0.1},
        {"min_p": math.nan},
        {"min_p": 2.0},
        {"repetition_penalty": 0.0},
        {"repetition_penalty": math.inf},
        {"penalty_last_n": -1},
        {"seed": -1},
    ],
)
def test_values_out_of_range_are_refused(bad: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match=next(iter(bad))):
        Sampling(**bad)
