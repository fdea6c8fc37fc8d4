"""Means and shares with 95 % confidence intervals, of values that were measured chunk by chunk.

Values are arrays [n_chunks, n], a row for each chunk of text. The positions of a chunk read the same text, so they are
no independent samples: from 8 chunks on, the chunks are what is sampled. With fewer, positions are, and the interval is
rather too narrow.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np

ENOUGH_CHUNKS = 8
Z = NormalDist().inv_cdf(0.975)


@dataclass(frozen=True, slots=True)
class Estimate:
    """A value, and the ends of its 95 % confidence interval."""

    value: float
    low: float
    high: float

    def map(self, function: Callable[[float], float]) -> "Estimate":
        """The same of a rising function of the value."""
        return Estimate(function(self.value), function(self.low), function(self.high))


def mean(values: np.ndarray) -> Estimate:
    """Mean of values [n_chunks, n], with Student's t times the standard error of the samples on either side."""
    samples = values.mean(axis=1) if len(values) >= ENOUGH_CHUNKS else values.ravel()
    middle = float(samples.mean())
    margin = student_t(samples.size - 1) * float(samples.std(ddof=1)) / math.sqrt(samples.size)
    return Estimate(middle, middle - margin, middle + margin)


def share(hits: np.ndarray) -> Estimate:
    """Share of what is true in hits, bool [n_chunks, n], with Wilson's interval.

    (E. B. Wilson 1927.) Where chunks are the samples, the number of positions is divided by the design effect (L. Kish
    1965): how many times the variance of the chunks' shares is that of independent positions, and 1 at the least.
    """
    p, n = float(hits.mean()), float(hits.size)
    if len(hits) >= ENOUGH_CHUNKS and 0 < p < 1:
        n /= max(1.0, float(hits.mean(axis=1).var(ddof=1)) * hits.shape[1] / (p * (1 - p)))
    centre = (p + Z**2 / (2 * n)) / (1 + Z**2 / n)
    margin = Z / (1 + Z**2 / n) * math.sqrt(p * (1 - p) / n + Z**2 / (4 * n**2))
    return Estimate(p, min(p, centre - margin), max(p, centre + margin))  # rounding aside, p is inside


def student_t(freedom: int) -> float:
    """The 97.5 % point of Student's t, to 0.1 % from 7 degrees of freedom on.

    The expansion about the normal distribution (Abramowitz and Stegun, 26.7.5).
    """
    z2 = Z**2
    return Z * (
        1
        + (z2 + 1) / (4 * freedom)
        + (5 * z2**2 + 16 * z2 + 3) / (96 * freedom**2)
        + (3 * z2**3 + 19 * z2**2 + 17 * z2 - 15) / (384 * freedom**3)
    )
