"""A model that is asked for two replies in turns, used after close(), or loses its file's name."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import Tiny

from llmq import Sampling, load
from llmq.errors import UsageError

GREEDY = Sampling(temperature=0)
PROMPT = [1, 40, 50, 60]


@pytest.fixture(scope="module")
def path(tiny_model: Tiny) -> Path:
    return tiny_model(n_layers=1)[0]


def test_a_reply_ends_when_the_next_one_begins(path: Path) -> None:
    """Read on, it would write into the other's conversation."""
    with load(path) as model:
        alone = model.generate([1, 70, 80], sampling=GREEDY, max_tokens=8)
        list(alone)
        first = model.generate(PROMPT, sampling=GREEDY, max_tokens=400)
        next(first)
        second = model.generate([1, 70, 80], sampling=GREEDY, max_tokens=8)
        next(second)
        with pytest.raises(UsageError, match="another reply of this model has begun"):
            list(first)
        list(second)
        assert second.ids == alone.ids


def test_a_reply_that_has_not_begun_disturbs_nobody(path: Path) -> None:
    with load(path) as model:
        alone = model.generate(PROMPT, sampling=GREEDY, max_tokens=8)
        list(alone)
        first = model.generate(PROMPT, sampling=GREEDY, max_tokens=8)
        next(first)
        model.generate([1, 70, 80])
        list(first)
        assert first.ids == alone.ids


CLOSED = """
import sys
from llmq import load
from llmq.errors import UsageError
model = load(sys.argv[1], threads=int(sys.argv[2]))
reply = model.generate([1, 40, 50], max_tokens=400)
next(reply)
model.close()
model.close()
for use in (lambda: list(reply), lambda: model.generate([1, 2]), lambda: model.logits([1, 2])):
    try:
        use()
    except UsageError as error:
        print(error)
"""


@pytest.mark.parametrize("threads", ["1", "2"])
def test_a_closed_model_says_so(path: Path, threads: str) -> None:
    """In a process of its own: memory that is not mapped any more must not be read."""
    done = subprocess.run(
        [sys.executable, "-c", CLOSED, str(path), threads], capture_output=True, text=True, timeout=120, check=True
    )
    assert done.stdout.splitlines() == [f"{path.name!r} has been closed; load it again"] * 3


@pytest.mark.skipif(os.name == "nt", reason="a mapped file cannot be replaced there")
@pytest.mark.parametrize("replaced", [True, False])
def test_a_file_that_is_replaced_or_removed_is_read_on(path: Path, tmp_path: Path, replaced: bool) -> None:
    copy = tmp_path / "model.gguf"
    copy.write_bytes(path.read_bytes())
    with load(copy) as model:
        expected = model.logits(PROMPT)
        if replaced:
            (tmp_path / "new").write_bytes(b"GGUF, and shorter")
            (tmp_path / "new").replace(copy)
        else:
            copy.unlink()
        np.testing.assert_array_equal(model.logits(PROMPT), expected)


def test_ids_may_be_an_array(path: Path) -> None:
    with load(path) as model:
        np.testing.assert_array_equal(model.logits(np.array(PROMPT)), model.logits(PROMPT))
        with pytest.raises(UsageError, match="the prompt is empty"):
            model.logits(np.array([], np.int64))


@pytest.mark.parametrize("number", [2**31 + 1, 2**70])
def test_numbers_beyond_any_position_are_refused(path: Path, number: int) -> None:
    with pytest.raises(UsageError, match="the window is"):
        load(path, window=number)
    with pytest.raises(UsageError, match="the context is"):
        load(path, n_ctx=number, window=64)
