"""Integer dot products by instruction set."""

from collections.abc import Sequence
from typing import Any

from llvmlite import ir

import llmq.simd.arm as arm
from llmq.simd.vector import (
    ADDRESS,
    I16,
    I32,
    ISA,
    NEON,
    SPREAD,
    call_intrinsic,
    concat,
    const,
    i8x32,
    i16x8,
    i16x16,
    i16x32,
    i32x4,
    i32x8,
    i32x16,
    ll,
    op,
    pointer,
    shuffle,
    slices,
    splat,
    u8x32,
    u8x64,
)

VNNI = ISA in ("avx512vnni", "avxvnni")


def _dot_wide(b: Any, acc: Any, u: Any, s: Any) -> Any:
    """The portable form: every product in 32 bits, then four neighbours added."""
    wide = ir.VectorType(I32, 64)
    products = b.mul(b.zext(u, wide), b.sext(s, wide))
    for k in range(4):
        acc = b.add(acc, shuffle(b, products, products, range(k, 64, 4)))
    return acc


def _dot_avx2(b: Any, acc: Any, u: Any, s: Any, doubled: bool = False) -> Any:
    half16, half32 = ir.VectorType(I16, 16), ir.VectorType(I32, 8)
    weight = const(half16, [2 if doubled else 1] * 16)
    out = []
    for part, (uu, ss) in enumerate(zip(slices(b, u, 2), slices(b, s, 2), strict=True)):
        pairs = call_intrinsic(b, "llvm.x86.avx2.pmadd.ub.sw", half16, uu, ss)
        quads = call_intrinsic(b, "llvm.x86.avx2.pmadd.wd", half32, pairs, weight)
        out.append(b.add(slices(b, acc, 2)[part], quads))
    return concat(b, out)


