"""Encoders against the gguf package's bytes where those are the reference, and at the edges of what floats hold."""

import hashlib

import gguf
import numpy as np
import pytest
from encoded import decoded, lcg_rows
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from llmq.errors import FileFormatError, UnsupportedError
from llmq.formats import BF16, F16, F32, IQ4_NL, IQ4_XS, Q4_K, Q8_0, Format
from quant.encode import FAST, PLAIN, ROUNDS, encode, squared_error
from quant.feedback import DAMPING, prepare
from quant.grid import GRIDS
from quant.limits import check_range

WRITTEN = [*PLAIN, *GRIDS, Q8_0]
ALL = pytest.mark.parametrize("fmt", WRITTEN, ids=lambda fmt: fmt.name)
REFERENCE = pytest.mark.parametrize("fmt", [F16, BF16, Q8_0], ids=lambda fmt: fmt.name)

FINITE_HALVES = st.floats(-65504, 65504, width=32, allow_subnormal=False)


def assert_reference_bytes(fmt: Format, rows: np.ndarray) -> None:
    with np.errstate(all="ignore"):
        theirs = gguf.quantize(rows, gguf.GGMLQuantizationType(fmt.id)).view(np.uint8)
    np.testing.assert_array_equal(encode(fmt, rows), theirs.reshape(rows.shape[0], -1))


@REFERENCE
@pytest.mark.parametrize("scale", [1e-6, 0.02, 1.0, 900.0])
def test_bytes_are_those_of_gguf(fmt: Format, scale: float) -> None:
    rng = np.random.default_rng(1)
    assert_reference_bytes(fmt, (rng.standard_normal((7, 512)) * scale).astype(np.float32))
    assert_reference_bytes(fmt, (rng.integers(-8, 9, (7, 512)) * scale / 8).astype(np.float32))


@REFERENCE
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
    "scales of both signs": np.resize([-1.0, 0.5, 1.0, -0.5, 0.25], 512) * np.repeat(np.resize([1, -1], 32), 16),
    "largest, one side": np.full(512, 65504.0),
    "half of each": np.resize([65504.0, 1e-4], 512),
}


# Of a few tokens of 512 columns that have much in common.
TOKENS = np.random.default_rng(15).standard_normal((40, 1)) + np.random.default_rng(16).standard_normal((40, 512))
FEEDBACK = prepare(np.stack([part.T @ part for part in (TOKENS[:, :256], TOKENS[:, 256:])]))
IMPORTANCE = {
    "none": None,
    "uneven": np.square(TOKENS).mean(0).astype(np.float32),
    "much of it 0": np.resize(np.repeat([0, 1, 0, 1e-9], 16), 512).astype(np.float32),
    "all 0": np.zeros(512, np.float32),
    "largest": np.full(512, np.finfo(np.float32).max),
}


@ALL
@pytest.mark.parametrize("rounds", [FAST, ROUNDS])
@pytest.mark.parametrize("edge", EDGES)
def test_edges_decode_to_finite_weights_near_the_original(fmt: Format, edge: str, rounds: int) -> None:
    row = EDGES[edge].astype(np.float32).reshape(1, 512)
    ours = decoded(fmt, encode(fmt, row, rounds=rounds).copy()).astype(np.float64)
    assert np.isfinite(ours).all()
    assert ((ours - row) ** 2).sum() <= (row.astype(np.float64) ** 2).sum() * (1 + 1e-5)
    assert np.abs(ours - row).max() <= np.abs(row).max()
    if edge == "zeros":
        assert not ours.any()
    if edge in ("constant", "negative constant", "ternary", "largest, one side"):
        # IQ4's levels are not evenly spaced.
        limit = 2**-3 if fmt in (IQ4_NL, IQ4_XS) else 2**-8
        assert np.abs(ours - row).max() <= np.abs(row).max() * limit


GRIDDED = pytest.mark.parametrize("fmt", GRIDS, ids=lambda fmt: fmt.name)


def error_over_that_of_zeros(fmt: Format, rows: np.ndarray, raw: np.ndarray, counts: np.ndarray | None) -> float:
    """Of the weighted sums of squares, the worst block's."""
    x, weights = rows.astype(np.float64), np.float64(1)
    if counts is not None and counts.any():
        weights = counts.astype(np.float64) / counts.max()
    errors = (weights * (made - x) ** 2 for made in (decoded(fmt, raw.copy()), 0))
    ours, zeros = (error.reshape(-1, fmt.block_size).sum(1) for error in errors)
    return float((ours / np.where(zeros > 0, zeros, 1)).max())


