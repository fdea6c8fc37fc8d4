"""Every kernel against its naive twin: blocks at their extremes, attention over rings that have wrapped, routers."""

import math
from typing import Any

import naive
import numpy as np
import pytest
from compiled import address, aligned, compiled
from tiny import random_rows

from llmq.engine.cpu import SPARE
from llmq.engine.plan import kernels
from llmq.formats import FORMATS, Format, dequantize, row_bytes
from llmq.kernels.activation import SUMS, SUMS16, SUMS32, VALUES, prepare
from llmq.kernels.attention import QUERIES, SCRATCH_BYTES, SIZES, attend_kernel, combine_parts
from llmq.kernels.elementwise import rms_norm, rope, rope_angles, silu_mul
from llmq.kernels.kv import F16_KV, Q8_0_KV, KVFormat
from llmq.kernels.panel import PANEL_BYTES
from llmq.kernels.router import choose_experts, group_by_expert
from llmq.kernels.unpack import GROUP, UNPACK, BlockFormat, FloatFormat, KFormat, group_bytes
from llmq.layout import BLOCK, FEW, FLOAT, GROUP_BYTES, K, activation_kind
from llmq.simd import ROWS, load_f32

EPS = 2.0**-24  # half a unit in the last place of 1.0 in float32

each_format = pytest.mark.parametrize("fmt", FORMATS.values(), ids=lambda fmt: fmt.name)


def kind_of(fmt: Format) -> int:
    return {FloatFormat: FLOAT, KFormat: K, BlockFormat: BLOCK}[type(UNPACK[fmt.id])]


# ---- activations
def test_each_format_reads_the_activations_that_its_kernels_are_made_for() -> None:
    assert [activation_kind(fmt) for fmt in FORMATS.values()] == [kind_of(fmt) for fmt in FORMATS.values()]


