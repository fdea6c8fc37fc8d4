"""Encoders against the gguf package's bytes, against a search in plain NumPy, and at the edges of what floats hold."""

import hashlib

import gguf
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from llmq.errors import FileFormatError, UnsupportedError
from llmq.formats import BF16, F16, F32, FORMATS, Q4_1, Q4_K, Q5_1, Q5_K, Q6_K, Q8_0, Format
from quant.encode import KERNELS, PLAIN, check_range, encode, squared_error

WRITTEN = [fmt for fmt in FORMATS.values() if fmt in KERNELS or fmt in PLAIN]
ALL = pytest.mark.parametrize("fmt", WRITTEN, ids=lambda fmt: fmt.name)
K_QUANTS = pytest.mark.parametrize("fmt", [Q4_K, Q5_K, Q6_K], ids=lambda fmt: fmt.name)
REFERENCE = [fmt for fmt in WRITTEN if fmt not in (Q4_K, Q5_K, Q6_K)]

FINITE_HALVES = st.floats(-65504, 65504, width=32, allow_subnormal=False)


def decoded(fmt: Format, raw: np.ndarray) -> np.ndarray:
    """By the gguf package, so that encoder and decoder cannot share a mistake."""
    with np.errstate(all="ignore"):
        return gguf.dequantize(raw, gguf.GGMLQuantizationType(fmt.id)).astype(np.float64)


def assert_reference_bytes(fmt: Format, rows: np.ndarray) -> None:
    with np.errstate(all="ignore"):
        theirs = gguf.quantize(rows, gguf.GGMLQuantizationType(fmt.id)).view(np.uint8)
    np.testing.assert_array_equal(encode(fmt, rows), theirs.reshape(rows.shape[0], -1))


@pytest.mark.parametrize("fmt", REFERENCE, ids=lambda fmt: fmt.name)
@pytest.mark.parametrize("scale", [1e-6, 0.02, 1.0, 900.0])
def test_bytes_are_those_of_gguf(fmt: Format, scale: float) -> None:
    rng = np.random.default_rng(1)
    assert_reference_bytes(fmt, (rng.standard_normal((7, 512)) * scale).astype(np.float32))
    assert_reference_bytes(fmt, (rng.integers(-8, 9, (7, 512)) * scale / 8).astype(np.float32))


@pytest.mark.parametrize("fmt", REFERENCE, ids=lambda fmt: fmt.name)
@given(block=arrays(np.float32, (1, 32), elements=FINITE_HALVES))
@settings(deadline=None, max_examples=150)
def test_bytes_of_wild_blocks_are_those_of_gguf(fmt: Format, block: np.ndarray) -> None:
    # Adding zero makes -0.0 a plain 0: which of two equal zeros is the minimum is nobody's promise. NumPy's double
    # rounding of magnitudes whose inverse is infinite has no counterpart in C.
    block = np.where(np.abs(block) < 1e-30, 0, block).astype(np.float32) + np.float32(0)
    assert_reference_bytes(fmt, block)


def bf16_oracle(value: float) -> int:
    """The nearest of the two neighbours in BF16, the even one between."""
    bits = int(np.float32(value).view(np.uint32))
    low, rest = bits >> 16, bits & 0xFFFF
    return low + (rest > 0x8000 or (rest == 0x8000 and low & 1))


@given(st.floats(-(2.0**127), 2.0**127, width=32))
def test_bf16_rounds_to_nearest_even(value: float) -> None:
    assert int(encode(BF16, np.array([[value]], np.float32)).view(np.uint16)[0, 0]) == bf16_oracle(value)


def fit_levels(x: np.ndarray, w: np.ndarray, levels: np.ndarray) -> tuple[float, float]:
    """Weighted least squares of x = scale * level + low with low <= 0, by NumPy's solver."""
    root = np.sqrt(w)
    scale, low = np.linalg.lstsq(np.stack([levels, np.ones_like(x)], 1) * root[:, None], x * root, rcond=None)[0]
    if low > 0:
        return float((w * x * levels).sum() / (w * levels**2).sum()), 0.0
    return float(scale), float(low)


def naive_search(x: np.ndarray, top: int, first: float, tries: int) -> tuple[float, float]:
    """Scale and minimum of 32 weights by the published search, in float64."""
    w = np.sqrt((x**2).mean()) + np.abs(x)
    low, high = min(x.min(), 0.0), x.max()
    if high == low:
        return 0.0, low
    span, scale, best = high - low, (high - low) / top, np.inf
    for k in range(-1, tries):
        inverse = (top if k < 0 else top + first + 0.1 * k) / span
        levels = np.clip(np.rint(inverse * (x - low)), 0, top)
        new = (scale, low) if k < 0 else fit_levels(x, w, levels)
        error = (w * (new[0] * levels + new[1] - x) ** 2).sum()
        if error < best:
            best, (scale, low) = error, new
    return scale, low


