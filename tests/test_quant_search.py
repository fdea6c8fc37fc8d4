"""The search against one in plain NumPy and float64, and what its joint rounds and importance must do."""

from itertools import pairwise

import numpy as np
import pytest
from encoded import decoded_search

from llmq.formats import IQ4_VALUES
from quant.grid import GRIDS, TABLE, Grid
from quant.search import MOST_GAIN, SAME_FIT, search

ALL = pytest.mark.parametrize("grid", GRIDS.values(), ids=lambda grid: grid.format.name)


def normal(n_rows: int, n_cols: int, seed: int = 1) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((n_rows, n_cols)).astype(np.float32)


def uneven(n_cols: int, seed: int = 2) -> np.ndarray:
    """An importance as of squares of activations."""
    return np.square(np.random.default_rng(seed).standard_normal(n_cols)).astype(np.float32)


def weights_of(rows: np.ndarray, importance: np.ndarray) -> np.ndarray:
    """What each squared error counts for, float64 [n, n_cols]."""
    return np.broadcast_to(importance.astype(np.float64), rows.shape)


def found(grid: Grid, rows: np.ndarray, importance: np.ndarray | None = None, *, rounds: int = 3) -> np.ndarray:
    return decoded_search(grid, search(grid, rows, importance, rounds=rounds))


def block_errors(grid: Grid, rows: np.ndarray, ours: np.ndarray, weights: np.ndarray) -> np.ndarray:
    return (weights * (ours - rows) ** 2).reshape(-1, grid.format.block_size).sum(1)


def nearest(grid: Grid, y: np.ndarray) -> np.ndarray:
    if grid.spacing == TABLE:
        return IQ4_VALUES.astype(np.float64)[np.abs(IQ4_VALUES[:, None] - y).argmin(0)]
    return np.clip(np.rint(y), *grid.levels)


def naive_span(grid: Grid, x: np.ndarray, w: np.ndarray) -> tuple[float, float]:
    """Scale and minimum of one sub-block, by NumPy's least squares for each span that is tried."""

    def error(scale: float, minimum: float) -> float:
        levels = nearest(grid, (x + minimum) / scale)
        return float((w * (scale * levels - minimum - x) ** 2).sum())

    low = x.min() if grid.n_sub == 1 else min(x.min(), 0.0)
    span, root = x.max() - low, np.sqrt(w)
    candidates = [(span / grid.levels[1], -low)]
    for k in range(grid.tries):
        levels = nearest(grid, (grid.first + grid.step * k) / span * (x - low))
        columns = np.stack([levels, -np.ones_like(x)], 1)
        scale, minimum = np.linalg.lstsq(columns * root[:, None], x * root, rcond=None)[0]
        if grid.n_sub > 1 and minimum < 0:
            scale, minimum = (w * x * levels).sum() / (w * levels**2).sum(), 0.0
        candidates.append((float(scale), float(minimum)))
    return min(candidates, key=lambda pair: error(*pair))


def naive_farthest(grid: Grid, x: np.ndarray, w: np.ndarray) -> tuple[float, float]:
    low, high = grid.levels
    best, scale = 0.0, 0.0
    ends = [grid.first + grid.step * k for k in range(grid.tries)]
    for end in [-end for end in ends] + [end + low + high for end in ends]:
        levels = nearest(grid, end * x / x[np.abs(x).argmax()])
        product, square = (w * x * levels).sum(), (w * levels**2).sum()
        if product**2 > best * square * (1 + SAME_FIT):
            best, scale = product**2 / square, product / square
    return scale, 0.0


def naive_unit(values: np.ndarray, least: int, most: int) -> tuple[float, np.ndarray]:
    """A half float and the whole numbers of it that are nearest to `values`."""
    if (least, most) == (1, 1):
        return float(np.float16(values[0])), np.ones(1)
    if least == 0:
        unit = float(np.float16(values.max() / most))
    else:
        sign = -1 if values.max() >= -values.min() else 1
        unit = sign * float(np.float16(max((values * sign).max() / most, (values * sign).min() / least)))
    return unit, np.clip(np.rint(values / unit if unit else values * 0), least, most)


def naive_block(grid: Grid, x: np.ndarray, w: np.ndarray) -> np.ndarray:
    """What a block would decode to: scales and minima of each sub-block, made whole numbers, and nearest levels."""
    one = naive_farthest if grid.minima is None else naive_span
    parts = x.reshape(-1, grid.size), w.reshape(-1, grid.size)
    fits = np.array([one(grid, *part) for part in zip(*parts, strict=True)])
    d, scales = naive_unit(fits[:, 0], *grid.scales)
    if grid.minima and grid.n_sub > 1:
        # A sub-block whose scale is rounded to 0 is its mean, as far as the sign of minima allows.
        means = np.array([np.average(part, weights=w) for part, w in zip(*parts, strict=True)])
        fits[:, 1] = np.where(scales > 0, fits[:, 1], np.maximum(-means, 0))
    dmin, minima = naive_unit(fits[:, 1], *grid.minima) if grid.minima else (0.0, scales * 0)
    out = []
    for part, step, low in zip(parts[0], d * scales, dmin * minima, strict=True):
        out.append(step * nearest(grid, (part + low) / step) - low if step else part * 0 - low)
    return np.concatenate(out)


