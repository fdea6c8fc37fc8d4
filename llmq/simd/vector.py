"""The vector type, and the few LLVM steps that every operation is built from."""

import inspect
from collections.abc import Callable, Sequence
from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.core.typing.templates import signature
from numba.extending import intrinsic, models, register_model

from llmq.jit import codegen_target
from llmq.simd.target import instruction_set

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


ISA = instruction_set(*codegen_target())
NEON = ISA in ("neon", "dotprod", "i8mm")
# Products of bytes are of signed ones on both sides on Arm, of unsigned by signed ones on x86.
SIGNED = NEON


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
i8x32, i16x8, i32x4, f32x4 = Vec(types.int8, 32), Vec(types.int16, 8), Vec(types.int32, 4), Vec(types.float32, 4)
i32x16, f32x16, f32x8, i32x8 = Vec(types.int32, 16), Vec(types.float32, 16), Vec(types.float32, 8), Vec(types.int32, 8)
# Scales beside 64 weights: with every pair of products on x86, with every sum of four on Arm.
SPREAD = i32x16 if NEON else i16x32


def pointer(b: Any, address: Any, to: ir.Type) -> Any:
    return b.inttoptr(address, to.as_pointer())


def const(t: ir.VectorType, values: Sequence[int | float]) -> ir.Constant:
    return ir.Constant(t, list(values))


def shuffle(b: Any, x: Any, y: Any, lanes: Sequence[int]) -> Any:
    return b.shuffle_vector(x, y, const(ir.VectorType(I32, len(lanes)), lanes))


def splat(b: Any, x: Any, n: int) -> Any:
    undefined = ir.Constant(ir.VectorType(x.type, n), ir.Undefined)
    return shuffle(b, b.insert_element(undefined, x, ir.Constant(I32, 0)), undefined, [0] * n)


def call_intrinsic(b: Any, name: str, returns: ir.Type, *args: Any) -> Any:
    function = cgutils.get_or_insert_function(b.module, ir.FunctionType(returns, [a.type for a in args]), name)
    return b.call(function, args)


def slices(b: Any, x: Any, parts: int) -> list[Any]:
    n = x.type.count // parts
    return [shuffle(b, x, x, range(i * n, (i + 1) * n)) for i in range(parts)]


def concat(b: Any, parts: list[Any]) -> Any:
    while len(parts) > 1:
        n = parts[0].type.count
        parts = [shuffle(b, parts[i], parts[i + 1], range(2 * n)) for i in range(0, len(parts), 2)]
    return parts[0]


def multiply_add(b: Any, x: Any, y: Any, z: Any) -> Any:
    """x * y + z of float32 vectors, rounded once."""
    return call_intrinsic(b, f"llvm.fma.v{x.type.count}f32", x.type, x, y, z)


def offset_by(b: Any, address: Any, n_bytes: int) -> Any:
    return b.add(address, ir.Constant(I64, n_bytes)) if n_bytes else address


def zeros(vec: Vec, count: int, *given: Any) -> Any:
    """What an intrinsic of the literals `given` declares to be a tuple of `count` zero vectors."""

    def codegen(context: Any, b: Any, sig: Any, _args: Any) -> Any:
        return context.make_tuple(b, sig.return_type, [ir.Constant(ll(vec), None)] * count)

    return signature(types.UniTuple(vec, count), *given), codegen


def intrinsic_of(declare: Callable[..., Any], arity: int) -> Any:
    """`numba.extending.intrinsic` for a function of *args: the arity has to stand in its signature."""
    names = ["typingctx", *(f"a{i}" for i in range(arity))]
    parameters = [inspect.Parameter(name, inspect.Parameter.POSITIONAL_OR_KEYWORD) for name in names]
    declare.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    return intrinsic(declare)


def op(build: Callable[..., Any], returns: Any, *takes: Any) -> Any:
    """An intrinsic with a fixed signature; `build(builder, *llvm_values)` gives its value (None for a store)."""

    def declare(typingctx: Any, *_args: Any) -> Any:
        def codegen(context: Any, b: Any, _sig: Any, values: Any) -> Any:
            value = build(b, *values)
            return context.get_dummy_value() if value is None else value

        return signature(returns, *takes), codegen

    return intrinsic_of(declare, len(takes))


def literal(t: Any) -> int | None:
    """The value of an argument that is a constant in the source, for intrinsics that need one."""
    return t.literal_value if isinstance(t, types.IntegerLiteral) else None
