"""A grid of sums in registers: a few vectors times a few words, the inner step of attention.

A grid is a tuple of vectors: item u * n + q belongs to vector u and word q. The n words lie side by side in memory, so
that their addresses need no arithmetic.
"""

from typing import Any

from llvmlite import ir
from numba import types
from numba.core.typing.templates import signature
from numba.extending import intrinsic

from llmq.simd.dot import dot_full, dot_small
from llmq.simd.half import widen
from llmq.simd.vector import (
    ADDRESS,
    F32,
    I16,
    I32,
    I64,
    SIGNED,
    Vec,
    const,
    f32x16,
    i8x16,
    i8x64,
    i32x16,
    intrinsic_of,
    literal,
    ll,
    multiply_add,
    offset_by,
    pointer,
    splat,
    u8x64,
    u16x16,
    zeros,
)


def _load(b: Any, at: Any, t: ir.Type) -> Any:
    return b.load(pointer(b, at, t), align=1)


def _items(b: Any, value: Any, n: int) -> list[Any]:
    return [b.extract_value(value, i) for i in range(n)]


@intrinsic
def grid_f32(typingctx: Any, n: Any) -> Any:
    """A grid of `n` (a literal) zeros."""
    count = literal(n)
    return zeros(f32x16, count, n) if count else None


def _load_each(vec: Vec, build: Any) -> Any:
    """An intrinsic: addresses (a tuple), offset -> a vector from each address + offset."""

    def declare(typingctx: Any, addresses: Any, offset: Any) -> Any:
        def codegen(context: Any, b: Any, sig: Any, values: Any) -> Any:
            vectors = [build(b, b.add(at, values[1])) for at in _items(b, values[0], addresses.count)]
            return context.make_tuple(b, sig.return_type, vectors)

        return signature(types.UniTuple(vec, addresses.count), addresses, ADDRESS), codegen

    return intrinsic_of(declare, 2)


load_f16_each = _load_each(f32x16, lambda b, at: widen(b, _load(b, at, ll(u16x16))))
# Signed bytes, each plus BIAS, as products of bytes want them.
BIAS = 0 if SIGNED else 128
load_i8_each = _load_each(u8x64, lambda b, at: b.xor(_load(b, at, ll(u8x64)), const(ll(u8x64), [BIAS] * 64)))


def _load_row(build: Any) -> Any:
    """An intrinsic: address of a row, i, skip, n (literals) -> n vectors: 16 values each, from value i + 16 skip on.

    i is a multiple of 32.
    """

    def declare(typingctx: Any, at: Any, first: Any, skip: Any, n: Any) -> Any:
        start, count = literal(skip), literal(n)
        if start is None or count is None:
            return None

        def codegen(context: Any, b: Any, sig: Any, values: Any) -> Any:
            vectors = [build(b, values[0], values[1], start + u) for u in range(count)]
            return context.make_tuple(b, sig.return_type, vectors)

        return signature(types.UniTuple(f32x16, count), ADDRESS, ADDRESS, skip, n), codegen

    return intrinsic_of(declare, 4)


def _f16_vector(b: Any, row: Any, i: Any, u: int) -> Any:
    return widen(b, _load(b, offset_by(b, b.add(row, b.shl(i, ir.Constant(I64, 1))), 32 * u), ll(u16x16)))


