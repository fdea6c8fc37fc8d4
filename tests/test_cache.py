"""The KV ring: what it holds, what it may go back to, and that it does not grow."""

from pathlib import Path

import numpy as np
import pytest
from conftest import Tiny
from hypothesis import given, settings
from hypothesis import strategies as st

from llmq.cache import KVRing
from llmq.config import ModelConfig, read_config
from llmq.errors import UsageError
from llmq.formats import F16
from llmq.gguf import open_gguf
from llmq.kernels.kv import F16_KV
from llmq.memory import ring_bytes


@pytest.fixture(scope="module")
def config(tiny_model: Tiny) -> ModelConfig:
    path: Path = tiny_model()[0]
    with open_gguf(path) as gguf:
        return read_config(gguf)


@pytest.mark.parametrize(
    ("n_ctx", "window", "batch", "capacity"),
    [(100, 0, 8, 112), (16, 0, 512, 16), (4096, 24, 8, 32), (4096, 25, 8, 48), (30, 24, 8, 32), (10, 24, 8, 16)],
)
def test_capacity(config: ModelConfig, n_ctx: int, window: int, batch: int, capacity: int) -> None:
    """Whole blocks; window + batch where there is a window, and never more than the context needs."""
    ring = KVRing(config, n_ctx, window, batch, F16_KV)
    assert ring.capacity == capacity
    assert ring.memory.nbytes == ring_bytes(config, capacity, F16)
    halves = capacity * config.n_layers * config.n_kv_heads * config.head_dim * 2
    assert ring.memory.nbytes == halves * np.dtype(np.float16).itemsize
    assert ring.address % 64 == 0


def test_memory_stays_the_same_past_the_window(config: ModelConfig) -> None:
    ring = KVRing(config, 4096, 24, 8, F16_KV)
    before = ring.address, ring.memory.nbytes
    for _ in range(500):
        ring.advance(8)
    assert (ring.address, ring.memory.nbytes, ring.length) == (*before, 4000)


def test_going_back(config: ModelConfig) -> None:
    """Window 24, capacity 32, length 100: slots hold 68 .. 99, and a token at 92 sees 69 and on."""
    ring = KVRing(config, 4096, 24, 8, F16_KV)
    ring.advance(100)
    assert [ring.keepable(n) for n in (100, 92, 91, 90, 50, 0)] == [100, 92, 91, 0, 0, 0]
    with pytest.raises(UsageError, match="position 90"):
        ring.truncate(90)
    assert ring.length == 100
    ring.truncate(92)
    assert ring.length == 92
    assert ring.keepable(1000) == 92
    ring.truncate(0)
    assert ring.keepable(50) == 0


def test_an_interrupted_batch_has_overwritten_its_slots(config: ModelConfig) -> None:
    """Slots hold 68 .. 99; a batch of 8 that was begun and not finished may have taken those of 68 .. 75."""
    ring = KVRing(config, 4096, 24, 8, F16_KV)
    ring.advance(100)
    ring.claim(8)
    assert ring.length == 100
    assert [ring.keepable(n) for n in (100, 99, 98, 92)] == [100, 99, 0, 0]


def test_without_a_window_every_prefix_can_be_kept(config: ModelConfig) -> None:
    ring = KVRing(config, 128, 0, 8, F16_KV)
    ring.advance(120)
    for n in (120, 64, 3, 0):
        ring.truncate(n)
        assert ring.length == n


def test_going_back_twice(config: ModelConfig) -> None:
    """Slots hold 68 .. 99 after 100 positions. Going back to 92 does not bring older ones back."""
    ring = KVRing(config, 4096, 24, 8, F16_KV)
    ring.advance(100)
    ring.truncate(92)
    assert ring.keepable(85) == 0, "a token at 85 sees 62 and on, and 94 .. 99 have overwritten 62 .. 67"


steps = st.lists(st.one_of(st.integers(1, 8), st.tuples(st.integers(0, 130))), max_size=40)


@settings(deadline=None, max_examples=300)
@given(steps=steps, window=st.sampled_from([0, 2, 7, 24]))
def test_keeps_what_it_can_and_no_more(config: ModelConfig, steps: list[int | tuple[int]], window: int) -> None:
    """Against a dictionary of slots: numbers are tokens read, (n,) is going back to n, from the start if it must."""
    ring = KVRing(config, 320, window, 8, F16_KV)
    slots: dict[int, int] = {}
    length = 0
    for step in steps:
        if isinstance(step, int):
            for position in range(length, length + step):
                slots[position % ring.capacity] = position
            ring.advance(step)
            length += step
        else:
            wanted = min(step[0], length)
            needed = range(max(0, wanted - window + 1) if window else 0, wanted)
            whole = all(slots[position % ring.capacity] == position for position in needed)
            assert ring.keepable(step[0]) == (wanted if whole else 0)
            length = ring.keepable(step[0])
            ring.truncate(length)
        assert ring.length == length
