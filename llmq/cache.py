"""The KV ring: keys and values of one conversation, slot = position % capacity.

Memory does not grow with the conversation. With a window W and batches of up to B tokens, capacity is at least W + B: a
batch is written before it is attended to, and its first token still sees W positions. Positions stay absolute, and RoPE
is in the keys already, so nothing has to be turned or moved when the ring comes round. Example, W = 4, capacity = 8:

  position  ... 8  9 10 11 12        the query at 12 sees 9 .. 12
  slot          0  1  2  3  4        slots 5, 6, 7 still hold 5, 6, 7: they are masked
"""

import numpy as np

from llmq.config import ModelConfig
from llmq.errors import UsageError
from llmq.kernels.kv import KVFormat
from llmq.memory import ring_bytes, ring_capacity
from llmq.team import aligned

OVERREAD = 256  # attention reads whole registers past the values of small heads


class KVRing:
    """Keys and values of all layers for one conversation; `length` is the number of positions that count."""

    def __init__(self, config: ModelConfig, n_ctx: int, window: int, batch: int, kv: KVFormat) -> None:
        self.capacity = ring_capacity(n_ctx, window, batch)
        self.window = window
        self.length = 0
        self._first = 0  # the oldest position that has not been overwritten
        n_bytes = ring_bytes(config, self.capacity, kv.layout)
        self.memory: np.ndarray = aligned(n_bytes + OVERREAD)[:n_bytes]

    @property
    def address(self) -> int:
        return self.memory.ctypes.data

    def claim(self, n: int) -> None:
        """`n` more positions are going to be written: what their slots hold is lost, even if writing is interrupted."""
        self._first = max(self._first, self.length + n - self.capacity)

    def advance(self, n: int) -> None:
        """`n` more positions have been written."""
        self.claim(n)
        self.length += n

    def keepable(self, length: int) -> int:
        """The longest prefix of `length` positions or fewer that can be continued: 0 when the ring has gone past it."""
        length = min(length, self.length)
        first_needed = max(0, length - self.window + 1) if self.window else 0
        return length if first_needed >= self._first else 0

    def truncate(self, length: int) -> None:
        """Forget all positions from `length` on.

        Raises UsageError when positions that the next token would see are overwritten.
        """
        if self.keepable(length) != length:
            raise UsageError(f"the cache cannot go back to position {length}: that part of it is overwritten")
        self.length = length
        if length == 0:
            self._first = 0
