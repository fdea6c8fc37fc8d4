"""The commands with the bundled model and the real engine, as a new user runs them."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from llmq.store import BUNDLED_PATH

ROOT = Path(__file__).parents[1]
PROGRAM = [sys.executable, "-m", "cli.main"]
PROMPT = "Tell me a story about a cat."

pytestmark = pytest.mark.skipif(not BUNDLED_PATH.is_file(), reason=f"{BUNDLED_PATH.name} is not in the package")


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LLMQ_HOME", str(tmp_path / "home"))


def llmq(*arguments: str, stdin: str = "") -> subprocess.CompletedProcess[str]:
    return subprocess.run([*PROGRAM, *arguments], cwd=ROOT, input=stdin, capture_output=True, text=True, env=os.environ)


def test_run_tells_a_story() -> None:
    told = llmq("run", "--temp", "0", "-n", "80", PROMPT)
    assert told.returncode == 0, told.stderr
    assert told.stdout.startswith("Once upon a time")
    assert "\x1b" not in told.stdout + told.stderr
    assert llmq("run", "--temp", "0", "-n", "80", PROMPT).stdout == told.stdout


def test_the_text_is_that_of_the_python_interface() -> None:
    from llmq.model import load
    from llmq.prompt import Message
    from llmq.sampler import Sampling

    with load("storyteller") as model:
        text = "".join(model.chat([Message("user", PROMPT)], sampling=Sampling(temperature=0), max_tokens=40))
    reply = json.loads(llmq("run", "--json", "--temp", "0", "-n", "40", PROMPT).stdout)
    assert reply["text"] == text
    assert reply["stop_reason"] == "length"


def test_a_seed_repeats_a_reply_and_another_changes_it() -> None:
    first, again, other = (llmq("run", "--seed", seed, "-n", "40", PROMPT).stdout for seed in ("1", "1", "2"))
    assert first == again != other


def test_lookup_changes_the_time_alone() -> None:
    text = "Once upon a time there was a cat. " * 6
    options = ("run", "--raw", "--json", "--seed", "1", "--temp", "0.3", "-n", "60", text)
    plain, guessed = (json.loads(llmq(*options, *lookup).stdout) for lookup in ((), ("--lookup",)))
    assert guessed["text"] == plain["text"]
    assert guessed["stats"]["drafted"] >= guessed["stats"]["accepted"] > 0
    assert plain["stats"]["drafted"] == 0


def test_a_stop_text_ends_the_reply() -> None:
    assert "time" not in llmq("run", "--temp", "0", "--stop", "time", PROMPT).stdout


def test_a_conversation_remembers() -> None:
    chat = llmq("chat", "--temp", "0", "-n", "60", stdin=f"{PROMPT}\nAnd then?\n")
    assert chat.returncode == 0, chat.stderr
    first = llmq("run", "--temp", "0", "-n", "60", PROMPT).stdout
    assert chat.stdout.startswith(first)
    assert len(chat.stdout) > len(first) + 20


def test_a_full_context_is_said_plainly() -> None:
    cut = llmq("run", "--ctx", "40", "--temp", "0", PROMPT)
    assert cut.returncode == 0
    assert "context of 40 tokens is full" in cut.stderr
    refused = llmq("run", "--ctx", "5", PROMPT)
    assert refused.returncode != 0
    assert refused.stdout == ""
    assert "context holds 5" in refused.stderr
    assert refused.stderr.count("\n") == 1


def test_show_and_list_know_it() -> None:
    shown = llmq("show").stdout
    assert "8 experts, 2 used a token" in shown
    assert "window      256 tokens" in shown
    assert "\nstoryteller  " in llmq("list").stdout
