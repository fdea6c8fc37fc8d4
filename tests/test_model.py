"""The Python face on tiny models: what comes out, what is kept between calls, what is refused."""

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import Tiny
from hypothesis import given, settings
from hypothesis import strategies as st

import llmq
from llmq import Message, Model, Sampling, load
from llmq.errors import FileFormatError, LlmqError, ResourceError, UsageError
from llmq.formats import Q4_K, Q8_0
from llmq.kernels.kv import F16_KV

GREEDY = Sampling(temperature=0)
WINDOW = 24
NOISE = 5e-5  # see test_engine.py


@pytest.fixture(scope="module")
def path(tiny_model: Tiny) -> Path:
    return tiny_model(window=WINDOW, n_layers=1)[0]


@pytest.fixture
def model(path: Path) -> Any:
    with load(path, n_ctx=200, threads=2) as opened:
        yield opened


def some_ids(n: int, seed: int = 0) -> list[int]:
    return np.random.default_rng(seed).integers(3, 512, n).tolist()


def greedy(model: Model, prompt: str | Sequence[int], n: int = 8) -> tuple[list[int], str]:
    made = model.generate(prompt, sampling=GREEDY, max_tokens=n)
    text = "".join(made)
    return made.ids, text


# ---- what comes out
def test_greedy_is_the_argmax_of_logits(model: Model) -> None:
    ids = some_ids(60)
    made, _ = greedy(model, ids, 20)
    for i, token in enumerate(made):
        assert token == model.logits(ids + made[:i], all_positions=False)[0].argmax()


def test_greedy_is_the_same_every_time_and_on_any_threads(path: Path) -> None:
    found = []
    for threads in (1, 2, 3, 2):
        with load(path, threads=threads) as model:
            found += [greedy(model, "the cat sat on"), greedy(model, "the cat sat on")]
            assert model.n_threads == threads
    assert len({repr(one) for one in found}) == 1


def test_seeds(model: Model) -> None:
    def text(seed: int | None) -> str:
        return "".join(model.generate("once", sampling=Sampling(seed=seed), max_tokens=12))

    assert text(7) == text(7) != text(8)


def test_text_and_ids_are_the_same_prompt(model: Model) -> None:
    ids = model.encode("once upon a time")
    assert ids[0] == model.tokenizer.bos_id
    assert ids[1:] == model.tokenizer.encode("once upon a time")
    assert greedy(model, ids) == greedy(model, "once upon a time")


def test_logits_of_all_positions_or_the_last(model: Model) -> None:
    ids = some_ids(130)
    every = model.logits(ids)
    assert every.shape == (130, 512)
    assert every.dtype == np.float32
    last = model.logits(ids, all_positions=False)
    assert last.shape == (1, 512)
    np.testing.assert_allclose(last[0], every[-1], atol=NOISE)


def test_logits_leave_the_conversation_alone(path: Path) -> None:
    ids = some_ids(50)
    with load(path, n_ctx=200) as model, load(path, n_ctx=200) as fresh:
        made = model.generate(ids, sampling=GREEDY, max_tokens=10)
        pieces = []
        for piece in made:
            model.logits(some_ids(70, seed=3))
            pieces.append(piece)
        assert (made.ids, "".join(pieces)) == greedy(fresh, ids, 10)
        again = model.generate(ids, sampling=GREEDY, max_tokens=10)
        list(again)
        assert again.ids == made.ids
        assert again.stats.reused_tokens == 49


def test_longer_than_a_batch(path: Path, tiny_model: Tiny) -> None:
    """700 tokens in a windowed ring and in one that holds them all; `read` and `logits` agree."""
    for file in (path, tiny_model(n_layers=1)[0]):
        with load(file, n_ctx=900) as model:
            ids = some_ids(700)
            whole = model.logits(ids)
            model.start(ids)
            np.testing.assert_allclose(model.read(ids)[0], whole[-1], atol=NOISE)


# ---- what is kept between calls
def test_a_prefix_is_reused(path: Path) -> None:
    first, second = some_ids(40), some_ids(12, seed=1)
    with load(path) as model, load(path) as fresh:
        made, _ = greedy(model, first, 6)
        longer = [*first, *made, *second]
        reply = model.generate(longer, sampling=GREEDY, max_tokens=8)
        list(reply)
        assert reply.stats.prompt_tokens == len(longer)
        assert reply.stats.reused_tokens == 45, "40 of the prompt, and 5 of 6: the last was never read"
        assert reply.ids == greedy(fresh, longer)[0]


def test_the_same_prompt_again_reads_one_token(model: Model) -> None:
    ids = some_ids(40)
    greedy(model, ids)
    reply = model.generate(ids, sampling=GREEDY)
    next(reply, None)
    assert reply.stats.reused_tokens == 39


def test_another_prompt_starts_anew(path: Path) -> None:
    with load(path) as model, load(path) as fresh:
        greedy(model, some_ids(40))
        reply = model.generate(some_ids(30, seed=5), sampling=GREEDY, max_tokens=8)
        list(reply)
        assert reply.stats.reused_tokens == 0
        assert reply.ids == greedy(fresh, some_ids(30, seed=5))[0]


