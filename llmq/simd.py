"""Vector values for Numba code: 512-bit registers that kernels add, multiply and shuffle by name.

A `Vec` is a Numba type whose machine value is an LLVM vector. Kernels are written once for 64 bytes; on processors
with narrower registers LLVM splits each value in two or four. The few operations that have no portable form (integer
dot products, half floats) are lowered here by instruction set, and only here.
"""

import inspect
import operator
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from llvmlite import ir
from numba import from_dtype, types
from numba.core import cgutils
from numba.core.typing.templates import AbstractTemplate, infer_global, signature
from numba.extending import intrinsic, lower_builtin, models, register_model

from llmq.jit import codegen_target, jit

I8, I16, I32, I64, F16, F32 = (
    ir.IntType(8),
    ir.IntType(16),
    ir.IntType(32),
    ir.IntType(64),
    ir.HalfType(),
    ir.FloatType(),
)
_LL = {
    types.uint8: I8, types.int8: I8, types.int16: I16, types.uint16: I16, types.int32: I32, types.float32: F32,
}  # fmt: skip


# Addresses are signed, so that adding a plain integer to one stays an integer in Numba's typing.
ADDRESS = types.int64


def _detect() -> str:
    triple, _name, features = codegen_target()
    have = set(features.split(","))
    if triple.startswith(("aarch64", "arm64")):
        return "neon" if "+dotprod" in have else "generic"
    for isa, needed in (
        ("avx512vnni", {"+avx512vnni", "+avx512bw", "+avx512vl"}),
        ("avxvnni", {"+avxvnni", "+avx2", "+f16c", "+fma"}),
        ("avx2", {"+avx2", "+f16c", "+fma"}),
    ):
        if needed <= have:
            return isa
    return "generic"


ISA = _detect()
# Tokens a matrix product keeps in registers at once: eight accumulators and their sums fit 32 registers, not 16.
TILE = 8 if ISA == "avx512vnni" else 4


class Vec(types.Type):
    """`n` lanes of `elem`."""

    def __init__(self, elem: types.Type, n: int) -> None:
        self.elem, self.n = elem, n
        super().__init__(name=f"vec({elem}x{n})")


def ll(vec: Vec) -> ir.VectorType:
    return ir.VectorType(_LL[vec.elem], vec.n)


@register_model(Vec)
class _VecModel(models.PrimitiveModel):
    def __init__(self, dmm: Any, fe_type: Vec) -> None:
        super().__init__(dmm, fe_type, ll(fe_type))


u8x64, i8x64 = Vec(types.uint8, 64), Vec(types.int8, 64)
u8x32, u8x16, i8x16 = Vec(types.uint8, 32), Vec(types.uint8, 16), Vec(types.int8, 16)
i16x32, i16x16, u16x16 = Vec(types.int16, 32), Vec(types.int16, 16), Vec(types.uint16, 16)
i32x16, f32x16, f32x8, i32x8 = Vec(types.int32, 16), Vec(types.float32, 16), Vec(types.float32, 8), Vec(types.int32, 8)


# ---- building blocks in LLVM terms
def _pointer(b: Any, address: Any, to: ir.Type) -> Any:
    return b.inttoptr(address, to.as_pointer())


def _const(t: ir.VectorType, values: Sequence[int | float]) -> ir.Constant:
    return ir.Constant(t, list(values))


def _shuffle(b: Any, x: Any, y: Any, lanes: Sequence[int]) -> Any:
    return b.shuffle_vector(x, y, _const(ir.VectorType(I32, len(lanes)), lanes))


def _splat(b: Any, x: Any, n: int) -> Any:
    undefined = ir.Constant(ir.VectorType(x.type, n), ir.Undefined)
    return _shuffle(b, b.insert_element(undefined, x, ir.Constant(I32, 0)), undefined, [0] * n)


def _call(b: Any, name: str, returns: ir.Type, *args: Any) -> Any:
    function = cgutils.get_or_insert_function(b.module, ir.FunctionType(returns, [a.type for a in args]), name)
    return b.call(function, args)


def _slices(b: Any, x: Any, parts: int) -> list[Any]:
    n = x.type.count // parts
    return [_shuffle(b, x, x, range(i * n, (i + 1) * n)) for i in range(parts)]


def _concat(b: Any, parts: list[Any]) -> Any:
    while len(parts) > 1:
        n = parts[0].type.count
        parts = [_shuffle(b, parts[i], parts[i + 1], range(2 * n)) for i in range(0, len(parts), 2)]
    return parts[0]


