"""Block formats of GGUF tensors: ids, sizes, bit layout, and a NumPy dequantize that is the executable spec.

Weights run along a row in blocks of `block_size`; a block is `block_bytes` bytes, little-endian, and a row is a whole
number of blocks. In the diagrams one cell is one field, `d`, `m` and `dmin` are IEEE half floats, and `b3..b0` are bits
of a byte from high to low. To add a format: a constant, a diagram, a function, an entry in DEQUANTIZE.

Layouts and names: ggml, `ggml-common.h` and `ggml-quants.c`.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, slots=True)
class Format:
    """One tensor type: its ggml id, and how many weights share a block of how many bytes."""

    name: str
    id: int
    block_size: int
    block_bytes: int


F32 = Format("F32", 0, 1, 4)
F16 = Format("F16", 1, 1, 2)
Q4_0 = Format("Q4_0", 2, 32, 18)
Q4_1 = Format("Q4_1", 3, 32, 20)
Q5_0 = Format("Q5_0", 6, 32, 22)
Q5_1 = Format("Q5_1", 7, 32, 24)
Q8_0 = Format("Q8_0", 8, 32, 34)
Q2_K = Format("Q2_K", 10, 256, 84)
Q3_K = Format("Q3_K", 11, 256, 110)
Q4_K = Format("Q4_K", 12, 256, 144)
Q5_K = Format("Q5_K", 13, 256, 176)
Q6_K = Format("Q6_K", 14, 256, 210)
IQ4_NL = Format("IQ4_NL", 20, 32, 18)
IQ4_XS = Format("IQ4_XS", 23, 256, 136)
BF16 = Format("BF16", 30, 1, 2)

# The ggml types that llmq does not read, so that they can be refused by name.
GGML_NAMES = {
    4: "Q4_2", 5: "Q4_3", 9: "Q8_1", 15: "Q8_K", 16: "IQ2_XXS", 17: "IQ2_XS", 18: "IQ3_XXS", 19: "IQ1_S", 21: "IQ3_S",
    22: "IQ2_S", 24: "I8", 25: "I16", 26: "I32", 27: "I64", 28: "F64", 29: "IQ1_M", 31: "Q4_0_4_4", 32: "Q4_0_4_8",
    33: "Q4_0_8_8", 34: "TQ1_0", 35: "TQ2_0", 36: "IQ4_NL_4_4", 37: "IQ4_NL_4_8", 38: "IQ4_NL_8_8", 39: "MXFP4",
    40: "NVFP4", 41: "Q1_0",
}  # fmt: skip


def row_bytes(fmt: Format, n_cols: int) -> int:
    """Bytes of one row of `n_cols` weights."""
    assert n_cols % fmt.block_size == 0, (fmt.name, n_cols)
    return n_cols // fmt.block_size * fmt.block_bytes


def dequantize(fmt: Format, raw: np.ndarray) -> np.ndarray:
    """Weights of whole rows: uint8 [..., row_bytes] -> a new float32 [..., n_cols].

    Products and sums are done in float32 in ggml's order, so the bits agree with it. A damaged scale (infinite, NaN)
    gives infinite or NaN weights, without a warning.
    """
    assert raw.dtype == np.uint8, raw.dtype
    assert raw.shape[-1] % fmt.block_bytes == 0, (fmt.name, raw.shape)
    blocks = np.ascontiguousarray(raw).reshape(-1, fmt.block_bytes)
    with np.errstate(over="ignore", invalid="ignore"):
        weights = DEQUANTIZE[fmt](blocks)
    n_cols = raw.shape[-1] // fmt.block_bytes * fmt.block_size
    return weights.reshape(*raw.shape[:-1], n_cols)


def _half(blocks: np.ndarray, at: int) -> np.ndarray:
    """The half float at byte `at` of each block, as float32 [n, 1]."""
    return np.ascontiguousarray(blocks[:, at : at + 2]).view("<f2").astype(np.float32)


def _fields(packed: np.ndarray, width: int) -> np.ndarray:
    """Splits bytes into `width`-bit fields, low bits first: uint8 [..., k] -> uint8 [..., 8 / width, k]."""
    shifts = np.arange(0, 8, width, dtype=np.uint8).reshape(-1, 1)
    return (packed[..., None, :] >> shifts) & np.uint8((1 << width) - 1)


# F32, F16: one IEEE number. BF16: the upper half of a float32.
def _f32(blocks: np.ndarray) -> np.ndarray:
    return blocks.view("<f4").astype(np.float32)


def _f16(blocks: np.ndarray) -> np.ndarray:
    return blocks.view("<f2").astype(np.float32)


def _bf16(blocks: np.ndarray) -> np.ndarray:
    return (blocks.view("<u2").astype(np.uint32) << np.uint32(16)).view(np.float32)


# | d | int8 q[32] |                                                         w[i] = d * q[i]
def _q8_0(blocks: np.ndarray) -> np.ndarray:
    return _half(blocks, 0) * blocks[:, 2:].view(np.int8).astype(np.float32)


# | d | qs[16] |        qs[i] = q[i+16] b7..b4, q[i] b3..b0                 w[i] = d * (q[i] - 8)
def _q4_0(blocks: np.ndarray) -> np.ndarray:
    q = _fields(blocks[:, 2:], 4).reshape(-1, 32).view(np.int8) - np.int8(8)
    return _half(blocks, 0) * q.astype(np.float32)


# | d | m | qs[16] |    qs as in Q4_0                                       w[i] = d * q[i] + m
def _q4_1(blocks: np.ndarray) -> np.ndarray:
    q = _fields(blocks[:, 4:], 4).reshape(-1, 32).astype(np.float32)
    return _half(blocks, 0) * q + _half(blocks, 2)


def _five_bits(high: np.ndarray, low: np.ndarray) -> np.ndarray:
    """Q5_0 and Q5_1: bit i of the 32-bit number `high` is bit 4 of q[i]; `low` is packed as in Q4_0."""
    fifth = np.unpackbits(high, axis=1, bitorder="little")
    return _fields(low, 4).reshape(-1, 32) | fifth << np.uint8(4)


# | d | qh[4] | qs[16] |                                                    w[i] = d * (q[i] - 16)
def _q5_0(blocks: np.ndarray) -> np.ndarray:
    q = _five_bits(blocks[:, 2:6], blocks[:, 6:]).view(np.int8) - np.int8(16)
    return _half(blocks, 0) * q.astype(np.float32)


# | d | m | qh[4] | qs[16] |                                                w[i] = d * q[i] + m
def _q5_1(blocks: np.ndarray) -> np.ndarray:
    q = _five_bits(blocks[:, 4:8], blocks[:, 8:]).astype(np.float32)
    return _half(blocks, 0) * q + _half(blocks, 2)


# What the four bits of IQ4_NL and IQ4_XS stand for: closer together where weights are many.
IQ4_VALUES = np.array([-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113], np.int8)


# | d | qs[16] |        qs as in Q4_0                                       w[i] = d * IQ4_VALUES[q[i]]
def _iq4_nl(blocks: np.ndarray) -> np.ndarray:
    q = _fields(blocks[:, 2:], 4).reshape(-1, 32)
    return _half(blocks, 0) * IQ4_VALUES[q].astype(np.float32)


# | d | sh[2] | sl[4] | qs[128] |    sub-block j of 32 weights has qs[16j ..], packed as in Q4_0
# sc[j]: b3..b0 in sl[j/2], the lower half for even j; b5 b4 are bits 2j+1 and 2j of the number sh
#                                                               w[i] = (d * (sc[i/32] - 32)) * IQ4_VALUES[q[i]]
def _iq4_xs(blocks: np.ndarray) -> np.ndarray:
    low = _fields(blocks[:, 4:8], 4).swapaxes(1, 2).reshape(-1, 8)
    high = _fields(blocks[:, 2:4], 2).swapaxes(1, 2).reshape(-1, 8)
    scale = _half(blocks, 0) * ((low | high << np.uint8(4)).view(np.int8) - np.int8(32)).astype(np.float32)
    q = _fields(blocks[:, 8:].reshape(-1, 8, 16), 4).reshape(-1, 8, 32)
    return scale[:, :, None] * IQ4_VALUES[q].astype(np.float32)


# | sm[16] | qs[64] | d | dmin |     sm[j] = m[j] b3..b0 in b7..b4, sc[j] b3..b0 in b3..b0,  j = i/16
# Each half h of 128 weights: qs[32h + l] = q[l+96], q[l+64], q[l+32], q[l], two bits each,   l = 0..31
#                                                               w[i] = (d * sc[j]) * q[i] - (dmin * m[j])
def _q2_k(blocks: np.ndarray) -> np.ndarray:
    q = _fields(blocks[:, 16:80].reshape(-1, 2, 32), 2).reshape(-1, 16, 16)
    scale = _half(blocks, 80) * (blocks[:, :16] & 15).astype(np.float32)
    minimum = _half(blocks, 82) * (blocks[:, :16] >> 4).astype(np.float32)
    return scale[:, :, None] * q.astype(np.float32) - minimum[:, :, None]


# | hmask[32] | qs[64] | scales[12] | d |      qs as in Q2_K; bit j of hmask[l] is bit 2 of weight 32j + l
# sc[j], j = 0..15: b3..b0 in scales[j], the lower half, for j < 8, else in scales[j-8], the upper half;
#                   b5 b4 in scales[8 + j%4], bits 2(j/4)+1 and 2(j/4)
#                                                               w[i] = (d * (sc[i/16] - 32)) * (q[i] - 4)
def _q3_k(blocks: np.ndarray) -> np.ndarray:
    low = _fields(blocks[:, 32:96].reshape(-1, 2, 32), 2).reshape(-1, 256)
    third = _fields(blocks[:, 0:32], 1).reshape(-1, 256)
    q = (low | third << np.uint8(2)).view(np.int8) - np.int8(4)
    scales = _fields(blocks[:, 96:104], 4).reshape(-1, 16) | _fields(blocks[:, 104:108], 2).reshape(-1, 16) << np.uint8(
        4
    )
    scale = _half(blocks, 108) * (scales.view(np.int8) - np.int8(32)).astype(np.float32)
    return scale[:, :, None] * q.reshape(-1, 16, 16).astype(np.float32)


def _six_bit_scales(packed: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Q4_K and Q5_K: eight 6-bit scales and eight 6-bit minima from 12 bytes, as uint8 [n, 8] each.

    byte      b7 b6           b5 b4    b3..b0
    j         sc[j+4] b5 b4   sc[j] b5 .. b0           j = 0..3
    j + 4     m[j+4]  b5 b4   m[j]  b5 .. b0
    j + 8     m[j+4]  b3 .. b0  |  sc[j+4] b3 .. b0
    """
    first, second, last = packed[:, 0:4], packed[:, 4:8], packed[:, 8:12]
    scales = np.concatenate([first & 63, last & 15 | first >> 6 << 4], axis=1)
    minima = np.concatenate([second & 63, last >> 4 | second >> 6 << 4], axis=1)
    return scales, minima


