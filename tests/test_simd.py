"""Vector operations against NumPy, on whatever instruction set the code is compiled for (test_isa.py forces others)."""

import math
from typing import Any

import numpy as np
import pytest
from compiled import address, aligned, compiled
from numba import types

from llmq.jit import jit, kernel
from llmq.simd import (
    BIAS,
    ROWS,
    SIGNED,
    TOKENS,
    abs_f32x16,
    add_lanes_f32x16,
    add_lanes_i32x16,
    bits_u8x32,
    count16,
    dot_i16x8,
    dot_u7s8_half,
    exp_f32x16,
    f32_of_bf16x16,
    f32_of_i32x4,
    fma,
    grid_add_scaled,
    grid_dot,
    grid_f32,
    grid_fma,
    grid_load,
    grid_scale,
    grid_start,
    grid_store,
    high_i16_u8x16,
    i8_of_i32x16,
    i16_of_i8x16,
    i16_of_u8x16,
    i32_of_f32x16,
    join_u8x32,
    load_f16,
    load_f16_each,
    load_f16_row,
    load_f16x16,
    load_f32,
    load_f32x16,
    load_i8_each,
    load_i8x16,
    load_i8x32,
    load_i16x8,
    load_i32x16,
    load_q8_row,
    load_u8x16,
    load_u8x32,
    load_u8x64,
    load_u16x16,
    load_u32,
    low_pairs_u8x16,
    max_f32x16,
    max_lanes_f32x16,
    nibbles_u8x32,
    pair_f32x16,
    pick_bits,
    rotate_u8x32,
    round_f32x16,
    store_f16,
    store_f16x16,
    store_f32,
    store_f32x16,
    store_i8x16,
    store_i16x16,
    store_i32,
    store_i32x8,
    store_i32x16,
    store_u8x64,
    strip_add_scaled,
    strip_dot32,
    strip_dot_pair,
    strip_f32,
    strip_fma,
    strip_fma_scaled,
    strip_fma_scaled2,
    strip_i32,
    strip_load,
    strip_settle,
    strip_store,
    tile_add_mins,
    tile_dot_crossed32,
    tile_dot_scaled16,
    tile_dot_scaled32,
    tile_dot_u7,
    tile_dot_u8,
    tile_f32,
    tile_i32,
    tile_load,
    tile_splat,
    tile_store,
    tile_sums,
    transpose_i32,
    twice_high,
    twice_low,
    weave_i32,
    weave_u64,
    where_between,
    zero_i32x4,
    zero_i32x8,
)


@compiled
def run_dots(small, full, acc, u, s):
    start = tile_load(tile_i32(1), acc, 64)
    tile_store(small, 64, tile_dot_u7(start, load_u8x64(u), s, 64))
    tile_store(full, 64, tile_dot_u8(start, load_u8x64(u), s, 64))


def naive_dots(acc: np.ndarray, u: np.ndarray, s: np.ndarray) -> list[int]:
    return [int(acc[i]) + sum(int(u[4 * i + k]) * int(s[4 * i + k]) for k in range(4)) for i in range(16)]


def dots(acc: np.ndarray, u: np.ndarray, s: np.ndarray) -> tuple[list[int], list[int]]:
    small, full = np.zeros(16, np.int32), np.zeros(16, np.int32)
    run_dots(address(small), address(full), address(acc), address(u), address(s))
    return small.tolist(), full.tolist()


@pytest.mark.parametrize("s", [127, -127])
@pytest.mark.parametrize("u", [0, 1, 63, 127, 128, 254, 255])
def test_byte_dots_at_their_extremes(u: int, s: int) -> None:
    """Two products of 255 * 127 do not fit 16 bits: instructions that add them there saturate."""
    acc, us, ss = np.full(16, -7, np.int32), np.full(64, u, np.uint8), np.full(64, s, np.int8)
    small, full = dots(acc, us, ss)
    assert full == naive_dots(acc, us, ss)
    if u < 128:
        assert small == full


