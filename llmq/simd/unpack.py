"""Packed bits to lanes, and lanes turned round: what block formats need."""

from collections.abc import Sequence
from typing import Any

from llvmlite import ir
from numba import types

import llmq.simd.arm as arm
from llmq.simd.vector import (
    I8,
    I32,
    I64,
    ISA,
    NEON,
    call_intrinsic,
    concat,
    const,
    f32x8,
    f32x16,
    i16x8,
    i16x16,
    i32x8,
    i32x16,
    ll,
    op,
    shuffle,
    slices,
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


_SHUFFLE, _TABLE = ("llvm.x86.avx2.pshuf.b", 32), ("llvm.aarch64.neon.tbl1.v16i8", 16)
# What looks up bytes in tables of 16, and how many at once.
LOOKUPS = {
    "avx512vnni": ("llvm.x86.avx512.pshuf.b.512", 64), "avxvnni": _SHUFFLE, "avx2": _SHUFFLE,
    "i8mm": _TABLE, "dotprod": _TABLE, "neon": _TABLE,
}  # fmt: skip


def lookup16(table: Sequence[int]) -> Any:
    """An intrinsic u8x64 -> u8x64: what stands in a table of 16 bytes at each lane, 0..15."""

    def build(b: Any, x: Any) -> Any:
        if ISA in LOOKUPS:
            name, n = LOOKUPS[ISA]
            t = ir.VectorType(I8, n)
            tables = const(t, [*table] * (n // 16))
            return concat(b, [call_intrinsic(b, name, t, tables, part) for part in slices(b, x, 64 // n)])
        found = const(x.type, [table[0]] * 64)
        for i, value in enumerate(table[1:], 1):
            there = b.icmp_unsigned("==", x, const(x.type, [i] * 64))
            found = b.select(there, const(x.type, [value] * 64), found)
        return found

    return op(build, u8x64, u8x64)


def _f32_of_bytes(b: Any, word: Any) -> Any:
    return b.uitofp(b.bitcast(word, ir.VectorType(I8, 8)), ll(f32x8))


# eight bytes as floats, and of sixteen bytes the lower and the upper four bits as i16
f32x8_of_bytes = op(_f32_of_bytes, f32x8, types.uint64)
low_nibbles_i16 = op(lambda b, x: b.zext(b.and_(x, const(ll(u8x16), [15] * 16)), ll(i16x16)), i16x16, u8x16)
high_nibbles_i16 = op(lambda b, x: b.zext(b.lshr(x, const(ll(u8x16), [4] * 16)), ll(i16x16)), i16x16, u8x16)
# sixteen bytes, each less 32
about32_i16 = op(lambda b, x: b.sub(b.zext(x, ll(i16x16)), const(ll(i16x16), [32] * 16)), i16x16, u8x16)