def _scaled(blocks: np.ndarray, q: np.ndarray) -> np.ndarray:
    """Q4_K and Q5_K: w = (d * sc[j]) * q - (dmin * m[j]) for sub-block j; q is uint8 [n, 8, 32]."""
    scales, minima = _six_bit_scales(blocks[:, 4:16])
    scale = _half(blocks, 0) * scales.astype(np.float32)
    minimum = _half(blocks, 2) * minima.astype(np.float32)
    return scale[:, :, None] * q.astype(np.float32) - minimum[:, :, None]


# | d | dmin | scales[12] | qs[128] |
# qs: 4 runs of 32 bytes; run c holds sub-block 2c in b3..b0 and sub-block 2c+1 in b7..b4.
def _q4_k(blocks: np.ndarray) -> np.ndarray:
    q = _fields(blocks[:, 16:].reshape(-1, 4, 32), 4).reshape(-1, 8, 32)
    return _scaled(blocks, q)


# | d | dmin | scales[12] | qh[32] | qs[128] |
# qs as in Q4_K; bit j of qh[l] is bit 4 of weight l of sub-block j.
def _q5_k(blocks: np.ndarray) -> np.ndarray:
    low = _fields(blocks[:, 48:].reshape(-1, 4, 32), 4).reshape(-1, 8, 32)
    return _scaled(blocks, low | _fields(blocks[:, 16:48], 1) << np.uint8(4))