def test_byte_dots_of_random_lanes() -> None:
    rng = np.random.default_rng(0)
    for _ in range(20):
        acc = rng.integers(-(2**20), 2**20, 16, dtype=np.int32)
        u, s = rng.integers(0, 256, 64, dtype=np.uint8), rng.integers(-127, 128, 64, dtype=np.int8)
        assert dots(acc, u, s)[1] == naive_dots(acc, u, s)
        assert dots(acc, u & 127, s)[0] == naive_dots(acc, u & 127, s)


@compiled
def run_mins(out, mins, sums):
    zero = tile_f32(8, 2)
    products = tile_add_mins(zero, i16_of_i8x16(load_i8x16(mins)), sums, tile_splat(zero, np.float32(2)))
    first, second = tile_sums(2, products, zero)
    store_f32(out, first)
    store_f32(out + 4, second)


def test_mins_of_two_tokens() -> None:
    """Sixteen each, side by side in one vector."""
    rng = np.random.default_rng(1)
    mins, sums = rng.integers(-64, 64, 16, dtype=np.int8), rng.integers(-4064, 4065, (2, 16), dtype=np.int16)
    out = np.zeros(2, np.float32)
    run_mins(address(out), address(mins), address(sums))
    assert out.tolist() == (2 * (sums.astype(int) @ mins.astype(int))).tolist()


@jit
def weave(woven, rows):
    """16 rows of 64 bytes as one part of a strip's weights."""
    tile_store(woven, 4 * ROWS, weave_i32((
        load_i32x16(rows), load_i32x16(rows + 64), load_i32x16(rows + 128), load_i32x16(rows + 192),
        load_i32x16(rows + 256), load_i32x16(rows + 320), load_i32x16(rows + 384), load_i32x16(rows + 448),
        load_i32x16(rows + 512), load_i32x16(rows + 576), load_i32x16(rows + 640), load_i32x16(rows + 704),
        load_i32x16(rows + 768), load_i32x16(rows + 832), load_i32x16(rows + 896), load_i32x16(rows + 960),
    )))  # fmt: skip


def strips_of(top: int) -> Any:
    """A kernel of everything that a strip does with integers, for weights of up to `top`."""
    dot, add_scaled32, add_scaled16 = strip_dot32(top), *(strip_add_scaled(n, min(top, 63)) for n in (32, 16))
    line = 4 * ROWS

    def run_strips(out, woven, rows, pairs, scales, x):
        for r in range(0, ROWS, 16):
            weave(woven + 4 * r, rows + 64 * r)
        strip_store(out, dot(strip_i32(TOKENS), woven, x, 128))
        start = strip_dot_pair(strip_i32(TOKENS), pairs, x, 128)
        strip_store(out + TOKENS * line, start)
        strip_store(out + 2 * TOKENS * line, dot(start, woven, x, 128))
        total = add_scaled16(strip_i32(TOKENS), woven, x, scales, 128)
        strip_store(out + 3 * TOKENS * line, strip_settle(total))
        total = add_scaled16(total, woven + 4 * line, x + 16, scales + line, 128)
        total = add_scaled32(total, woven + 8 * line, x + 32, scales, 128)
        strip_store(out + 4 * TOKENS * line, strip_settle(total))

    return kernel(*(types.int64,) * 6, name=f"strips_{top}")(run_strips)


