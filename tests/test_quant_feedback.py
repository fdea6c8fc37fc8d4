"""Rounding with error feedback, against its identities in NumPy and a twin in plain Python."""

import hashlib
from itertools import pairwise

import numpy as np
import pytest
from encoded import lcg_rows

from llmq.formats import IQ4_VALUES, IQ4_XS, Q2_K, Q4_0, Q4_K, Q6_K
from quant import feedback as module
from quant.feedback import DAMPING, Feedback, error_difference, prepare, round_rows, weighted_error
from quant.grid import GRIDS, TABLE, Grid
from quant.search import Found, blocks_of, search

SOME = pytest.mark.parametrize(
    "grid", [GRIDS[f] for f in (Q2_K, Q4_0, Q4_K, Q6_K, IQ4_XS)], ids=lambda g: g.format.name
)


def moments(n_blocks: int, n_samples: int = 1000, seed: int = 1) -> np.ndarray:
    """Second moments [n_blocks, 256, 256] of inputs that have much in common, of very different sizes."""
    rng = np.random.default_rng(seed)
    mixed = rng.standard_normal((n_blocks, n_samples, 20)) @ rng.standard_normal((n_blocks, 20, 256))
    inputs = (mixed + rng.standard_normal(mixed.shape)) * rng.lognormal(size=256)
    return inputs.swapaxes(1, 2) @ inputs / n_samples


def damped(h: np.ndarray) -> np.ndarray:
    """What `prepare` factors."""
    return h + np.eye(256) * DAMPING * np.trace(h, axis1=1, axis2=2)[:, None, None] / 256


def normal(n_rows: int, n_cols: int, seed: int = 5) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((n_rows, n_cols)).astype(np.float32)


def found(grid: Grid, rows: np.ndarray, known: Feedback) -> Found:
    return search(grid, rows, known.importance, rounds=3)


def scales_of(grid: Grid, params: Found) -> tuple[np.ndarray, np.ndarray]:
    """float64 [n, n_cols]: the step and the minimum of each weight."""
    blocks, shape = blocks_of(grid, params), params.levels.shape
    per_weight = lambda d, integers: np.repeat(d[:, None] * integers.astype(np.float64), grid.size, 1).reshape(shape)  # noqa: E731
    return per_weight(blocks.d, blocks.scales), per_weight(blocks.dmin, blocks.minima)


def product_errors(h: np.ndarray, e: np.ndarray) -> np.ndarray:
    """e^T H e of each row's blocks, [n, n_blocks]."""
    parts = e.reshape(len(e), len(h), 256)
    return np.einsum("nbi,bij,nbj->nb", parts, h, parts)