def naive_asymmetric(x: np.ndarray, top: int, first: float, tries: int) -> np.ndarray:
    """What a Q4_K or Q5_K block of 256 weights would decode to."""
    found = np.array([naive_search(part, top, first, tries) for part in x.reshape(8, 32)])
    scales, minima = found[:, 0], -found[:, 1]
    d, dmin = (float(np.float16(values.max() / 63)) for values in (scales, minima))
    steps = np.rint(scales / d if d else scales * 0).clip(0, 63) * d
    lows = np.rint(minima / dmin if dmin else minima * 0).clip(0, 63) * dmin
    out = []
    for part, step, low in zip(x.reshape(8, 32), steps, lows, strict=True):
        levels = np.rint((part + low) / step).clip(0, top) if step else np.zeros(32)
        out.append(levels * step - low)
    return np.concatenate(out)


def naive_q6_k(x: np.ndarray) -> np.ndarray:
    scales = []
    for part in x.reshape(16, 16):
        extreme = part[np.abs(part).argmax()]
        best, scale = 0.0, 0.0
        for k in [0, *range(-9, 0), *range(1, 10)]:
            levels = np.rint(-(32 + 0.1 * k) / extreme * part).clip(-32, 31)
            product, square = (part**3 * levels).sum(), (part**2 * levels**2).sum()
            if square and product**2 / square > best:
                best, scale = product**2 / square, product / square
        scales.append(scale)
    table = np.array(scales)
    d = float(np.float16(table[np.abs(table).argmax()] / -128))
    steps = np.repeat(np.rint(table / d).clip(-128, 127) * d, 16)
    return np.rint(x / steps).clip(-32, 31) * steps


@K_QUANTS
@pytest.mark.parametrize("kind", ["normal", "laplace", "positive", "outliers"])
def test_k_quants_do_the_published_search(fmt: Format, kind: str) -> None:
    rng = np.random.default_rng(11)
    rows = {
        "normal": lambda: rng.standard_normal((9, 768)),
        "laplace": lambda: rng.laplace(size=(9, 768)) * 0.01,
        "positive": lambda: rng.uniform(1, 2, (9, 768)),
        "outliers": lambda: rng.standard_normal((9, 768)) * np.where(rng.random((9, 768)) < 0.01, 30, 1),
    }[kind]()
    rows = rows.astype(np.float32)
    naive = {
        Q4_K: lambda block: naive_asymmetric(block, 15, -1.0, 21),
        Q5_K: lambda block: naive_asymmetric(block, 31, -0.5, 16),
        Q6_K: naive_q6_k,
    }[fmt]
    expected = np.array([naive(block) for block in rows.astype(np.float64).reshape(-1, 256)]).reshape(rows.shape)
    ours = decoded(fmt, encode(fmt, rows))
    # Float32 ties may fall the other way now and then; most weights are the same to the last bit of the format.
    assert np.isclose(ours, expected, rtol=1e-5, atol=1e-9).mean() > 0.75
    ratio = np.sqrt(((ours - rows) ** 2).sum() / ((expected - rows) ** 2).sum())
    assert ratio < 1.01


def least_squares_bound(fmt: Format, rows: np.ndarray) -> np.ndarray:
    """Half a step of plain rounding over each block's own range, plus what rounding scales to 6 bits (7, with a sign,
    for Q6_K, 8 in all) can add: a bound no sensible search exceeds by much."""
    parts = rows.reshape(-1, 8, 32).astype(np.float64)
    reach = np.maximum(parts.max(-1), 0) - np.minimum(parts.min(-1), 0)
    steps = {Q4_K: 15, Q5_K: 31, Q6_K: 31}[fmt]
    whole = np.abs(parts).max((1, 2))[:, None]
    return np.repeat(reach / steps + whole / 63 + whole / steps, 32, -1).reshape(rows.shape)


EDGES = {
    "zeros": np.zeros(512),
    "constant": np.full(512, 0.37),
    "negative constant": np.full(512, -0.37),
    "one weight": np.eye(1, 512, 300)[0],
    "first block only": np.r_[np.ones(32), np.zeros(480)],
    "ternary": np.resize([0.5, -0.5, 0.0], 512),
    "largest": np.resize([65504.0, -65504.0, 1.0], 512),
    "near the smallest half": np.random.default_rng(12).standard_normal(512) * 1e-7,
    "scales that need the smallest half": np.random.default_rng(13).standard_normal(512) * 3e-6,
    "narrow around -5 beside wide": np.r_[np.random.default_rng(14).standard_normal(256), [-5, -5.001] * 128],
    "float subnormals": np.resize([1e-40, -1e-42, 0.0], 512),
    "scales too small for a half": np.resize([1e-9, -2e-9], 512),
    "subnormal scales": np.random.default_rng(2).standard_normal(512) * 1e-5,
    "one outlier": np.r_[np.random.default_rng(3).standard_normal(511) * 1e-3, 50],
    "all negative": -np.random.default_rng(4).uniform(3, 4, 512),
    "wild scales": np.random.default_rng(5).standard_normal(512) * np.repeat(10.0 ** np.arange(-8, 8), 32) / 1e4,
}