# | ql[128] | qh[64] | int8 sc[16] | d |                                    w[i] = (d * sc[i/16]) * (q[i] - 32)
# Each half h of 128 weights: ql[64h + l] = q[l+64] b3..b0 in b7..b4, q[l] b3..b0 in b3..b0,  l = 0..63
#                             qh[32h + l] = b5 b4 of q[l+96], q[l+64], q[l+32], q[l],         l = 0..31
def _q6_k(blocks: np.ndarray) -> np.ndarray:
    low = _fields(blocks[:, 0:128].reshape(-1, 2, 64), 4).reshape(-1, 256)
    high = _fields(blocks[:, 128:192].reshape(-1, 2, 32), 2).reshape(-1, 256)
    q = (low | high << np.uint8(4)).view(np.int8) - np.int8(32)
    scale = _half(blocks, 208) * blocks[:, 192:208].view(np.int8).astype(np.float32)
    return scale[:, :, None] * q.reshape(-1, 16, 16).astype(np.float32)


DEQUANTIZE: dict[Format, Callable[[np.ndarray], np.ndarray]] = {
    F32: _f32, F16: _f16, BF16: _bf16, Q8_0: _q8_0, Q4_0: _q4_0, Q4_1: _q4_1, Q5_0: _q5_0, Q5_1: _q5_1,
    Q2_K: _q2_k, Q3_K: _q3_k, Q4_K: _q4_k, Q5_K: _q5_k, Q6_K: _q6_k, IQ4_NL: _iq4_nl, IQ4_XS: _iq4_xs,
}  # fmt: skip

FORMATS = {fmt.id: fmt for fmt in DEQUANTIZE}
