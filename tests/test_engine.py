"""Logits against a naive forward pass in float64 and against transformers, and against themselves in other orders."""

import dataclasses
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import naive
import numpy as np
import pytest
from conftest import Tiny

from llmq.cache import KVRing
from llmq.config import ModelConfig, check_tensors, read_config
from llmq.engine.cpu import Engine
from llmq.formats import BF16, F16, F32, FORMATS, Q4_0, Q4_K, Q6_K, Q8_0, Format
from llmq.gguf import open_gguf
from llmq.kernels.kv import F16_KV, KV_FORMATS, Q8_0_KV, KVFormat
from llmq.layout import PART

N = 520  # positions compared: more than one batch of 512, and more than three windows of 48

SHAPES: dict[str, dict[str, Any]] = {
    "dense": {},
    "windowed": {"window": 48},
    "mixtral": {"n_experts": 8, "window": 48, "n_layers": 1},
    "nemo": {"dim": 320, "n_heads": 8, "head_dim": 64, "ffn_dim": 544},
    "tied": {"tied": True, "n_layers": 1},
    "gqa6": {"n_heads": 12, "n_kv_heads": 2, "n_layers": 1},
    "gqa12": {"n_heads": 12, "n_kv_heads": 1, "head_dim": 16, "n_layers": 1, "window": 100},
}
# Float32 sums in another order, and keys that therefore round to another half float now and then.
NOISE = 5e-5
# A second seed where float noise would turn a near-tie between two experts, which both sides may break as they like.
SEEDS = {"mixtral": 2}


@contextmanager
def engine(path: Path, n_threads: int = 2, kv: KVFormat = F16_KV, **changes: Any) -> Iterator[Engine]:
    with open_gguf(path) as gguf:
        config = dataclasses.replace(read_config(gguf), **changes)
        check_tensors(gguf, config)
        running = Engine(gguf, config, n_threads, kv=kv)
        yield running
        running.close()


def some_ids(config: ModelConfig, n: int = N, seed: int = 1) -> list[int]:
    return np.random.default_rng(seed).integers(3, config.vocab_size, n).tolist()


def ring_of(running: Engine, batch: int = 512) -> KVRing:
    return KVRing(running.config, 4096, running.config.window, batch, F16_KV)


def read(running: Engine, ids: Sequence[int], chunks: Sequence[int] | int, ring: KVRing | None = None) -> np.ndarray:
    """Logits [len(ids), vocab] of a sequence read in chunks: sizes that repeat, or one size."""
    ring = ring or ring_of(running)
    sizes = [chunks] if isinstance(chunks, int) else list(chunks)
    found, done = [], 0
    while done < len(ids):
        part = ids[done : done + sizes[len(found) % len(sizes)]]
        positions = range(ring.length, ring.length + len(part))
        found.append(running.forward(part, positions, [ring] * len(part), range(len(part))))
        ring.advance(len(part))
        done += len(part)
    return np.concatenate(found)


def error(got: np.ndarray, expected: np.ndarray) -> float:
    assert got.shape == expected.shape
    assert np.isfinite(got).all()
    return float(np.linalg.norm(got - expected) / np.linalg.norm(expected))


# ---- against independent implementations
@pytest.mark.parametrize("fmt", [F32, BF16], ids=lambda fmt: fmt.name)
@pytest.mark.parametrize("shape", SHAPES)
def test_logits_equal_the_naive_forward_pass(tiny_model: Tiny, shape: str, fmt: Format) -> None:
    """The naive pass rounds keys and values to half floats too, so only float32 rounding is left: 1e-4.

    Prefill in batches of up to 512, then the same ids one at a time.
    """
    path, weights = tiny_model(**SHAPES[shape], format=fmt)
    with engine(path) as running:
        ids = some_ids(running.config, seed=SEEDS.get(shape, 1))
        expected = naive.forward(running.config, weights, ids)
        assert error(read(running, ids, 512), expected) < 1e-4
        if fmt == F32:
            assert error(read(running, ids, 1), expected) < 1e-4