@pytest.mark.parametrize("top", [15, 31, 63, 127, 255])
@pytest.mark.parametrize("largest", [False, True])
def test_strips(top: int, largest: bool) -> None:
    """64 weights of a strip's rows against the bytes of a tile's tokens.

    With all at their largest, sums in 16 bits are as near their end as they may get.
    """
    rng = np.random.default_rng(top)
    rows, woven, pairs = aligned((ROWS, 64), np.uint8), aligned((16, ROWS, 4), np.uint8), aligned((ROWS, 2), np.int16)
    scales, x, out = aligned((2, ROWS), np.int32), aligned((TOKENS, 128), np.int8), aligned((5, TOKENS, ROWS), np.int32)
    rows[:] = top if largest else rng.integers(0, top + 1, rows.shape)
    x[:] = -127 if largest else rng.integers(-127, 128, x.shape)
    pairs[:], scales[:] = rng.integers(-64, 64, pairs.shape), -128 if largest else rng.integers(-128, 128, scales.shape)
    strips_of(top)(*map(address, (out, woven, rows, pairs, scales, x)))
    u, tokens = (rows.view(np.int8) if SIGNED else rows).astype(np.int64), x.astype(np.int64)
    one, two, three, four = (tokens[:, i : i + 16] @ u[:, i : i + 16].T for i in range(0, 64, 16))
    first = x[:, :4].copy().view(np.int16).astype(np.int64) @ pairs.T.astype(np.int64)
    np.testing.assert_array_equal(out[0], one + two)
    np.testing.assert_array_equal(out[1], first)
    np.testing.assert_array_equal(out[2], first + one + two)
    if top < 64:
        np.testing.assert_array_equal(out[3], one * scales[0])
        np.testing.assert_array_equal(out[4], (one + three + four) * scales[0] + two * scales[1])


@compiled
def run_strip_floats(out, start, sums, other, rows, x):
    acc, first, second = (
        strip_load(strip_f32(TOKENS), start),
        strip_load(strip_i32(TOKENS), sums),
        strip_load(strip_i32(TOKENS), other),
    )
    line = 4 * ROWS * TOKENS
    strip_store(out, strip_fma(acc, rows, x, 128))
    strip_store(out + line, strip_fma_scaled(acc, first, rows, x, 128))
    strip_store(out + 2 * line, strip_fma_scaled2(acc, first, second, rows, x, 128))


