"""What the weight matrices of a model read while it worked through a text: which columns matter, and how much."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

# About 10,000 tokens of prose, talk, code, data and several languages.
DEFAULT_TEXT = Path(__file__).parent / "data" / "calibration.txt"
# An expert counts as if it had also read this many tokens of what all experts of its layer read on average.
BORROWED_TOKENS = 32
# The least importance of a column, as a share of the mean: a search for scales must not divide zero by zero.
LEAST_SHARE = 1e-6


@dataclass(frozen=True, slots=True)
class Inputs:
    """Sums over the tokens that a matrix read, for each of its experts (a dense matrix is one).

    `sum_squares` float32 [n_experts, n_cols]: the squares of each column's values. `counts` int64 [n_experts]: tokens.
    """

    sum_squares: np.ndarray
    counts: np.ndarray


@dataclass(frozen=True, slots=True)
class Calibration:
    """Inputs by tensor name; `dataset` names the text, which was read in `n_chunks` chunks of `chunk_size` tokens."""

    inputs: dict[str, Inputs]
    dataset: str
    n_chunks: int
    chunk_size: int

    def importance(self, name: str) -> np.ndarray:
        """Mean squares of what a matrix's columns read, float32 [n_experts, n_cols], all above 0.

        An expert that read few tokens borrows from the mean of all; a matrix that read nothing has ones. Raises
        KeyError for a tensor that is not in `inputs`.
        """
        inputs = self.inputs[name]
        sums, counts = inputs.sum_squares.astype(np.float64), inputs.counts[:, None]
        if not sums.any() or not counts.any():
            return np.ones(sums.shape, np.float32)
        mean = sums.sum(axis=0) / counts.sum()
        blended = (sums + BORROWED_TOKENS * mean) / (counts + BORROWED_TOKENS)
        return np.maximum(blended, LEAST_SHARE * blended.mean(axis=1, keepdims=True)).astype(np.float32)