@pytest.mark.parametrize("fmt", [F32, BF16], ids=lambda fmt: fmt.name)
@pytest.mark.parametrize("shape", SHAPES)
def test_logits_equal_those_of_transformers(tiny_model: Tiny, shape: str, fmt: Format) -> None:
    """Keys and values in float32 there, in float16 here: 2e-3 over all logits."""
    pytest.importorskip("transformers")
    from reference import reference_logits

    path, weights = tiny_model(**SHAPES[shape], format=fmt)
    with engine(path) as running:
        ids = some_ids(running.config, seed=SEEDS.get(shape, 1))
        expected = reference_logits(running.config, weights, ids)
        assert error(read(running, ids, 512), expected) < 2e-3
        if fmt == F32:
            assert error(read(running, ids, 1), expected) < 2e-3


def test_rotary_halves(tiny_model: Tiny) -> None:
    """The other layout of rotary pairs, which no `llama` file asks for."""
    path, weights = tiny_model()
    with engine(path, rope_interleaved=False) as running:
        ids = some_ids(running.config, 60)
        assert error(read(running, ids, 64), naive.forward(running.config, weights, ids)) < 1e-4
        other = dataclasses.replace(running.config, rope_interleaved=True)
        assert error(read(running, ids, 64), naive.forward(other, weights, ids)) > 1e-2


@pytest.mark.parametrize("fmt", [f for f in FORMATS.values() if f.block_size > 1], ids=lambda fmt: fmt.name)
def test_quantized_logits_are_near(tiny_model: Tiny, fmt: Format) -> None:
    """With exact arithmetic on the file's weights. Activations are rounded to 8 bits before each product.

    A step is the largest of 256 (or 32) divided by 127, about 2.8 (2.0) standard deviations / 127; the error is uniform
    within a step, so relative to the activation it is 2.8 / 127 / sqrt(12) = 0.6 %. Each product adds that to its
    output, and about ten products lie one behind another in two layers: 0.6 % * sqrt(10) = 2 %, and twice that allowed.
    """
    path, weights = tiny_model(format=fmt)
    with engine(path) as running:
        ids = some_ids(running.config, 40)
        expected = naive.forward(running.config, weights, ids)
        assert error(read(running, ids, 512), expected) < 4e-2
        assert error(read(running, ids, 1), expected) < 4e-2


def test_formats_mix(tiny_model: Tiny) -> None:
    """Matrices that read the same activations in different kinds: K, blocks of 32 and floats."""
    mix = {"attn_q.weight": Q4_K, "attn_k.weight": Q8_0, "attn_v.weight": F16, "gate.weight": Q6_K, "up.weight": Q4_0}
    path, weights = tiny_model(format={**mix, "down.weight": Q8_0, "token_embd.weight": Q6_K, "": Q4_K})
    with engine(path) as running:
        ids = some_ids(running.config, 40)
        assert error(read(running, ids, 512), naive.forward(running.config, weights, ids)) < 4e-2


# ---- against itself
@pytest.mark.parametrize("shape", ["dense", "windowed", "mixtral", "nemo"])
def test_chunks_do_not_matter(tiny_model: Tiny, shape: str) -> None:
    """Decode = prefill = any chunks, on floats.

    The order of sums differs by an ulp or so, and now and then turns the rounding of a key or value to a half float
    (1 in 2,000 of its size): 5e-5 in all.
    """
    path, _ = tiny_model(**SHAPES[shape])
    with engine(path) as running:
        ids = some_ids(running.config, 200, seed=SEEDS.get(shape, 1))
        whole = read(running, ids, 512)
        for chunks in (1, 7, 64, [1, 33, 2, 100]):
            assert error(read(running, ids, chunks), whole) < NOISE, chunks