def _intrinsic(declare: Callable[..., Any], arity: int) -> Any:
    """`numba.extending.intrinsic` for a function of *args: the arity has to stand in its signature."""
    names = ["typingctx", *(f"a{i}" for i in range(arity))]
    parameters = [inspect.Parameter(name, inspect.Parameter.POSITIONAL_OR_KEYWORD) for name in names]
    declare.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    return intrinsic(declare)


def _op(build: Callable[..., Any], returns: Any, *takes: Any) -> Any:
    """An intrinsic with a fixed signature; `build(builder, *llvm_values)` gives its value (None for a store)."""

    def declare(typingctx: Any, *_args: Any) -> Any:  # noqa: ARG001
        def codegen(context: Any, b: Any, _sig: Any, values: Any) -> Any:
            value = build(b, *values)
            return context.get_dummy_value() if value is None else value

        return signature(returns, *takes), codegen

    return _intrinsic(declare, len(takes))


# ---- arithmetic by operator: both sides the same vector type
class _Same(AbstractTemplate):
    def generic(self, args: Any, kws: Any) -> Any:
        if len(args) == 2 and not kws and isinstance(args[0], Vec) and args[0] == args[1]:
            return signature(args[0], *args)
        return None


def _lower(op: Any, on_int: str, on_float: str | None) -> None:
    infer_global(op)(type(f"_{op.__name__}", (_Same,), {"key": op}))

    @lower_builtin(op, Vec, Vec)
    def _build(context: Any, b: Any, sig: Any, args: Any) -> Any:  # noqa: ARG001
        return getattr(b, on_float if isinstance(sig.args[0].elem, types.Float) else on_int)(*args)


for _op_, _on_int, _on_float in (
    (operator.add, "add", "fadd"), (operator.sub, "sub", "fsub"), (operator.mul, "mul", "fmul"),
    (operator.and_, "and_", None), (operator.or_, "or_", None), (operator.xor, "xor", None),
    (operator.lshift, "shl", None), (operator.rshift, "lshr", None),
    (operator.truediv, "fdiv", "fdiv"), (operator.iadd, "add", "fadd"), (operator.ior, "or_", None),
):  # fmt: skip
    _lower(_op_, _on_int, _on_float)


# ---- memory
def _load(vec: Vec) -> Any:
    return _op(lambda b, a: b.load(_pointer(b, a, ll(vec)), align=1), vec, ADDRESS)


def _load_scalar(t: types.Type, to: ir.Type) -> Any:
    return _op(lambda b, a: b.load(_pointer(b, a, to), align=1), t, ADDRESS)


load_u8x64, load_i8x64, load_u8x32, load_u8x16, load_i8x16 = map(_load, (u8x64, i8x64, u8x32, u8x16, i8x16))
load_i16x32, load_i16x16, load_u16x16 = map(_load, (i16x32, i16x16, u16x16))
load_i32x16, load_f32x16, load_f32x8 = map(_load, (i32x16, f32x16, f32x8))
load_u32, load_u64 = _load_scalar(types.uint32, I32), _load_scalar(types.uint64, I64)
load_i32, load_i64 = _load_scalar(types.int32, I32), _load_scalar(types.int64, I64)
load_i16, load_i8 = _load_scalar(types.int16, I16), _load_scalar(types.int8, I8)
load_u8 = _load_scalar(types.uint8, I8)
load_f64 = _load_scalar(types.float64, ir.DoubleType())
load_f32 = _load_scalar(types.float32, F32)


def _store(t: Any, to: ir.Type) -> Any:
    def build(b: Any, address: Any, value: Any) -> None:
        b.store(value, _pointer(b, address, to), align=1)

    return _op(build, types.void, ADDRESS, t)


store_u8x64, store_i8x16, store_i32x16, store_f32x16, store_i16x16 = (
    _store(v, ll(v)) for v in (u8x64, i8x16, i32x16, f32x16, i16x16)
)
store_f32, store_i16, store_i32 = _store(types.float32, F32), _store(types.int16, I16), _store(types.int32, I32)
store_i64 = _store(types.int64, I64)


def _copy(b: Any, to: Any, source: Any, n: Any) -> None:
    pointers = [_pointer(b, a, I8) for a in (to, source)]
    _call(b, "llvm.memcpy.p0.p0.i64", ir.VoidType(), *pointers, n, ir.Constant(ir.IntType(1), 0))


def _clear(b: Any, to: Any, n: Any) -> None:
    zero, no = ir.Constant(I8, 0), ir.Constant(ir.IntType(1), 0)
    _call(b, "llvm.memset.p0.i64", ir.VoidType(), _pointer(b, to, I8), zero, n, no)


copy_bytes = _op(_copy, types.void, ADDRESS, ADDRESS, types.int64)
clear_bytes = _op(_clear, types.void, ADDRESS, types.int64)


