"""IEEE half floats: one instruction where the processor has it, integer steps where it has not."""

from typing import Any

from llvmlite import ir
from numba import types
from numba.core.typing.templates import signature
from numba.extending import intrinsic

from llmq.simd.vector import (
    ADDRESS,
    F16,
    F32,
    I16,
    I32,
    I64,
    ISA,
    const,
    f32x8,
    f32x16,
    i32x16,
    literal,
    ll,
    op,
    pointer,
    splat,
    u16x16,
)


def widen(b: Any, half: Any) -> Any:
    """IEEE half bits (i16 vector or scalar) to float; in integer steps where the processor has no instruction."""
    vector = isinstance(half.type, ir.VectorType)
    n = half.type.count if vector else 0
    of = lambda t: ir.VectorType(t, n) if n else t  # noqa: E731
    if ISA != "generic":
        return b.fpext(b.bitcast(half, of(F16)), of(F32))
    every = lambda t, v: ir.Constant(of(t), [v] * n if n else v)  # noqa: E731
    bits = b.zext(half, of(I32))
    sign = b.shl(b.and_(bits, every(I32, 0x8000)), every(I32, 16))
    shifted = b.shl(b.and_(bits, every(I32, 0x7FFF)), every(I32, 13))
    # Reading the half's exponent as a float's is off by 2**112; the product also makes subnormals right.
    scaled = b.bitcast(b.fmul(b.bitcast(shifted, of(F32)), every(F32, 2.0**112)), of(I32))
    special = b.icmp_unsigned(">=", b.and_(bits, every(I32, 0x7FFF)), every(I32, 0x7C00))
    magnitude = b.select(special, b.or_(shifted, every(I32, 0x7F800000)), scaled)
    return b.bitcast(b.or_(sign, magnitude), of(F32))


def _narrow(b: Any, x: Any) -> Any:
    """f32x16 to half bits, rounded to nearest even."""
    if ISA != "generic":
        return b.bitcast(b.fptrunc(x, ir.VectorType(F16, 16)), ll(u16x16))
    every = lambda v: const(ll(i32x16), [v] * 16)  # noqa: E731
    bits = b.bitcast(x, ll(i32x16))
    sign = b.lshr(b.and_(bits, every(-(2**31))), every(16))
    magnitude = b.and_(bits, every(0x7FFFFFFF))
    # Below 2**-14 adding 0.5 lines the half's subnormal bits up at the bottom of the word.
    half_one = const(ll(f32x16), [0.5] * 16)
    small = b.sub(b.bitcast(b.fadd(b.bitcast(magnitude, ll(f32x16)), half_one), ll(i32x16)), every(0x3F000000))
    odd = b.and_(b.lshr(magnitude, every(13)), every(1))
    normal = b.lshr(b.add(b.add(magnitude, every(0xFFF - (112 << 23))), odd), every(13))
    large = b.select(b.icmp_unsigned(">", magnitude, every(0x7F800000)), every(0x7E00), every(0x7C00))
    result = b.select(b.icmp_unsigned("<", magnitude, every(0x38800000)), small, normal)
    result = b.select(b.icmp_unsigned(">=", magnitude, every(0x477FF000)), large, result)
    return b.trunc(b.or_(result, sign), ll(u16x16))


load_f16x16 = op(lambda b, a: widen(b, b.load(pointer(b, a, ll(u16x16)), align=1)), f32x16, ADDRESS)
load_f16 = op(lambda b, a: widen(b, b.load(pointer(b, a, I16), align=1)), types.float32, ADDRESS)


@intrinsic
def load_f16_pair(typingctx: Any, address: Any) -> Any:
    """Two half floats side by side, as two floats."""

    def codegen(context: Any, b: Any, sig: Any, args: Any) -> Any:
        both = widen(b, b.load(pointer(b, args[0], ir.VectorType(I16, 2)), align=1))
        items = [b.extract_element(both, ir.Constant(I32, i)) for i in range(2)]
        return context.make_tuple(b, sig.return_type, items)

    return signature(types.UniTuple(types.float32, 2), ADDRESS), codegen


def _store_f16(b: Any, address: Any, x: Any) -> None:
    b.store(_narrow(b, x), pointer(b, address, ll(u16x16)), align=1)


store_f16x16 = op(_store_f16, types.void, ADDRESS, f32x16)


def _store_one_f16(b: Any, address: Any, x: Any) -> None:
    half = b.extract_element(_narrow(b, splat(b, x, 16)), ir.Constant(I32, 0))
    b.store(half, pointer(b, address, I16), align=1)


store_f16 = op(_store_one_f16, types.void, ADDRESS, types.float32)


@intrinsic
def gather_f16x8(typingctx: Any, address: Any, step: Any) -> Any:
    """Eight half floats, `step` (a literal) bytes apart, as floats."""
    stride = literal(step)
    if stride is None:
        return None

    def codegen(_context: Any, b: Any, _sig: Any, args: Any) -> Any:
        halves = ir.Constant(ir.VectorType(I16, 8), ir.Undefined)
        for i in range(8):
            at = b.add(args[0], ir.Constant(I64, i * stride))
            halves = b.insert_element(halves, b.load(pointer(b, at, I16), align=1), ir.Constant(I32, i))
        return widen(b, halves)

    return signature(f32x8, ADDRESS, step), codegen
