"""One small set of functions per block format: packed bytes to lanes of unsigned weights, scales and offsets.

Work goes by groups of 256 weights (one K block, or eight blocks of 32). `lanes(w, j)` gives weights 64j to 64j+63 of
the group at address `w` as unsigned bytes `u`. What they mean:
  K formats     x = d * scale * u - dm * min     scale and min are small integers, one per 16 weights
  blocks of 32  x = d * u + c                    one d and c per block
  floats        x as it is, 16 at a time
Layouts are drawn in llmq/formats.py.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from llmq.formats import (
    BF16,
    F16,
    F32,
    IQ4_NL,
    IQ4_VALUES,
    IQ4_XS,
    Q2_K,
    Q3_K,
    Q4_0,
    Q4_1,
    Q4_K,
    Q5_0,
    Q5_1,
    Q5_K,
    Q6_K,
    Q8_0,
    Format,
)
from llmq.jit import jit
from llmq.simd import (
    SIGNED,
    about32_i16,
    bits_u8x32,
    f32_of_bf16x16,
    f32x8_of_bytes,
    gather_f16x8,
    high_nibbles_i16,
    i16_of_i8x16,
    i16_of_u8x16,
    join_u8x32,
    load_f16,
    load_f16_pair,
    load_f16x16,
    load_f32x16,
    load_i8x16,
    load_i16,
    load_i64,
    load_u8,
    load_u8x16,
    load_u8x32,
    load_u8x64,
    load_u16x16,
    load_u32,
    lookup16,
    low_nibbles_i16,
    nibbles_u8x32,
    pick_bits,
    rotate_u8x32,
    splat_f32x8,
    splat_u8x32,
    splat_u8x64,
    twice_high,
    twice_low,
    weave_u64,
)

GROUP = 256


@dataclass(frozen=True, slots=True)
class KFormat:
    """Super-blocks of 256: integer scales and mins under two half-float factors.

    Formats with 32 weights to a scale also say how to get at their parts without a shuffle: `halves` are the two halves
    of `lanes`, `words` the eight scales and eight mins as bytes, and `wide` has sub-blocks 4j and 4j + 2 of 32 weights,
    then 4j + 1 and 4j + 3.
    """

    format: Format
    sub: int  # weights per scale: 32 or 16
    top: int  # the largest lane
    lanes: Callable[..., Any]  # (w, j) -> u8x64, below 128
    scales: Callable[..., Any]  # (w) -> i16x16, one per 16 weights
    mins: Callable[..., Any]  # (w) -> i16x16, one per 16 weights
    factors: Callable[..., Any]  # (w) -> d, dm
    halves: Callable[..., Any] | None = None  # (w, j) -> u8x32, u8x32
    words: Callable[..., Any] | None = None  # (w) -> u8x16
    wide: Callable[..., Any] | None = None  # (w, j) -> u8x64, u8x64
    centre: int = 0  # not 0: mins and factors say x = d * scale * (u - centre)


@dataclass(frozen=True, slots=True)
class BlockFormat:
    """Blocks of 32 weights with a half-float scale and an offset."""

    format: Format
    top: int  # the largest lane
    centre: int  # not 0: x = d * (u - centre)
    lanes: Callable[..., Any]  # (w, j) -> u8x64
    factors: Callable[..., Any]  # (w, s) -> d, c of block s of the group
    factors8: Callable[..., Any]  # (w) -> f32x8, f32x8: d and c of the group's blocks


@dataclass(frozen=True, slots=True)
class FloatFormat:
    """Plain floats."""

    format: Format
    lanes: Callable[..., Any]  # (address) -> f32x16


# Q4_K and Q5_K keep 8 scales and 8 mins of 6 bits in 12 bytes. As little-endian words, ab of eight and c of four:
#   ab: byte i holds  hh ssssss   scale i (i = 0..3) or min i - 4 (i = 4..7), h = bits 4, 5 of that four further on
#   c:  byte i holds  mmmm ssss   low 4 bits of min i+4 and scale i+4
LOW6, LOW4, HIGH2 = np.uint64(0x3F3F3F3F3F3F3F3F), np.uint64(0x0F0F0F0F0F0F0F0F), np.uint64(0x3030303030303030)
LOW2 = np.uint64(0x0303030303030303)


@jit
def k45_words(w):
    """The eight scales and the eight mins."""
    ab, c = np.uint64(load_i64(w + 4)), np.uint64(load_u32(w + 12))
    low_bits = (c | (c << np.uint64(28))) & LOW4  # those of the scales, then those of the mins
    return weave_u64(ab & LOW6, low_bits | ((ab >> np.uint64(2)) & HIGH2))


@jit
def k45_scales(w):
    return twice_low(i16_of_u8x16(k45_words(w)))


@jit
def k45_mins(w):
    return twice_high(i16_of_u8x16(k45_words(w)))


@jit
def k45_factors(w):
    return load_f16_pair(w)


@jit
def q4_k_halves(w, j):
    x = load_u8x32(w + 16 + 32 * j)
    return x & splat_u8x32(np.uint8(15)), x >> splat_u8x32(np.uint8(4))


@jit
def q4_k_lanes(w, j):
    low, high = q4_k_halves(w, j)
    return join_u8x32(low, high)


@jit
def q4_k_wide(w, j):
    x = load_u8x64(w + 16 + 64 * j)
    return x & splat_u8x64(np.uint8(15)), x >> splat_u8x64(np.uint8(4))


@jit
def q5_k_halves(w, j):
    x, fifth = load_u8x32(w + 48 + 32 * j), load_u8x32(w + 16) >> splat_u8x32(np.uint8(2 * j))
    one, two, four = splat_u8x32(np.uint8(1)), splat_u8x32(np.uint8(2)), splat_u8x32(np.uint8(4))
    low = (x & splat_u8x32(np.uint8(15))) | ((fifth & one) << four)
    return low, (x >> four) | ((fifth & two) << splat_u8x32(np.uint8(3)))


@jit
def q5_k_lanes(w, j):
    low, high = q5_k_halves(w, j)
    return join_u8x32(low, high)


@jit
def q5_k_wide(w, j):
    """Byte i of the fifth bits has bit s of sub-block s, weight i."""
    x, fifth = load_u8x64(w + 48 + 64 * j), load_u8x32(w + 16)
    first = 1 << 4 * j
    low, high = (
        pick_bits(fifth, np.uint8(first), np.uint8(4 * first)),
        pick_bits(fifth, np.uint8(2 * first), np.uint8(8 * first)),
    )
    return (x & splat_u8x64(np.uint8(15))) | low, (x >> splat_u8x64(np.uint8(4))) | high


@jit
def q6_k_lanes(w, j):
    """Byte i of the upper bits has those of weights i, i + 32, i + 64 and i + 96 of 128, from the lowest on."""
    half, shift = j >> 1, 4 * (j & 1)
    low = (load_u8x64(w + 64 * half) >> splat_u8x64(np.uint8(shift))) & splat_u8x64(np.uint8(15))
    upper = rotate_u8x32(load_u8x32(w + 128 + 32 * half), 4 - shift, 2 - shift)
    return low | (upper & splat_u8x64(np.uint8(0x30)))


@jit
def q6_k_scales(w):
    return i16_of_i8x16(load_i8x16(w + 192))


@jit
def q6_k_factors(w):
    d = load_f16(w + 208)
    return d, d * np.float32(32)


@jit
def _two_bits(at, j):
    """Q2_K and Q3_K: byte i at `at` has weights i, i + 32, i + 64 and i + 96 of 128, from the lowest bits on."""
    shift = 4 * (j & 1)
    return rotate_u8x32(load_u8x32(at + 32 * (j >> 1)), -shift, -shift - 2) & splat_u8x64(np.uint8(3))


@jit
def q2_k_lanes(w, j):
    return _two_bits(w + 16, j)


@jit
def q2_k_scales(w):
    return low_nibbles_i16(load_u8x16(w))


@jit
def q2_k_mins(w):
    return high_nibbles_i16(load_u8x16(w))


@jit
def q2_k_factors(w):
    return load_f16_pair(w + 80)


@jit
def q3_k_lanes(w, j):
    """Byte i of the mask has bit s of weight i of sub-block s of 32."""
    first = 1 << 2 * j
    third = pick_bits(load_u8x32(w), np.uint8(first), np.uint8(2 * first))
    return _two_bits(w + 32, j) | (third >> splat_u8x64(np.uint8(2)))


@jit
def _four_and_two_bits(low, high):
    """Four scales from the lower halves of four bytes, then four from the upper ones; two bits each of `high`."""
    four = (low | (low << np.uint64(28))) & LOW4
    return four | (((high | (high << np.uint64(28))) & LOW2) << np.uint64(4))


@jit
def q3_k_scales(w):
    low, high = np.uint64(load_i64(w + 96)), np.uint64(load_u32(w + 104))
    first = _four_and_two_bits(low & np.uint64(0xFFFFFFFF), high)
    return about32_i16(weave_u64(first, _four_and_two_bits(low >> np.uint64(32), high >> np.uint64(2))))


@jit
def q3_k_factors(w):
    d = load_f16(w + 108)
    return d, d * np.float32(4)


@jit
def q8_0_lanes(w, j):
    w += 68 * j
    return join_u8x32(load_u8x32(w + 2), load_u8x32(w + 36)) ^ splat_u8x64(np.uint8(128))


@jit
def q4_0_lanes(w, j):
    w += 36 * j
    return join_u8x32(nibbles_u8x32(load_u8x16(w + 2)), nibbles_u8x32(load_u8x16(w + 20)))


@jit
def q4_1_lanes(w, j):
    w += 40 * j
    return join_u8x32(nibbles_u8x32(load_u8x16(w + 4)), nibbles_u8x32(load_u8x16(w + 24)))


@jit
def _five_bits(fifth, low):
    bits = bits_u8x32(load_u32(fifth)) << splat_u8x32(np.uint8(4))
    return nibbles_u8x32(load_u8x16(low)) | bits


@jit
def q5_0_lanes(w, j):
    w += 44 * j
    return join_u8x32(_five_bits(w + 2, w + 6), _five_bits(w + 24, w + 28))


@jit
def q5_1_lanes(w, j):
    w += 48 * j
    return join_u8x32(_five_bits(w + 4, w + 8), _five_bits(w + 28, w + 32))


# Unsigned bytes have 128 added.
iq4_values = lookup16([int(value) + 128 for value in IQ4_VALUES])


@jit
def iq4_nl_lanes(w, j):
    return iq4_values(q4_0_lanes(w, j))


@jit
def iq4_xs_lanes(w, j):
    w += 8 + 32 * j
    return iq4_values(join_u8x32(nibbles_u8x32(load_u8x16(w)), nibbles_u8x32(load_u8x16(w + 16))))


@jit
def iq4_xs_factors(w, s):
    low = (load_u8(w + 4 + (s >> 1)) >> (4 * (s & 1))) & 15
    high = (load_u8(w + 2 + (s >> 2)) >> (2 * (s & 3))) & 3
    d = load_f16(w) * np.float32((low | high << 4) - 32)
    return d, d * np.float32(-128)


@jit
def iq4_xs_factors8(w):
    """Eight scales, each four bits of a byte at 4 and two of one at 2, spread over eight bytes."""
    low, high = np.uint64(load_u32(w + 4)), np.uint64(load_i16(w + 2)) & np.uint64(0xFFFF)
    low = (low | (low << np.uint64(16))) & np.uint64(0x0000FFFF0000FFFF)
    low = (low | (low << np.uint64(8))) & np.uint64(0x00FF00FF00FF00FF)
    low = (low | (low << np.uint64(4))) & LOW4
    high = (high | (high << np.uint64(24))) & np.uint64(0x000000FF000000FF)
    high = (high | (high << np.uint64(12))) & np.uint64(0x000F000F000F000F)
    high = (high | (high << np.uint64(6))) & LOW2
    scales = f32x8_of_bytes(low | (high << np.uint64(4))) - splat_f32x8(np.float32(32))
    d = splat_f32x8(load_f16(w)) * scales
    return d, d * splat_f32x8(np.float32(-128))


def centred(fmt: Format, top: int, lanes: Callable[..., Any], centre: int) -> BlockFormat:
    """Blocks that start with a scale: x = d * (u - centre)."""
    offset, step = np.float32(-centre), fmt.block_bytes

    @jit
    def factors(w, s):
        d = load_f16(w + s * step)
        return d, d * offset

    @jit
    def factors8(w):
        d = gather_f16x8(w, step)
        return d, d * splat_f32x8(offset)

    return BlockFormat(fmt, top, centre, lanes, factors, factors8)


def with_minimum(fmt: Format, top: int, lanes: Callable[..., Any]) -> BlockFormat:
    """Blocks that start with a scale and a minimum: x = d * u + m."""
    step = fmt.block_bytes

    @jit
    def factors(w, s):
        return load_f16(w + s * step), load_f16(w + s * step + 2)

    @jit
    def factors8(w):
        return gather_f16x8(w, step), gather_f16x8(w + 2, step)

    return BlockFormat(fmt, top, 0, lanes, factors, factors8)


@jit
def f32_lanes(w):
    return load_f32x16(w)


@jit
def f16_lanes(w):
    return load_f16x16(w)


@jit
def bf16_lanes(w):
    return f32_of_bf16x16(load_u16x16(w))


UNPACK: dict[int, KFormat | BlockFormat | FloatFormat] = {
    unpack.format.id: unpack
    for unpack in (
        KFormat(Q2_K, 16, 3, q2_k_lanes, q2_k_scales, q2_k_mins, q2_k_factors),
        KFormat(Q3_K, 16, 7, q3_k_lanes, q3_k_scales, q3_k_scales, q3_k_factors, centre=4),
        KFormat(Q4_K, 32, 15, q4_k_lanes, k45_scales, k45_mins, k45_factors, q4_k_halves, k45_words, q4_k_wide),
        KFormat(Q5_K, 32, 31, q5_k_lanes, k45_scales, k45_mins, k45_factors, q5_k_halves, k45_words, q5_k_wide),
        KFormat(Q6_K, 16, 63, q6_k_lanes, q6_k_scales, q6_k_scales, q6_k_factors, centre=32),
        centred(Q8_0, 255, q8_0_lanes, 128),
        centred(Q4_0, 15, q4_0_lanes, 8),
        with_minimum(Q4_1, 15, q4_1_lanes),
        centred(Q5_0, 31, q5_0_lanes, 16),
        with_minimum(Q5_1, 31, q5_1_lanes),
        centred(IQ4_NL, 255, iq4_nl_lanes, 128),
        BlockFormat(IQ4_XS, 255, 128, iq4_xs_lanes, iq4_xs_factors, iq4_xs_factors8),
        FloatFormat(F32, f32_lanes),
        FloatFormat(F16, f16_lanes),
        FloatFormat(BF16, bf16_lanes),
    )
}


def is_signed(unpack: KFormat | BlockFormat) -> bool:
    """Whether products take lanes as signed bytes about their centre, which need no offset."""
    return bool(SIGNED and unpack.centre)


def product_lanes(unpack: KFormat | BlockFormat) -> Callable[..., Any]:
    """Lanes as products take them."""
    if not is_signed(unpack):
        return unpack.lanes
    lanes, centre = unpack.lanes, np.uint8(unpack.centre)

    @jit
    def signed(w, j):
        return lanes(w, j) - splat_u8x64(centre)

    return signed


def group_bytes(fmt: Format) -> int:
    """Bytes of 256 weights."""
    return GROUP // fmt.block_size * fmt.block_bytes
