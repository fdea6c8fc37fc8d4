"""Measuring a model: the work of a token, worked out tensor by tensor, how often things are run, and on what."""

import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import Tiny

from llmq import Sampling, load, speed
from llmq.cache import KVRing
from llmq.config import read_config
from llmq.engine.cpu import Engine
from llmq.errors import FileFormatError
from llmq.formats import F32, Q4_K, Q6_K, Q8_0
from llmq.gguf import open_gguf
from llmq.kernels.kv import F16_KV
from llmq.speed import LAYER, Rate, Speed, measure_layer, measure_model, synthetic_layers
from llmq.work import Work, work_per_token


def work_of(path: Path) -> Work:
    with open_gguf(path) as gguf:
        tensors = {name: (info.shape, info.format) for name, info in gguf.tensors.items()}
        return work_per_token(read_config(gguf), tensors)


def test_weights_that_give_no_numbers_are_refused(tiny_model: Tiny, tmp_path: Path) -> None:
    whole = tiny_model(format=F32)[0]
    with open_gguf(whole) as gguf:
        weights = gguf.data("output.weight").tobytes()
    content = whole.read_bytes().replace(weights, b"\xff" * len(weights))
    path = tmp_path / "broken.gguf"
    path.write_bytes(content)
    with load(path, threads=1) as model, pytest.raises(FileFormatError, match="not numbers"):
        measure_model(model, print)


# Of the tiny models: width 256, 8 heads and 2 KV heads of 32, feed-forward 512, a vocabulary of 512, 2 layers.
ATTENTION = 256 * 256 + 2 * 256 * 64 + 256 * 256
EXPERT = 3 * 256 * 512
NORMS = 4 * (2 * 2 * 256 + 256)  # bytes


def test_the_work_of_a_dense_model(tiny_model: Tiny) -> None:
    layers = 2 * (ATTENTION + EXPERT)
    output = 512 * 256
    assert work_of(tiny_model(format=Q8_0)[0]) == Work((layers + output) / 32 * 34 + NORMS, layers)


def test_the_work_of_a_mixture_is_that_of_the_used_experts(tiny_model: Tiny) -> None:
    router = 4 * 256
    work = work_of(tiny_model(n_experts=4, format={"ffn_down_exps.weight": Q6_K, "": Q4_K})[0])
    gate_and_up, down = 2 * 2 * 256 * 512, 2 * 256 * 512
    assert work.n_products == 2 * (ATTENTION + gate_and_up + down + router)
    q4_k = 2 * (ATTENTION + gate_and_up) + 512 * 256
    assert work.n_bytes == q4_k / 256 * 144 + 2 * down / 256 * 210 + 2 * router * 4 + NORMS


def test_an_embedding_that_is_the_output_too_is_read_whole(tiny_model: Tiny) -> None:
    assert work_of(tiny_model(format=Q8_0, tied=True)[0]) == work_of(tiny_model(format=Q8_0)[0])


def test_rates_of_work() -> None:
    found = Speed(Work(2e9, 5e9), (Rate(128, (9.0,)), Rate(512, (10.0, 30.0, 20.0))), Rate(16, (4.0, 3.0, 8.0)), True)
    assert found.read_rate == 8
    assert found.product_rate == 100


# ---- runs
class Clock:
    """A clock that stands still but in a run, which takes `seconds`."""

    def __init__(self, seconds: float, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now, self.seconds, self.runs = 0.0, seconds, 0
        monkeypatch.setattr(time, "perf_counter", lambda: self.now)

    def run(self) -> None:
        self.now += self.seconds
        self.runs += 1


@pytest.mark.parametrize(("seconds", "runs"), [(100, 1), (8.5, 1), (3, 3), (1, 5), (0.3, 5), (0.125, 9), (0.001, 50)])
def test_long_runs_are_few(monkeypatch, seconds: float, runs: int) -> None:
    clock = Clock(seconds, monkeypatch)
    rate = speed._rate(100, clock.run)
    assert (clock.runs, len(rate.runs)) == (runs, runs)
    assert rate.median == pytest.approx(100 / seconds)


@pytest.fixture
def hasty(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int, list[int]]]:
    """One run of each kind; what the engine is given: rows, first position, rows with logits."""
    monkeypatch.setattr(speed, "MOST_RUNS", 1)
    monkeypatch.setattr(speed, "RUNS", 1)
    calls: list[tuple[int, int, list[int]]] = []
    forward = Engine.forward

    def watched(self: Engine, tokens: Any, positions: Any, rings: Any, outputs: Any = ()) -> np.ndarray:
        calls.append((len(tokens), positions[0], list(outputs)))
        return forward(self, tokens, positions, rings, outputs)

    monkeypatch.setattr(Engine, "forward", watched)
    return calls


