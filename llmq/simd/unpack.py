"""Packed bits to lanes, and lanes turned round: what block formats need."""

from typing import Any

from llvmlite import ir
from numba import types

import llmq.simd.arm as arm
from llmq.simd.vector import (
    I8,
    I32,
    I64,
    NEON,
    call_intrinsic,
    const,
    f32x16,
    i16x8,
    i16x16,
    i32x8,
    i32x16,
    ll,
    op,
    shuffle,
    splat,
    u8x16,
    u8x32,
    u8x64,
)


def _join(b: Any, low: Any, high: Any) -> Any:
    return shuffle(b, low, high, range(2 * low.type.count))


join_u8x32 = op(_join, u8x64, u8x32, u8x32)


def _nibbles16(b: Any, x: Any) -> Any:
    low = b.and_(x, const(ll(u8x16), [15] * 16))
    return _join(b, low, b.lshr(x, const(ll(u8x16), [4] * 16)))


# 16 bytes to 32 lanes: the low nibbles, then the high ones
nibbles_u8x32 = op(_nibbles16, u8x32, u8x16)


def _rotate(b: Any, x: Any, low: Any, high: Any) -> Any:
    wide = ir.VectorType(I64, 8)
    twice = b.bitcast(_join(b, x, x), wide)
    by = _join(b, splat(b, low, 4), splat(b, high, 4))
    return b.bitcast(call_intrinsic(b, "llvm.fshl.v8i64", wide, twice, twice, by), ll(u8x64))


# 32 bytes to 64 lanes, twice the same, each eight bytes rotated left: by `low` bits, then by `high`. What is not moved
# past its byte's ends arrives in it.
rotate_u8x32 = op(_rotate, u8x64, u8x32, types.int64, types.int64)


def _pick_bits(b: Any, x: Any, low: Any, high: Any) -> Any:
    there = b.and_(_join(b, x, x), _join(b, splat(b, low, 32), splat(b, high, 32)))
    zero = const(ll(u8x64), [0] * 64)
    return b.select(b.icmp_unsigned("!=", there, zero), const(ll(u8x64), [16] * 64), zero)


# 32 bytes to 64 lanes: 16 where a byte has a bit of the mask `low`, then where it has one of `high`, else 0
pick_bits = op(_pick_bits, u8x64, u8x32, types.uint8, types.uint8)


def _bits32(b: Any, word: Any) -> Any:
    """32 bits to 32 lanes of 0 or 1, lane i from bit i."""
    if NEON:
        four = b.bitcast(word, ir.VectorType(I8, 4))
        bits = const(ll(u8x32), [1 << i % 8 for i in range(32)])
        there = b.and_(shuffle(b, four, four, [i // 8 for i in range(32)]), bits)
        return b.zext(b.icmp_unsigned("!=", there, const(ll(u8x32), [0] * 32)), ll(u8x32))
    bits = b.bitcast(word, ir.VectorType(ir.IntType(1), 32))
    return b.zext(bits, ll(u8x32))


bits_u8x32 = op(_bits32, u8x32, types.uint32)


def _weave_u64(b: Any, x: Any, y: Any) -> Any:
    both = const(ir.VectorType(I64, 2), [0, 0])
    for i, word in enumerate((x, y)):
        both = b.insert_element(both, word, ir.Constant(I32, i))
    quarters = b.bitcast(both, ir.VectorType(I32, 4))
    return b.bitcast(shuffle(b, quarters, quarters, [0, 2, 1, 3]), ll(u8x16))


# sixteen bytes: the lower four of both words, then the upper four of both
weave_u64 = op(_weave_u64, u8x16, types.uint64, types.uint64)
i16_of_u8x16 = op(lambda b, x: b.zext(x, ll(i16x16)), i16x16, u8x16)


def _twice(b: Any, x: Any, start: int) -> Any:
    return shuffle(b, x, x, [start + i // 2 for i in range(16)])


# the first or the last eight lanes, each two times
twice_low = op(lambda b, x: _twice(b, x, 0), i16x16, i16x16)
twice_high = op(lambda b, x: _twice(b, x, 8), i16x16, i16x16)


def _pair(b: Any, low: Any, high: Any) -> Any:
    return shuffle(b, splat(b, low, 8), splat(b, high, 8), range(16))


# lanes 0..7 the first scalar, 8..15 the second
pair_f32x16 = op(_pair, f32x16, types.float32, types.float32)


def _transpose(b: Any, rows: Any) -> Any:
    """Sixteen rows of 16 lanes to sixteen columns: four rounds of swapping halves, quarters, pairs and lanes."""
    v = [b.extract_value(rows, i) for i in range(16)]
    for step in (8, 4, 2, 1):
        for i in range(16):
            if i & step:
                continue
            x, y = v[i], v[i + step]
            low = [lane if not lane & step else 16 + lane - step for lane in range(16)]
            high = [lane + step if not lane & step else 16 + lane for lane in range(16)]
            v[i], v[i + step] = shuffle(b, x, y, low), shuffle(b, x, y, high)
    for i, column in enumerate(v):
        rows = b.insert_value(rows, column, i)
    return rows


def _weave(b: Any, rows: Any) -> Any:
    """Sixteen rows of 64 bytes to the order in which a strip's products read them: by columns, but on Arm."""
    if not NEON:
        return _transpose(b, rows)
    for i, words in enumerate(arm.weave(b, [b.extract_value(rows, i) for i in range(16)])):
        rows = b.insert_value(rows, words, i)
    return rows


weave_i32 = op(_weave, types.UniTuple(i32x16, 16), types.UniTuple(i32x16, 16))
transpose_i32 = op(_transpose, types.UniTuple(i32x16, 16), types.UniTuple(i32x16, 16))
transpose_f32 = op(_transpose, types.UniTuple(f32x16, 16), types.UniTuple(f32x16, 16))


def _low_pairs(b: Any, x: Any) -> Any:
    return b.bitcast(b.zext(shuffle(b, x, x, [i // 2 for i in range(16)]), ll(i16x16)), ll(i32x8))


# of sixteen bytes the first eight as i32, each in both halves, and the last eight as i16
low_pairs_u8x16 = op(_low_pairs, i32x8, u8x16)
high_i16_u8x16 = op(lambda b, x: b.zext(shuffle(b, x, x, range(8, 16)), ll(i16x8)), i16x8, u8x16)
