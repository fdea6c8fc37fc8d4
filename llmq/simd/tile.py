"""Tiles: a tuple of vectors, one for each token or query, that share the loaded weights."""

from collections.abc import Callable
from typing import Any

from llvmlite import ir
from numba import types
from numba.core.typing.templates import signature
from numba.extending import intrinsic

import llmq.simd.arm as arm
from llmq.simd.basics import add_lanes
from llmq.simd.dot import dot_full, dot_i16, dot_scaled, dot_small
from llmq.simd.vector import (
    ADDRESS,
    F32,
    I32,
    I64,
    NEON,
    SPREAD,
    Vec,
    call_intrinsic,
    f32x4,
    f32x8,
    f32x16,
    i8x64,
    i32x16,
    intrinsic_of,
    literal,
    ll,
    pointer,
    shuffle,
    slices,
    splat,
    u8x64,
)


def _zero_tile(vec: Vec) -> Any:
    def declare(typingctx: Any, n: Any) -> Any:  # noqa: ARG001
        count = literal(n)
        if count is None:
            return None

        def codegen(context: Any, b: Any, sig: Any, _args: Any) -> Any:
            return context.make_tuple(b, sig.return_type, [ir.Constant(ll(vec), None)] * count)

        return signature(types.UniTuple(vec, count), n), codegen

    return intrinsic_of(declare, 1)


# `n` (a literal) zero vectors
tile_i32, tile_f32, tile_f32x8, tile_f32x4 = map(_zero_tile, (i32x16, f32x16, f32x8, f32x4))


def _each(build: Callable[..., Any], takes: tuple[Any, ...]) -> Any:
    """An intrinsic on a tile: `build(builder, i, acc[i], *values)` gives the new acc[i]."""

    def declare(typingctx: Any, tile: Any, *args: Any) -> Any:  # noqa: ARG001
        def codegen(context: Any, b: Any, sig: Any, values: Any) -> Any:
            items = [build(b, i, b.extract_value(values[0], i), *values[1:]) for i in range(tile.count)]
            return context.make_tuple(b, sig.return_type, items)

        return signature(tile, tile, *takes), codegen

    return intrinsic_of(declare, 1 + len(takes))


def _at(b: Any, base: Any, stride: Any, i: int) -> Any:
    return b.add(base, b.mul(stride, ir.Constant(I64, i))) if i else base


def _vector(b: Any, base: Any, stride: Any, i: int, t: ir.Type) -> Any:
    """What lies at `base + i * stride`."""
    return b.load(pointer(b, _at(b, base, stride, i), t), align=1)


def _dot(dot: Callable[..., Any]) -> Callable[..., Any]:
    def build(b: Any, i: int, acc: Any, lanes: Any, at: Any, stride: Any) -> Any:
        return dot(b, acc, lanes, _vector(b, at, stride, i, ll(i8x64)))

    return build


# acc[i] += lanes . (the 64 bytes at `at + i * stride`); lanes below 128 (where SIGNED any signed byte), or any
tile_dot_u7 = _each(_dot(dot_small), (u8x64, ADDRESS, ADDRESS))
tile_dot_u8 = _each(_dot(dot_full), (u8x64, ADDRESS, ADDRESS))


def _dot_scaled(span: int) -> Callable[..., Any]:
    def build(b: Any, i: int, acc: Any, lanes: Any, scales: Any, at: Any, stride: Any) -> Any:
        x = _vector(b, at, stride, i, ll(i8x64))
        return arm.sum_scaled(b, acc, lanes, x, scales, span) if NEON else dot_scaled(b, acc, lanes, x, scales)

    return build


# acc[i] += scale * (lanes . (the 64 bytes at `at + i * stride`)), in whatever lanes; lanes below 128 (where SIGNED any
# signed byte), scales as `spread` has them, one for 32 or 16 weights
tile_dot_scaled32 = _each(_dot_scaled(32), (u8x64, SPREAD, ADDRESS, ADDRESS))
tile_dot_scaled16 = _each(_dot_scaled(16), (u8x64, SPREAD, ADDRESS, ADDRESS))


def _fold(b: Any, x: Any, n: int) -> Any:
    """Lanes added up until `n` are left."""
    while x.type.count > n:
        low, high = slices(b, x, 2)
        x = b.add(low, high)
    return x


def _add_scaled(b: Any, i: int, acc: Any, sums: Any, scale: Any, at: Any, stride: Any) -> Any:
    """acc + float(sums) * (scale * the float at `at + i * stride`)."""
    n = acc.type.count
    factor = splat(b, b.fmul(scale, _vector(b, at, stride, i, F32)), n)
    return call_intrinsic(b, f"llvm.fma.v{n}f32", acc.type, b.sitofp(_fold(b, sums, n), acc.type), factor, acc)