@pytest.mark.parametrize(
    ("n_ctx", "lengths"), [(600, (128, 512)), (300, (128, 300)), (128, (128,)), (5, (5,)), (1, (1,))]
)
@pytest.mark.parametrize("window", [0, 24])
def test_what_is_run(tiny_model: Tiny, hasty, n_ctx: int, lengths: tuple[int, ...], window: int) -> None:
    told: list[str] = []
    with load(tiny_model(n_layers=1, window=window)[0], n_ctx=n_ctx, threads=2) as model:
        found = measure_model(model, told.append)
    assert tuple(rate.n_tokens for rate in found.prefill) == lengths
    n_decoded = min(16, n_ctx)
    assert found.decode.n_tokens == n_decoded
    assert hasty[1:] == [*((n, 0, [n - 1]) for n in lengths), *((1, i, [0]) for i in range(n_decoded))]
    assert len(told) == len(lengths) + 1
    assert all(0 < run < 1e7 for rate in (*found.prefill, found.decode) for run in rate.runs)


@pytest.mark.usefixtures("hasty")
def test_only_what_no_cache_holds_is_bound_by_memory(tiny_model: Tiny, monkeypatch) -> None:
    path = tiny_model(n_layers=1)[0]
    n_bytes, bound = work_of(path).n_bytes, []
    with load(path, n_ctx=1, threads=2) as model:
        for cache_bytes in (n_bytes, n_bytes / 2, n_bytes / 2 - 1, 0):
            monkeypatch.setattr(speed, "last_cache_bytes", lambda found=cache_bytes: found)
            bound.append(measure_model(model, lambda _: None).is_memory_bound)
    assert bound == [False, False, True, True]


@pytest.mark.usefixtures("hasty")
def test_a_conversation_is_left_alone(tiny_model: Tiny) -> None:
    path = tiny_model(n_layers=1, window=24)[0]
    ids = list(range(40, 100))
    with load(path, n_ctx=300, threads=2) as model, load(path, n_ctx=300, threads=2) as fresh:
        made = model.generate(ids, sampling=Sampling(temperature=0), max_tokens=20)
        pieces = [next(made) for _ in range(3)]
        measure_model(model, lambda _: None)
        pieces += list(made)
        expected = fresh.generate(ids, sampling=Sampling(temperature=0), max_tokens=20)
        assert "".join(expected) == "".join(pieces)
        assert made.ids == expected.ids


# ---- the layer
def test_synthetic_layers_give_numbers() -> None:
    gguf = synthetic_layers(2)
    config = speed._layers(2)
    engine = Engine(gguf, config, 2)
    ring = KVRing(config, 16, 0, engine.batch, F16_KV)
    logits = engine.forward([1, 2, 3], range(3), [ring] * 3, [0, 1, 2])
    engine.close()
    assert np.isfinite(logits).all()
    assert np.abs(logits).max() > 0
    assert {info.format for info in gguf.tensors.values()} == {F32, Q4_K}
    per_layer = 2 * 4096 * 4096 + 2 * 4096 * 1024 + 3 * 4096 * 14336
    assert LAYER.n_layers == 1
    assert sum(info.n_bytes for name, info in gguf.tensors.items() if len(info.shape) > 1 and "blk" in name) == (
        2 * per_layer // 256 * 144
    )


@pytest.mark.usefixtures("hasty")
def test_the_layer_is_bound_by_memory() -> None:
    found = measure_layer(2, lambda _: None)
    assert found.is_memory_bound
    assert found.read_rate > 0.1
    assert found.product_rate > 0.1
