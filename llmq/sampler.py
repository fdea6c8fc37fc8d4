"""Choosing the next token from logits: pure functions, an explicit random generator, float64 throughout.

The order is llama.cpp's default: repetition penalty, top-k, top-p, min-p, temperature. Top-p and min-p therefore see
the probabilities at temperature 1, and the temperature only reshapes what they left.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from llmq.errors import FileFormatError, UsageError

NOT_NUMBERS = "the model computed values that are not numbers; its file is probably damaged"


@dataclass(frozen=True, slots=True)
class Sampling:
    """How to choose. 0 turns off top_k, min_p and penalty_last_n, 1 turns off top_p and repetition_penalty.

    temperature 0 takes the most likely token; seed None draws a new one. Raises UsageError for values out of range.
    """

    temperature: float = 0.7
    top_k: int = 0
    top_p: float = 0.95
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    penalty_last_n: int = 64
    seed: int | None = None

    def __post_init__(self) -> None:
        _check("temperature", self.temperature, 0, 100)
        _check("top_k", self.top_k, 0)
        _check("top_p", self.top_p, 0, 1)
        _check("min_p", self.min_p, 0, 1)
        _check("repetition_penalty", self.repetition_penalty, 0.01, 100)
        _check("penalty_last_n", self.penalty_last_n, 0)
        _check("seed", self.seed or 0, 0)


def _check(name: str, value: float, low: float, high: float = math.inf) -> None:
    if not low <= value <= high:  # a NaN fails too
        wanted = f"at least {low:g}" if math.isinf(high) else f"from {low:g} to {high:g}"
        raise UsageError(f"{name} is {value}; it must be {wanted}")


def sample(logits: np.ndarray, sampling: Sampling, recent: Sequence[int], rng: np.random.Generator) -> int:
    """Id of the next token.

    logits: float32 [n_vocab], left as they are; -inf bars a token. recent: the ids so far, of which the last
    penalty_last_n are made less likely. Equal logits count in order of id. With temperature 0, or when one token is
    left, `rng` is not used. Raises FileFormatError when no logit is finite or one is NaN or +inf.
    """
    scores = logits.astype(np.float64)
    _penalize(scores, sampling, recent)
    best = int(np.argmax(scores))  # a NaN if there is one
    if not math.isfinite(scores[best]):
        raise FileFormatError(NOT_NUMBERS)
    if sampling.temperature == 0:
        return best
    scores -= scores[best]
    ids = np.flatnonzero(scores > -np.inf)
    if sampling.top_k:
        ids = ids[_top_k(scores[ids], sampling.top_k)]
    if sampling.top_p < 1:
        ids = ids[_top_p(scores[ids], sampling.top_p)]
    if sampling.min_p > 0:
        ids = ids[scores[ids] >= math.log(sampling.min_p)]
    return int(ids[_draw(scores[ids], sampling.temperature, rng)]) if len(ids) > 1 else best


def _penalize(scores: np.ndarray, sampling: Sampling, recent: Sequence[int]) -> None:
    """The penalty of CTRL (arXiv 1909.05858), once per distinct recent id; positive and negative scores both fall."""
    if sampling.repetition_penalty == 1 or sampling.penalty_last_n == 0:
        return
    seen = np.unique(np.asarray(recent[-sampling.penalty_last_n :], np.int64))
    values = scores[seen]
    scores[seen] = np.where(values > 0, values / sampling.repetition_penalty, values * sampling.repetition_penalty)


def _top_k(scores: np.ndarray, k: int) -> np.ndarray:
    """Ascending indices of the k highest scores."""
    if k >= len(scores):
        return np.arange(len(scores))
    threshold = np.partition(scores, -k)[-k]
    above, equal = np.flatnonzero(scores > threshold), np.flatnonzero(scores == threshold)
    return np.sort(np.concatenate([above, equal[: k - len(above)]]))


def _top_p(scores: np.ndarray, p: float) -> np.ndarray:
    """Ascending indices of the fewest scores, highest first, whose probabilities reach p together."""
    weights = np.exp(scores)
    wanted = p * weights.sum()
    # All weights below the mean of the unwanted mass add up to less than that mass: the rest reaches p without them,
    # and only the rest needs sorting. Half of it, to be far from rounding.
    heavy = np.flatnonzero(weights >= 0.5 * (1 - p) * weights.sum() / len(weights))
    needed = int(np.searchsorted(np.cumsum(np.sort(weights[heavy])[::-1]), wanted)) + 1
    return heavy[_top_k(scores[heavy], needed)]


def _draw(scores: np.ndarray, temperature: float, rng: np.random.Generator) -> int:
    """Index drawn with probability softmax(scores / temperature); the highest score is 0."""
    with np.errstate(over="ignore"):  # a temperature next to 0 sends all but the best to -inf
        cumulative = np.cumsum(np.exp(scores / temperature))
    return int(np.searchsorted(cumulative, rng.random() * cumulative[-1], side="right"))