@ALL
@pytest.mark.parametrize("edge", EDGES)
def test_edges_decode_to_finite_weights_near_the_original(fmt: Format, edge: str) -> None:
    row = EDGES[edge].astype(np.float32).reshape(1, 512)
    ours = decoded(fmt, encode(fmt, row).copy())
    assert np.isfinite(ours).all()
    # The reference bytes of Q4_1 and Q5_1 keep a minimum where the scale is lost.
    if edge == "near the smallest half" and fmt in (Q4_1, Q5_1):
        return
    assert np.abs(ours - row).max() <= np.abs(row).max()
    assert ((ours - row) ** 2).sum() <= (row.astype(np.float64) ** 2).sum()
    if edge == "zeros":
        assert not ours.any()
    if edge in ("constant", "negative constant", "ternary"):
        assert np.abs(ours - row).max() <= np.abs(row).max() * 0.13
    if fmt in (Q4_K, Q5_K, Q6_K):
        assert (np.abs(ours - row) <= least_squares_bound(fmt, row) + 6e-8 * 63).all()


@K_QUANTS
def test_subnormal_scales_are_counted_in_what_is_stored(fmt: Format) -> None:
    """Rounding integer scales against the exact scale instead loses up to a tenth here."""
    rows = (np.random.default_rng(6).standard_normal((64, 256)) * 2e-4).astype(np.float32)
    ours = decoded(fmt, encode(fmt, rows))
    relative = np.sqrt(((ours - rows) ** 2).mean() / (rows.astype(np.float64) ** 2).mean())
    assert relative < {Q4_K: 0.076, Q5_K: 0.040, Q6_K: 0.028}[fmt]


@K_QUANTS
@pytest.mark.parametrize("n_blocks", [1, 2, 3, 5])
def test_a_block_does_not_depend_on_its_neighbours(fmt: Format, n_blocks: int) -> None:
    rows = np.random.default_rng(8).standard_normal((n_blocks, 256)).astype(np.float32)
    together = encode(fmt, rows)
    apart = np.concatenate([encode(fmt, rows[i : i + 1]) for i in range(n_blocks)])
    np.testing.assert_array_equal(together, apart)


def test_golden_bytes_of_k_quants() -> None:
    """The same bytes on every processor: the sums are strict, so a difference is a change of the algorithm."""
    state, values = 12345, []
    for _ in range(2048):
        state = state * 1103515245 + 12345 & 0x7FFFFFFF
        values.append((state >> 16) - 16384)
    rows = (np.array(values, np.float32) * np.float32(2.0**-18)).reshape(4, 512)
    digests = {fmt.name: hashlib.sha256(encode(fmt, rows).tobytes()).hexdigest()[:16] for fmt in (Q4_K, Q5_K, Q6_K)}
    assert digests == GOLDEN


GOLDEN = {"Q4_K": "1b46a664aec2bed1", "Q5_K": "dba162b75a594501", "Q6_K": "c5ba48a5c4ab6662"}


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@ALL
def test_weights_that_are_not_finite_are_refused_by_name(fmt: Format, bad: float) -> None:
    rows = np.zeros((3, 256), np.float32)
    rows[1, 77] = bad
    with pytest.raises(FileFormatError, match=r"blk\.3\.attn_q\.weight"):
        check_range("blk.3.attn_q.weight", fmt, rows)


@pytest.mark.parametrize(
    ("fmt", "weight", "fits"),
    [
        (F16, 65504.0, True), (F16, 65536.0, False), (F16, -65536.0, False), (Q4_K, 1e5, False), (Q8_0, 1e5, False),
        (BF16, 1e38, True), (BF16, 3.3895e38, True), (BF16, 3.4e38, False), (F32, 3.4e38, True),
    ],
)  # fmt: skip
def test_what_a_format_cannot_hold_is_refused(fmt: Format, weight: float, fits: bool) -> None:
    rows = np.full((1, 256), weight, np.float32)
    if fits:
        check_range("t", fmt, rows)
        assert np.isfinite(decoded(fmt, encode(fmt, rows).copy())).all()
    else:
        with pytest.raises(UnsupportedError, match="too large"):
            check_range("t", fmt, rows)


def test_squared_error_is_measured_on_what_is_stored() -> None:
    rows = np.random.default_rng(9).standard_normal((4, 256)).astype(np.float32)
    packed = encode(Q8_0, rows)
    error, size = squared_error(Q8_0, rows, packed)
    assert error == pytest.approx(((decoded(Q8_0, packed) - rows) ** 2).sum())
    assert size == pytest.approx((rows.astype(np.float64) ** 2).sum())