def _prefetch(b: Any, address: Any) -> None:
    read, keep, data = (ir.Constant(I32, v) for v in (0, 3, 1))
    _call(b, "llvm.prefetch.p0", ir.VoidType(), _pointer(b, address, I8), read, keep, data)


prefetch = _op(_prefetch, types.void, ADDRESS)

# ---- making, converting, reducing
splat_u8x64, splat_u8x32, splat_u8x16 = (
    _op(lambda b, x, n=n: _splat(b, x, n), v, types.uint8) for v, n in ((u8x64, 64), (u8x32, 32), (u8x16, 16))
)
splat_i32x16 = _op(lambda b, x: _splat(b, x, 16), i32x16, types.int32)
splat_f32x16 = _op(lambda b, x: _splat(b, x, 16), f32x16, types.float32)
zero_i32x8 = _op(lambda _b: ir.Constant(ll(i32x8), None), i32x8)
splat_f32x8 = _op(lambda b, x: _splat(b, x, 8), f32x8, types.float32)

f32_of_i32x16 = _op(lambda b, x: b.sitofp(x, ll(f32x16)), f32x16, i32x16)
f32_of_i32x8 = _op(lambda b, x: b.sitofp(x, ll(f32x8)), f32x8, i32x8)
f32_of_bf16x16 = _op(
    lambda b, x: b.bitcast(b.shl(b.zext(x, ll(i32x16)), _const(ll(i32x16), [16] * 16)), ll(f32x16)), f32x16, u16x16
)
i16_of_i8x16 = _op(lambda b, x: b.sext(x, ll(i16x16)), i16x16, i8x16)
i32_of_i8x16 = _op(lambda b, x: b.sext(x, ll(i32x16)), i32x16, i8x16)
i32_of_i16x16 = _op(lambda b, x: b.sext(x, ll(i32x16)), i32x16, i16x16)
i8_of_i32x16 = _op(lambda b, x: b.trunc(x, ll(i8x16)), i8x16, i32x16)
as_u8x64 = _op(lambda b, x: b.bitcast(x, ll(u8x64)), u8x64, i32x16)
as_i32x16 = _op(lambda b, x: b.bitcast(x, ll(i32x16)), i32x16, u8x64)
bits_of_f32x16 = _op(lambda b, x: b.bitcast(x, ll(i32x16)), i32x16, f32x16)
f32x16_of_bits = _op(lambda b, x: b.bitcast(x, ll(f32x16)), f32x16, i32x16)

add_lanes_i32x16 = _op(lambda b, x: _call(b, "llvm.vector.reduce.add.v16i32", I32, x), types.int32, i32x16)
max_lanes_f32x16 = _op(lambda b, x: _call(b, "llvm.vector.reduce.fmax.v16f32", F32, x), types.float32, f32x16)


def _add_lanes(b: Any, x: Any) -> Any:
    while x.type.count > 1:
        low, high = _slices(b, x, 2)
        x = b.fadd(low, high)
    return b.extract_element(x, ir.Constant(I32, 0))


add_lanes_f32x16 = _op(_add_lanes, types.float32, f32x16)
add_lanes_f32x8 = _op(_add_lanes, types.float32, f32x8)

fma = _op(lambda b, x, y, z: _call(b, "llvm.fma.v16f32", ll(f32x16), x, y, z), f32x16, f32x16, f32x16, f32x16)
fma8 = _op(lambda b, x, y, z: _call(b, "llvm.fma.v8f32", ll(f32x8), x, y, z), f32x8, f32x8, f32x8, f32x8)
abs_f32x16 = _op(lambda b, x: _call(b, "llvm.fabs.v16f32", ll(f32x16), x), f32x16, f32x16)
round_f32x16 = _op(lambda b, x: _call(b, "llvm.rint.v16f32", ll(f32x16), x), f32x16, f32x16)
i32_of_f32x16 = _op(lambda b, x: b.fptosi(x, ll(i32x16)), i32x16, f32x16)


def _max(b: Any, x: Any, y: Any) -> Any:
    return b.select(b.fcmp_ordered(">", x, y), x, y)


max_f32x16 = _op(_max, f32x16, f32x16, f32x16)
# where x < y take a, else b
where_less = _op(
    lambda b, x, y, p, q: b.select(b.fcmp_ordered("<", x, y), p, q), f32x16, f32x16, f32x16, f32x16, f32x16
)


def _between(b: Any, x: Any, low: Any, high: Any, inside: Any, outside: Any) -> Any:
    mask = b.and_(b.icmp_signed(">=", x, _splat(b, low, 16)), b.icmp_signed("<=", x, _splat(b, high, 16)))
    return b.select(mask, inside, outside)