@ALL
@pytest.mark.parametrize("kind", ["normal", "laplace", "positive", "outliers"])
def test_the_first_search_is_the_naive_one(grid: Grid, kind: str) -> None:
    rng, shape = np.random.default_rng(11), (3, 512)
    rows = {
        "normal": lambda: rng.standard_normal(shape),
        "laplace": lambda: rng.laplace(size=shape) * 0.01,
        "positive": lambda: rng.uniform(1, 2, shape),
        "outliers": lambda: rng.standard_normal(shape) * np.where(rng.random(shape) < 0.01, 30, 1),
    }[kind]()
    rows = rows.astype(np.float32)
    importance = uneven(512) + np.float32(0.1)
    weights = weights_of(rows, importance)
    blocks = (array.astype(np.float64).reshape(-1, grid.format.block_size) for array in (rows, weights))
    expected = np.array([naive_block(grid, x, w) for x, w in zip(*blocks, strict=True)]).reshape(rows.shape)
    ours = found(grid, rows, importance, rounds=0)
    # Float32 ties may fall the other way now and then; most weights are the same to the last bit of the format.
    assert np.isclose(ours, expected, rtol=1e-5, atol=1e-9).mean() > 0.75
    ratio = block_errors(grid, rows, ours, weights).sum() / block_errors(grid, rows, expected, weights).sum()
    assert ratio == pytest.approx(1, abs=0.02)


@ALL
def test_rounds_never_make_a_block_worse(grid: Grid) -> None:
    rows = np.random.default_rng(3).laplace(size=(7, 1024)).astype(np.float32)
    rows[3] = np.abs(rows[3])
    rows[4] = 1 + rows[4] / 100
    importance = uneven(1024)
    weights = weights_of(rows, importance)
    errors = []
    for rounds in (0, 1, 3, 6):
        ours = decoded_search(grid, search(grid, rows, importance, rounds=rounds))
        errors.append(block_errors(grid, rows, ours, weights))
    for before, after in pairwise(errors):
        assert (after <= before * (1 + 1e-4)).all()
    assert errors[2].sum() < errors[0].sum() * 0.999


@ALL
def test_an_important_column_has_less_error(grid: Grid) -> None:
    rows = normal(200, 256)
    importance = np.ones(256, np.float32)
    importance[::37] = 100
    with_it, without = ((found(grid, rows, given) - rows) ** 2 for given in (importance, None))
    assert with_it[:, ::37].mean() < 0.8 * without[:, ::37].mean()
    weights = weights_of(rows, importance)
    assert (weights * with_it).sum() < (weights * without).sum()


@ALL
def test_without_importance_products_keep_their_size(grid: Grid) -> None:
    """By theory a fit by least squares loses the share that its error has, which is then made good."""
    rows = normal(64, 512)
    fitted, kept = found(grid, rows, np.ones(512, np.float32)), found(grid, rows)
    lost = ((fitted - rows) ** 2).sum() / (rows**2).sum()
    gains = [(made * rows).sum() / (rows**2).sum() for made in (fitted, kept)]
    assert gains[0] == pytest.approx(1 - lost, abs=lost / 5)
    assert gains[1] == pytest.approx(min(1, gains[0] * MOST_GAIN), abs=lost / 4 + 2**-12)
    assert ((kept - rows) ** 2).sum() < ((fitted - rows) ** 2).sum() * (1 + 1.5 * lost)


@ALL
@pytest.mark.parametrize("exponent", [-100, -60, 0, 60, 120])
def test_importance_counts_in_relation_only(grid: Grid, exponent: int) -> None:
    rows, importance = normal(3, 512), uneven(512)
    once = found(grid, rows, importance)
    np.testing.assert_array_equal(found(grid, rows, np.ldexp(importance, exponent)), once)


@ALL
def test_where_nothing_counts_weights_are_kept_all_the_same(grid: Grid) -> None:
    rows, importance = normal(5, 512), uneven(512)
    importance[64:96] = 0
    ours = found(grid, rows, importance)
    assert np.isfinite(ours).all()
    assert ((ours - rows) ** 2)[:, 64:96].sum() < (rows[:, 64:96].astype(np.float64) ** 2).sum() / 4
    np.testing.assert_array_equal(*(found(grid, rows, np.full(512, same, np.float32)) for same in (0, 1)))


@ALL
@pytest.mark.parametrize(("n_rows", "n_blocks"), [(1, 1), (3, 2), (2, 3), (5, 5)])
def test_a_block_does_not_depend_on_its_neighbours(grid: Grid, n_rows: int, n_blocks: int) -> None:
    """Neither where the lanes of a row are no multiple of 16."""
    size = grid.format.block_size
    rows, importance = normal(n_rows, n_blocks * size), uneven(n_blocks * size)
    together = found(grid, rows, importance)
    for row in range(n_rows):
        for at in range(0, n_blocks * size, size):
            one = np.ascontiguousarray(rows[row : row + 1, at : at + size])
            alone = found(grid, one, importance[at : at + size])
            np.testing.assert_array_equal(together[row : row + 1, at : at + size], alone)


@ALL
def test_subnormal_scales_are_counted_in_what_is_stored(grid: Grid) -> None:
    """Rounding integers against exact scales instead would lose far more where half floats have few bits."""
    rows = normal(32, 256, seed=6)
    small = (rows * np.float32(2.0**-12)).astype(np.float32)
    relative = [np.sqrt(np.mean((found(grid, x) - x) ** 2) / np.mean(x**2)) for x in (rows, small)]
    assert relative[1] < 1.25 * relative[0]


def test_scales_of_both_signs_are_not_cut_off() -> None:
    """Ternary weights fit exactly where a block's integers are as far on both sides."""
    rows = (np.random.default_rng(7).integers(-1, 2, (20, 512)) * 0.05).astype(np.float32)
    for grid in GRIDS.values():
        if grid.spacing != TABLE:
            off = found(grid, rows, uneven(512) + np.float32(0.01)) - rows
            assert np.abs(off).max() < 0.05 * 2**-8, grid.format.name