prompts = st.lists(
    st.tuples(st.integers(0, 60), st.integers(0, 3), st.integers(1, 30), st.integers(1, 5)), min_size=2, max_size=6
)


@settings(deadline=None, max_examples=25)
@given(steps=prompts)
def test_any_conversation_equals_a_fresh_one(path: Path, steps: list[tuple[int, int, int, int]]) -> None:
    """Each prompt keeps some of the one before and goes on in its own way, over a ring that comes round every 32."""
    with load(path, n_ctx=300, threads=1) as model:
        model._engine.batch = 8
        model._ring = llmq.cache.KVRing(model.config, 300, WINDOW, 8, F16_KV)
        ids = some_ids(90, seed=9)
        for keep, seed, n, replies in steps:
            ids = ids[: len(ids) - keep] + some_ids(n, seed)
            made, _ = greedy(model, ids, replies)
            logits = model.logits(ids + made)
            for i, token in enumerate(made):
                row = logits[len(ids) - 1 + i]
                assert row[token] >= row.max() - 1e-3, "not what a fresh conversation would say"
            ids = ids + made


def test_going_back_twice_past_the_ring(path: Path) -> None:
    """Read far, go back a little, go back again: what the far end overwrote must not come back as if it were whole."""
    with load(path) as model:
        model._ring = llmq.cache.KVRing(model.config, 2000, WINDOW, 512, F16_KV)  # 544 slots
        ids = some_ids(1000)
        for n in (1000, 900, 480 + WINDOW):
            model.start(ids[:n])
            got = model.read(ids[len(model._ids) : n])
            np.testing.assert_allclose(got, model.logits(ids[:n], all_positions=False), atol=NOISE)


