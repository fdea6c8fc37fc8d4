"""Arithmetic by operator, memory, conversions and sums across lanes."""

import operator
from typing import Any

from llvmlite import ir
from numba import types
from numba.core.typing.templates import AbstractTemplate, infer_global, signature
from numba.extending import lower_builtin

from llmq.simd.vector import (
    ADDRESS,
    F32,
    I8,
    I16,
    I32,
    I64,
    Vec,
    call_intrinsic,
    const,
    f32x4,
    f32x8,
    f32x16,
    i8x16,
    i8x32,
    i16x8,
    i16x16,
    i32x4,
    i32x8,
    i32x16,
    ll,
    multiply_add,
    op,
    pointer,
    slices,
    splat,
    u8x16,
    u8x32,
    u8x64,
    u16x16,
)


# Arithmetic: both sides the same vector type.
class _Same(AbstractTemplate):
    def generic(self, args: Any, kws: Any) -> Any:
        if len(args) == 2 and not kws and isinstance(args[0], Vec) and args[0] == args[1]:
            return signature(args[0], *args)
        return None


def _lower(op: Any, on_int: str, on_float: str) -> None:
    infer_global(op)(type(f"_{op.__name__}", (_Same,), {"key": op}))

    @lower_builtin(op, Vec, Vec)
    def _build(context: Any, b: Any, sig: Any, args: Any) -> Any:
        return getattr(b, on_float if isinstance(sig.args[0].elem, types.Float) else on_int)(*args)


for _op_, _on_int, _on_float in (
    (operator.add, "add", "fadd"), (operator.sub, "sub", "fsub"), (operator.mul, "mul", "fmul"),
    (operator.and_, "and_", ""), (operator.or_, "or_", ""), (operator.xor, "xor", ""),
    (operator.lshift, "shl", ""), (operator.rshift, "lshr", ""),
    (operator.truediv, "fdiv", "fdiv"), (operator.iadd, "add", "fadd"), (operator.ior, "or_", ""),
):  # fmt: skip
    _lower(_op_, _on_int, _on_float)


# Memory.
def _load(vec: Vec) -> Any:
    return op(lambda b, a: b.load(pointer(b, a, ll(vec)), align=1), vec, ADDRESS)


def _load_scalar(t: types.Type, to: ir.Type) -> Any:
    return op(lambda b, a: b.load(pointer(b, a, to), align=1), t, ADDRESS)


load_u8x64, load_u8x32, load_u8x16, load_i8x16, load_u16x16 = map(_load, (u8x64, u8x32, u8x16, i8x16, u16x16))
load_i32x16, load_f32x16 = map(_load, (i32x16, f32x16))
load_u32 = _load_scalar(types.uint32, I32)
load_i32, load_i64 = _load_scalar(types.int32, I32), _load_scalar(types.int64, I64)
load_i16 = _load_scalar(types.int16, I16)
load_u8 = _load_scalar(types.uint8, I8)
load_f64 = _load_scalar(types.float64, ir.DoubleType())
load_f32 = _load_scalar(types.float32, F32)


def _store(t: Any, to: ir.Type) -> Any:
    def build(b: Any, address: Any, value: Any) -> None:
        b.store(value, pointer(b, address, to), align=1)

    return op(build, types.void, ADDRESS, t)


store_u8x64, store_i8x16, store_i32x16, store_f32x16, store_i16x16 = (
    _store(v, ll(v)) for v in (u8x64, i8x16, i32x16, f32x16, i16x16)
)
store_f32, store_i16, store_i32 = _store(types.float32, F32), _store(types.int16, I16), _store(types.int32, I32)
store_i64 = _store(types.int64, I64)


def _copy(b: Any, to: Any, source: Any, n: Any) -> None:
    pointers = [pointer(b, a, I8) for a in (to, source)]
    call_intrinsic(b, "llvm.memcpy.p0.p0.i64", ir.VoidType(), *pointers, n, ir.Constant(ir.IntType(1), 0))


def _clear(b: Any, to: Any, n: Any) -> None:
    zero, no = ir.Constant(I8, 0), ir.Constant(ir.IntType(1), 0)
    call_intrinsic(b, "llvm.memset.p0.i64", ir.VoidType(), pointer(b, to, I8), zero, n, no)


copy_bytes = op(_copy, types.void, ADDRESS, ADDRESS, types.int64)
clear_bytes = op(_clear, types.void, ADDRESS, types.int64)

