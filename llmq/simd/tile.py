"""Tiles: a tuple of vectors, one for each token or query, that share the loaded weights."""

from collections.abc import Callable
from typing import Any

from llvmlite import ir
from numba import types
from numba.core.typing.templates import signature
from numba.extending import intrinsic

from llmq.simd.dot import dot_full, dot_i16, dot_small
from llmq.simd.vector import (
    ADDRESS,
    F32,
    I32,
    I64,
    Vec,
    call_intrinsic,
    f32x16,
    i8x64,
    i16x32,
    i32x16,
    intrinsic_of,
    literal,
    ll,
    pointer,
    splat,
    u8x64,
)


@intrinsic
def tile_i32(typingctx: Any, n: Any) -> Any:  # noqa: ARG001
    """`n` (a literal) zero vectors i32x16."""
    return _zero_tile(i32x16, n)


@intrinsic
def tile_f32(typingctx: Any, n: Any) -> Any:  # noqa: ARG001
    """`n` (a literal) zero vectors f32x16."""
    return _zero_tile(f32x16, n)


def _zero_tile(vec: Vec, n: Any) -> Any:
    count = literal(n)
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

    return intrinsic_of(declare, 1 + len(takes))


def _word(b: Any, base: Any, stride: Any, i: int, t: ir.Type) -> Any:
    address = b.add(base, b.mul(stride, ir.Constant(I64, i))) if i else base
    return b.load(pointer(b, address, t), align=1)


def _dot_block(dot: Callable[..., Any], n: int) -> Any:
    """A tile's tokens against 4 * n weights of 16 rows: weight vectors at `w`, words at `x`, x + stride..."""

    def declare(typingctx: Any, tile: Any, *_args: Any) -> Any:  # noqa: ARG001
        def codegen(context: Any, b: Any, sig: Any, values: Any) -> Any:
            tokens, w, x, stride = values
            acc = [b.extract_value(tokens, i) for i in range(tile.count)]
            for k in range(n):
                weights = b.load(pointer(b, b.add(w, ir.Constant(I64, 64 * k)), ll(u8x64)), align=64)
                at = b.add(x, ir.Constant(I64, 4 * k))
                for i in range(tile.count):
                    word = splat(b, _word(b, at, stride, i, I32), 16)
                    acc[i] = dot(b, acc[i], weights, b.bitcast(word, ll(i8x64)))
            return context.make_tuple(b, sig.return_type, acc)

        return signature(tile, tile, ADDRESS, ADDRESS, ADDRESS), codegen

    return intrinsic_of(declare, 4)


# 32 or 16 weights of 16 rows; bytes below 128, or any
tile_dot32_u7, tile_dot32_u8 = _dot_block(dot_small, 8), _dot_block(dot_full, 8)
tile_dot16_u7 = _dot_block(dot_small, 4)


def _dot_pairs(b: Any, i: int, acc: Any, x: Any, at: Any, stride: Any) -> Any:
    pair = b.bitcast(splat(b, _word(b, at, stride, i, I32), 16), ll(i16x32))
    return dot_i16(b, acc, x, pair)


# acc[i] += x (16 rows of two i16) . the two i16 at `at + i * stride`
tile_dot_pair = _each(_dot_pairs, (i16x32, ADDRESS, ADDRESS))


def _fma_word(b: Any, i: int, acc: Any, x: Any, at: Any, stride: Any) -> Any:
    return call_intrinsic(b, "llvm.fma.v16f32", ll(f32x16), x, splat(b, _word(b, at, stride, i, F32), 16), acc)


# acc[i] += x * (the float at `at + i * stride`)
tile_fma = _each(_fma_word, (f32x16, ADDRESS, ADDRESS))


def _scale_word(b: Any, i: int, acc: Any, at: Any, stride: Any) -> Any:
    return b.fmul(acc, splat(b, _word(b, at, stride, i, F32), 16))


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

    return intrinsic_of(declare, 2 + len(takes))


def _mul_add(b: Any, _i: int, acc: Any, x: Any, scale: Any) -> Any:
    return b.add(acc, b.mul(x, scale))


def _fma_scaled(b: Any, i: int, acc: Any, x: Any, scale: Any, at: Any, stride: Any) -> Any:
    factor = b.fmul(scale, splat(b, _word(b, at, stride, i, F32), 16))
    return call_intrinsic(b, "llvm.fma.v16f32", ll(f32x16), b.sitofp(x, ll(f32x16)), factor, acc)


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
            b.store(b.extract_value(vectors, i), pointer(b, address, ll(tile.dtype)), align=1)
        return context.get_dummy_value()

    return signature(types.void, ADDRESS, ADDRESS, tile), codegen
