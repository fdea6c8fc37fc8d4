"""Tiles: a tuple of vectors, in which each token that shares the loaded weights has one, a half or a quarter."""

from collections.abc import Callable
from typing import Any

from llvmlite import ir
from numba import types
from numba.core.typing.templates import signature
from numba.extending import intrinsic

import llmq.simd.arm as arm
from llmq.simd.basics import add_lanes
from llmq.simd.dot import dot_full, dot_i16, dot_small, scaled_dot
from llmq.simd.vector import (
    ADDRESS,
    I16,
    I32,
    I64,
    NEON,
    Vec,
    concat,
    f32x8,
    f32x16,
    i8x64,
    i16x16,
    i32x8,
    i32x16,
    intrinsic_of,
    literal,
    ll,
    multiply_add,
    offset_by,
    pointer,
    shuffle,
    slices,
    splat,
    u8x64,
    zeros,
)


@intrinsic
def tile_i32(typingctx: Any, n: Any) -> Any:
    """Zero sums of `n` (a literal) tokens, 16 lanes each."""
    tokens = literal(n)
    return zeros(i32x16, tokens, n) if tokens else None


@intrinsic
def tile_f32(typingctx: Any, lanes: Any, n: Any) -> Any:
    """Zero sums of `n` tokens as floats, `lanes` (16, 8 or 4) each, side by side in vectors; both are literals."""
    each, tokens = literal(lanes), literal(n)
    if not each or not tokens:
        return None
    width = min(16, each * tokens)
    return zeros(Vec(types.float32, width), each * tokens // width, lanes, n)


def _each(build: Callable[..., Any], takes: tuple[Any, ...]) -> Any:
    """An intrinsic on a tile: `build(builder, i, acc[i], *values)` gives the new acc[i]."""

    def declare(typingctx: Any, tile: Any, *args: Any) -> Any:
        def codegen(context: Any, b: Any, sig: Any, values: Any) -> Any:
            items = [build(b, i, b.extract_value(values[0], i), *values[1:]) for i in range(tile.count)]
            return context.make_tuple(b, sig.return_type, items)

        return signature(tile, tile, *takes), codegen

    return intrinsic_of(declare, 1 + len(takes))


def _at(b: Any, base: Any, stride: Any, i: int, offset: int = 0) -> Any:
    return offset_by(b, b.add(base, b.mul(stride, ir.Constant(I64, i))) if i else base, offset)


def _vector(b: Any, base: Any, stride: Any, i: int, t: ir.Type, offset: int = 0) -> Any:
    """What lies at `base + i * stride + offset`."""
    return b.load(pointer(b, _at(b, base, stride, i, offset), t), align=1)


def _dot(dot: Callable[..., Any]) -> Callable[..., Any]:
    def build(b: Any, i: int, acc: Any, lanes: Any, at: Any, stride: Any) -> Any:
        return dot(b, acc, lanes, _vector(b, at, stride, i, ll(i8x64)))

    return build


# acc[i] += lanes . (the 64 bytes at `at + i * stride`); lanes below 128 (where SIGNED any signed byte), or any
tile_dot_u7 = _each(_dot(dot_small), (u8x64, ADDRESS, ADDRESS))
tile_dot_u8 = _each(_dot(dot_full), (u8x64, ADDRESS, ADDRESS))


def _dot_scaled(span: int, crossed: bool) -> Any:
    def declare(typingctx: Any, tile: Any, low: Any, high: Any, scales: Any, half: Any, *at: Any) -> Any:
        part = literal(half)
        if part is None:
            return None

        def codegen(context: Any, b: Any, sig: Any, values: Any) -> Any:
            acc, *lanes, scales, _half, base, stride = values
            dot = scaled_dot(b, lanes, scales, part, span, crossed)
            items = []
            for i in range(tile.count):
                x = [_vector(b, base, stride, i, ll(i8x64), 64 * k) for k in (0, 1)]
                items.append(dot(b.extract_value(acc, i), x))
            return context.make_tuple(b, sig.return_type, items)

        return signature(tile, tile, u8x64, u8x64, i16x16, half, ADDRESS, ADDRESS), codegen

    return intrinsic_of(declare, 7)


# acc[i] += scales * (weights . the 128 bytes at `at + i * stride`), in whatever lanes, of 128 weights in two vectors.
# They are half 0 or 1 (a literal) of a group, and below 64 (where SIGNED any signed bytes); of the group's 16 scales
# each is for 16 weights, or two, which are equal, for 32. Crossed: 32-weight sub-blocks 0 and 2, then 1 and 3.
tile_dot_scaled32, tile_dot_scaled16 = _dot_scaled(32, False), _dot_scaled(16, False)
tile_dot_crossed32 = _dot_scaled(32, True)


def _fold(b: Any, tokens: list[Any], n: int) -> Any:
    """Lanes of one token's sums added up until `n` are left, or those of two, side by side in one vector."""
    if len(tokens) == 2:
        # Halves of both are picked so that one of the two vectors needs no shuffle, but a blend.
        near, far = [*range(n), *range(3 * n, 4 * n)], [*range(n, 2 * n), *range(2 * n, 3 * n)]
        return b.add(*(shuffle(b, tokens[0], tokens[1], order) for order in (near, far)))
    folded = tokens[0]
    while folded.type.count > n:
        folded = b.add(*slices(b, folded, 2))
    return folded


def _fma(b: Any, acc: Any, sums: Any, factor: Any, other: Any = None) -> Any:
    """acc + float(sums) * factor, or acc + (float(sums) * factor) * other."""
    value = b.sitofp(sums, acc.type)
    if other is not None:
        value, factor = b.fmul(value, factor), other
    return multiply_add(b, value, factor, acc)


@intrinsic
def tile_add_scaled(typingctx: Any, tile: Any, sums: Any, factors: Any) -> Any:
    """acc += float(sums) * factors, with the sums of each token folded to its lanes of acc."""
    per = sums.count // tile.count

    def codegen(context: Any, b: Any, sig: Any, values: Any) -> Any:
        items = []
        for i in range(tile.count):
            tokens = [b.extract_value(values[1], t) for t in range(i * per, (i + 1) * per)]
            folded = _fold(b, tokens, tile.dtype.n // per)
            items.append(_fma(b, b.extract_value(values[0], i), folded, b.extract_value(values[2], i)))
        return context.make_tuple(b, sig.return_type, items)

    return signature(tile, tile, sums, factors), codegen


def _dot_mins(b: Any, mins: Any, sums: Any, per: int) -> Any:
    """mins . sums of each token, side by side; on Arm one by one, for its products keep no order."""
    zero = ir.Constant(ir.VectorType(I32, mins.type.count // 2), None)
    if NEON:
        return concat(b, [dot_i16(b, zero, mins, s) for s in slices(b, sums, per)])
    return dot_i16(b, concat(b, [zero] * per), concat(b, [mins] * per), sums)


@intrinsic
def tile_add_mins(typingctx: Any, tile: Any, mins: Any, sums: Any, factors: Any) -> Any:
    """acc += float(mins . each token's i16 sums, side by side at `sums`) * factors."""
    lanes = tile.dtype.n
    per = lanes // (mins.n // 2)

    def codegen(context: Any, b: Any, sig: Any, values: Any) -> Any:
        acc, m, at, floats = values
        items = []
        for i in range(tile.count):
            vector = _vector(b, at, ir.Constant(I64, 4 * lanes), i, ir.VectorType(I16, 2 * lanes))
            product = _dot_mins(b, m, vector, per)
            items.append(_fma(b, b.extract_value(acc, i), product, b.extract_value(floats, i)))
        return context.make_tuple(b, sig.return_type, items)

    return signature(tile, tile, mins, ADDRESS, factors), codegen


@intrinsic
def tile_splat(typingctx: Any, tile: Any, value: Any) -> Any:
    """A tile like `tile`, all of it one float."""

    def codegen(context: Any, b: Any, sig: Any, values: Any) -> Any:
        return context.make_tuple(b, sig.return_type, [splat(b, values[1], tile.dtype.n)] * tile.count)

    return signature(tile, tile, types.float32), codegen


@intrinsic
def tile_times(typingctx: Any, tile: Any, value: Any) -> Any:
    """The floats of a tile, each times `value`."""

    def codegen(context: Any, b: Any, sig: Any, values: Any) -> Any:
        factor = splat(b, values[1], tile.dtype.n)
        items = [b.fmul(b.extract_value(values[0], i), factor) for i in range(tile.count)]
        return context.make_tuple(b, sig.return_type, items)

    return signature(tile, tile, types.float32), codegen


@intrinsic
def tile_add_blocks(typingctx: Any, tile: Any, sums: Any, d: Any, part: Any, at: Any, stride: Any) -> Any:
    """acc[i] += float(sums[i]) * d * (the eight floats at `at + i * stride`), of blocks 2 * part and 2 * part + 1."""
    first, per = literal(part), sums.count // tile.count
    if first is None:
        return None

    def codegen(context: Any, b: Any, sig: Any, values: Any) -> Any:
        acc, parts, scales, _part, base, step = values
        old = [piece for i in range(tile.count) for piece in slices(b, b.extract_value(acc, i), per)]
        new = []
        for i, token in enumerate(old):
            scaled, product = b.fmul(scales, _vector(b, base, step, i, ll(f32x8))), b.extract_value(parts, i)
            if NEON:
                new.append(arm.add_blocks(b, token, product, scaled, 2 * first))
                continue
            factor = shuffle(b, scaled, scaled, [2 * first + lane // 8 for lane in range(16)])
            new.append(multiply_add(b, b.sitofp(product, token.type), factor, token))
        items = [concat(b, new[i : i + per]) for i in range(0, len(new), per)]
        return context.make_tuple(b, sig.return_type, items)

    return signature(tile, tile, sums, f32x8, part, ADDRESS, ADDRESS), codegen


@intrinsic
def tile_add_offsets(typingctx: Any, tile: Any, c: Any, scales: Any, sums: Any, stride: Any) -> Any:
    """acc += c * (the eight floats at `scales + i * stride`) * (the eight i32 at `sums + i * stride`)."""
    per = tile.dtype.n // c.n

    def codegen(context: Any, b: Any, sig: Any, values: Any) -> Any:
        acc, offsets, scales, sums, step = values
        repeated = concat(b, [offsets] * per)
        items = []
        for i in range(tile.count):
            tokens = range(i * per, (i + 1) * per)
            d = concat(b, [_vector(b, scales, step, t, ll(f32x8)) for t in tokens])
            total = concat(b, [_vector(b, sums, step, t, ll(i32x8)) for t in tokens])
            items.append(_fma(b, b.extract_value(acc, i), total, d, repeated))
        return context.make_tuple(b, sig.return_type, items)

    return signature(tile, tile, c, ADDRESS, ADDRESS, ADDRESS), codegen


def _add_product(b: Any, i: int, acc: Any, x: Any, at: Any, stride: Any) -> Any:
    return multiply_add(b, x, _vector(b, at, stride, i, acc.type), acc)


# acc[i] += x * (the sixteen floats at `at + i * stride`)
tile_add_product = _each(_add_product, (f32x16, ADDRESS, ADDRESS))


@intrinsic
def tile_sums(typingctx: Any, n: Any, tile: Any, other: Any) -> Any:
    """The lanes of each of `n` (a literal) tokens in both added up, float32s; in one order, whatever surrounds it."""
    tokens = literal(n)
    if tokens is None:
        return None

    def codegen(context: Any, b: Any, sig: Any, values: Any) -> Any:
        totals = []
        for value, held in ((values[1], tile), (values[2], other)):
            per = tokens // held.count
            pieces = [piece for i in range(held.count) for piece in slices(b, b.extract_value(value, i), per)]
            totals.append([add_lanes(b, piece) for piece in pieces])
        return context.make_tuple(b, sig.return_type, [b.fadd(x, y) for x, y in zip(*totals, strict=True)])

    return signature(types.UniTuple(types.float32, tokens), n, tile, other), codegen


@intrinsic
def tile_load(typingctx: Any, tile: Any, at: Any, stride: Any) -> Any:
    """A tile like `tile`, from `at`, `at + stride`, ..."""

    def codegen(context: Any, b: Any, sig: Any, values: Any) -> Any:
        items = [_vector(b, values[1], values[2], i, ll(tile.dtype)) for i in range(tile.count)]
        return context.make_tuple(b, sig.return_type, items)

    return signature(tile, tile, ADDRESS, ADDRESS), codegen


@intrinsic
def tile_store(typingctx: Any, at: Any, stride: Any, tile: Any) -> Any:
    """Write the tile's vectors to `at`, `at + stride`, ..."""

    def codegen(context: Any, b: Any, _sig: Any, values: Any) -> Any:
        base, step, vectors = values
        for i in range(tile.count):
            b.store(b.extract_value(vectors, i), pointer(b, _at(b, base, step, i), ll(tile.dtype)), align=1)
        return context.get_dummy_value()

    return signature(types.void, ADDRESS, ADDRESS, tile), codegen
