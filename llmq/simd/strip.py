"""A strip of rows times a few tokens, in registers: the inner step of a matrix product.

A strip value is a tuple of vectors, 16 rows each: rows 0..15 of token 0, rows 16..31 of token 0, then token 1. Weights
lie as vectors of 16 rows x 4 weights, the vectors of one word of four weights side by side (on Arm as `weave_i32` has
them); a token's word of four activations is broadcast from memory. Tokens lie `step` bytes apart, a constant, so that
addresses need no arithmetic.
"""

from collections.abc import Callable, Iterator
from typing import Any

from llvmlite import ir
from numba import types
from numba.core.typing.templates import signature
from numba.extending import intrinsic

import llmq.simd.arm as arm
from llmq.simd.dot import dot_full, dot_i16, dot_small, multiply_pairs
from llmq.simd.vector import (
    ADDRESS,
    F32,
    I32,
    ISA,
    NEON,
    const,
    f32x16,
    i8x64,
    i16x32,
    i32x16,
    intrinsic_of,
    literal,
    ll,
    multiply_add,
    offset_by,
    pointer,
    splat,
    u8x64,
    zeros,
)

# Four vectors of rows share each broadcast word where registers are many: loads are what bounds a product otherwise.
# Tokens at once: sums and totals of all of them must fit the registers, with the weights and a word beside.
VECTORS, TOKENS = (4, 3) if ISA == "avx512vnni" else (1, 4)
ROWS = 16 * VECTORS


@intrinsic
def strip_i32(typingctx: Any, n: Any) -> Any:
    """Zero sums of `n` (a literal) tokens."""
    tokens = literal(n)
    return zeros(i32x16, tokens * VECTORS, n) if tokens else None


@intrinsic
def strip_f32(typingctx: Any, n: Any) -> Any:
    """Zero sums of `n` (a literal) tokens, as floats."""
    tokens = literal(n)
    return zeros(f32x16, tokens * VECTORS, n) if tokens else None


def _vectors(b: Any, at: Any, t: ir.Type) -> list[Any]:
    """The vectors of a strip's rows at an address."""
    return [b.load(pointer(b, offset_by(b, at, 64 * v), t), align=64) for v in range(VECTORS)]


def _word(b: Any, x: Any, token: int, step: int, t: ir.Type) -> Any:
    return splat(b, b.load(pointer(b, offset_by(b, x, token * step), t), align=4), 16)


def _strip_op(build: Callable[..., list[Any]], arity: int, others: tuple[Any, ...] = ()) -> Any:
    """An intrinsic strip, *others, *addresses, step (a literal) -> strip; build(b, items, *values, step)."""

    def declare(typingctx: Any, strip: Any, *args: Any) -> Any:
        step = literal(args[-1])
        if step is None:
            return None
        seconds = [types.UniTuple(other, strip.count) for other in others]
        addresses = [ADDRESS] * (len(args) - 1 - len(others))

        def codegen(context: Any, b: Any, sig: Any, values: Any) -> Any:
            tuples = [[b.extract_value(v, i) for i in range(strip.count)] for v in values[: 1 + len(others)]]
            items = build(b, *tuples, *values[1 + len(others) : -1], step)
            return context.make_tuple(b, sig.return_type, items)

        return signature(strip, strip, *seconds, *addresses, args[-1]), codegen

    return intrinsic_of(declare, arity)