def _q8_vector(b: Any, row: Any, i: Any, u: int) -> Any:
    """Sixteen values of a row of Q8_0 blocks: half d, then 32 signed bytes."""
    block = offset_by(b, b.add(row, b.mul(b.lshr(i, ir.Constant(I64, 5)), ir.Constant(I64, 34))), u // 2 * 34)
    d = widen(b, _load(b, block, I16))
    bytes16 = _load(b, offset_by(b, block, 2 + u % 2 * 16), ll(i8x16))
    return b.fmul(b.sitofp(b.sext(bytes16, ll(i32x16)), ll(f32x16)), splat(b, d, 16))


load_f16_row, load_q8_row = _load_row(_f16_vector), _load_row(_q8_vector)


@intrinsic
def grid_fma(typingctx: Any, grid: Any, vectors: Any, words: Any, step: Any) -> Any:
    """grid[u][q] += vectors[u] * the float at `words + q * step` (`step` is a literal)."""
    apart = literal(step)
    if apart is None:
        return None

    def codegen(context: Any, b: Any, sig: Any, values: Any) -> Any:
        n = grid.count // vectors.count
        xs = _items(b, values[1], vectors.count)
        ws = [splat(b, _load(b, offset_by(b, values[2], apart * q), F32), 16) for q in range(n)]
        acc = _items(b, values[0], grid.count)
        items = [multiply_add(b, xs[k // n], ws[k % n], a) for k, a in enumerate(acc)]
        return context.make_tuple(b, sig.return_type, items)

    return signature(grid, grid, vectors, ADDRESS, step), codegen


@intrinsic
def grid_start(typingctx: Any, vectors: Any, n: Any, words: Any) -> Any:
    """A grid of i32 with the integers at `words` in the lanes, for as many vectors as there are in a tuple."""
    count = literal(n)
    if count is None:
        return None

    def codegen(context: Any, b: Any, sig: Any, values: Any) -> Any:
        ws = [splat(b, _load(b, offset_by(b, values[2], 4 * q), I32), 16) for q in range(count)]
        return context.make_tuple(b, sig.return_type, ws * vectors.count)

    return signature(types.UniTuple(i32x16, count * vectors.count), vectors, n, ADDRESS), codegen


@intrinsic
def grid_dot(typingctx: Any, grid: Any, vectors: Any, words: Any) -> Any:
    """grid[u][q] += bytes of vectors[u] (signed where SIGNED) . the four signed bytes `q` at `words`, by fours."""

    def codegen(context: Any, b: Any, sig: Any, values: Any) -> Any:
        n = grid.count // vectors.count
        xs = _items(b, values[1], vectors.count)
        ws = [b.bitcast(splat(b, _load(b, offset_by(b, values[2], 4 * q), I32), 16), ll(i8x64)) for q in range(n)]
        dot = dot_small if SIGNED else dot_full
        items = [dot(b, a, xs[k // n], ws[k % n]) for k, a in enumerate(_items(b, values[0], grid.count))]
        return context.make_tuple(b, sig.return_type, items)

    return signature(grid, grid, vectors, ADDRESS), codegen


@intrinsic
def grid_add_scaled(typingctx: Any, grid: Any, sums: Any, scales: Any, words: Any) -> Any:
    """grid[u][q] += float(sums[u][q]) * (scales[u] * the float `q` at `words`)."""

    def codegen(context: Any, b: Any, sig: Any, values: Any) -> Any:
        n = grid.count // scales.count
        ds = _items(b, values[2], scales.count)
        ws = [splat(b, _load(b, offset_by(b, values[3], 4 * q), F32), 16) for q in range(n)]
        acc, parts = _items(b, values[0], grid.count), _items(b, values[1], grid.count)
        items = [
            multiply_add(b, b.sitofp(parts[k], ll(f32x16)), b.fmul(ds[k // n], ws[k % n]), a) for k, a in enumerate(acc)
        ]
        return context.make_tuple(b, sig.return_type, items)

    return signature(grid, grid, sums, scales, ADDRESS), codegen


@intrinsic
def grid_load(typingctx: Any, n: Any, m: Any, at: Any, step: Any) -> Any:
    """A grid of `m` vectors (side by side) for each of `n` words (`step` bytes apart); `n` and `m` are literals."""
    words, vectors = literal(n), literal(m)
    if words is None or vectors is None:
        return None

    def codegen(context: Any, b: Any, sig: Any, values: Any) -> Any:
        rows = [b.add(values[2], b.mul(values[3], ir.Constant(I64, q))) for q in range(words)]
        items = [_load(b, offset_by(b, rows[q], 64 * u), ll(f32x16)) for u in range(vectors) for q in range(words)]
        return context.make_tuple(b, sig.return_type, items)

    return signature(types.UniTuple(f32x16, words * vectors), n, m, ADDRESS, ADDRESS), codegen


@intrinsic
def grid_store(typingctx: Any, at: Any, step: Any, n: Any, grid: Any) -> Any:
    """Write a grid of `n` (a literal) words: vectors side by side, words `step` bytes apart."""
    words = literal(n)
    if words is None:
        return None

    def codegen(context: Any, b: Any, _sig: Any, values: Any) -> Any:
        rows = [b.add(values[0], b.mul(values[1], ir.Constant(I64, q))) for q in range(words)]
        for k, item in enumerate(_items(b, values[3], grid.count)):
            b.store(item, pointer(b, offset_by(b, rows[k % words], 64 * (k // words)), ll(f32x16)), align=1)
        return context.get_dummy_value()

    return signature(types.void, ADDRESS, ADDRESS, n, grid), codegen


@intrinsic
def grid_scale(typingctx: Any, grid: Any, n: Any, words: Any) -> Any:
    """grid[u][q] *= the float `q` at `words`, of `n` (a literal)."""
    count = literal(n)
    if count is None:
        return None

    def codegen(context: Any, b: Any, sig: Any, values: Any) -> Any:
        ws = [splat(b, _load(b, offset_by(b, values[2], 4 * q), F32), 16) for q in range(count)]
        items = [b.fmul(a, ws[k % count]) for k, a in enumerate(_items(b, values[0], grid.count))]
        return context.make_tuple(b, sig.return_type, items)

    return signature(grid, grid, n, ADDRESS), codegen