# where low <= x <= high take the first vector, else the second
where_between = _op(_between, f32x16, i32x16, types.int32, types.int32, f32x16, f32x16)
count16 = _op(lambda b, x: b.add(_splat(b, x, 16), _const(ll(i32x16), range(16))), i32x16, types.int32)


# ---- unpacking: 4-bit pairs, 2-bit quads, single bits
def _nibbles(b: Any, x: Any) -> Any:
    twice = b.bitcast(_shuffle(b, x, x, [*range(32), *range(32)]), ll(i16x32))
    shifted = b.bitcast(b.lshr(twice, _const(ll(i16x32), [0] * 16 + [4] * 16)), ll(u8x64))
    return b.and_(shifted, _const(ll(u8x64), [15] * 64))


def _join(b: Any, low: Any, high: Any) -> Any:
    return _shuffle(b, low, high, range(2 * low.type.count))


# 32 bytes to 64 lanes: the low nibbles, then the high ones
nibbles_u8x64 = _op(_nibbles, u8x64, u8x32)
join_u8x32 = _op(_join, u8x64, u8x32, u8x32)


def _nibbles16(b: Any, x: Any) -> Any:
    low = b.and_(x, _const(ll(u8x16), [15] * 16))
    return _join(b, low, b.lshr(x, _const(ll(u8x16), [4] * 16)))


# 16 bytes to 32 lanes: the low nibbles, then the high ones
nibbles_u8x32 = _op(_nibbles16, u8x32, u8x16)


def _shifted_bits(b: Any, x: Any, shift_low: Any, shift_high: Any, mask: Any, up: Any) -> Any:
    """32 bytes to 64 lanes: (x >> shift_low) & mask, then (x >> shift_high) & mask, each << up."""
    pieces = [b.and_(b.lshr(x, _splat(b, s, 32)), _splat(b, mask, 32)) for s in (shift_low, shift_high)]
    return b.shl(_join(b, *pieces), _splat(b, up, 64))


shifted_bits = _op(_shifted_bits, u8x64, u8x32, *[types.uint8] * 4)


def _bits32(b: Any, word: Any) -> Any:
    """32 bits to 32 lanes of 0 or 1, lane i from bit i."""
    bits = b.bitcast(word, ir.VectorType(ir.IntType(1), 32))
    return b.zext(bits, ll(u8x32))


bits_u8x32 = _op(_bits32, u8x32, types.uint32)


