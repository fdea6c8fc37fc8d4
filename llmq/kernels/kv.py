"""How keys and values lie in a ring: half floats, or bytes with a scale for every 32 (Q8_0).

One ring, one layer, one KV head; capacity is a multiple of 16, and slot = position % capacity.

            keys, by blocks of 16 positions                            values, by positions
  f16       half [head_dim][16]                                        half [head_dim]
  q8_0      [head_dim / 32] { half d[16] | i8 [8 words][16][4] }       [head_dim / 32] { half d | i8 [32] }

Keys have sixteen positions side by side, so that scores need no sum across lanes. Both formats take the same bytes for
keys as for values. RoPE is in the keys when they are stored, so a slot never has to be turned again.
"""

from dataclasses import dataclass

import numpy as np
from numba import types

from llmq.formats import Format, row_bytes
from llmq.jit import Kernel, jit, kernel
from llmq.kernels.activation import inverse_scale, largest, quantize16
from llmq.layout import KV_LAYOUTS
from llmq.simd import (
    copy_bytes,
    load_f32,
    load_f32x16,
    load_i32,
    stack,
    store_f16,
    store_f16x16,
    store_i32,
)

# keys, values, slot, k, v, head_dim
STORE_TYPES = (types.int64,) * 6
KEYS_BLOCK = 16 * 34  # bytes of 16 positions by 32 dimensions in q8_0


def store_f16_kv(keys, values, slot, k, v, head_dim):
    """Write one position's key and value f32 [head_dim] of one KV head."""
    block = keys + ((slot >> 4) * head_dim * 16 + (slot & 15)) * 2
    for i in range(head_dim):
        store_f16(block + 32 * i, load_f32(k + 4 * i))
    for i in range(0, head_dim, 16):
        store_f16x16(values + (slot * head_dim + i) * 2, load_f32x16(v + 4 * i))


@jit
def quantize32(out, x):
    """32 floats to bytes at `out`; returns their scale."""
    top = largest(x, 32)
    inverse = inverse_scale(top)
    quantize16(out, x, inverse)
    quantize16(out + 16, x + 64, inverse)
    return top / np.float32(127)


def store_q8_0_kv(keys, values, slot, k, v, head_dim):
    """Write one position's key and value f32 [head_dim] of one KV head; head_dim is a multiple of 32."""
    n_groups, lane = head_dim >> 5, slot & 15
    block, row, q = keys + (slot >> 4) * n_groups * KEYS_BLOCK, values + slot * n_groups * 34, stack(32)
    for g in range(n_groups):
        at = block + g * KEYS_BLOCK
        store_f16(at + 2 * lane, quantize32(q, k + 128 * g))
        for word in range(8):
            store_i32(at + 32 + 64 * word + 4 * lane, load_i32(q + 4 * word))
        store_f16(row + 34 * g, quantize32(q, v + 128 * g))
        copy_bytes(row + 34 * g + 2, q, 32)


@dataclass(frozen=True, slots=True)
class KVFormat:
    """Rows of `layout`; `multiple` is what the head size has to be a multiple of."""

    name: str
    layout: Format
    multiple: int
    store: Kernel

    def row_bytes(self, head_dim: int) -> int:
        """Bytes of one position's keys, or values, of one head."""
        return row_bytes(self.layout, head_dim)


F16_KV = KVFormat("f16", KV_LAYOUTS["f16"], 16, kernel(*STORE_TYPES, name="store_f16_kv")(store_f16_kv))
Q8_0_KV = KVFormat("q8_0", KV_LAYOUTS["q8_0"], 32, kernel(*STORE_TYPES, name="store_q8_0_kv")(store_q8_0_kv))
KV_FORMATS = {kv.name: kv for kv in (F16_KV, Q8_0_KV)}