def _dot_vnni(b: Any, acc: Any, u: Any, s: Any) -> Any:
    parts = 1 if ISA == "avx512vnni" else 2
    name = "llvm.x86.avx512.vpdpbusd.512" if parts == 1 else "llvm.x86.avx512.vpdpbusd.256"
    i32 = ir.VectorType(I32, 16 // parts)
    pieces = zip(*(slices(b, b.bitcast(v, ll(i32x16)), parts) for v in (acc, u, s)), strict=True)
    return concat(b, [call_intrinsic(b, name, i32, *piece) for piece in pieces])


def dot_small(b: Any, acc: Any, u: Any, s: Any) -> Any:
    """acc[i] += u[4i]*s[4i] + ... + u[4i+3]*s[4i+3]; u below 128, or any signed byte where SIGNED."""
    if NEON:
        return arm.dot(b, acc, u, s)
    build = {"avx512vnni": _dot_vnni, "avxvnni": _dot_vnni, "avx2": _dot_avx2}.get(ISA, _dot_wide)
    return build(b, acc, u, s)


def dot_full(b: Any, acc: Any, u: Any, s: Any) -> Any:
    """The same for any unsigned byte u."""
    one = const(ll(u8x64), [1] * 64)
    if ISA == "avx2":
        # 255 * 127 * 2 overflows 16 bits: u = 2 * (u >> 1) + (u & 1)
        return _dot_avx2(b, _dot_avx2(b, acc, b.lshr(u, one), s, doubled=True), b.and_(u, one), s)
    if NEON:
        # u = (u - 128) + 2 * 64
        low, offset = b.xor(u, const(ll(u8x64), [128] * 64)), const(ll(u8x64), [64] * 64)
        return arm.dot(b, arm.dot(b, arm.dot(b, acc, low, s), offset, s), offset, s)
    return dot_small(b, acc, u, s)


def dot_i16(b: Any, acc: Any, x: Any, y: Any) -> Any:
    """acc[i] += x[2i]*y[2i] + x[2i+1]*y[2i+1]; on Arm in other lanes, so that only the total is promised."""
    n = x.type.count
    i32 = ir.VectorType(I32, n // 2)
    if ISA == "avx512vnni" and n == 32:
        return call_intrinsic(b, "llvm.x86.avx512.vpdpwssd.512", i32, acc, b.bitcast(x, i32), b.bitcast(y, i32))
    if ISA in ("avx512vnni", "avxvnni", "avx2") and n == 8:
        return b.add(acc, call_intrinsic(b, "llvm.x86.sse2.pmadd.wd", i32, x, y))
    if ISA in ("avx512vnni", "avxvnni", "avx2"):
        parts = n // 16
        pieces = zip(slices(b, x, parts), slices(b, y, parts), strict=True)
        half = ir.VectorType(I32, 8)
        return b.add(acc, concat(b, [call_intrinsic(b, "llvm.x86.avx2.pmadd.wd", half, *piece) for piece in pieces]))
    if NEON:
        return arm.dot_i16(b, acc, x, y)
    products = b.mul(b.sext(x, ir.VectorType(I32, n)), b.sext(y, ir.VectorType(I32, n)))
    even, odd = (shuffle(b, products, products, range(k, n, 2)) for k in (0, 1))
    return b.add(acc, b.add(even, odd))


def multiply_pairs(b: Any, u: Any, s: Any) -> Any:
    """i16 lanes u[2i]*s[2i] + u[2i+1]*s[2i+1], for u below 128; x86 only."""
    if ISA == "avx512vnni":
        return call_intrinsic(b, "llvm.x86.avx512.pmaddubs.w.512", ll(i16x32), u, s)
    halves = zip(slices(b, u, 2), slices(b, s, 2), strict=True)
    half = ir.VectorType(I16, 16)
    return concat(b, [call_intrinsic(b, "llvm.x86.avx2.pmadd.ub.sw", half, *pieces) for pieces in halves])


def _dot_scaled(b: Any, acc: Any, u: Any, s: Any, scales: Any) -> Any:
    """acc[i] += scale * (u[4i]*s[4i] + ... + u[4i+3]*s[4i+3]); i16 lanes 2i and 2i+1 both hold the scale.

    With AVX2 two products of bytes fit 16 bits (127 * 127 * 2); the step that adds pairs multiplies by the scale too.
    """
    if ISA == "avx2":
        return dot_i16(b, acc, multiply_pairs(b, u, s), scales)
    wide = b.sext(shuffle(b, scales, scales, range(0, 32, 2)), ll(i32x16))
    return b.add(acc, b.mul(dot_small(b, const(ll(i32x16), [0] * 16), u, s), wide))


def _pack(b: Any, x: Any, y: Any) -> Any:
    """Lanes of two i32x16 as i16: four of x and four of y in turn."""
    if ISA == "avx512vnni":
        return call_intrinsic(b, "llvm.x86.avx512.packssdw.512", ll(i16x32), x, y)
    halves, half = zip(slices(b, x, 2), slices(b, y, 2), strict=True), ir.VectorType(I16, 16)
    return concat(b, [call_intrinsic(b, "llvm.x86.avx2.packssdw", half, *pieces) for pieces in halves])


def _spread(b: Any, scales: Any, order: Sequence[int], width: int) -> Any:
    """Scales beside lanes: the next of `order` for each `width`."""
    return shuffle(b, scales, scales, [scale for scale in order for _ in range(width)])


def scaled_dot(b: Any, lanes: list[Any], scales: Any, part: int, span: int, crossed: bool) -> Any:
    """dot(acc, x): acc + scales * (lanes . x) of 128 weights below 64 in two vectors, half `part` of a group.

    With VNNI sums of four products, which fit 16 bits, are packed, so that one multiplication by scales does for both
    vectors. Of four lanes two then come from each.
    """
    order = [8 * part + i for i in ((0, 1, 4, 5, 2, 3, 6, 7) if crossed else range(8))]
    if VNNI:
        zero = ir.Constant(ll(i32x16), None)
        factors = _spread(b, scales, [order[i // 2 + 4 * (i % 2)] for i in range(8)], 4)

        def packed(acc: Any, x: list[Any]) -> Any:
            return dot_i16(
                b, acc, _pack(b, *(dot_small(b, zero, u, s) for u, s in zip(lanes, x, strict=True))), factors
            )

        return packed
    scales = arm.widen(b, scales) if NEON else scales
    each = [_spread(b, scales, order[k : k + 4], SPREAD.n // 4) for k in (0, 4)]

    def one_by_one(acc: Any, x: list[Any]) -> Any:
        for u, s, factor in zip(lanes, x, each, strict=True):
            acc = arm.sum_scaled(b, acc, u, s, factor, span) if NEON else _dot_scaled(b, acc, u, s, factor)
        return acc

    return one_by_one


def _dot_scaled_half(b: Any, acc: Any, u: Any, s: Any, at: Any) -> Any:
    """acc[i] += scale * (u[4i]*s[4i] + ... + u[4i+3]*s[4i+3]) for 32 weights; at `at` two i16 that both hold the scale.

    Broadcast from memory the scale costs no shuffle, which is what the wider form is short of.
    """
    scales = b.bitcast(splat(b, b.load(pointer(b, at, I32), align=4), 8), ll(i16x16))
    if NEON:
        wide = b.sext(shuffle(b, scales, scales, range(0, 16, 2)), ll(i32x8))
        return arm.dot_scaled(b, acc, u, s, wide)
    if ISA in ("avx512vnni", "avxvnni", "avx2"):
        pairs = call_intrinsic(b, "llvm.x86.avx2.pmadd.ub.sw", ll(i16x16), u, s)
    else:
        products = b.mul(b.zext(u, ir.VectorType(I16, 32)), b.sext(s, ir.VectorType(I16, 32)))
        even, odd = (shuffle(b, products, products, range(k, 32, 2)) for k in (0, 1))
        pairs = b.add(even, odd)
    if ISA in ("avx512vnni", "avxvnni"):
        words = [b.bitcast(v, ll(i32x8)) for v in (pairs, scales)]
        return call_intrinsic(b, "llvm.x86.avx512.vpdpwssd.256", ll(i32x8), acc, *words)
    return dot_i16(b, acc, pairs, scales)


# u below 128
dot_u7s8_half = op(_dot_scaled_half, i32x8, i32x8, u8x32, i8x32, ADDRESS)
dot_i16x8 = op(dot_i16, i32x4, i32x4, i16x8, i16x8)


def _add_halves(b: Any, x: Any, y: Any) -> Any:
    if not VNNI:
        return b.add(x, y)
    return call_intrinsic(b, "llvm.x86.avx2.phadd.d", ll(i32x8), x, y)


# Sums of `dot_u7s8_half` over the even and over the odd sub-blocks of a group, in the lanes of what `scaled_dot` gives
# when it has them crossed, folded to eight.
add_halves = op(_add_halves, i32x8, i32x8, i32x8)