# Making, converting, reducing.
splat_u8x64, splat_u8x32 = (op(lambda b, x, n=n: splat(b, x, n), v, types.uint8) for v, n in ((u8x64, 64), (u8x32, 32)))
splat_i32x16 = op(lambda b, x: splat(b, x, 16), i32x16, types.int32)
splat_f32x16 = op(lambda b, x: splat(b, x, 16), f32x16, types.float32)
zero_i32x8 = op(lambda _b: ir.Constant(ll(i32x8), None), i32x8)
splat_f32x8 = op(lambda b, x: splat(b, x, 8), f32x8, types.float32)

f32_of_i32x16 = op(lambda b, x: b.sitofp(x, ll(f32x16)), f32x16, i32x16)
f32_of_i32x8 = op(lambda b, x: b.sitofp(x, ll(f32x8)), f32x8, i32x8)
f32_of_bf16x16 = op(
    lambda b, x: b.bitcast(b.shl(b.zext(x, ll(i32x16)), const(ll(i32x16), [16] * 16)), ll(f32x16)), f32x16, u16x16
)
i16_of_i8x16 = op(lambda b, x: b.sext(x, ll(i16x16)), i16x16, i8x16)
i32_of_i16x16 = op(lambda b, x: b.sext(x, ll(i32x16)), i32x16, i16x16)
i8_of_i32x16 = op(lambda b, x: b.trunc(x, ll(i8x16)), i8x16, i32x16)
as_i32x16 = op(lambda b, x: b.bitcast(x, ll(i32x16)), i32x16, u8x64)
f32x16_of_bits = op(lambda b, x: b.bitcast(x, ll(f32x16)), f32x16, i32x16)

add_lanes_i32x16 = op(lambda b, x: call_intrinsic(b, "llvm.vector.reduce.add.v16i32", I32, x), types.int32, i32x16)
max_lanes_f32x16 = op(lambda b, x: call_intrinsic(b, "llvm.vector.reduce.fmax.v16f32", F32, x), types.float32, f32x16)


def add_lanes(b: Any, x: Any) -> Any:
    while x.type.count > 1:
        low, high = slices(b, x, 2)
        x = b.fadd(low, high)
    return b.extract_element(x, ir.Constant(I32, 0))


add_lanes_f32x16 = op(add_lanes, types.float32, f32x16)

fma, fma8, fma4 = (op(multiply_add, v, v, v, v) for v in (f32x16, f32x8, f32x4))
abs_f32x16 = op(lambda b, x: call_intrinsic(b, "llvm.fabs.v16f32", ll(f32x16), x), f32x16, f32x16)
round_f32x16 = op(lambda b, x: call_intrinsic(b, "llvm.rint.v16f32", ll(f32x16), x), f32x16, f32x16)
i32_of_f32x16 = op(lambda b, x: b.fptosi(x, ll(i32x16)), i32x16, f32x16)


def _max(b: Any, x: Any, y: Any) -> Any:
    return b.select(b.fcmp_ordered(">", x, y), x, y)


max_f32x16 = op(_max, f32x16, f32x16, f32x16)
# where x < y take a, else b
where_less = op(lambda b, x, y, p, q: b.select(b.fcmp_ordered("<", x, y), p, q), f32x16, f32x16, f32x16, f32x16, f32x16)


def _between(b: Any, x: Any, low: Any, high: Any, inside: Any, outside: Any) -> Any:
    mask = b.and_(b.icmp_signed(">=", x, splat(b, low, 16)), b.icmp_signed("<=", x, splat(b, high, 16)))
    return b.select(mask, inside, outside)


# where low <= x <= high take the first vector, else the second
where_between = op(_between, f32x16, i32x16, types.int32, types.int32, f32x16, f32x16)
count16 = op(lambda b, x: b.add(splat(b, x, 16), const(ll(i32x16), range(16))), i32x16, types.int32)

load_i8x32, load_i16x8 = _load(i8x32), _load(i16x8)
store_i32x8 = _store(i32x8, ll(i32x8))
f32_of_i32x4 = op(lambda b, x: b.sitofp(x, ll(f32x4)), f32x4, i32x4)
zero_i32x4 = op(lambda _b: ir.Constant(ll(i32x4), None), i32x4)
splat_f32x4 = op(lambda b, x: splat(b, x, 4), f32x4, types.float32)