def test_strips_of_floats() -> None:
    rng = np.random.default_rng(6)
    out, rows, x = (
        aligned((3, TOKENS, ROWS), np.float32),
        aligned((2, ROWS), np.float32),
        aligned((TOKENS, 32), np.float32),
    )
    start, sums, other = (
        aligned((TOKENS, ROWS), np.float32),
        aligned((TOKENS, ROWS), np.int32),
        aligned((TOKENS, ROWS), np.int32),
    )
    for array in (start, rows, x):
        array[:] = rng.standard_normal(array.shape)
    sums[:], other[:] = rng.integers(-1000, 1000, sums.shape), rng.integers(-1000, 1000, sums.shape)
    run_strip_floats(*map(address, (out, start, sums, other, rows, x)))
    word = x[:, :1].astype(np.float64)
    np.testing.assert_allclose(out[0], start + rows[0] * word, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(out[1], start + sums * rows[0] * word, rtol=1e-5, atol=1e-3)
    np.testing.assert_allclose(out[2], start + (sums * rows[0] + other * rows[1]) * word, rtol=1e-5, atol=1e-3)


@jit
def low_word(x):
    return np.uint64(load_u32(x)) | (np.uint64(load_u32(x + 4)) << np.uint64(32))


@compiled
def run_unpack(out, x):
    sixteen = load_u8x16(x)
    store_i32x8(out, low_pairs_u8x16(sixteen))
    store_u8x64(out + 64, join_u8x32(nibbles_u8x32(load_u8x16(x)), nibbles_u8x32(load_u8x16(x + 16))))
    store_u8x64(out + 128, rotate_u8x32(load_u8x32(x), 2, -4))
    store_u8x64(out + 192, join_u8x32(bits_u8x32(load_u32(x)), load_u8x32(x)))
    store_i16x16(out + 256, i16_of_i8x16(load_i8x16(x)))
    both = i16_of_u8x16(sixteen)
    store_i16x16(out + 288, both)
    store_i16x16(out + 320, twice_low(both))
    store_i16x16(out + 352, twice_high(both))
    store_i16x16(out + 384, i16_of_u8x16(weave_u64(low_word(x), low_word(x + 8))))
    store_u8x64(out + 448, pick_bits(load_u8x32(x), np.uint8(4), np.uint8(128)))


def test_unpacking() -> None:
    x = np.random.default_rng(2).integers(0, 256, 32, dtype=np.uint8)
    out = np.zeros(512, np.uint8)
    run_unpack(address(out), address(x))
    low, high = (x & 15).tolist(), (x >> 4).tolist()
    assert out[:32].view(np.uint16).tolist() == [b for b in x[:8].tolist() for _ in range(2)]
    assert out[64:128].tolist() == low[:16] + high[:16] + low[16:] + high[16:]
    words = [int.from_bytes(x[i : i + 8].tobytes(), "little") for i in range(0, 32, 8)]
    rotated = [word << by | word >> 64 - by for by in (2, 60) for word in words]
    assert out[128:192].view(np.uint64).tolist() == [word % 2**64 for word in rotated]
    word = int.from_bytes(x[:4].tobytes(), "little")
    assert out[192:224].tolist() == [word >> i & 1 for i in range(32)]
    assert out[224:256].tolist() == x.tolist()
    assert out[256:288].view(np.int16).tolist() == x[:16].view(np.int8).tolist()
    assert out[288:320].view(np.int16).tolist() == x[:16].tolist()
    assert out[320:352].view(np.int16).tolist() == [b for b in x[:8].tolist() for _ in range(2)]
    assert out[352:384].view(np.int16).tolist() == [b for b in x[8:16].tolist() for _ in range(2)]
    assert out[384:416].view(np.int16).tolist() == [*x[:4], *x[8:12], *x[4:8], *x[12:16]]
    assert out[448:].tolist() == [16 * (b >> 2 & 1) for b in x.tolist()] + [16 * (b >> 7) for b in x.tolist()]


def scaled_dots(dot: Any, name: str) -> Any:
    """A kernel of both halves of a group for two tokens."""

    def run(out, start, u, s, scales):
        acc, sixteen = tile_load(tile_i32(2), start, 64), i16_of_i8x16(load_i8x16(scales))
        tile_store(out, 64, dot(acc, load_u8x64(u), load_u8x64(u + 64), sixteen, 0, s, 128))
        tile_store(out + 128, 64, dot(acc, load_u8x64(u), load_u8x64(u + 64), sixteen, 1, s, 128))

    return kernel(*(types.int64,) * 5, name=f"scaled_dots_{name}")(run)


@compiled
def run_half_dots(out, u, s, scales, words):
    acc = dot_u7s8_half(zero_i32x8(), load_u8x32(u), load_i8x32(s), scales)
    store_i32x8(out, dot_u7s8_half(acc, load_u8x32(u + 32), load_i8x32(s + 32), scales + 4))
    sums = dot_i16x8(zero_i32x4(), high_i16_u8x16(load_u8x16(words)), load_i16x8(words + 16))
    store_f32(out + 32, tile_sums(1, (f32_of_i32x4(sums),), tile_f32(4, 1))[0])


@pytest.mark.parametrize("extreme", [False, True])
def test_half_dots(extreme: bool) -> None:
    """Thirty-two weights to a scale, and eight mins against eight sums."""
    rng = np.random.default_rng(5)
    u = np.full(64, 127, np.uint8) if extreme else rng.integers(0, 128, 64, dtype=np.uint8)
    s = np.full(64, -127, np.int8) if extreme else rng.integers(-127, 128, 64, dtype=np.int8)
    scales = np.full(2, 63, np.int16) if extreme else rng.integers(0, 64, 2, dtype=np.int16)
    mins, sums = rng.integers(0, 64, 8, dtype=np.uint8), rng.integers(-4064, 4065, 8, dtype=np.int16)
    words = np.concatenate([np.zeros(8, np.uint8), mins, sums.view(np.uint8)])
    out = np.zeros(9, np.int32)
    run_half_dots(address(out), address(u), address(s), address(np.repeat(scales, 2)), address(words))
    products = (u.astype(int) * s.astype(int)).reshape(2, 8, 4).sum(axis=2)
    assert out[:8].tolist() == (products * scales[:, None].astype(int)).sum(axis=0).tolist()
    assert out[8:].view(np.float32)[0] == int(mins.astype(int) @ sums.astype(int))


# For each 16 of 128 weights, which of a half's eight scales is theirs.
ORDERS = {
    "scaled16": (tile_dot_scaled16, range(8)),
    "scaled32": (tile_dot_scaled32, range(8)),
    "crossed32": (tile_dot_crossed32, (0, 1, 4, 5, 2, 3, 6, 7)),
}


@pytest.mark.parametrize("extreme", [False, True])
@pytest.mark.parametrize("name", ORDERS)
def test_scaled_dots(name: str, extreme: bool) -> None:
    """128 weights of two tokens; of the lanes only the total is promised. Four products of 63 * 127 fit 16 bits."""
    dot, order = ORDERS[name]
    if name == "crossed32" and SIGNED:
        pytest.skip("not used on Arm")
    rng = np.random.default_rng(4)
    start = rng.integers(-(2**20), 2**20, (2, 16), dtype=np.int32)
    u = np.full(128, 63, np.uint8) if extreme else rng.integers(0, 64, 128, dtype=np.uint8)
    s = np.full((2, 128), -127, np.int8) if extreme else rng.integers(-127, 128, (2, 128), dtype=np.int8)
    scales = np.full(16, -128, np.int8) if extreme else rng.integers(-128, 128, 16, dtype=np.int8)
    if name != "scaled16":
        scales[1::2] = scales[::2]
    out = np.zeros((2, 2, 16), np.int32)
    scaled_dots(dot, name)(*map(address, (out, start, u, s, scales)))
    for half in (0, 1):
        each = scales[8 * half :][list(order)].repeat(16).astype(np.int64)
        expected = start.sum(axis=1, dtype=np.int64) + s @ (u * each)
        assert out[half].sum(axis=1, dtype=np.int64).tolist() == expected.tolist()


@compiled
def run_transpose(out, rows):
    a = rows
    store = transpose_i32((
        load_i32x16(a), load_i32x16(a + 64), load_i32x16(a + 128), load_i32x16(a + 192),
        load_i32x16(a + 256), load_i32x16(a + 320), load_i32x16(a + 384), load_i32x16(a + 448),
        load_i32x16(a + 512), load_i32x16(a + 576), load_i32x16(a + 640), load_i32x16(a + 704),
        load_i32x16(a + 768), load_i32x16(a + 832), load_i32x16(a + 896), load_i32x16(a + 960),
    ))  # fmt: skip
    tile_store(out, 64, store)


def test_transpose() -> None:
    rows = np.random.default_rng(3).integers(-(2**31), 2**31, (16, 16)).astype(np.int32)
    columns = np.zeros((16, 16), np.int32)
    run_transpose(address(columns), address(rows))
    np.testing.assert_array_equal(columns, rows.T)


@compiled
def run_halves(wide, one, brain, x, n):
    for i in range(0, n, 16):
        store_f32x16(wide + 4 * i, load_f16x16(x + 2 * i))
        store_f32x16(brain + 4 * i, f32_of_bf16x16(load_u16x16(x + 2 * i)))
        for k in range(16):
            store_f32(one + 4 * (i + k), load_f16(x + 2 * (i + k)))


def test_every_half_float_widens_exactly() -> None:
    bits = np.arange(65536, dtype=np.uint16)
    wide, one, brain = (np.zeros(65536, np.float32) for _ in range(3))
    run_halves(address(wide), address(one), address(brain), address(bits), 65536)
    with np.errstate(invalid="ignore"):  # signalling NaN
        expected = bits.view(np.float16).astype(np.float32)
    numbers = ~np.isnan(expected)
    for got in (wide, one):
        np.testing.assert_array_equal(got[numbers].view(np.uint32), expected[numbers].view(np.uint32))
        assert np.isnan(got[~numbers]).all()
    np.testing.assert_array_equal(brain.view(np.uint32), bits.astype(np.uint32) << 16)


@compiled
def run_narrow(out, one, x, n):
    for i in range(0, n, 16):
        store_f16x16(out + 2 * i, load_f32x16(x + 4 * i))
        for k in range(16):
            store_f16(one + 2 * (i + k), load_f32(x + 4 * (i + k)))


def test_narrowing_rounds_to_nearest_even() -> None:
    """Every half float, the ties between neighbours, the floats beside those ties, and random bits."""
    halves = np.arange(0x7C00, dtype=np.uint16).view(np.float16).astype(np.float32)
    ties = (halves[:-1] + halves[1:]) / 2
    around = np.concatenate([np.nextafter(ties, np.float32(0)), ties, np.nextafter(ties, np.float32(1e9))])
    edge = np.array([65519.996, 65520, 1e30, np.inf, 2.0**-25, np.nextafter(np.float32(2.0**-25), np.float32(1))])
    random = np.random.default_rng(4).integers(0, 2**32, 40_000, dtype=np.uint32).view(np.float32)
    x = np.concatenate([halves, around, edge.astype(np.float32), random])
    x = np.concatenate([x, -x])
    x = np.resize(x, -(-len(x) // 16) * 16)
    out, one = np.zeros(len(x), np.uint16), np.zeros(len(x), np.uint16)
    run_narrow(address(out), address(one), address(x), len(x))
    with np.errstate(over="ignore", invalid="ignore"):
        expected = x.astype(np.float16).view(np.uint16)
    numbers = ~np.isnan(x)
    np.testing.assert_array_equal(out[numbers], expected[numbers])
    np.testing.assert_array_equal(one[numbers], expected[numbers])
    assert np.isnan(out.view(np.float16)[~numbers]).all()


@compiled
def run_exp(out, x, n):
    for i in range(0, n, 16):
        store_f32x16(out + 4 * i, exp_f32x16(load_f32x16(x + 4 * i)))


def test_exp() -> None:
    """Within 2 units in the last place where the result is a normal float; the ends as documented."""
    x = np.concatenate([np.linspace(-87.3, 88.2, 40_000), np.linspace(-1, 1, 4_000)]).astype(np.float32)[: 2_750 * 16]
    out = np.zeros_like(x)
    run_exp(address(out), address(x), len(x))
    expected = np.exp(x.astype(np.float64))
    assert (np.abs(out - expected) <= 2 * np.spacing(expected.astype(np.float32))).all()
    ends = np.array([-np.inf, -1e30, -87.4, 88.3, 1e30, np.inf, 0, -0.0] * 2, np.float32)
    out = np.zeros(16, np.float32)
    run_exp(address(out), address(ends), 16)
    assert out[:3].tolist() == [0, 0, 0]
    assert out[3] == out[4] == out[5] > 2e38
    assert out[6:8].tolist() == [1, 1]


@compiled
def run_grid(out, sums, halves, words, bytes_, row):
    at = (halves, halves + 32)
    grid = grid_fma(grid_load(3, 2, out, 128), load_f16_each(at, 0), words, 8)
    grid_store(out, 128, 3, grid_scale(grid, 3, words))
    dots = grid_dot(grid_start(at, 3, sums), load_i8_each((bytes_, bytes_ + 64), 0), words)
    grid_store(out + 384, 128, 3, grid_add_scaled(grid_f32(6), dots, load_f16_each(at, 0), words))
    grid_store(out + 768, 64, 1, load_f16_row(halves, 0, 0, 2))
    grid_store(out + 896, 64, 1, load_q8_row(row, 0, 1, 2))


def test_grids() -> None:
    """Two vectors times three words; then rows of values, in halves and in blocks of bytes."""
    rng = np.random.default_rng(9)
    out = rng.standard_normal((8, 2, 16)).astype(np.float32)
    start, words = out[:3].astype(np.float64), rng.standard_normal(5).astype(np.float32)
    halves, sums = rng.standard_normal((2, 16)).astype(np.float16), rng.integers(-1000, 1000, 3, dtype=np.int32)
    keys = rng.integers(-127, 128, (2, 16, 4), dtype=np.int8)
    blocks = np.zeros(2, [("d", np.float16), ("q", np.int8, 32)])
    blocks["d"], blocks["q"] = rng.standard_normal(2), rng.integers(-127, 128, (2, 32))
    run_grid(*map(address, (out, sums, halves, words, keys, blocks)))
    x, w = halves.astype(np.float64), words.astype(np.float64)
    expected = (start + x * w[[0, 2, 4], None, None]) * w[:3, None, None]
    np.testing.assert_allclose(out[:3], expected, rtol=1e-5, atol=1e-6)
    q = words[:3].view(np.int8).reshape(3, 1, 1, 4).astype(np.int64)
    dots = sums[:, None, None] + ((keys.astype(np.int64) + BIAS) * q).sum(axis=3)
    np.testing.assert_allclose(out[3:6], dots * x * w[:3, None, None], rtol=1e-5)
    np.testing.assert_array_equal(out[6], halves.astype(np.float32))
    values = (blocks["q"] * blocks["d"].astype(np.float32)[:, None]).reshape(4, 16)
    np.testing.assert_array_equal(out[7], values[1:3])


@compiled
def run_floats(out, scalars, x, y):
    a, b = load_f32x16(x), load_f32x16(y)
    store_f32x16(out, fma(a, b, a))
    store_f32x16(out + 64, max_f32x16(a, b))
    store_f32x16(out + 128, round_f32x16(a))
    store_f32x16(out + 192, abs_f32x16(a))
    store_f32x16(out + 256, where_between(count16(np.int32(5)), np.int32(7), np.int32(9), a, b))
    store_f32x16(out + 320, pair_f32x16(load_f32(x), load_f32(y)))
    store_f32x16(out + 384, a / b)
    store_i32x16(out + 448, i32_of_f32x16(round_f32x16(a)))
    store_i8x16(out + 512, i8_of_i32x16(i32_of_f32x16(round_f32x16(a))))
    store_f32(scalars, add_lanes_f32x16(a))
    store_f32(scalars + 8, max_lanes_f32x16(a))
    store_i32(scalars + 12, add_lanes_i32x16(i32_of_f32x16(round_f32x16(a))))


def test_float_arithmetic() -> None:
    rng = np.random.default_rng(5)
    x = (rng.standard_normal(16) * 40).astype(np.float32)
    x[:4] = 0.5, 1.5, -2.5, -126.5
    y = rng.uniform(1, 2, 16).astype(np.float32)
    out, scalars = np.zeros((10, 16), np.float32), np.zeros(4, np.float32)
    run_floats(address(out), address(scalars), address(x), address(y))
    wide = x.astype(np.float64)
    np.testing.assert_array_equal(out[0], (wide * y + wide).astype(np.float32))
    np.testing.assert_array_equal(out[1], np.maximum(x, y))
    np.testing.assert_array_equal(out[2], np.rint(x))
    np.testing.assert_array_equal(out[3], np.abs(x))
    assert out[4].tolist() == [x[i] if 7 <= i + 5 <= 9 else y[i] for i in range(16)]
    assert out[5].tolist() == [x[0]] * 8 + [y[0]] * 8
    np.testing.assert_allclose(out[6], wide / y, rtol=2.0**-22)
    assert out[7].view(np.int32).tolist() == np.rint(x).astype(int).tolist()
    assert out[8].view(np.int8)[:16].tolist() == np.rint(x).astype(int).tolist()
    assert math.isclose(scalars[0], wide.sum(), abs_tol=16 * 2.0**-24 * np.abs(wide).sum())
    assert scalars[2] == x.max()
    assert scalars[3:].view(np.int32)[0] == np.rint(x).sum()