def test_factors_make_the_moments_again() -> None:
    h = moments(3)
    known = prepare(h)
    upper = known.forward.swapaxes(1, 2)
    assert not np.tril(upper).any()
    assert (known.importance > 0).all()
    ones = np.eye(256) + upper
    again = ones * known.importance.reshape(3, 1, 256) @ ones.swapaxes(1, 2)
    np.testing.assert_allclose(again, damped(h), rtol=0, atol=1e-5 * np.abs(h).max())
    own = np.diagonal(damped(h), axis1=1, axis2=2)[:, :, None]
    np.testing.assert_allclose(known.around, damped(h) / own - np.eye(256), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("scale", [0.0, 1e-30, 1e-12, 1.0, 1e12, 1e30])
@pytest.mark.parametrize("kind", ["one direction", "few tokens", "one column"])
def test_moments_that_say_little_are_enough(scale: float, kind: str) -> None:
    rng = np.random.default_rng(2)
    inputs = {
        "one direction": np.ones((1, 256)),
        "few tokens": rng.standard_normal((5, 256)),
        "one column": np.eye(1, 256, 77),
    }[kind]
    known = prepare((inputs.T @ inputs * scale)[None])
    assert all(np.isfinite(part).all() for part in (known.importance, known.forward, known.around))
    assert (known.importance > 0).all()
    rows = normal(3, 256)
    for grid in (GRIDS[Q4_K], GRIDS[Q4_0]):
        params = found(grid, rows, known)
        levels = round_rows(grid, rows, params.params, known)
        step, low = scales_of(grid, params)
        assert np.square(step * levels - low - rows).sum() < np.square(rows).sum() / 4


@SOME
def test_inputs_with_nothing_in_common_give_the_nearest_levels(grid: Grid) -> None:
    rows = normal(20, 768)
    known = prepare(np.stack([np.diag(np.random.default_rng(3).lognormal(size=256))] * 3))
    params = found(grid, rows, known)
    levels = round_rows(grid, rows, params.params, known)
    step, low = scales_of(grid, params)
    can_be = IQ4_VALUES if grid.spacing == TABLE else np.arange(grid.levels[0], grid.levels[1] + 1)
    assert np.isin(levels, can_be).all()
    least = np.abs(step * can_be[:, None, None] - low - rows).min(0)
    np.testing.assert_allclose(np.abs(step * levels - low - rows), least, rtol=0, atol=1e-5)
    np.testing.assert_array_equal(levels, params.levels)


@SOME
def test_products_have_less_error_and_sweeps_never_more(grid: Grid, monkeypatch: pytest.MonkeyPatch) -> None:
    rows, h = normal(37, 512), moments(2)
    known = prepare(h)
    params = found(grid, rows, known)
    step, low = scales_of(grid, params)

    def errors(levels: np.ndarray, h: np.ndarray) -> np.ndarray:
        return product_errors(h, step * levels - low - rows)

    by_sweeps = []
    for sweeps in (0, 1, 2, 5):
        monkeypatch.setattr(module, "SWEEPS", sweeps)
        by_sweeps.append(round_rows(grid, rows, params.params, known))
    assert errors(by_sweeps[0], h).sum() < 0.8 * errors(params.levels, h).sum()
    for before, after in pairwise(by_sweeps):
        assert (errors(after, damped(h)) <= errors(before, damped(h)) * (1 + 1e-5)).all()
    assert errors(by_sweeps[2], damped(h)).sum() < errors(by_sweeps[0], damped(h)).sum()


def naive_levels(grid: Grid, row: np.ndarray, step: np.ndarray, low: np.ndarray, h: np.ndarray) -> list[int]:
    """One row of 256: LDLQ with U from NumPy, then sweeps of the best level for each column, given the others."""
    can_be = [int(v) for v in IQ4_VALUES] if grid.spacing == TABLE else range(grid.levels[0], grid.levels[1] + 1)
    lower = np.linalg.cholesky(h[::-1, ::-1])[::-1, ::-1]
    upper = lower / np.diag(lower)
    levels, error = [0] * 256, np.zeros(256)

    def choose(k: int, target: float) -> None:
        levels[k] = min(can_be, key=lambda level: abs(step[k] * level - low[k] - target))
        error[k] = row[k] - (step[k] * levels[k] - low[k])

    for k in range(256):
        choose(k, row[k] + error[:k] @ upper[:k, k])
    for _ in range(module.SWEEPS):
        for k in range(256):
            choose(k, row[k] + (error @ h[k] - error[k] * h[k, k]) / h[k, k])
    return levels


@SOME
def test_levels_are_those_of_the_naive_twin(grid: Grid) -> None:
    rows, h = normal(3, 512), moments(2, seed=4)
    known = prepare(h)
    params = found(grid, rows, known)
    levels = round_rows(grid, rows, params.params, known)
    step, low = scales_of(grid, params)
    for row in range(3):
        for block, part in enumerate((slice(0, 256), slice(256, 512))):
            expected = naive_levels(grid, rows[row, part], step[row, part], low[row, part], damped(h)[block])
            # A tie in float32 that falls the other way changes a few levels after it.
            assert (levels[row, part] == expected).mean() > 0.9


@SOME
@pytest.mark.parametrize("n_rows", [1, 15, 16, 17, 33])
def test_a_row_does_not_depend_on_its_neighbours(grid: Grid, n_rows: int) -> None:
    rows, known = normal(n_rows, 512), prepare(moments(2))
    together = round_rows(grid, rows, found(grid, rows, known).params, known)
    for row in {0, n_rows // 2, n_rows - 1}:
        one = rows[row : row + 1]
        np.testing.assert_array_equal(round_rows(grid, one, found(grid, one, known).params, known), together[[row]])


def test_golden_levels() -> None:
    """The same on every processor. The factors are made by hand: those of a linear algebra library need not be."""
    rows = lcg_rows(17, 512)
    near = np.exp2(-np.abs(np.subtract.outer(np.arange(256), np.arange(256)))).astype(np.float32)
    forward, around = np.tril(near, -1), near - np.eye(256, dtype=np.float32)
    known = Feedback(np.ones(512, np.float32), np.stack([forward] * 2), np.stack([around] * 2))
    digest = hashlib.sha256()
    for grid in GRIDS.values():
        digest.update(round_rows(grid, rows, found(grid, rows, known).params, known).tobytes())
    assert digest.hexdigest()[:16] == GOLDEN


GOLDEN = "9fa84168749a1c52"


def test_errors_count_by_the_moments_of_what_they_are_multiplied_with() -> None:
    rng = np.random.default_rng(8)
    a, b = rng.standard_normal((2, 5, 512)).astype(np.float32)
    factors = rng.standard_normal((2, 256, 300))
    moments = (factors @ factors.swapaxes(1, 2) / 300).astype(np.float32)
    blocks = (x.reshape(5, 2, 256).astype(np.float64) for x in (a, b))
    expected = [np.einsum("rbi,bij,rbj->", x, moments, x) for x in blocks]
    assert weighted_error(a, moments) == pytest.approx(expected[0], rel=1e-5)
    assert error_difference(a, b, moments) == pytest.approx(expected[0] - expected[1], rel=1e-4)
    assert error_difference(b, a, moments) == pytest.approx(expected[1] - expected[0], rel=1e-4)
