"""Formats: NumPy dequantize against the gguf package on random bytes, and against blocks worked out by hand."""

import gguf
import numpy as np
import pytest

from llmq import formats
from llmq.formats import FORMATS, GGML_NAMES, Format, dequantize, row_bytes

ALL = pytest.mark.parametrize("fmt", FORMATS.values(), ids=lambda fmt: fmt.name)


def half(value: float) -> bytes:
    return np.float16(value).tobytes()


def weights(fmt: Format, block: bytes) -> list[float]:
    assert len(block) == fmt.block_bytes
    return dequantize(fmt, np.frombuffer(block, np.uint8)).tolist()


@ALL
def test_sizes_and_ids_agree_with_gguf(fmt: Format) -> None:
    theirs = gguf.GGMLQuantizationType[fmt.name]
    assert fmt.id == theirs.value
    assert (fmt.block_size, fmt.block_bytes) == gguf.GGML_QUANT_SIZES[theirs]
    assert row_bytes(fmt, 512) == 512 // fmt.block_size * fmt.block_bytes


def test_every_ggml_type_has_a_name() -> None:
    ours = {fmt.id: fmt.name for fmt in FORMATS.values()} | GGML_NAMES
    assert len(ours) == len(FORMATS) + len(GGML_NAMES), "a type is both readable and refused"
    theirs = {t.value: t.name for t in gguf.GGMLQuantizationType if t.value <= max(ours)}
    assert theirs.items() <= ours.items()


@ALL
def test_dequantize_is_bit_exact_on_random_bytes(fmt: Format) -> None:
    rng = np.random.default_rng(7)
    raw = rng.integers(0, 256, (3, 40, row_bytes(fmt, 512)), dtype=np.uint8)
    with np.errstate(all="ignore"):
        theirs = gguf.dequantize(raw, gguf.GGMLQuantizationType(fmt.id))
    ours = dequantize(fmt, raw)
    assert ours.dtype == np.float32
    assert ours.shape == (3, 40, 512)
    nan = np.isnan(theirs)
    np.testing.assert_array_equal(np.isnan(ours), nan)
    np.testing.assert_array_equal(ours.view(np.uint32)[~nan], theirs.view(np.uint32)[~nan])


@ALL
def test_dequantize_keeps_its_hands_off_the_input(fmt: Format) -> None:
    raw = np.zeros((2, row_bytes(fmt, 256) * 2), np.uint8)
    raw.flags.writeable = False
    every_other = raw[:, : row_bytes(fmt, 256)]
    result = dequantize(fmt, every_other)
    result += 1
    assert not raw.any()


def test_plain_numbers() -> None:
    assert weights(formats.F32, np.float32(-1.5).tobytes()) == [-1.5]
    assert weights(formats.F16, half(0.25)) == [0.25]
    assert weights(formats.BF16, np.float32(-3.0).tobytes()[2:]) == [-3.0]
    assert weights(formats.Q8_0, half(0.5) + bytes([0, 1, 127, 128, 255]) + bytes(27))[:6] == [
        0,
        0.5,
        63.5,
        -64,
        -0.5,
        0,
    ]


def test_four_and_five_bit_blocks() -> None:
    qs = bytes([0xF0]) + bytes([0x21]) + bytes(14)  # q[0]=0 q[16]=15 q[1]=1 q[17]=2
    qh = (1 << 0 | 1 << 17 | 1 << 31).to_bytes(4, "little")
    q4 = weights(formats.Q4_0, half(2) + qs)
    assert [q4[i] for i in (0, 16, 1, 17, 31)] == [-16, 14, -14, -12, -16]
    q4 = weights(formats.Q4_1, half(2) + half(-1) + qs)
    assert [q4[i] for i in (0, 16, 1, 17, 31)] == [-1, 29, 1, 3, -1]
    q5 = weights(formats.Q5_0, half(2) + qh + qs)
    assert [q5[i] for i in (0, 16, 1, 17, 31)] == [0, -2, -30, 4, 0]
    q5 = weights(formats.Q5_1, half(2) + half(-1) + qh + qs)
    assert [q5[i] for i in (0, 16, 1, 17, 31)] == [31, 29, 1, 35, 31]


def six_bit_scales() -> bytes:
    """sc = 1 + 8 j and m = 63 - 8 j for j = 0..7, packed by hand."""
    sc, m = [1 + 8 * j for j in range(8)], [63 - 8 * j for j in range(8)]
    first = [sc[j] + (sc[j + 4] // 16) * 64 for j in range(4)]
    second = [m[j] + (m[j + 4] // 16) * 64 for j in range(4)]
    last = [sc[j + 4] % 16 + (m[j + 4] % 16) * 16 for j in range(4)]
    return bytes(first + second + last)


def test_q4_k_and_q5_k_blocks() -> None:
    head = half(0.5) + half(0.25) + six_bit_scales()
    qs = bytearray(128)
    qs[32 * 1 + 5] = 0xA3  # sub-block 2 weight 5 is 3, sub-block 3 weight 5 is 10
    w = weights(formats.Q4_K, head + qs)
    for j in range(8):
        q = {2: 3, 3: 10}.get(j, 0)
        assert w[32 * j + 5] == 0.5 * (1 + 8 * j) * q - 0.25 * (63 - 8 * j)
    qh = bytearray(32)
    qh[5] = 1 << 3 | 1 << 7
    w = weights(formats.Q5_K, head + qh + qs)
    for j in range(8):
        q = {2: 3, 3: 26, 7: 16}.get(j, 0)
        assert w[32 * j + 5] == 0.5 * (1 + 8 * j) * q - 0.25 * (63 - 8 * j)


def test_q6_k_block() -> None:
    ql, qh = bytearray(128), bytearray(64)
    ql[64 + 40] = 0x5C  # second half: weight 40 low bits 12, weight 104 low bits 5
    qh[32 + 8] = 0b11_10_01_00  # second half: high bits of weights 8, 40, 72, 104 are 0, 1, 2, 3
    scales = np.arange(-8, 8, dtype=np.int8)
    w = weights(formats.Q6_K, bytes(ql) + bytes(qh) + scales.tobytes() + half(0.5))
    for i, q in {8: 0, 40: 28, 72: 32, 104: 53}.items():
        assert w[128 + i] == 0.5 * float(scales[(128 + i) // 16]) * (q - 32)
