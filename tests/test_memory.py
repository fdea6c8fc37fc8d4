"""Memory stays flat once the window is full."""

from pathlib import Path

import numpy as np
import psutil
import pytest
from conftest import Tiny

from llmq import Sampling, load

WINDOW = 4000
PER_POSITION = 2 * 2 * 2 * 2 * 32  # bytes: layers, key and value, half floats, heads, head size


def resident() -> int:
    return psutil.Process().memory_info().rss


@pytest.fixture(scope="module")
def path(tiny_model: Tiny) -> Path:
    return tiny_model(window=WINDOW)[0]


def test_resident_memory_is_flat_from_one_window_to_five(path: Path) -> None:
    """Within 2 MB, in prefill and in decode; keeping four more windows would take 8 MB."""
    assert 4 * WINDOW * PER_POSITION > 8_000_000
    ids = np.random.default_rng(0).integers(3, 512, 5 * WINDOW).tolist()
    with load(path, n_ctx=6 * WINDOW) as model:
        model.read(ids[: WINDOW - 100])
        for token in ids[WINDOW - 100 : WINDOW]:
            model.read([token])
        full = resident()
        model.read(ids[WINDOW : 5 * WINDOW - 300])
        for token in ids[5 * WINDOW - 300 :]:
            model.read([token])
        assert model._ring.length == 5 * WINDOW
        assert abs(resident() - full) < 2 << 20


def test_the_ring_is_as_large_as_the_window_asks(path: Path) -> None:
    """Not as the context: window + one batch of 512, in whole blocks of 16."""
    with load(path, n_ctx=1_000_000) as model:
        assert model._ring.memory.nbytes == 4512 * PER_POSITION


def test_replies_leave_nothing_behind(path: Path) -> None:
    with load(path, n_ctx=1200) as model:
        for seed in range(3):
            list(model.generate([1, 5, 6], sampling=Sampling(seed=seed), max_tokens=30))
        before = resident()
        for seed in range(60):
            list(model.generate([1, 5, 6 + seed], sampling=Sampling(seed=seed), max_tokens=30))
        assert resident() - before < 2 << 20