@GRIDDED
@pytest.mark.parametrize("importance", IMPORTANCE)
@pytest.mark.parametrize("edge", EDGES)
def test_edges_with_importance_are_no_worse_than_zeros(fmt: Format, edge: str, importance: str) -> None:
    rows, counts = EDGES[edge].astype(np.float32).reshape(1, 512), IMPORTANCE[importance]
    raw = encode(fmt, rows, counts)
    assert np.isfinite(decoded(fmt, raw.copy())).all()
    assert error_over_that_of_zeros(fmt, rows, raw, counts) < 1 + 1e-5


@GRIDDED
@pytest.mark.parametrize("edge", EDGES)
def test_products_of_edges_with_feedback_are_no_worse_than_with_zeros(fmt: Format, edge: str) -> None:
    rows = EDGES[edge].astype(np.float32).reshape(1, 512)
    ours = decoded(fmt, encode(fmt, rows, None, FEEDBACK).copy())
    assert np.isfinite(ours).all()
    assert product_error(ours - rows.astype(np.float64)) <= product_error(rows.astype(np.float64)) * (1 + 1e-5)


def product_error(off: np.ndarray) -> float:
    """e^T H e of both blocks of 256, with H as it is factored."""
    total = 0.0
    for part in (slice(0, 256), slice(256, 512)):
        tokens = TOKENS[:, part]
        damping = DAMPING * np.square(tokens).sum() / 256
        total += np.square(off[:, part] @ tokens.T).sum() + damping * np.square(off[:, part]).sum()
    return total


@st.composite
def rows_and_importance(draw: st.DrawFn) -> tuple[np.ndarray, np.ndarray]:
    """Blocks of wild numbers of one size, and as wild an importance."""
    size = draw(st.sampled_from([1e-42, 1e-9, 1e-6, 1e-3, 1.0, 6e4]))
    rows = draw(arrays(np.float32, (1, 256), elements=st.floats(-1, 1, width=32))) * np.float32(size)
    return rows, draw(arrays(np.float32, 256, elements=st.floats(0, 2.0**100, width=32)))


@GRIDDED
@given(drawn=rows_and_importance())
@settings(deadline=None, max_examples=60)
def test_wild_weights_are_no_worse_than_zeros(fmt: Format, drawn: tuple[np.ndarray, np.ndarray]) -> None:
    rows, importance = drawn
    assert np.isfinite(decoded(fmt, encode(fmt, rows, importance).copy())).all()
    assert error_over_that_of_zeros(fmt, rows, encode(fmt, rows), None) < 1 + 1e-5


@REFERENCE
def test_importance_and_feedback_leave_the_reference_bytes(fmt: Format) -> None:
    rows = lcg_rows(2, 512)
    plain = encode(fmt, rows)
    np.testing.assert_array_equal(encode(fmt, rows, IMPORTANCE["uneven"]), plain)
    np.testing.assert_array_equal(encode(fmt, rows, None, FEEDBACK), plain)


@GRIDDED
def test_feedback_lowers_the_error_of_products(fmt: Format) -> None:
    rows = np.random.default_rng(17).standard_normal((40, 512)).astype(np.float32)
    errors = []
    for given_feedback in (None, FEEDBACK):
        off = decoded(fmt, encode(fmt, rows, None, given_feedback)).astype(np.float64) - rows
        errors.append(sum(np.square(TOKENS[:, part] @ off[:, part].T).sum() for part in np.split(np.arange(512), 2)))
    assert errors[1] < 0.5 * errors[0]


def test_golden_bytes() -> None:
    """The same on every processor: sums are strict, so a difference is a change of the algorithm."""
    rows, importance = lcg_rows(4, 512), np.resize(np.array([1, 3, 0.5, 2, 7], np.float32), 512)
    digests = {}
    for fmt in GRIDS:
        made = (encode(fmt, rows, given, rounds=rounds) for given in (None, importance) for rounds in (FAST, ROUNDS))
        digests[fmt.name] = hashlib.sha256(b"".join(part.tobytes() for part in made)).hexdigest()[:16]
    assert digests == GOLDEN


GOLDEN = {
    "Q2_K": "22ba5e81161bf18f", "Q3_K": "5a12bf9f8de32f0a", "Q4_K": "aa9bfe548e3f70d0", "Q5_K": "19906e5618a3877d",
    "Q6_K": "9a83322f07711ab2", "Q4_0": "fd1434b451cf5c32", "Q5_0": "32e17815ae8083ee", "Q4_1": "fe89a10042cffd62",
    "Q5_1": "4a235c5f20974259", "IQ4_NL": "e25dec9c94adb9b8", "IQ4_XS": "4d99338550be86fa",
}  # fmt: skip


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