def _spread(b: Any, scales: Any, j: Any) -> Any:
    """Lanes 4i to 4i+3 of part `j` (0..3) take scale 4j + i: one i32 lane holds the dot product of 4 weights."""
    parts = [_shuffle(b, scales, scales, [4 * part + lane // 4 for lane in range(16)]) for part in range(4)]
    picked = parts[3]
    for part in (2, 1, 0):
        picked = b.select(b.icmp_signed("==", j, ir.Constant(j.type, part)), parts[part], picked)
    return b.sext(picked, ll(i32x16))


# i8x16 scales of 16 weights each, and which 64 weights (a literal, so that the choice folds away)
spread = _op(_spread, i32x16, i8x16, types.int64)


def _twice(b: Any, word: Any) -> Any:
    bytes_ = b.bitcast(word, ir.VectorType(I8, 8))
    return _shuffle(b, bytes_, bytes_, [i // 2 for i in range(16)])


# 8 bytes to 16 lanes, each byte two times
twice_i8x16 = _op(_twice, i8x16, types.uint64)


def _pair(b: Any, low: Any, high: Any) -> Any:
    return _shuffle(b, _splat(b, low, 8), _splat(b, high, 8), range(16))


# lanes 0..7 the first scalar, 8..15 the second
pair_f32x16 = _op(_pair, f32x16, types.float32, types.float32)


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
            v[i], v[i + step] = _shuffle(b, x, y, low), _shuffle(b, x, y, high)
    for i, column in enumerate(v):
        rows = b.insert_value(rows, column, i)
    return rows


transpose_i32 = _op(_transpose, types.UniTuple(i32x16, 16), types.UniTuple(i32x16, 16))
transpose_f32 = _op(_transpose, types.UniTuple(f32x16, 16), types.UniTuple(f32x16, 16))


# ---- half floats
def _widen(b: Any, half: Any) -> Any:
    """IEEE half bits (i16 vector or scalar) to float; in integer steps where the processor has no instruction."""
    vector = isinstance(half.type, ir.VectorType)
    n = half.type.count if vector else 0
    of = lambda t: ir.VectorType(t, n) if n else t  # noqa: E731
    if ISA != "generic":
        return b.fpext(b.bitcast(half, of(F16)), of(F32))
    const = lambda t, v: ir.Constant(of(t), [v] * n if n else v)  # noqa: E731
    bits = b.zext(half, of(I32))
    sign = b.shl(b.and_(bits, const(I32, 0x8000)), const(I32, 16))
    shifted = b.shl(b.and_(bits, const(I32, 0x7FFF)), const(I32, 13))
    # Reading the half's exponent as a float's is off by 2**112; the product also makes subnormals right.
    scaled = b.bitcast(b.fmul(b.bitcast(shifted, of(F32)), const(F32, 2.0**112)), of(I32))
    special = b.icmp_unsigned(">=", b.and_(bits, const(I32, 0x7FFF)), const(I32, 0x7C00))
    magnitude = b.select(special, b.or_(shifted, const(I32, 0x7F800000)), scaled)
    return b.bitcast(b.or_(sign, magnitude), of(F32))


def _narrow(b: Any, x: Any) -> Any:
    """f32x16 to half bits, rounded to nearest even."""
    if ISA != "generic":
        return b.bitcast(b.fptrunc(x, ir.VectorType(F16, 16)), ll(u16x16))
    const = lambda v: _const(ll(i32x16), [v] * 16)  # noqa: E731
    bits = b.bitcast(x, ll(i32x16))
    sign = b.lshr(b.and_(bits, const(-(2**31))), const(16))
    magnitude = b.and_(bits, const(0x7FFFFFFF))
    # Below 2**-14 adding 0.5 lines the half's subnormal bits up at the bottom of the word.
    half_one = _const(ll(f32x16), [0.5] * 16)
    small = b.sub(b.bitcast(b.fadd(b.bitcast(magnitude, ll(f32x16)), half_one), ll(i32x16)), const(0x3F000000))
    odd = b.and_(b.lshr(magnitude, const(13)), const(1))
    normal = b.lshr(b.add(b.add(magnitude, const(0xFFF - (112 << 23))), odd), const(13))
    large = b.select(b.icmp_unsigned(">", magnitude, const(0x7F800000)), const(0x7E00), const(0x7C00))
    result = b.select(b.icmp_unsigned("<", magnitude, const(0x38800000)), small, normal)
    result = b.select(b.icmp_unsigned(">=", magnitude, const(0x477FF000)), large, result)
    return b.trunc(b.or_(result, sign), ll(u16x16))


load_f16x16 = _op(lambda b, a: _widen(b, b.load(_pointer(b, a, ll(u16x16)), align=1)), f32x16, ADDRESS)
load_f16 = _op(lambda b, a: _widen(b, b.load(_pointer(b, a, I16), align=1)), types.float32, ADDRESS)


def _store_f16(b: Any, address: Any, x: Any) -> None:
    b.store(_narrow(b, x), _pointer(b, address, ll(u16x16)), align=1)


store_f16x16 = _op(_store_f16, types.void, ADDRESS, f32x16)


def _store_one_f16(b: Any, address: Any, x: Any) -> None:
    half = b.extract_element(_narrow(b, _splat(b, x, 16)), ir.Constant(I32, 0))
    b.store(half, _pointer(b, address, I16), align=1)


store_f16 = _op(_store_one_f16, types.void, ADDRESS, types.float32)


# ---- integer dot products
def _dot_wide(b: Any, acc: Any, u: Any, s: Any) -> Any:
    """The portable form: every product in 32 bits, then four neighbours added."""
    wide = ir.VectorType(I32, 64)
    products = b.mul(b.zext(u, wide), b.sext(s, wide))
    for k in range(4):
        acc = b.add(acc, _shuffle(b, products, products, range(k, 64, 4)))
    return acc


def _dot_avx2(b: Any, acc: Any, u: Any, s: Any, doubled: bool = False) -> Any:
    half16, half32 = ir.VectorType(I16, 16), ir.VectorType(I32, 8)
    weight = _const(half16, [2 if doubled else 1] * 16)
    out = []
    for part, (uu, ss) in enumerate(zip(_slices(b, u, 2), _slices(b, s, 2), strict=True)):
        pairs = _call(b, "llvm.x86.avx2.pmadd.ub.sw", half16, uu, ss)
        quads = _call(b, "llvm.x86.avx2.pmadd.wd", half32, pairs, weight)
        out.append(b.add(_slices(b, acc, 2)[part], quads))
    return _concat(b, out)


def _dot_vnni(b: Any, acc: Any, u: Any, s: Any) -> Any:
    parts = 1 if ISA == "avx512vnni" else 2
    name = "llvm.x86.avx512.vpdpbusd.512" if parts == 1 else "llvm.x86.avx512.vpdpbusd.256"
    i32 = ir.VectorType(I32, 16 // parts)
    pieces = zip(*(_slices(b, b.bitcast(v, ll(i32x16)), parts) for v in (acc, u, s)), strict=True)
    return _concat(b, [_call(b, name, i32, *piece) for piece in pieces])


def _dot_neon(b: Any, acc: Any, u: Any, s: Any) -> Any:
    i32 = ir.VectorType(I32, 4)
    pieces = zip(_slices(b, acc, 4), _slices(b, u, 4), _slices(b, s, 4), strict=True)
    return _concat(b, [_call(b, "llvm.aarch64.neon.sdot.v4i32.v16i8", i32, *piece) for piece in pieces])


def _dot_small(b: Any, acc: Any, u: Any, s: Any) -> Any:
    build = {"avx512vnni": _dot_vnni, "avxvnni": _dot_vnni, "avx2": _dot_avx2, "neon": _dot_neon}.get(ISA, _dot_wide)
    return build(b, acc, u, s)


def _dot_full(b: Any, acc: Any, u: Any, s: Any) -> Any:
    one = _const(ll(u8x64), [1] * 64)
    if ISA == "avx2":
        # 255 * 127 * 2 overflows 16 bits: u = 2 * (u >> 1) + (u & 1)
        return _dot_avx2(b, _dot_avx2(b, acc, b.lshr(u, one), s, doubled=True), b.and_(u, one), s)
    if ISA == "neon":
        # sdot is signed on both sides: u = (u - 128) + 2 * 64
        low = _dot_neon(b, acc, b.xor(u, _const(ll(u8x64), [128] * 64)), s)
        offset = _const(ll(u8x64), [64] * 64)
        return _dot_neon(b, _dot_neon(b, low, offset, s), offset, s)
    return _dot_small(b, acc, u, s)


# acc[i] += u[4i]*s[4i] + ... + u[4i+3]*s[4i+3]; u below 128, or any byte
dot_u7s8 = _op(_dot_small, i32x16, i32x16, u8x64, i8x64)
dot_u8s8 = _op(_dot_full, i32x16, i32x16, u8x64, i8x64)


def _dot_i16(b: Any, acc: Any, x: Any, y: Any) -> Any:
    """acc[i] += x[2i]*y[2i] + x[2i+1]*y[2i+1]."""
    n = x.type.count
    i32 = ir.VectorType(I32, n // 2)
    if ISA == "avx512vnni" and n == 32:
        return _call(b, "llvm.x86.avx512.vpdpwssd.512", i32, acc, b.bitcast(x, i32), b.bitcast(y, i32))
    if ISA in ("avx512vnni", "avxvnni", "avx2"):
        parts = n // 16
        pieces = zip(_slices(b, x, parts), _slices(b, y, parts), strict=True)
        half = ir.VectorType(I32, 8)
        return b.add(acc, _concat(b, [_call(b, "llvm.x86.avx2.pmadd.wd", half, *piece) for piece in pieces]))
    products = b.mul(b.sext(x, ir.VectorType(I32, n)), b.sext(y, ir.VectorType(I32, n)))
    even, odd = (_shuffle(b, products, products, range(k, n, 2)) for k in (0, 1))
    return b.add(acc, b.add(even, odd))


dot_i16x16 = _op(_dot_i16, i32x8, i32x8, i16x16, i16x16)


# ---- tiles: a tuple of vectors, one for each token or query, that share the loaded weights
def _literal(t: Any) -> int | None:
    return t.literal_value if isinstance(t, types.IntegerLiteral) else None


@intrinsic
def tile_i32(typingctx: Any, n: Any) -> Any:  # noqa: ARG001
    """`n` (a literal) zero vectors i32x16."""
    return _zero_tile(i32x16, n)


@intrinsic
def tile_f32(typingctx: Any, n: Any) -> Any:  # noqa: ARG001
    """`n` (a literal) zero vectors f32x16."""
    return _zero_tile(f32x16, n)


def _zero_tile(vec: Vec, n: Any) -> Any:
    count = _literal(n)
    if count is None:
        return None

    def codegen(context: Any, b: Any, sig: Any, _args: Any) -> Any:
        return context.make_tuple(b, sig.return_type, [ir.Constant(ll(vec), None)] * count)

    return signature(types.UniTuple(vec, count), n), codegen


def _each(build: Callable[..., Any], takes: tuple[Any, ...]) -> Any:
    """An intrinsic on a tile: `build(builder, i, acc[i], *values)` gives the new acc[i]."""

    def declare(typingctx: Any, tile: Any, *args: Any) -> Any:  # noqa: ARG001
        def codegen(context: Any, b: Any, sig: Any, values: Any) -> Any:
            items = [build(b, i, b.extract_value(values[0], i), *values[1:]) for i in range(tile.count)]
            return context.make_tuple(b, sig.return_type, items)

        return signature(tile, tile, *takes), codegen

    return _intrinsic(declare, 1 + len(takes))


def _word(b: Any, base: Any, stride: Any, i: int, t: ir.Type) -> Any:
    address = b.add(base, b.mul(stride, ir.Constant(I64, i))) if i else base
    return b.load(_pointer(b, address, t), align=1)


def _dot_block(dot: Callable[..., Any], n: int) -> Any:
    """A tile's tokens against 4 * n weights of 16 rows: weight vectors at `w`, activation words at `x`, `x + stride`..."""

    def declare(typingctx: Any, tile: Any, *_args: Any) -> Any:  # noqa: ARG001
        def codegen(context: Any, b: Any, sig: Any, values: Any) -> Any:
            tokens, w, x, stride = values
            acc = [b.extract_value(tokens, i) for i in range(tile.count)]
            for k in range(n):
                weights = b.load(_pointer(b, b.add(w, ir.Constant(I64, 64 * k)), ll(u8x64)), align=64)
                at = b.add(x, ir.Constant(I64, 4 * k))
                for i in range(tile.count):
                    word = _splat(b, _word(b, at, stride, i, I32), 16)
                    acc[i] = dot(b, acc[i], weights, b.bitcast(word, ll(i8x64)))
            return context.make_tuple(b, sig.return_type, acc)

        return signature(tile, tile, ADDRESS, ADDRESS, ADDRESS), codegen

    return _intrinsic(declare, 4)


# 32 or 16 weights of 16 rows; bytes below 128, or any
tile_dot32_u7, tile_dot32_u8 = _dot_block(_dot_small, 8), _dot_block(_dot_full, 8)
tile_dot16_u7, tile_dot16_u8 = _dot_block(_dot_small, 4), _dot_block(_dot_full, 4)


def _dot_pairs(b: Any, i: int, acc: Any, x: Any, at: Any, stride: Any) -> Any:
    pair = b.bitcast(_splat(b, _word(b, at, stride, i, I32), 16), ll(i16x32))
    return _dot_i16(b, acc, x, pair)


# acc[i] += x (16 rows of two i16) . the two i16 at `at + i * stride`
tile_dot_pair = _each(_dot_pairs, (i16x32, ADDRESS, ADDRESS))


def _fma_word(b: Any, i: int, acc: Any, x: Any, at: Any, stride: Any) -> Any:
    return _call(b, "llvm.fma.v16f32", ll(f32x16), x, _splat(b, _word(b, at, stride, i, F32), 16), acc)


# acc[i] += x * (the float at `at + i * stride`)
tile_fma = _each(_fma_word, (f32x16, ADDRESS, ADDRESS))


def _scale_word(b: Any, i: int, acc: Any, at: Any, stride: Any) -> Any:
    return b.fmul(acc, _splat(b, _word(b, at, stride, i, F32), 16))


# acc[i] *= the float at `at + i * stride`
tile_scale = _each(_scale_word, (ADDRESS, ADDRESS))


def _each2(build: Callable[..., Any], other: Any, *takes: Any) -> Any:
    """Like `_each` with a second tile of `other` vectors beside the first: build(builder, i, acc[i], other[i], ...)."""

    def declare(typingctx: Any, tile: Any, *args: Any) -> Any:  # noqa: ARG001
        def codegen(context: Any, b: Any, sig: Any, values: Any) -> Any:
            first, second = values[:2]
            items = [
                build(b, i, b.extract_value(first, i), b.extract_value(second, i), *values[2:])
                for i in range(tile.count)
            ]
            return context.make_tuple(b, sig.return_type, items)

        return signature(tile, tile, types.UniTuple(other, tile.count), *takes), codegen

    return _intrinsic(declare, 2 + len(takes))


def _mul_add(b: Any, _i: int, acc: Any, x: Any, scale: Any) -> Any:
    return b.add(acc, b.mul(x, scale))


def _fma_scaled(b: Any, i: int, acc: Any, x: Any, scale: Any, at: Any, stride: Any) -> Any:
    factor = b.fmul(scale, _splat(b, _word(b, at, stride, i, F32), 16))
    return _call(b, "llvm.fma.v16f32", ll(f32x16), b.sitofp(x, ll(f32x16)), factor, acc)


# acc[i] += x[i] * scale, in integers
tile_mul_add = _each2(_mul_add, i32x16, i32x16)
# acc[i] += float(x[i]) * scale * (the float at `at + i * stride`)
tile_fma_scaled = _each2(_fma_scaled, i32x16, f32x16, ADDRESS, ADDRESS)


@intrinsic
def tile_load(typingctx: Any, tile: Any, at: Any, stride: Any) -> Any:  # noqa: ARG001
    """The tile's vectors f32x16 from `at`, `at + stride`, ..."""

    def codegen(context: Any, b: Any, sig: Any, values: Any) -> Any:
        items = [_word(b, values[1], values[2], i, ll(f32x16)) for i in range(tile.count)]
        return context.make_tuple(b, sig.return_type, items)

    return signature(tile, tile, ADDRESS, ADDRESS), codegen


@intrinsic
def tile_store(typingctx: Any, at: Any, stride: Any, tile: Any) -> Any:  # noqa: ARG001
    """Write the tile's vectors to `at`, `at + stride`, ..."""

    def codegen(context: Any, b: Any, _sig: Any, values: Any) -> Any:
        base, step, vectors = values
        for i in range(tile.count):
            address = b.add(base, b.mul(step, ir.Constant(I64, i))) if i else base
            b.store(b.extract_value(vectors, i), _pointer(b, address, ll(tile.dtype)), align=1)
        return context.get_dummy_value()

    return signature(types.void, ADDRESS, ADDRESS, tile), codegen


# ---- threads
def _pause(b: Any) -> None:
    if codegen_target()[0].startswith("x86_64"):
        _call(b, "llvm.x86.sse2.pause", ir.VoidType())


# a hint to the processor, inside a waiting loop, that nothing is happening
pause = _op(_pause, types.void)


# ---- calls through an address
def call(*takes: Any) -> Any:
    """An intrinsic that calls the kernel at an address with these arguments."""

    def build(b: Any, address: Any, *values: Any) -> None:
        t = ir.FunctionType(ir.VoidType(), [v.type for v in values])
        b.call(b.inttoptr(address, t.as_pointer()), values)

    return _op(build, types.void, ADDRESS, *takes)


def record_at(dtype: np.dtype) -> Any:
    """An intrinsic that reads the NumPy record at an address, in place."""
    record = from_dtype(dtype)

    @intrinsic
    def at(typingctx: Any, address: Any) -> Any:  # noqa: ARG001
        def codegen(context: Any, b: Any, _sig: Any, args: Any) -> Any:
            return b.inttoptr(args[0], context.get_value_type(record))

        return signature(record, ADDRESS), codegen

    return at


@intrinsic
def stack(typingctx: Any, n: Any) -> Any:  # noqa: ARG001
    """Address of `n` (a literal) bytes on the stack, aligned to 64."""
    count = _literal(n)
    if count is None:
        return None

    def codegen(_context: Any, b: Any, _sig: Any, _args: Any) -> Any:
        with b.goto_entry_block():
            space = b.alloca(ir.ArrayType(I8, count))
            space.align = 64
        return b.ptrtoint(space, I64)

    return signature(ADDRESS, n), codegen


# Cody and Waite's split of ln 2: the first part has few enough bits that n * LN2_HIGH is exact.
LN2_HIGH, LN2_LOW = 0.693145751953125, 1.4286067653302e-06


@jit
def exp_f32x16(x):  # type: ignore[no-untyped-def]
    """exp of each lane to about 2 units in the last place; 0 below -87.3, no overflow above 88.3 (clamped).

    Split x = n ln 2 + r with |r| <= ln 2 / 2 (Cody and Waite), a polynomial for exp(r), n into the exponent bits.
    """
    low, high = splat_f32x16(-87.3), splat_f32x16(88.3)
    clamped = where_less(x, low, low, where_less(high, x, high, x))
    n = round_f32x16(clamped * splat_f32x16(1.4426950408889634))
    r = fma(n, splat_f32x16(-LN2_HIGH), clamped)
    r = fma(n, splat_f32x16(-LN2_LOW), r)
    p = splat_f32x16(1.0 / 5040)
    p = fma(p, r, splat_f32x16(1.0 / 720))
    p = fma(p, r, splat_f32x16(1.0 / 120))
    p = fma(p, r, splat_f32x16(1.0 / 24))
    p = fma(p, r, splat_f32x16(1.0 / 6))
    p = fma(p, r, splat_f32x16(0.5))
    p = fma(p, r, splat_f32x16(1.0))
    p = fma(p, r, splat_f32x16(1.0))
    scale = f32x16_of_bits((i32_of_f32x16(n) + splat_i32x16(127)) << splat_i32x16(23))
    return where_less(x, low, splat_f32x16(0.0), p * scale)