@pytest.mark.parametrize("fmt", [Q4_K, Q8_0, F32], ids=lambda fmt: fmt.name)
def test_chunks_do_not_matter_across_the_ring(tiny_model: Tiny, fmt: Format) -> None:
    """A ring of 32 slots (window 24, batches of up to 8) goes round more than three times; one of 512 does not.

    Where activations are rounded to 8 bits, float noise now and then turns a rounding, which moves one activation by
    a step, 1/127 of the largest: hence 1e-2 for quantized weights.
    """
    path, _ = tiny_model(window=24, format=fmt)
    with engine(path) as running:
        ids = some_ids(running.config, 110)
        whole = read(running, ids, 512)
        for chunks in (8, 1, 3, [8, 1, 1, 5]):
            ring = ring_of(running, batch=8)
            assert ring.capacity == 32
            assert error(read(running, ids, chunks, ring), whole) < (NOISE if fmt == F32 else 1e-2), chunks


def test_a_prompt_longer_than_the_window(tiny_model: Tiny) -> None:
    """One batch of 110 over a window of 24: each token sees its own 24, though the batch overtakes them."""
    path, weights = tiny_model(window=24)
    with engine(path) as running:
        ids = some_ids(running.config, 110)
        expected = naive.forward(running.config, weights, ids)
        assert error(read(running, ids, 512), expected) < 1e-4
        unlimited = dataclasses.replace(running.config, window=0)
        assert error(expected, naive.forward(unlimited, weights, ids)) > 1e-3


@pytest.mark.parametrize("shape", ["dense", "mixtral"])
@pytest.mark.parametrize("fmt", [F32, Q4_K], ids=lambda fmt: fmt.name)
def test_threads_do_not_change_a_bit(tiny_model: Tiny, shape: str, fmt: Format) -> None:
    path, _ = tiny_model(**SHAPES[shape], format=fmt)
    found = []
    for n_threads in (1, 2, 3):
        with engine(path, n_threads) as running:
            ids = some_ids(running.config, 70)
            found.append([read(running, ids, chunks) for chunks in (512, [64, 1])])
    for other in found[1:]:
        for mine, theirs in zip(found[0], other, strict=True):
            np.testing.assert_array_equal(mine, theirs)


def test_outputs_are_the_rows_asked_for(tiny_model: Tiny) -> None:
    path, _ = tiny_model()
    with engine(path) as running:
        ids = some_ids(running.config, 20)
        every = read(running, ids, 512)
        for outputs in ([19], [0, 7, 19], []):
            got = running.forward(ids, range(20), [ring_of(running)] * 20, outputs)
            assert got.shape == (len(outputs), running.config.vocab_size)
            np.testing.assert_allclose(got, every[outputs], rtol=0, atol=NOISE)


def test_two_conversations_in_one_batch(tiny_model: Tiny) -> None:
    """Rows of two rings at different positions, one of them past its window, give what each gives alone."""
    path, _ = tiny_model(window=24)
    with engine(path) as running:
        ids = some_ids(running.config, 100)
        first, second = ids[:60], ids[60:]
        alone = [read(running, first, 512)[40:], read(running, second, 512)[3:]]
        rings = [ring_of(running, 32), ring_of(running, 64)]
        read(running, first[:40], 16, rings[0])
        read(running, second[:3], 16, rings[1])
        for step in (range(40, 57), range(57, 60)):
            mine = [i - 40 + 3 for i in step]
            got = running.forward(
                [first[i] for i in step] + [second[i] for i in mine],
                [*step, *mine],
                [rings[0]] * len(step) + [rings[1]] * len(step),
                range(2 * len(step)),
            )
            for ring in rings:
                ring.advance(len(step))
            assert error(got[: len(step)], alone[0][step.start - 40 : step.stop - 40]) < NOISE
            assert error(got[len(step) :], alone[1][step.start - 40 : step.stop - 40]) < NOISE