def _products(b: Any, count: int, w: Any, x: Any, step: int, words: range) -> Iterator[tuple[int, Any, Any]]:
    """What is multiplied: which of the `count` sums, its weights and its token's, for words of four weights in turn."""
    for k in words:
        weights = _vectors(b, offset_by(b, w, 64 * VECTORS * k), ll(u8x64))
        for token in range(count // VECTORS):
            word = b.bitcast(_word(b, offset_by(b, x, 4 * k), token, step, I32), ll(i8x64))
            for v in range(VECTORS):
                yield token * VECTORS + v, weights[v], word


def _dot_words(dot: Callable[..., Any], n: int) -> Callable[..., list[Any]]:
    """Sums of 4 * n products: weight vectors at `w`, activations at `x`."""

    def build(b: Any, sums: list[Any], w: Any, x: Any, step: int) -> list[Any]:
        if NEON:
            added = arm.strip_products(b, len(sums), w, x, step, n // 4)
            return [b.add(s, product) for s, product in zip(sums, added, strict=True)]
        for i, weights, word in _products(b, len(sums), w, x, step, range(n)):
            sums[i] = dot(b, sums[i], weights, word)
        return sums

    return build


def _dot_runs(n: int, top: int) -> Callable[..., list[Any]]:
    """The same with 16-bit sums for as long as they hold weights up to `top`; gives the sums of each run."""
    run = min(n, 32767 // (2 * 127 * top))

    def build(b: Any, count: int, w: Any, x: Any, step: int) -> list[list[Any]]:
        runs = []
        for first in range(0, n, run):
            sums: list[Any] = [None] * count
            for i, weights, word in _products(b, count, w, x, step, range(first, min(first + run, n))):
                pairs = multiply_pairs(b, weights, word)
                sums[i] = pairs if sums[i] is None else b.add(sums[i], pairs)
            runs.append(sums)
        return runs

    return build


def _twice(b: Any, scales: Any) -> Any:
    """i32 lanes with the low half in both halves, as i16."""
    low = b.and_(scales, const(ll(i32x16), [0xFFFF] * 16))
    return b.bitcast(b.or_(low, b.shl(scales, const(ll(i32x16), [16] * 16))), ll(i16x32))


def strip_add_scaled(n_weights: int, top: int) -> Any:
    """An intrinsic: totals, weights, activations, scales, step -> totals + scale * (weights . activations).

    `n_weights` (32 or 16) weights of up to `top`, and an i32 scale for each row; all in integers. Without a dot product
    of bytes the products are added in 16 bits, and the step to 32 bits is what multiplies by the scale.
    """
    words, runs = _dot_words(dot_small, n_weights // 4), _dot_runs(n_weights // 4, top)

    def build(b: Any, totals: list[Any], w: Any, x: Any, scales: Any, step: int) -> list[Any]:
        if NEON:
            return arm.add_scaled(b, totals, w, x, scales, step, n_weights // 16)
        factors = _vectors(b, scales, ll(i32x16))
        if ISA != "avx2":
            sums = words(b, [ir.Constant(ll(i32x16), None)] * len(totals), w, x, step)
            return [b.add(total, b.mul(sums[i], factors[i % VECTORS])) for i, total in enumerate(totals)]
        factors = [_twice(b, f) for f in factors]
        for sums in runs(b, len(totals), w, x, step):
            totals = [dot_i16(b, total, sums[i], factors[i % VECTORS]) for i, total in enumerate(totals)]
        return totals

    return _strip_op(build, 5)


def strip_dot32(top: int) -> Any:
    """An intrinsic: sums, weights, activations, step -> sums + weights . activations, of 32 weights of up to `top`.

    Where SIGNED, weights are any signed bytes.
    """
    words, runs = _dot_words(dot_full if top > 127 else dot_small, 8), _dot_runs(8, min(top, 127))

    def build(b: Any, sums: list[Any], w: Any, x: Any, step: int) -> list[Any]:
        if ISA != "avx2" or top > 127:
            return words(b, sums, w, x, step)
        ones = const(ll(i16x32), [1] * 32)
        for pairs in runs(b, len(sums), w, x, step):
            sums = [dot_i16(b, old, pairs[i], ones) for i, old in enumerate(sums)]
        return sums

    return _strip_op(build, 4)


@intrinsic
def strip_settle(typingctx: Any, strip: Any) -> Any:
    """Totals of `strip_add_scaled` with rows as lanes; until then their order is the processor's own."""

    def codegen(context: Any, b: Any, sig: Any, values: Any) -> Any:
        totals = [b.extract_value(values[0], i) for i in range(strip.count)]
        return context.make_tuple(b, sig.return_type, arm.settle(b, totals) if NEON else totals)

    return signature(strip, strip), codegen


def strip_offset(centre: int) -> Any:
    """An intrinsic: sums, at, step -> each token's i32 at `at`, times -centre, beside all its rows."""

    def build(b: Any, sums: list[Any], at: Any, step: int) -> list[Any]:
        factor = const(ll(i32x16), [-centre] * 16)
        tokens = [b.mul(_word(b, at, t, step, I32), factor) for t in range(len(sums) // VECTORS)]
        return [token for token in tokens for _ in range(VECTORS)]

    return _strip_op(build, 3)


def _dot_pairs(b: Any, sums: list[Any], pairs: Any, x: Any, step: int) -> list[Any]:
    rows = _vectors(b, pairs, ll(i16x32))
    if NEON:
        return [arm.dot_pair(b, s, rows[0], offset_by(b, x, t * step)) for t, s in enumerate(sums)]
    words = [b.bitcast(_word(b, x, t, step, I32), ll(i16x32)) for t in range(len(sums) // VECTORS)]
    return [dot_i16(b, s, rows[i % VECTORS], words[i // VECTORS]) for i, s in enumerate(sums)]


# sums += (pairs of i16 of each row) . (the two i16 of each token): sums, pairs, activations, step
strip_dot_pair = _strip_op(_dot_pairs, 4)


def _fma_word(b: Any, acc: list[Any], w: Any, x: Any, step: int) -> list[Any]:
    rows = _vectors(b, w, ll(f32x16))
    words = [_word(b, x, t, step, F32) for t in range(len(acc) // VECTORS)]
    return [multiply_add(b, rows[i % VECTORS], words[i // VECTORS], a) for i, a in enumerate(acc)]


# acc += (a float of each row) * (a float of each token): acc, rows, activations, step
strip_fma = _strip_op(_fma_word, 4)


def _fma_offset(b: Any, acc: list[Any], w: Any, x: Any, sums: Any, step: int) -> list[Any]:
    rows = _vectors(b, w, ll(f32x16))
    words = [
        b.fmul(b.sitofp(_word(b, sums, t, step, I32), ll(f32x16)), _word(b, x, t, step, F32))
        for t in range(len(acc) // VECTORS)
    ]
    return [multiply_add(b, rows[i % VECTORS], words[i // VECTORS], a) for i, a in enumerate(acc)]


# acc += (a float of each row) * (a float of each token) * (an i32 of each): acc, rows, activations, sums, step
strip_fma_offset = _strip_op(_fma_offset, 5)


def _fma_scaled(b: Any, acc: list[Any], sums: list[Any], w: Any, x: Any, step: int) -> list[Any]:
    rows = _vectors(b, w, ll(f32x16))
    words = [_word(b, x, t, step, F32) for t in range(len(acc) // VECTORS)]
    factors = [b.fmul(rows[i % VECTORS], words[i // VECTORS]) for i in range(len(acc))]
    return [multiply_add(b, b.sitofp(s, ll(f32x16)), f, a) for s, f, a in zip(sums, factors, acc, strict=True)]


def _fma_scaled2(b: Any, acc: list[Any], first: list[Any], second: list[Any], w: Any, x: Any, step: int) -> list[Any]:
    rows = [_vectors(b, offset_by(b, w, part * 4 * ROWS), ll(f32x16)) for part in (0, 1)]
    words = [_word(b, x, t, step, F32) for t in range(len(acc) // VECTORS)]
    out = []
    for i, old in enumerate(acc):
        value = b.fmul(b.sitofp(first[i], ll(f32x16)), rows[0][i % VECTORS])
        value = multiply_add(b, b.sitofp(second[i], ll(f32x16)), rows[1][i % VECTORS], value)
        out.append(multiply_add(b, value, words[i // VECTORS], old))
    return out


# acc += float(sums) * (a float of each row) * (a float of each token): acc, sums, rows, activations, step
strip_fma_scaled = _strip_op(_fma_scaled, 5, (i32x16,))
# the same with two kinds of sums, each with a line of floats of its own: acc, first, second, rows, activations, step
strip_fma_scaled2 = _strip_op(_fma_scaled2, 6, (i32x16, i32x16))


@intrinsic
def strip_load(typingctx: Any, strip: Any, at: Any) -> Any:
    """The strip that lies at an address as [token][ROWS]."""

    def codegen(context: Any, b: Any, sig: Any, values: Any) -> Any:
        vectors = [
            b.load(pointer(b, offset_by(b, values[1], 64 * i), ll(strip.dtype)), align=64) for i in range(strip.count)
        ]
        return context.make_tuple(b, sig.return_type, vectors)

    return signature(strip, strip, ADDRESS), codegen


@intrinsic
def strip_store(typingctx: Any, at: Any, strip: Any) -> Any:
    """Write the strip to an address as [token][ROWS]."""

    def codegen(context: Any, b: Any, _sig: Any, values: Any) -> Any:
        for i in range(strip.count):
            b.store(
                b.extract_value(values[1], i), pointer(b, offset_by(b, values[0], 64 * i), ll(strip.dtype)), align=64
            )
        return context.get_dummy_value()

    return signature(types.void, ADDRESS, strip), codegen
