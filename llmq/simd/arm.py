"""Arm: dot products of bytes in registers of 16 bytes, by `sdot`, `smmla` or what the first Armv8 has.

A vector of 16 rows or 64 bytes takes four of the 32 registers. A strip does four rows of all its tokens before the next
four: then totals and activations of four tokens stay in registers, with one sum and a few weights beside them.
"""

from collections.abc import Iterator, Sequence
from typing import Any

from llvmlite import ir

from llmq.simd.vector import (
    I8,
    I16,
    I32,
    ISA,
    call_intrinsic,
    concat,
    multiply_add,
    offset_by,
    pointer,
    shuffle,
    slices,
    splat,
)

BYTES, HALVES, WORDS = ir.VectorType(I8, 16), ir.VectorType(I16, 8), ir.VectorType(I32, 4)
ZERO = ir.Constant(WORDS, None)
BLOCKS = ISA == "i8mm"  # products of two rows and two tokens in one instruction


def sdot(b: Any, acc: Any, x: Any, y: Any) -> Any:
    """acc[i] += x[4i]*y[4i] + ... + x[4i+3]*y[4i+3], 16 signed bytes each, those of y from -127 to 127."""
    if ISA != "neon":
        return call_intrinsic(b, "llvm.aarch64.neon.sdot.v4i32.v16i8", WORDS, acc, x, y)
    halves = zip(slices(b, x, 2), slices(b, y, 2), strict=True)
    low, high = (b.mul(b.sext(u, HALVES), b.sext(v, HALVES)) for u, v in halves)
    pairs = call_intrinsic(b, "llvm.aarch64.neon.addp.v8i16", HALVES, low, high)  # 2 * 128 * 127 fits
    return b.add(acc, call_intrinsic(b, "llvm.aarch64.neon.saddlp.v4i32.v8i16", WORDS, pairs))


def smmla(b: Any, acc: Any, x: Any, y: Any) -> Any:
    """The 2x2 block acc += two rows of eight bytes x . two rows of eight bytes y."""
    return call_intrinsic(b, "llvm.aarch64.neon.smmla.v4i32.v16i8", WORDS, acc, x, y)


def _sixteens(b: Any, acc: Any, *vectors: Any) -> Iterator[tuple[Any, ...]]:
    """Registers of `acc` (i32) and of what stands beside it, side by side."""
    parts = acc.type.count // 4
    return zip(*(slices(b, v, parts) for v in (acc, *vectors)), strict=True)


def dot(b: Any, acc: Any, u: Any, s: Any) -> Any:
    """acc[i] += the product of bytes 4i to 4i+3."""
    return concat(b, [sdot(b, *registers) for registers in _sixteens(b, acc, u, s)])


def dot_scaled(b: Any, acc: Any, u: Any, s: Any, scales: Any) -> Any:
    """acc[i] += scales[i] * the product of bytes 4i to 4i+3."""
    registers = _sixteens(b, acc, u, s, scales)
    return concat(b, [b.add(a, b.mul(sdot(b, ZERO, x, y), scale)) for a, x, y, scale in registers])


def sum_scaled(b: Any, acc: Any, u: Any, s: Any, scales: Any, span: int) -> Any:
    """`dot_scaled` with `span` weights (16 or 32) to a scale and all sums in the lower eight lanes.

    They are to be added up later, and so take two registers instead of four.
    """
    totals, together = slices(b, acc, 4), span // 16
    pieces = list(zip(slices(b, u, 4), slices(b, s, 4), strict=True))
    for i, scale in enumerate(slices(b, scales, 4)[::together]):
        product = ZERO
        for x, y in pieces[i * together : (i + 1) * together]:
            product = sdot(b, product, x, y)
        totals[i % 2] = b.add(totals[i % 2], b.mul(product, scale))
    return concat(b, totals)


def add_blocks(b: Any, acc: Any, sums: Any, factors: Any, first: int) -> Any:
    """acc (eight lanes) += sums of two blocks * lanes `first` and `first + 1` of the factors."""
    totals, parts = slices(b, acc, 2), slices(b, sums, 4)
    for i in range(2):
        block = b.sitofp(b.add(parts[2 * i], parts[2 * i + 1]), totals[i].type)
        factor = shuffle(b, factors, factors, [first + i] * 4)
        totals[i] = multiply_add(b, block, factor, totals[i])
    return concat(b, totals)


def widen(b: Any, scales: Any) -> Any:
    """Sixteen i16 as i32, with the other half of each word, 0, added: LLVM would widen each again where it is used."""
    words = slices(b, b.zext(scales, ir.VectorType(I32, 16)), 4)
    name = "llvm.aarch64.neon.saddlp.v4i32.v8i16"
    return concat(b, [call_intrinsic(b, name, WORDS, b.bitcast(four, HALVES)) for four in words])


def dot_i16(b: Any, acc: Any, x: Any, y: Any) -> Any:
    """Products of i16 lanes, added to `acc` in any order: only the total counts."""
    wide = ir.VectorType(I32, x.type.count)
    for part in slices(b, b.mul(b.sext(x, wide), b.sext(y, wide)), 2):
        acc = b.add(acc, part)
    return acc


def dot_pair(b: Any, acc: Any, x: Any, at: Any) -> Any:
    """acc[i] += x[2i] * (the i16 at `at`) + x[2i+1] * (the next one)."""
    both = b.load(pointer(b, at, ir.VectorType(I16, 2)), align=4)
    wide = ir.VectorType(I32, 16)
    for k in range(2):
        factor = b.sext(splat(b, b.extract_element(both, ir.Constant(I32, k)), 16), wide)
        acc = b.add(acc, b.mul(b.sext(shuffle(b, x, x, range(k, 32, 2)), wide), factor))
    return acc


