"""Replies with prompt lookup on real models: token by token those of plain decoding, and as good to go on from."""

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import Tiny
from hypothesis import given, settings
from hypothesis import strategies as st

from llmq import Message, Model, Sampling, load
from llmq.cache import KVRing
from llmq.errors import UsageError
from llmq.formats import F16, Q4_0, Q4_K, Q6_K, Q8_0
from llmq.kernels.kv import F16_KV
from llmq.store import BUNDLED_PATH

GREEDY = Sampling(temperature=0)
WINDOW = 24
NOISE = 5e-5  # see test_engine.py

MODELS: dict[str, dict[str, Any]] = {
    "float32": {"n_layers": 1},
    "window": {"n_layers": 1, "window": WINDOW},
    "Q4_K": {"format": {"attn_v.weight": Q6_K, "": Q4_K}},
    "Q8_0": {"format": Q8_0, "n_layers": 1},
    "Q4_0": {"format": Q4_0, "n_layers": 1},
    "float16": {"format": F16, "n_layers": 1},
    "experts": {"format": Q4_K, "n_experts": 8, "n_layers": 1},
}


@pytest.fixture(scope="module")
def path(tiny_model: Tiny) -> Path:
    return tiny_model(window=WINDOW, n_layers=1)[0]


def repetitive(seed: int, n: int = 60) -> list[int]:
    """Ids of which runs come back."""
    rng = np.random.default_rng(seed)
    ids = rng.integers(3, 512, n // 2).tolist()
    while len(ids) < n:
        at = int(rng.integers(0, len(ids) - 6))
        ids += ids[at : at + int(rng.integers(3, 20))]
    return ids[:n]


def said(model: Model, prompt: str | Sequence[int], lookup: bool, **options: Any) -> tuple[list[int], str, str]:
    made = model.generate(prompt, **{"sampling": GREEDY, "max_tokens": 60, **options}, lookup=lookup)
    text = "".join(made)
    assert model._ring.length == len(model._ids)
    return made.ids, text, made.stop_reason


@pytest.mark.parametrize("name", MODELS)
def test_greedy_replies_are_the_same(tiny_model: Tiny, name: str) -> None:
    """Twelve prompts that repeat themselves, as replies of random weights soon do too."""
    file = tiny_model(**MODELS[name])[0]
    drafted = accepted = 0
    with load(file) as plain, load(file) as guessing:
        for seed in range(12):
            prompt = repetitive(seed)
            made = guessing.generate(prompt, sampling=GREEDY, max_tokens=80, lookup=True)
            text = "".join(made)
            assert (made.ids, text, made.stop_reason) == said(plain, prompt, False, max_tokens=80)
            assert guessing._ids == plain._ids
            drafted, accepted = drafted + made.stats.drafted, accepted + made.stats.accepted
    assert drafted >= accepted > 0


@pytest.mark.parametrize("kv_type", ["f16", "q8_0"])
def test_greedy_replies_are_the_same_far_into_a_context(tiny_model: Tiny, kv_type: str) -> None:
    file = tiny_model(**MODELS["Q4_K"])[0]
    with load(file, kv_type=kv_type, threads=2) as plain, load(file, kv_type=kv_type, threads=2) as guessing:
        prompt = repetitive(0, 1500)
        expected = said(plain, prompt, False, max_tokens=150)
        assert said(guessing, prompt, True, max_tokens=150) == expected
        assert guessing._ids == plain._ids


@pytest.mark.parametrize("name", ["window", "Q4_K", "experts"])
def test_sampled_replies_are_the_same_for_a_seed(tiny_model: Tiny, name: str) -> None:
    file = tiny_model(**MODELS[name])[0]
    drafted = 0
    with load(file) as plain, load(file) as guessing:
        for seed in range(12):
            sampling = Sampling(temperature=0.2, top_k=3, repetition_penalty=1.1, penalty_last_n=20, seed=seed)
            options = {"sampling": sampling, "max_tokens": 50}
            prompt = repetitive(seed)
            made = guessing.generate(prompt, **options, lookup=True)
            text = "".join(made)
            assert (made.ids, text, made.stop_reason) == said(plain, prompt, False, **options)
            drafted += made.stats.drafted
    assert drafted > 0


replies = st.tuples(st.integers(0, 60), st.integers(0, 3), st.integers(1, 30), st.integers(1, 40), st.integers(1, 40))


@settings(deadline=None, max_examples=25)
@given(steps=st.lists(replies, min_size=1, max_size=5))
def test_any_conversation_is_the_same(path: Path, steps: list[tuple[int, ...]]) -> None:
    """Over rings of 32 positions that come round again and again: each prompt keeps some of what was said before, and
    each reply is read to its end or closed early, within an accepted run or not.
    """
    with load(path, n_ctx=500, threads=1) as plain, load(path, n_ctx=500, threads=1) as guessing:
        for model in (plain, guessing):
            model._engine.batch = 8
            model._ring = KVRing(model.config, 500, WINDOW, 8, F16_KV)
        ids = repetitive(9)
        for keep, seed, n, max_tokens, pieces in steps:
            ids = ids[: len(ids) - keep] + repetitive(seed, 60)[:n]
            found = []
            for model in (plain, guessing):
                made = model.generate(ids, sampling=GREEDY, max_tokens=max_tokens, lookup=model is guessing)
                text = "".join(itertools.islice(made, pieces))
                made.close()
                assert model._ring.length == len(model._ids)
                found.append((made.ids, text, made.stop_reason, model._ids))
            assert found[0] == found[1]
            ids = ids + made.ids


def test_a_full_context(path: Path) -> None:
    """Drafts end where the context does."""
    for n_ctx in range(61, 90):
        with load(path, n_ctx=n_ctx) as plain, load(path, n_ctx=n_ctx) as guessing:
            expected = said(plain, repetitive(0), False)
            assert said(guessing, repetitive(0), True) == expected
            assert guessing._ids == plain._ids


def test_an_interrupt_in_a_batch_of_guesses(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The batch has overwritten part of the ring; the same prompt then has the same answer."""
    with load(path) as model:
        model._ring = KVRing(model.config, 500, WINDOW, 8, F16_KV)
        model._engine.batch = 8
        expected = said(model, repetitive(3), False)
        run = model._engine.forward
        for at in range(9, 30, 3):
            calls = itertools.count()

            def interrupted(*arguments: Any, at: int = at, calls: Any = calls) -> np.ndarray:
                logits = run(*arguments)
                if next(calls) == at:
                    raise KeyboardInterrupt
                return logits

            model.start([5, 6])
            monkeypatch.setattr(model._engine, "forward", interrupted)
            with pytest.raises(KeyboardInterrupt):
                said(model, repetitive(3), True)
            monkeypatch.setattr(model._engine, "forward", run)
            assert said(model, repetitive(3), True) == expected


def test_a_reply_closed_after_the_next_began(path: Path) -> None:
    """Its guesses are not its own to take back any more."""
    with load(path) as model, load(path) as fresh:
        loop = [5, 6, 7, 8] * 8
        first = model.generate(loop, sampling=GREEDY, max_tokens=90, lookup=True)
        for _ in range(40):
            next(first)
        second = model.generate(repetitive(1), sampling=GREEDY, max_tokens=40, lookup=True)
        next(second)
        first.close()
        list(second)
        assert second.ids == said(fresh, repetitive(1), False, max_tokens=40)[0]


def test_logits_of_the_last_rows(path: Path) -> None:
    """In a batch, and where they lie in two; taken back, they leave what was there before."""
    with load(path) as model:
        ids = repetitive(2, 700)
        model.start(ids)
        rows = model.read(ids, 12)
        assert rows.shape == (12, 512)
        np.testing.assert_allclose(rows, model.logits(ids)[-12:], atol=NOISE)
        before = model.read([7])
        model.take_back(1)
        model.read([9, 9, 9, 9, 9, 9, 9, 9], 8)
        model.take_back(8)
        assert model._ids == ids
        np.testing.assert_array_equal(model.read([7]), before)
        with pytest.raises(UsageError, match="overwritten"):
            model.take_back(600)


@pytest.mark.skipif(not BUNDLED_PATH.is_file(), reason=f"{BUNDLED_PATH.name} is not in the package")
def test_the_bundled_model_tells_a_story_again() -> None:
    """Asked twice for the same, past its window of 256; each turn reads what the same turn reads without lookup."""
    question = Message("user", "Tell me a story about a cat.")
    with load("storyteller") as plain, load("storyteller") as guessing:
        for sampling in (GREEDY, Sampling(temperature=0.3, seed=4)):
            messages = [question]
            for _ in range(2):
                expected = plain.chat(messages, sampling=sampling, max_tokens=250)
                made = guessing.chat(messages, sampling=sampling, max_tokens=250, lookup=True)
                pieces = list(made)
                assert pieces == list(expected)
                assert made.ids == expected.ids
                assert made.stats.reused_tokens == expected.stats.reused_tokens
                messages += [Message("assistant", "".join(pieces)), question]
            assert made.stats.accepted > 10
        once = "Once upon a time, there was a little dog named Spot. Spot loved to play in the park with his red ball. "
        text = once * 8 + "Once upon a time, there was"
        expected = said(plain, text, False, max_tokens=200)
        assert said(guessing, text, True, max_tokens=200) == expected
