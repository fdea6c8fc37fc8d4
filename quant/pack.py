"""Levels and scales to the bytes of a block; the diagrams are beside the formats in llmq.formats."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from llmq.formats import (
    IQ4_NL,
    IQ4_VALUES,
    IQ4_XS,
    Q2_K,
    Q3_K,
    Q4_0,
    Q4_1,
    Q4_K,
    Q5_0,
    Q5_1,
    Q5_K,
    Q6_K,
    Format,
)


@dataclass(frozen=True, slots=True)
class Blocks:
    """n blocks: `levels` int8 [n, block_size]; `d`, `dmin` float32 [n], exact half floats; a weight is
    d * scales * level - dmin * minima, with integers of `scales`, `minima` int8 [n, n_sub].
    """

    levels: np.ndarray
    d: np.ndarray
    dmin: np.ndarray
    scales: np.ndarray
    minima: np.ndarray


def pack(fmt: Format, blocks: Blocks) -> np.ndarray:
    """uint8 [n, block_bytes]."""
    packed = np.concatenate(PACK[fmt](blocks), axis=1)
    assert packed.shape[1] == fmt.block_bytes, fmt.name
    return packed


def _half(values: np.ndarray) -> np.ndarray:
    return values.astype("<f2").reshape(-1, 1).view(np.uint8)


def _join(fields: np.ndarray, width: int) -> np.ndarray:
    """`width`-bit fields to bytes, low bits first: uint8 [..., 8 / width, k] -> uint8 [..., k]."""
    joined = fields[..., 0, :].copy()
    for i in range(1, 8 // width):
        joined |= fields[..., i, :] << np.uint8(width * i)
    return joined


def _unsigned(levels: np.ndarray, offset: int) -> np.ndarray:
    return (levels + np.int8(offset)).view(np.uint8)


def _nibbles(levels: np.ndarray) -> np.ndarray:
    """32 levels a block to 16 bytes: q[i] in b3..b0, q[i+16] in b7..b4."""
    return _join((levels & np.uint8(15)).reshape(-1, 2, 16), 4)


def _fifth_bits(levels: np.ndarray) -> np.ndarray:
    return np.packbits(levels >> np.uint8(4), axis=1, bitorder="little")


def _q4_0(blocks: Blocks) -> list[np.ndarray]:
    return [_half(blocks.d), _nibbles(_unsigned(blocks.levels, 8))]


def _q4_1(blocks: Blocks) -> list[np.ndarray]:
    return [_half(blocks.d), _half(-blocks.dmin), _nibbles(_unsigned(blocks.levels, 0))]


def _q5_0(blocks: Blocks) -> list[np.ndarray]:
    levels = _unsigned(blocks.levels, 16)
    return [_half(blocks.d), _fifth_bits(levels), _nibbles(levels)]


def _q5_1(blocks: Blocks) -> list[np.ndarray]:
    levels = _unsigned(blocks.levels, 0)
    return [_half(blocks.d), _half(-blocks.dmin), _fifth_bits(levels), _nibbles(levels)]


# From a value of IQ4_VALUES, as a byte, to its place among them.
_IQ4_INDEX = np.zeros(256, np.uint8)
_IQ4_INDEX[IQ4_VALUES.view(np.uint8)] = np.arange(16)


def _iq4_nl(blocks: Blocks) -> list[np.ndarray]:
    return [_half(blocks.d), _nibbles(_IQ4_INDEX[_unsigned(blocks.levels, 0)])]


def _iq4_xs(blocks: Blocks) -> list[np.ndarray]:
    scales = _unsigned(blocks.scales, 32)
    low = _join((scales & np.uint8(15)).reshape(-1, 4, 2).swapaxes(1, 2), 4)
    high = _join((scales >> np.uint8(4)).reshape(-1, 2, 4).swapaxes(1, 2), 2)
    levels = _nibbles(_IQ4_INDEX[_unsigned(blocks.levels, 0)].reshape(-1, 32))
    return [_half(blocks.d), high, low, levels.reshape(-1, 128)]


def _two_bits(levels: np.ndarray) -> np.ndarray:
    """qs[64] of Q2_K and Q3_K: in each half of 128, weights l, l+32, l+64 and l+96 share byte l."""
    return _join(levels.reshape(-1, 2, 4, 32), 2).reshape(-1, 64)


def _q2_k(blocks: Blocks) -> list[np.ndarray]:
    sm = blocks.scales.view(np.uint8) | blocks.minima.view(np.uint8) << np.uint8(4)
    return [sm, _two_bits(_unsigned(blocks.levels, 0)), _half(blocks.d), _half(blocks.dmin)]


def _q3_k(blocks: Blocks) -> list[np.ndarray]:
    levels, scales = _unsigned(blocks.levels, 4), _unsigned(blocks.scales, 32)
    hmask = _join((levels >> np.uint8(2)).reshape(-1, 8, 32), 1)
    low = _join((scales & np.uint8(15)).reshape(-1, 2, 8), 4)
    high = _join((scales >> np.uint8(4)).reshape(-1, 4, 4), 2)
    return [hmask, _two_bits(levels & np.uint8(3)), low, high, _half(blocks.d)]


def _six_bits(blocks: Blocks) -> np.ndarray:
    """The 12 bytes of eight scales and eight minima of Q4_K and Q5_K."""
    scales, minima = blocks.scales.view(np.uint8), blocks.minima.view(np.uint8)
    tops = (scales[:, 4:] >> np.uint8(4), minima[:, 4:] >> np.uint8(4))
    first = scales[:, :4] | tops[0] << np.uint8(6)
    second = minima[:, :4] | tops[1] << np.uint8(6)
    third = scales[:, 4:] & np.uint8(15) | minima[:, 4:] << np.uint8(4)
    return np.concatenate([first, second, third], axis=1)


def _pairs(levels: np.ndarray) -> np.ndarray:
    """qs[128] of Q4_K and Q5_K: sub-blocks of 32 in pairs, the even one in b3..b0."""
    return _join((levels & np.uint8(15)).reshape(-1, 4, 2, 32), 4).reshape(-1, 128)


def _q4_k(blocks: Blocks) -> list[np.ndarray]:
    levels = _pairs(_unsigned(blocks.levels, 0))
    return [_half(blocks.d), _half(blocks.dmin), _six_bits(blocks), levels]


def _q5_k(blocks: Blocks) -> list[np.ndarray]:
    levels = _unsigned(blocks.levels, 0)
    high = _join((levels >> np.uint8(4)).reshape(-1, 8, 32), 1)
    return [_half(blocks.d), _half(blocks.dmin), _six_bits(blocks), high, _pairs(levels)]


def _q6_k(blocks: Blocks) -> list[np.ndarray]:
    levels = _unsigned(blocks.levels, 32)
    low = _join((levels & np.uint8(15)).reshape(-1, 2, 2, 64), 4).reshape(-1, 128)
    high = _join((levels >> np.uint8(4)).reshape(-1, 2, 4, 32), 2).reshape(-1, 64)
    return [low, high, blocks.scales.view(np.uint8), _half(blocks.d)]


PACK: dict[Format, Callable[[Blocks], list[np.ndarray]]] = {
    Q4_0: _q4_0, Q4_1: _q4_1, Q5_0: _q5_0, Q5_1: _q5_1, IQ4_NL: _iq4_nl, IQ4_XS: _iq4_xs,
    Q2_K: _q2_k, Q3_K: _q3_k, Q4_K: _q4_k, Q5_K: _q5_k, Q6_K: _q6_k,
}  # fmt: skip