@intrinsic
def tile_add_scaled(typingctx: Any, tile: Any, sums: Any, scale: Any, at: Any, stride: Any) -> Any:  # noqa: ARG001
    """acc[i] += float(sums[i]) * (scale * the float at `at + i * stride`); sums are folded to acc's lanes."""

    def codegen(context: Any, b: Any, sig: Any, values: Any) -> Any:
        acc, parts, *rest = values
        items = [
            _add_scaled(b, i, b.extract_value(acc, i), b.extract_value(parts, i), *rest) for i in range(tile.count)
        ]
        return context.make_tuple(b, sig.return_type, items)

    return signature(tile, tile, sums, types.float32, ADDRESS, ADDRESS), codegen


@intrinsic
def tile_add_mins(ctx: Any, tile: Any, mins: Any, sums: Any, scale: Any, at: Any, stride: Any) -> Any:  # noqa: ARG001
    """acc[i] += float(mins . the i16 sums at `sums + i * stride`) * (scale * the float at `at + i * stride`)."""

    def codegen(context: Any, b: Any, sig: Any, values: Any) -> Any:
        acc, m, s, *rest = values
        step = rest[-1]
        zero = ir.Constant(ir.VectorType(I32, mins.n // 2), None)
        items = []
        for i in range(tile.count):
            product = dot_i16(b, zero, m, _vector(b, s, step, i, ll(mins)))
            items.append(_add_scaled(b, i, b.extract_value(acc, i), product, *rest))
        return context.make_tuple(b, sig.return_type, items)

    return signature(tile, tile, mins, ADDRESS, types.float32, ADDRESS, ADDRESS), codegen


@intrinsic
def tile_add_blocks(ctx: Any, tile: Any, sums: Any, d: Any, part: Any, at: Any, stride: Any) -> Any:  # noqa: ARG001
    """acc[i] += float(sums[i]) * d * (the eight floats at `at + i * stride`), of blocks 2 * part and 2 * part + 1."""
    first = literal(part)
    if first is None:
        return None

    def codegen(context: Any, b: Any, sig: Any, values: Any) -> Any:
        acc, parts, scales, _part, base, step = values
        items = []
        for i in range(tile.count):
            scaled = b.fmul(scales, _vector(b, base, step, i, ll(f32x8)))
            if NEON:
                items.append(arm.add_blocks(b, b.extract_value(acc, i), b.extract_value(parts, i), scaled, 2 * first))
                continue
            factor = shuffle(b, scaled, scaled, [2 * first + lane // 8 for lane in range(16)])
            product = b.sitofp(b.extract_value(parts, i), ll(f32x16))
            items.append(call_intrinsic(b, "llvm.fma.v16f32", ll(f32x16), product, factor, b.extract_value(acc, i)))
        return context.make_tuple(b, sig.return_type, items)

    return signature(tile, tile, sums, f32x8, part, ADDRESS, ADDRESS), codegen


def _add_product(b: Any, i: int, acc: Any, x: Any, at: Any, stride: Any) -> Any:
    name = f"llvm.fma.v{acc.type.count}f32"
    return call_intrinsic(b, name, acc.type, x, _vector(b, at, stride, i, acc.type), acc)


# acc[i] += x * (the eight or sixteen floats at `at + i * stride`)
tile_add_product8 = _each(_add_product, (f32x8, ADDRESS, ADDRESS))
tile_add_product16 = _each(_add_product, (f32x16, ADDRESS, ADDRESS))


@intrinsic
def tile_sums(typingctx: Any, tile: Any, other: Any) -> Any:  # noqa: ARG001
    """The lanes of tile[i] and of other[i] added up, float32s; in one order, whatever surrounds it."""

    def codegen(context: Any, b: Any, sig: Any, values: Any) -> Any:
        items = [b.fadd(*(add_lanes(b, b.extract_value(v, i)) for v in values)) for i in range(tile.count)]
        return context.make_tuple(b, sig.return_type, items)

    return signature(types.UniTuple(types.float32, tile.count), tile, other), codegen


@intrinsic
def tile_load(typingctx: Any, tile: Any, at: Any, stride: Any) -> Any:  # noqa: ARG001
    """A tile like `tile`, from `at`, `at + stride`, ..."""

    def codegen(context: Any, b: Any, sig: Any, values: Any) -> Any:
        items = [_vector(b, values[1], values[2], i, ll(tile.dtype)) for i in range(tile.count)]
        return context.make_tuple(b, sig.return_type, items)

    return signature(tile, tile, ADDRESS, ADDRESS), codegen


@intrinsic
def tile_store(typingctx: Any, at: Any, stride: Any, tile: Any) -> Any:  # noqa: ARG001
    """Write the tile's vectors to `at`, `at + stride`, ..."""

    def codegen(context: Any, b: Any, _sig: Any, values: Any) -> Any:
        base, step, vectors = values
        for i in range(tile.count):
            b.store(b.extract_value(vectors, i), pointer(b, _at(b, base, step, i), ll(tile.dtype)), align=1)
        return context.get_dummy_value()

    return signature(types.void, ADDRESS, ADDRESS, tile), codegen