def test_going_back_and_reading_again(tiny_model: Tiny) -> None:
    path, _ = tiny_model(window=24)
    with engine(path) as running:
        ids, other = some_ids(running.config, 90), some_ids(running.config, 30, seed=9)
        ring = ring_of(running, batch=16)
        read(running, ids, 8, ring)
        ring.truncate(84)
        np.testing.assert_allclose(read(running, ids[84:], 8, ring), read(running, ids, 8)[84:], atol=NOISE)
        ring.truncate(86)
        fresh = read(running, ids[:86] + other, 8)
        np.testing.assert_allclose(read(running, other, 8, ring), fresh[86:], atol=NOISE)


def test_experts_without_a_token(tiny_model: Tiny) -> None:
    """One token takes 2 of 8 experts; the same token many times takes no other."""
    path, weights = tiny_model(**SHAPES["mixtral"])
    with engine(path) as running:
        ids = [77] * 30
        expected = naive.forward(running.config, weights, ids)
        assert error(read(running, ids, 512), expected) < 1e-4
        assert error(read(running, ids, 1), expected) < 1e-4


def test_buffers_grow_and_stay(tiny_model: Tiny) -> None:
    """Batches of rising and falling sizes on one engine equal those of a new one."""
    path, _ = tiny_model(**SHAPES["mixtral"])
    with engine(path) as running:
        ids = some_ids(running.config, 130, seed=SEEDS["mixtral"])
        whole = read(running, ids, 512)
        assert error(read(running, ids, [3, 60, 1, 2, 40, 24]), whole) < NOISE
        np.testing.assert_array_equal(read(running, ids, 512), whole)


def test_work_in_several_calls(tiny_model: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    """A batch may be cut between layers, to look at the keyboard; the result is the same to the bit."""
    path, _ = tiny_model(n_layers=3)
    with engine(path) as running:
        ids = some_ids(running.config, 30)
        whole = read(running, ids, 512)
        monkeypatch.setattr("llmq.engine.cpu.WORK_PER_CALL", 1.0)
        np.testing.assert_array_equal(read(running, ids, 512), whole)


# ---- a few rows at once
@pytest.mark.parametrize("kv", KV_FORMATS.values(), ids=lambda kv: kv.name)
@pytest.mark.parametrize("shape", ["dense", "windowed", "mixtral"])
def test_a_few_rows_at_once_are_bit_for_bit_what_single_rows_are(tiny_model: Tiny, shape: str, kv: KVFormat) -> None:
    """On both sides of the place where a context is first cut in parts, in formats that round activations."""
    path, _ = tiny_model(**SHAPES[shape], format={"v.weight": Q6_K, "down.weight": Q8_0, "": Q4_K})
    with engine(path, kv=kv) as running:
        ids = some_ids(running.config, PART + 20)
        rings = [KVRing(running.config, PART + 64, running.config.window, 512, kv) for _ in range(2)]
        for ring in rings:
            read(running, ids[: PART - 10], 512, ring)
        single = read(running, ids[PART - 10 :], 1, rings[0])
        several = read(running, ids[PART - 10 :], [2, 8, 3, 5, 4, 7, 1], rings[1])
        np.testing.assert_array_equal(single.view(np.uint32), several.view(np.uint32))


def test_a_cache_of_bytes(tiny_model: Tiny) -> None:
    """Against the naive pass: keys, values and queries are within half a step of 1/127 of the largest of 32."""
    path, weights = tiny_model(**SHAPES["windowed"])
    with engine(path, kv=Q8_0_KV) as running:
        ids = some_ids(running.config)
        expected = naive.forward(running.config, weights, ids)
        for chunk in (512, 5):
            ring = KVRing(running.config, 4096, running.config.window, 512, Q8_0_KV)
            assert 1e-4 < error(read(running, ids, chunk, ring), expected) < 1e-2
            assert ring.memory.nbytes == ring_of(running).memory.nbytes * 17 // 32