def test_an_interrupt_in_the_middle_of_a_prompt(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The batch that was begun has overwritten part of the ring; what is asked next is answered as by a fresh model."""
    with load(path, n_ctx=3000) as model:
        ids = some_ids(1500)
        model.start(ids[:900])
        model.read(ids[:900])
        run = model._engine.forward
        calls = []

        def interrupted(*args: Any) -> np.ndarray:
            calls.append(run(*args))
            if len(calls) == 2:
                raise KeyboardInterrupt
            return calls[-1]

        monkeypatch.setattr(model._engine, "forward", interrupted)
        longer = ids[:900] + some_ids(1200, seed=8)
        model.start(longer)
        with pytest.raises(KeyboardInterrupt):
            model.read(longer[900:])
        monkeypatch.setattr(model._engine, "forward", run)
        for prompt in (longer, ids[:901], [*ids[:900], 7]):
            kept = model.start(prompt)
            got = model.read(prompt[kept:])
            np.testing.assert_allclose(got, model.logits(prompt, all_positions=False), atol=NOISE)


def test_closing_a_reply_and_going_on(path: Path) -> None:
    with load(path) as model, load(path) as fresh:
        ids = some_ids(30)
        reply = model.generate(ids, sampling=GREEDY, max_tokens=50)
        next(reply)
        reply.close()
        assert reply.stop_reason == "interrupted"
        assert greedy(model, ids + reply.ids, 9) == greedy(fresh, ids + reply.ids, 9)


# ---- chat
def test_chat_reuses_the_conversation(path: Path) -> None:
    with load(path) as model, load(path) as fresh:
        messages = [Message("system", "be kind"), Message("user", "hello there")]
        reply = model.chat(messages, sampling=GREEDY, max_tokens=6)
        text = "".join(reply)
        assert model.prompt_version == "v1"
        assert reply.stats.reused_tokens == 0
        messages += [Message("assistant", text or "x"), Message("user", "and then")]
        second = model.chat(messages, sampling=GREEDY, max_tokens=6)
        pieces = list(second)
        assert second.stats.reused_tokens >= reply.stats.prompt_tokens
        other = fresh.chat(messages, sampling=GREEDY, max_tokens=6)
        assert list(other) == pieces
        assert other.ids == second.ids


# ---- reasons to stop
def test_length_and_context(path: Path) -> None:
    with load(path, n_ctx=40) as model:
        reply = model.generate(some_ids(30), sampling=GREEDY, max_tokens=5)
        list(reply)
        assert (reply.stop_reason, len(reply.ids)) == ("length", 5)
        reply = model.generate(some_ids(30), sampling=GREEDY, max_tokens=500)
        list(reply)
        assert reply.stop_reason in ("context", "eos")
        assert reply.stop_reason == "eos" or len(reply.ids) == 11
        reply = model.generate(some_ids(40), sampling=GREEDY)
        list(reply)
        assert len(reply.ids) == (reply.stop_reason == "context")


def test_a_stop_text(model: Model) -> None:
    _, text = greedy(model, "the", 30)
    assert len(text) > 10
    reply = model.generate("the", sampling=GREEDY, max_tokens=30, stop=[text[5:9]])
    assert "".join(reply) == text[: text.index(text[5:9])]
    assert reply.stop_reason == "stop"


# ---- what is refused
@pytest.mark.parametrize(
    ("prompt", "options", "says"),
    [
        ([], {}, "empty"),
        ([1, 512], {}, "0 to 511"),
        ([1, -1], {}, "0 to 511"),
        ([1] * 201, {}, "201 tokens"),
        ([1], {"max_tokens": 0}, "max_tokens"),
        ([1], {"stop": "the"}, "list of texts"),
    ],
)
def test_bad_prompts(model: Model, prompt: list[int], options: dict[str, Any], says: str) -> None:
    with pytest.raises(UsageError, match=says):
        model.generate(prompt, **options)
    if not options:
        with pytest.raises(UsageError, match=says):
            model.logits(prompt)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"threads": 0}, "threads"),
        ({"threads": 100_000}, "threads"),
        ({"window": -1}, "window"),
        ({"n_ctx": 0}, "context"),
        ({"n_ctx": 5000, "window": 0}, "4096"),
        ({"kv_type": "q4"}, "f16, q8_0"),
    ],
)
def test_bad_options(path: Path, options: dict[str, Any], says: str) -> None:
    with pytest.raises(UsageError, match=says):
        load(path, **options)


def test_a_context_beyond_memory(path: Path) -> None:
    with pytest.raises(ResourceError, match="GiB"):
        load(path, window=2**31 - 1, n_ctx=2**31 - 1)


def test_no_such_model(tmp_path: Path) -> None:
    with pytest.raises(LlmqError):
        load(tmp_path / "none.gguf")


def test_a_window_can_be_given(tiny_model: Tiny) -> None:
    """The file's window, none, and another; each as long as the file's limit allows."""
    plain, windowed = tiny_model(n_layers=1)[0], tiny_model(n_layers=1, window=WINDOW)[0]
    ids = some_ids(80)
    with load(windowed) as model:
        expected = model.logits(ids)
    with load(plain, window=WINDOW, n_ctx=9000) as model:
        assert model.config.window == WINDOW
        assert model.n_ctx == 9000
        np.testing.assert_array_equal(model.logits(ids), expected)
    with load(windowed, window=0) as model:
        assert np.abs(model.logits(ids)[-1] - expected[-1]).max() > 1e-3


def test_a_closed_model_says_so(path: Path) -> None:
    """Not a crash at an address that is no longer mapped, nor a wait for threads that have gone."""
    model = load(path)
    reply = model.generate([1, 5], max_tokens=50)
    next(reply, None)
    model.close()
    model.close()
    for use in (lambda: model.logits([1, 5]), lambda: next(reply), lambda: next(model.generate([1, 5]))):
        with pytest.raises(UsageError, match="closed"):
            use()


def test_a_file_that_got_shorter(tiny_model: Tiny, tmp_path: Path) -> None:
    copy = tmp_path / "model.gguf"
    copy.write_bytes(tiny_model(n_layers=1)[0].read_bytes())
    with load(copy, threads=1) as model:
        greedy(model, [1, 5])
        os.truncate(copy, copy.stat().st_size // 2)
        with pytest.raises(FileFormatError, match="shorter"):
            next(model.generate([1, 6]))


def test_two_models_at_once(tiny_model: Tiny) -> None:
    """Interleaved replies of two models, each with its threads, equal those of each alone."""
    files = [tiny_model(n_layers=1, format=Q4_K)[0], tiny_model(n_layers=1, format=Q8_0, seed=4)[0]]
    alone = []
    for file in files:
        with load(file) as model:
            alone.append(greedy(model, "the", 10)[0])
    with load(files[0]) as first, load(files[1]) as second:
        replies = [model.generate("the", sampling=GREEDY, max_tokens=10) for model in (first, second)]
        for _ in range(30):
            for reply in replies:
                next(reply, None)
    assert [reply.ids for reply in replies] == alone


def test_ctrl_c_ends_a_reply_and_not_the_program(path: Path) -> None:
    """A real signal while compiled code runs in two threads; after it the same prompt has the same answer."""
    code = """
import signal, sys, threading, os
import llmq
with llmq.load(sys.argv[1], threads=2) as model:
    greedy = llmq.Sampling(temperature=0)
    ids = [5 + i % 300 for i in range(700)]
    expected = model.generate(ids, sampling=greedy, max_tokens=20)
    list(expected)
    for i in range(30):
        reply = model.generate([9 + i, *ids], sampling=greedy, max_tokens=200)
        timer = threading.Timer(0.002 * i, os.kill, (os.getpid(), signal.SIGINT))
        try:
            timer.start()
            list(reply)
            while True:
                timer.join()
        except KeyboardInterrupt:
            pass
        timer.cancel()
    again = model.generate(ids, sampling=greedy, max_tokens=20)
    list(again)
    print(again.ids == expected.ids)
"""
    done = subprocess.run(
        [sys.executable, "-c", code, path], capture_output=True, text=True, timeout=120, cwd=Path(__file__).parents[1]
    )
    assert (done.returncode, done.stdout) == (0, "True\n"), done.stderr[-2000:]