def prepared(x: np.ndarray, kind: int) -> np.ndarray:
    """Groups uint8 [n_groups, n_tokens, group bytes] of float32 rows [n_tokens, n]."""
    x = np.ascontiguousarray(x, np.float32)
    n_groups, n_tokens, size = -(-x.shape[1] // GROUP), len(x), GROUP_BYTES[kind]
    groups = aligned((n_groups * n_tokens + SPARE, size), np.uint8)[:-SPARE].reshape(n_groups, n_tokens, size)
    prepare(address(groups), kind, address(x), x.shape[1], len(x))
    return groups


def scales_and_values(groups: np.ndarray, kind: int) -> tuple[np.ndarray, np.ndarray]:
    """float32 scales and int8 values [n_tokens, n_groups * 256] in K or BLOCK groups; one scale for each value."""
    q = groups[:, :, VALUES:].view(np.int8)
    d = groups[:, :, :4].view(np.float32) if kind == K else groups[:, :, :32].view(np.float32)
    d = np.repeat(d, 256 // d.shape[-1], axis=-1)
    flat = lambda a: a.swapaxes(0, 1).reshape(groups.shape[1], -1)  # noqa: E731
    return flat(d), flat(q)


def activations(groups: np.ndarray, kind: int, n: int) -> np.ndarray:
    """float64 [n_tokens, n]: what prepared groups stand for, exactly."""
    if kind == FLOAT:
        rows = groups.view(np.float32).swapaxes(0, 1).reshape(groups.shape[1], -1)
        return rows[:, :n].astype(np.float64)
    d, q = scales_and_values(groups, kind)
    assert not q[:, n:].any(), "what lies past the end of a row counts as zero"
    return (d.astype(np.float64) * q)[:, :n]


@pytest.mark.parametrize("n", [32, 96, 256, 352, 512])
@pytest.mark.parametrize("kind", [K, BLOCK])
def test_prepare_quantizes_each_token(kind: int, n: int) -> None:
    rng = np.random.default_rng(n)
    x = (rng.standard_normal((3, n)) * [[0.01], [1], [300]]).astype(np.float32)
    x[1, : n // 2] = 0
    groups = prepared(x, kind)
    d, q = scales_and_values(groups, kind)
    for token in range(3):
        padded = np.pad(x[token], (0, -n % GROUP))
        scales, exact = naive.quantize(padded, GROUP if kind == K else 32)
        np.testing.assert_allclose(d[token], np.repeat(scales, len(padded) // len(scales)), rtol=4 * EPS)
        near = [value * 127 / top if (top := d[token, i] * 127.0) else 0 for i, value in enumerate(padded)]
        assert (np.abs(q[token] - near) <= 0.5 + 1e-4).all()
        assert np.count_nonzero(q[token] != exact) <= 1, "a tie may round either way, no more"
    wide = groups[:, :, VALUES:].view(np.int8).astype(np.int64)
    if kind == K:
        np.testing.assert_array_equal(
            groups[:, :, SUMS32 : SUMS32 + 16].view(np.int16), wide.reshape(*wide.shape[:2], 8, 32).sum(-1)
        )
        np.testing.assert_array_equal(
            groups[:, :, SUMS16 : SUMS16 + 32].view(np.int16), wide.reshape(*wide.shape[:2], 16, 16).sum(-1)
        )
    else:
        np.testing.assert_array_equal(
            groups[:, :, SUMS : SUMS + 32].view(np.int32), wide.reshape(*wide.shape[:2], 8, 32).sum(-1)
        )


def test_prepare_copies_floats() -> None:
    x = np.random.default_rng(0).standard_normal((2, 352)).astype(np.float32)
    np.testing.assert_array_equal(activations(prepared(x, FLOAT), FLOAT, 352), x)


@pytest.mark.parametrize("kind", [K, BLOCK])
def test_prepare_reaches_plus_and_minus_127(kind: int) -> None:
    x = np.tile(np.array([-254, 254, 2, 0], np.float32), 64)[None]
    d, q = scales_and_values(prepared(x, kind), kind)
    assert set(d.ravel().tolist()) == {2.0}
    assert q[0, :4].tolist() == [-127, 127, 1, 0]


# ---- products
def split(fmt: Format, n_cols: int) -> tuple[int, int]:
    """Whole groups in a row, and the bytes after them."""
    n_groups = n_cols // GROUP
    return n_groups, row_bytes(fmt, n_cols) - n_groups * group_bytes(fmt)


def by_dot(fmt: Format, w: np.ndarray, groups: np.ndarray, n_cols: int) -> np.ndarray:
    """float32 [n_tokens, n_rows] by the kernel for a few tokens, all of them at once."""
    n_groups, tail = split(fmt, n_cols)
    n_tokens, size = groups.shape[1:]
    out = results(n_tokens)
    kernels(fmt).dot(
        address(out), address(w), w.shape[1], len(w), address(groups), size * n_tokens, n_tokens, n_groups, tail
    )
    assert np.isnan(out[:, len(w) :]).all(), "written past the rows"
    assert np.isnan(out[-1]).all(), "written past the spare tokens"
    return out[:n_tokens, : len(w)]


def by_panel(fmt: Format, w: np.ndarray, groups: np.ndarray, n_cols: int) -> np.ndarray:
    """float32 [n_tokens, n_rows] by the kernel for many tokens, at most ROWS rows."""
    n_groups, tail = split(fmt, n_cols)
    n_tokens, size = groups.shape[1:]
    out = results(n_tokens)
    panel = aligned((PANEL_BYTES,), np.uint8)
    kernels(fmt).panel(
        address(out), address(w), w.shape[1], len(w), address(groups), size * n_tokens, n_tokens, n_groups, tail,
        address(panel),
    )  # fmt: skip
    return out[:n_tokens, : len(w)]


def results(n_tokens: int) -> np.ndarray:
    """Room for the whole tiles that both kernels write, and a guard that shows writing past it."""
    out = aligned((n_tokens + SPARE + 1, ROWS), np.float32)
    out[:] = np.nan
    return out


def sizes(fmt: Format) -> list[tuple[int, int]]:
    """(columns, rows), with columns that end inside a group where the format allows it."""
    return [(256, ROWS), (768, 5), *([(32, 16), (96, 1), (352, ROWS - 5)] if fmt.block_size < GROUP else [])]


@each_format
def test_dot_and_panel(fmt: Format) -> None:
    """Both against the exact product with the quantized activations, and that against the one with the floats.

    Bound: an output is a sum of terms no larger than twice the largest weight times an activation (twice: unsigned
    weight and offset are multiplied apart), and no term or partial sum goes through more than four float32 roundings
    per group of 256.
    """
    rng = np.random.default_rng(fmt.id)
    kind = kind_of(fmt)
    for n_cols, n_rows in sizes(fmt):
        w = random_rows(rng, fmt, (n_rows, n_cols))
        weights = dequantize(fmt, w).astype(np.float64)
        for n_tokens in range(1, 21):
            x = rng.standard_normal((n_tokens, n_cols)).astype(np.float32)
            groups = prepared(x, kind)
            exact = activations(groups, kind, n_cols)
            expected = exact @ weights.T
            roundings = 4 * (1 + n_cols // GROUP) if kind != FLOAT else 2 + n_cols // 16
            bound = roundings * EPS * 2 * np.abs(weights).max() * np.abs(exact).sum(axis=1, keepdims=True)
            dots, panels = by_dot(fmt, w, groups, n_cols), by_panel(fmt, w, groups, n_cols)
            assert (np.abs(dots - expected) <= bound).all(), (n_cols, n_rows, n_tokens)
            assert (np.abs(panels - expected) <= bound).all(), (n_cols, n_rows, n_tokens)
            step = 0 if kind == FLOAT else scales_and_values(groups, kind)[0][:, :n_cols]
            unquantized = (np.abs(x - exact) <= 0.5001 * step).all()
            assert unquantized, "an activation is off by more than half a step"
    first = naive.dot(weights[:1], exact[0])
    np.testing.assert_allclose(expected[0, :1], first, rtol=1e-12)


def extreme_rows(fmt: Format, fill: int, scale: int, n_cols: int = GROUP) -> np.ndarray:
    """Three rows whose quants are all `fill` bytes, with d = m = 1 and (K formats) sub-block scales of `scale`."""
    if fmt.block_size == 1:
        value = np.array([fill - 128], np.float32)
        raw = {"F32": value, "F16": value.astype(np.float16), "BF16": value.view(np.uint16)[1:]}[fmt.name]
        return np.tile(raw.view(np.uint8), (3, n_cols))
    blocks = np.full((3, n_cols // fmt.block_size, fmt.block_bytes), fill, np.uint8)
    both = {"Q2_K": (80, 82), **dict.fromkeys(("Q4_K", "Q5_K", "Q4_1", "Q5_1"), (0, 2))}
    halves = {"Q3_K": (108,), "Q6_K": (208,), **both}
    for at in halves.get(fmt.name, (0,)):
        blocks[:, :, at : at + 2] = np.array([1], np.float16).view(np.uint8)
    if fmt.name in ("Q4_K", "Q5_K"):
        blocks[:, :, 4:16] = [scale] * 8 + [scale * 17] * 4 if scale < 16 else 255
    if fmt.name == "Q6_K":
        blocks[:, :, 192:208] = np.array([scale], np.int8).view(np.uint8)
    if fmt.name == "Q2_K":
        blocks[:, :, :16] = scale * 17
    if fmt.name == "Q3_K":
        blocks[:, :, 96:108] = [(scale + 32 & 15) * 17] * 8 + [(scale + 32 >> 4) * 85] * 4
    if fmt.name == "IQ4_XS":
        blocks[:, :, 2:8] = [(scale + 32 >> 4) * 85] * 2 + [(scale + 32 & 15) * 17] * 4
    return blocks.reshape(3, -1)


PATTERNS = [
    np.full(GROUP, 127),
    np.full(GROUP, -127),
    np.tile([127, -127], GROUP // 2),
    np.tile([127, 127, -127, -127], GROUP // 4),
    np.eye(1, GROUP, 77)[0] * -127,
]
SUB_BLOCK_SCALES = {
    "Q2_K": (1, 2, 15), "Q3_K": (1, -2, 31, -32), "Q4_K": (1, 2, 63), "Q5_K": (1, 2, 63), "Q6_K": (1, -2, 127, -128),
    "IQ4_XS": (1, -2, 31, -32),
}  # fmt: skip


@pytest.mark.parametrize("fill", [0x00, 0x7F, 0x80, 0xFF, 0xF0, 0x0F])
@each_format
def test_extremes_are_exact(fmt: Format, fill: int) -> None:
    """Largest and smallest weights against activations of +-127: integer sums that nothing may clip or wrap.

    Sums below 2**24 must come out exactly. Larger ones (sub-block scales at their ends) may be rounded twice.
    """
    x = np.array(PATTERNS, np.float32)
    groups = prepared(x, kind_of(fmt))
    np.testing.assert_array_equal(activations(groups, kind_of(fmt), GROUP), x)
    for scale in SUB_BLOCK_SCALES.get(fmt.name, (1,)):
        w = extreme_rows(fmt, fill, scale)
        weights = dequantize(fmt, w).astype(np.int64)
        expected = x.astype(np.int64) @ weights.T
        terms = 2 * np.abs(x).sum(axis=1, keepdims=True) * np.abs(weights).max()
        slack = np.where(terms < 2**24, 0, 4 * EPS * terms)
        for product in (by_dot, by_panel):
            assert (np.abs(product(fmt, w, groups, GROUP) - expected) <= slack).all(), (product.__name__, scale)


@each_format
def test_a_token_does_not_depend_on_its_neighbours(fmt: Format) -> None:
    """Bit for bit: a draft that is checked in one batch must give what one token at a time would have given."""
    rng = np.random.default_rng(fmt.id)
    for n_cols, n_rows in sizes(fmt):
        w = random_rows(rng, fmt, (n_rows, n_cols))
        x = rng.standard_normal((FEW, n_cols)).astype(np.float32)
        together = by_dot(fmt, w, prepared(x, kind_of(fmt)), n_cols)
        for n_tokens in (1, 2, 3, 5):
            alone = by_dot(fmt, w, prepared(x[FEW - n_tokens :], kind_of(fmt)), n_cols)
            np.testing.assert_array_equal(alone.view(np.uint32), together[FEW - n_tokens :].view(np.uint32))


@each_format
def test_a_zero_token_gives_zero(fmt: Format) -> None:
    w = random_rows(np.random.default_rng(0), fmt, (4, 512))
    groups = prepared(np.zeros((2, 512), np.float32), kind_of(fmt))
    assert not by_dot(fmt, w, groups, 512).any()
    assert not by_panel(fmt, w, groups, 512).any()


@each_format
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_what_is_not_a_number_stays_so(fmt: Format, bad: float) -> None:
    """An overflow must reach the logits, where it is reported, and not turn into plausible numbers."""
    w = random_rows(np.random.default_rng(0), fmt, (4, 256))
    x = np.ones((2, 256), np.float32)
    x[:, 5] = bad
    groups = prepared(x, kind_of(fmt))
    assert not np.isfinite(by_dot(fmt, w, groups, 256)).any()
    assert not np.isfinite(by_panel(fmt, w, groups, 256)).any()


@each_format
def test_floats(fmt: Format) -> None:
    """The compiled dequantize against the NumPy one: contraction may save a rounding, so two units of the largest."""
    rng = np.random.default_rng(fmt.id)
    for n_cols, _ in sizes(fmt):
        w = random_rows(rng, fmt, (1, n_cols))
        n_groups, tail = split(fmt, n_cols)
        out = np.full(n_cols + 1, np.nan, np.float32)
        kernels(fmt).floats(address(out), address(w), n_groups, tail, n_cols - GROUP * n_groups)
        expected = dequantize(fmt, w)[0]
        tolerance = 0 if fmt.block_size == 1 else 4 * EPS * np.abs(expected).max()
        np.testing.assert_allclose(out[:-1], expected, rtol=0, atol=tolerance)
        assert np.isnan(out[-1])


# ---- elementwise
@compiled
def run_rms_norm(out, x, weight, n, eps):
    rms_norm(out, x, weight, n, load_f32(eps))


@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e4])
@pytest.mark.parametrize("n", [32, 256, 320, 4096])
def test_rms_norm(n: int, scale: float) -> None:
    rng = np.random.default_rng(n)
    x = (rng.standard_normal(n) * scale).astype(np.float32)
    weight, eps, out = rng.uniform(0.5, 2, n).astype(np.float32), np.array([1e-5], np.float32), np.zeros(n, np.float32)
    run_rms_norm(address(out), address(x), address(weight), n, address(eps))
    np.testing.assert_allclose(out, naive.rms_norm(x, weight.astype(np.float64), float(eps[0])), rtol=1e-6)


@compiled
def run_rope(x, angles, frequencies, n, position, step, gap):
    rope_angles(angles, frequencies, n, position)
    rope(x, angles, n, step, gap)


@pytest.mark.parametrize("interleaved", [True, False])
@pytest.mark.parametrize("position", [0, 1, 77, 32_767, 1_000_003])
@pytest.mark.parametrize("head_dim", [16, 32, 48, 128])
def test_rope(head_dim: int, position: int, interleaved: bool) -> None:
    """Angles are formed in double precision, so far positions are as exact as near ones."""
    n = head_dim // 2
    x = np.random.default_rng(position).standard_normal(head_dim).astype(np.float32)
    frequencies = 10_000.0 ** (-2 * np.arange(n) / head_dim)
    expected = naive.rope(x.astype(np.float64), position, 10_000.0, interleaved)
    out, angles = x.copy(), np.zeros(head_dim, np.float32)
    step, gap = (2, 1) if interleaved else (1, n)
    run_rope(address(out), address(angles), address(frequencies), n, position, step, gap)
    np.testing.assert_allclose(out, expected, rtol=0, atol=6 * EPS * np.abs(x).max())


@compiled
def run_silu_mul(out, gate, up, n):
    silu_mul(out, gate, up, n)


def test_silu_mul() -> None:
    gate = np.concatenate([np.linspace(-80, 80, 1000), [-1e4, -88, -87.5, 1e4, 0, -0.0, 1e30, -1e30]]).astype(
        np.float32
    )
    up = np.random.default_rng(0).standard_normal(len(gate)).astype(np.float32)
    out = np.zeros_like(gate)
    run_silu_mul(address(out), address(gate), address(up), len(gate))
    # Below -87 the true value is under 1e-35: there the clamped exponential may leave something as small.
    np.testing.assert_allclose(out[:-1], naive.silu_mul(gate, up)[:-1], rtol=1e-6, atol=1e-33)


# ---- attention
KV = [F16_KV, Q8_0_KV]


def stored(k: np.ndarray, v: np.ndarray, capacity: int, kv: KVFormat) -> tuple[np.ndarray, np.ndarray]:
    """A ring after all positions of k and v [n_positions, head_dim] have been written to it, one after the other."""
    n_bytes = capacity * kv.row_bytes(k.shape[1])
    # Halves of about 1, so that a slot that was never written shows where it is not masked; and what may be overread.
    keys, values = (np.full(n_bytes + 256, 0x3C, np.uint8) for _ in range(2))
    for position in range(len(k)):
        slot = position % capacity
        kv.store(address(keys), address(values), slot, address(k[position]), address(v[position]), k.shape[1])
    return keys, values


def attended(
    kv: KVFormat, q: np.ndarray, positions: list[int], ring: tuple[np.ndarray, np.ndarray], capacity: int, window: int,
    part: tuple[int, int] = (0, 2**62),
) -> np.ndarray:  # fmt: skip
    """Rows float32 [n, head_dim + 16] as the kernel for n queries leaves them; a part's only with `part` given."""
    n, head_dim = q.shape
    out, at = np.zeros((n, head_dim + 16), np.float32), np.array(positions, np.int64)
    scratch = aligned((SCRATCH_BYTES,), np.uint8)
    sources, targets = (np.array([address(row) for row in rows], np.int64) for rows in (q, out))
    attend_kernel(n, kv)(
        address(targets), address(sources), address(at), address(ring[0]), address(ring[1]), capacity, head_dim,
        window or 2**40, *part, int(part[1] < 2**62), address(scratch),
    )  # fmt: skip
    return out


def as_stored(x: np.ndarray, kv: KVFormat) -> np.ndarray:
    """float64: what the ring holds of keys or values [n_positions, head_dim]."""
    if kv is F16_KV:
        return x.astype(np.float16).astype(np.float64)
    blocks = x.reshape(len(x), -1, 32)
    d = np.abs(blocks).max(axis=2, keepdims=True) / np.float32(127)
    return (np.rint(blocks / d) * d.astype(np.float16).astype(np.float64)).reshape(x.shape)


def rows_and_ring(rng: np.random.Generator, n_positions: int, head_dim: int, capacity: int, kv: KVFormat) -> Any:
    k, v = (rng.standard_normal((n_positions, head_dim)).astype(np.float32) for _ in range(2))
    k *= 3
    return [as_stored(a, kv) for a in (k, v)], stored(k, v, capacity, kv)


RINGS = [(32, 64, 0, 5), (32, 64, 0, 64), (48, 48, 17, 164), (16, 96, 32, 305), (128, 80, 64, 250), (32, 272, 200, 900)]


@pytest.mark.parametrize(("head_dim", "capacity", "window", "n_positions"), RINGS)
@pytest.mark.parametrize("kv", KV, ids=lambda kv: kv.name)
@pytest.mark.parametrize("n", sorted(set(SIZES)))
def test_attention(n: int, kv: KVFormat, head_dim: int, capacity: int, window: int, n_positions: int) -> None:
    """n queries at the last positions, and n heads at one position, over a ring that may have wrapped several times.

    With bytes the query is rounded too: a score of about 3 sqrt(head_dim) may then be off by a few hundredths.
    """
    head_dim = -(-head_dim // kv.multiple) * kv.multiple
    rng = np.random.default_rng(n_positions + n)
    exact, ring = rows_and_ring(rng, n_positions, head_dim, capacity, kv)
    for positions in (list(range(max(0, n_positions - n), n_positions)), [n_positions - 1] * n):
        if len(positions) < n:
            continue
        q = rng.standard_normal((n, head_dim)).astype(np.float32)
        out = attended(kv, q, positions, ring, capacity, window)[:, :head_dim]
        q = as_stored(q, kv) if kv is Q8_0_KV else q.astype(np.float64)
        for i, position in enumerate(positions):
            expected = naive.attend(q[i], position, *exact, window)
            tolerance = 2e-6 if kv is F16_KV else 3e-2
            np.testing.assert_allclose(out[i], expected, rtol=0, atol=tolerance * np.abs(exact[1]).max())


@compiled
def run_combine(out, parts, n_parts, head_dim):
    combine_parts(out, parts, n_parts, head_dim)


@pytest.mark.parametrize("kv", KV, ids=lambda kv: kv.name)
@pytest.mark.parametrize("n", sorted(set(SIZES)))
@pytest.mark.parametrize(("window", "position"), [(0, 300), (150, 290), (70, 64)])
def test_parts_of_a_context_give_the_whole(n: int, kv: KVFormat, window: int, position: int) -> None:
    rng = np.random.default_rng(n)
    _, ring = rows_and_ring(rng, position + 1, 64, 320, kv)
    q = rng.standard_normal((n, 64)).astype(np.float32)
    whole = attended(kv, q, [position] * n, ring, 320, window)
    first = max(0, position - window + 1) // 128 if window else 0
    cut = [
        attended(kv, q, [position] * n, ring, 320, window, (128 * i, 128 * i + 128))
        for i in range(first, position // 128 + 1)
    ]
    for i in range(n):
        out, parts = np.zeros(64, np.float32), np.stack([part[i] for part in cut])
        run_combine(address(out), address(parts), len(cut), 64)
        np.testing.assert_allclose(out, whole[i, :64], rtol=0, atol=2e-6)


@pytest.mark.parametrize("kv", KV, ids=lambda kv: kv.name)
@pytest.mark.parametrize("window", [0, 100])
def test_a_query_does_not_depend_on_its_neighbours(kv: KVFormat, window: int) -> None:
    """Bit for bit, as for matrix products."""
    rng = np.random.default_rng(0)
    _, ring = rows_and_ring(rng, 200, 32, 208, kv)
    positions = [120, 126, 127, 128, 129, 150, 191, 199][-QUERIES:]
    q = rng.standard_normal((QUERIES, 32)).astype(np.float32)
    together = attended(kv, q, positions, ring, 208, window)
    for i, position in enumerate(positions):
        alone = attended(kv, q[i : i + 1], [position], ring, 208, window)
        np.testing.assert_array_equal(alone[0].view(np.uint32), together[i].view(np.uint32))


# ---- router
@compiled
def run_router(chosen, weights, x, gate, dim, n_experts, n_used, scores, n_rows):
    for row in range(n_rows):
        at = 4 * row * n_used
        choose_experts(chosen + at, weights + at, x + 4 * row * dim, gate, dim, n_experts, n_used, scores)


@compiled
def run_group(entries, entry_weights, starts, active, chosen, weights, n_rows, n_experts, n_used):
    group_by_expert(entries, entry_weights, starts, active, chosen, weights, n_rows, n_experts, n_used)


@pytest.mark.parametrize(("n_experts", "n_used"), [(8, 2), (4, 1), (5, 3), (64, 8), (2, 2)])
def test_router_and_grouping(n_experts: int, n_used: int) -> None:
    """Rows, weights and starts as a list per expert has them; the first expert is made to get no row at all."""
    rng = np.random.default_rng(n_experts)
    dim, n_rows = 64, 33
    x, gate = (rng.standard_normal((n, dim)).astype(np.float32) for n in (n_rows, n_experts))
    x[:, 0], gate[:, 0] = 1, 0
    if n_used < n_experts:
        gate[0] = np.eye(1, dim)[0] * -1000
    chosen, weights = np.zeros((n_rows, n_used), np.int32), np.zeros((n_rows, n_used), np.float32)
    scores = np.zeros(n_experts, np.float32)
    run_router(
        address(chosen), address(weights), address(x), address(gate), dim, n_experts, n_used, address(scores), n_rows
    )
    choices = [naive.route(row.astype(np.float64), gate, n_used) for row in x]
    assert chosen.tolist() == [[e for e, _ in choice] for choice in choices]
    np.testing.assert_allclose(weights, [[w for _, w in choice] for choice in choices], rtol=1e-5)

    n = n_rows * n_used
    entries, entry_weights = np.zeros(n, np.int32), np.zeros(n, np.float32)
    starts, active = np.zeros(n_experts + 1, np.int32), np.zeros(n_experts + 1, np.int32)
    run_group(*map(address, (entries, entry_weights, starts, active, chosen, weights)), n_rows, n_experts, n_used)
    groups = naive.group(choices, n_experts)
    assert active[1 : active[0] + 1].tolist() == [e for e, group in enumerate(groups) if group]
    for e, group in enumerate(groups):
        part = slice(starts[e], starts[e + 1])
        assert entries[part].tolist() == [row for row, _ in group]
        np.testing.assert_allclose(entry_weights[part], [w for _, w in group], rtol=1e-5)
    assert n_used == n_experts or not groups[0]
    assert starts[-1] == n


def test_ties_go_to_the_lower_expert() -> None:
    x, gate = np.ones(32, np.float32), np.zeros((8, 32), np.float32)
    gate[[3, 5, 6]] = 1
    chosen, weights, scores = np.zeros(2, np.int32), np.zeros(2, np.float32), np.zeros(8, np.float32)
    run_router(*map(address, (chosen, weights, x, gate)), 32, 8, 2, address(scores), 1)
    assert chosen.tolist() == [3, 5]
    assert weights.tolist() == [0.5, 0.5]
    assert math.isclose(weights.sum(), 1)