def _registers(b: Any, at: Any, t: ir.Type, n: int) -> list[Any]:
    return [b.load(pointer(b, offset_by(b, at, 16 * i), t), align=1) for i in range(n)]


def _both(b: Any, x: Any, y: Any, low: Sequence[int], high: Sequence[int]) -> tuple[Any, Any]:
    return shuffle(b, x, y, low), shuffle(b, x, y, high)


def _halves(b: Any, x: Any, y: Any) -> tuple[Any, Any]:
    """The low halves of both, and the high ones."""
    return _both(b, x, y, (0, 1, 4, 5), (2, 3, 6, 7))


def _weave_pairs(b: Any, v: Sequence[Any]) -> list[Any]:
    """Four rows of 16 weights to registers of two rows and 8 weights."""
    return [*_halves(b, v[0], v[1]), *_halves(b, v[2], v[3])]


def _weave_words(b: Any, v: Sequence[Any]) -> list[Any]:
    """Four rows of 16 weights to registers of four rows and 4 weights."""
    (even, odd), (even2, odd2) = (_both(b, v[i], v[i + 1], (0, 4, 2, 6), (1, 5, 3, 7)) for i in (0, 2))
    (first, third), (second, fourth) = _halves(b, even, even2), _halves(b, odd, odd2)
    return [first, second, third, fourth]


def weave(b: Any, rows: Sequence[Any]) -> list[Any]:
    """Sixteen rows of 64 weights (i32x16 each) in the order that products read them: [16 weights][4 rows]."""
    parts = [slices(b, row, 4) for row in rows]
    quarters = [[parts[row + i][block] for i in range(4)] for block in range(4) for row in range(0, 16, 4)]
    return [concat(b, _weave_pairs(b, four) if BLOCKS else _weave_words(b, four)) for four in quarters]


def _word_products(b: Any, acc: list[Any], weights: list[Any], tokens: list[Any]) -> None:
    """acc[token] += four rows of 16 weights . token."""
    for k, four_rows in enumerate(weights):
        for t, token in enumerate(tokens):
            acc[t] = sdot(b, acc[t], four_rows, b.bitcast(shuffle(b, token, token, [k] * 4), BYTES))


def _pair_products(b: Any, acc: list[Any], weights: list[Any], tokens: list[Any]) -> None:
    """acc[2i] += the first two rows . tokens 2i and 2i + 1, acc[2i + 1] += the other two."""
    for i in range(0, len(tokens), 2):
        for k, two_tokens in enumerate(_halves(b, tokens[i], tokens[i + 1])):
            for half in (0, 1):
                acc[i + half] = smmla(b, acc[i + half], weights[2 * half + k], b.bitcast(two_tokens, BYTES))


def _products(b: Any, n: int, w: Any, x: Any, step: int, n_blocks: int) -> Iterator[list[Any]]:
    """Woven weights, 16 * n_blocks of 16 rows at `w`, times `n` tokens: for each four rows, `n` registers of sums.

    A register holds the sums of one token, or (BLOCKS) of two tokens and two rows.
    """
    tokens = [_registers(b, offset_by(b, x, step * t), WORDS, n_blocks) for t in range(n)]
    multiply = _pair_products if BLOCKS else _word_products
    for quarter in range(4):
        acc = [ZERO] * n
        for block in range(n_blocks):
            weights = _registers(b, offset_by(b, w, 256 * block + 64 * quarter), BYTES, 4)
            multiply(b, acc, weights, [token[block] for token in tokens])
        yield acc


def strip_products(b: Any, n: int, w: Any, x: Any, step: int, n_blocks: int) -> list[Any]:
    """Woven weights, 16 * n_blocks of 16 rows at `w`, times `n` tokens: a vector of 16 rows for each."""
    sums = zip(*_products(b, n, w, x, step, n_blocks), strict=True)
    return settle(b, [concat(b, list(quarters)) for quarters in sums])


def add_scaled(b: Any, totals: Sequence[Any], w: Any, x: Any, scales: Any, step: int, n_blocks: int) -> list[Any]:
    """totals += products * the 16 i32 at `scales`; with BLOCKS a total holds what `settle` sorts by tokens."""
    parts = [slices(b, total, 4) for total in totals]
    for quarter, sums in enumerate(_products(b, len(parts), w, x, step, n_blocks)):
        scale = b.load(pointer(b, offset_by(b, scales, 16 * quarter), WORDS), align=16)
        pair = _both(b, scale, scale, (0, 0, 1, 1), (2, 2, 3, 3)) if BLOCKS else (scale, scale)
        for t, value in enumerate(sums):
            parts[t][quarter] = b.add(parts[t][quarter], b.mul(value, pair[t % 2]))
    return [concat(b, part) for part in parts]


def settle(b: Any, totals: Sequence[Any]) -> list[Any]:
    """Totals of `add_scaled`, as a vector of 16 rows for each token."""
    if not BLOCKS:
        return list(totals)
    settled = []
    for two in zip(totals[::2], totals[1::2], strict=True):
        pairs = zip(*(slices(b, total, 4) for total in two), strict=True)
        quarters = [_both(b, x, y, (0, 2, 4, 6), (1, 3, 5, 7)) for x, y in pairs]
        settled += [concat(b, list(token)) for token in zip(*quarters, strict=True)]
    return settled
