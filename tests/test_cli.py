"""The commands as a user types them, with a model that needs no engine: output, errors and exit codes."""

import io
import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import cli_fake
import pytest
from cli_runs import llmq
from hypothesis import given
from hypothesis import strategies as st

from cli import screen
from cli.commands import COMMANDS
from cli.main import os_error_line
from cli.reply import figures
from llmq import __version__

ROOT = Path(__file__).parents[1]
FAKE = [sys.executable, str(ROOT / "tests" / "cli_fake.py")]


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("LLMQ_HOME", str(tmp_path / "home"))
    monkeypatch.delenv("LLMQ_DEBUG", raising=False)
    return tmp_path / "home"


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    module = cli_fake.module()
    monkeypatch.setitem(sys.modules, "llmq.model", module)
    return module


def feed(monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO(text))


def test_run_writes_the_answer_and_nothing_else_to_stdout(fake, capsys) -> None:
    code, out, err = llmq(capsys, "run", "Tell", "me a story.")
    assert (code, out) == (0, "one two. [1: Tell me a story.]\n")
    assert "\x1b" not in err
    assert fake.loaded[0].closed
    assert fake.loaded[0].generations[0].closed


@pytest.mark.parametrize(
    ("arguments", "prompt"),
    [([], "from stdin"), (["-"], "from stdin"), (["Sum up:", "-"], "Sum up: from stdin"), (["just this"], "just this")],
)
def test_a_dash_or_nothing_stands_for_stdin(fake, capsys, monkeypatch, arguments, prompt) -> None:
    feed(monkeypatch, "from stdin\n")
    code, _, _ = llmq(capsys, "run", *arguments)
    assert code == 0
    assert fake.loaded[0].calls[0]["messages"] == [("user", prompt)]


@pytest.mark.parametrize("text", ["", " \n\t\n"])
def test_an_empty_prompt_is_a_usage_error(fake, capsys, monkeypatch, text) -> None:
    feed(monkeypatch, text)
    code, out, err = llmq(capsys, "run")
    assert (code, out) == (2, "")
    assert err.startswith("llmq: the prompt is empty")
    assert not fake.loaded


def test_too_long_a_prompt_is_refused_unread(fake, capsys, monkeypatch) -> None:
    feed(monkeypatch, "a" * 16_000_001)
    code, _, err = llmq(capsys, "run")
    assert code == 2
    assert "16 million" in err
    assert not fake.loaded


OPTIONS = [
    (["--temp", "0"], "sampling.temperature", 0.0),
    (["--top-k", "40"], "sampling.top_k", 40),
    (["--top-p", "0.5"], "sampling.top_p", 0.5),
    (["--min-p", "0.1"], "sampling.min_p", 0.1),
    (["--repeat-penalty", "1.2"], "sampling.repetition_penalty", 1.2),
    (["--seed", "7"], "sampling.seed", 7),
    (["-n", "5"], "max_tokens", 5),
    (["--max-tokens", "6"], "max_tokens", 6),
    (["--stop", "a", "--stop", "b"], "stop", ["a", "b"]),
    (["--lookup"], "lookup", True),
    (["--ctx", "99"], "load.n_ctx", 99),
    (["--window", "32"], "load.window", 32),
    (["--threads", "3"], "load.threads", 3),
    (["--kv-type", "q8_0"], "load.kv_type", "q8_0"),
]


@pytest.mark.parametrize("command", ["run", "chat"])
@pytest.mark.parametrize(("arguments", "where", "value"), OPTIONS, ids=lambda value: str(value))
def test_every_option_reaches_the_model(fake, capsys, monkeypatch, command, arguments, where, value) -> None:
    feed(monkeypatch, "hello\n")
    code, _, err = llmq(capsys, command, *arguments)
    assert code == 0, err
    model = fake.loaded[0]
    call = model.calls[0]
    scope, _, name = where.rpartition(".")
    if scope == "sampling":
        assert getattr(call["sampling"], name) == value
    else:
        assert (model.asked if scope == "load" else call)[name] == value


@pytest.mark.parametrize("command", ["run", "chat"])
def test_the_system_prompt_comes_first(fake, capsys, monkeypatch, command) -> None:
    feed(monkeypatch, "hello\n")
    llmq(capsys, command, "--system", "Be brief.")
    assert fake.loaded[0].calls[0]["messages"] == [("system", "Be brief."), ("user", "hello")]


def test_raw_continues_the_text_itself(fake, capsys) -> None:
    code, out, _ = llmq(capsys, "run", "--raw", "Once upon")
    assert (code, out) == (0, "one two. [0: Once upon]\n")
    assert fake.loaded[0].calls[0]["prompt"] == "Once upon"
    assert llmq(capsys, "run", "--raw", "--system", "x", "Once")[0] == 2


def test_json_is_one_object_with_the_text_untouched(fake, capsys) -> None:
    fake.prepare = lambda model: model.replies.update(hello=["a\x1b[31m", "b\n"])
    code, out, _ = llmq(capsys, "run", "--json", "hello")
    assert code == 0
    assert out.isascii()
    assert "\x1b" not in out
    reply = json.loads(out)
    assert reply["text"] == "a\x1b[31mb\n"
    assert reply["stop_reason"] == "eos"
    assert reply["model"] == "storyteller"
    assert reply["stats"]["tokens"] == 2


def test_figures_tell_what_lookup_guessed() -> None:
    generation = cli_fake.Generation(iter(()), "eos", 5)
    assert "lookup" not in figures(generation, 64)
    generation.stats.drafted, generation.stats.accepted = 30, 24
    assert " tok/s, lookup 24/30; prompt" in figures(generation, 64)


@pytest.mark.parametrize(("reason", "said"), [("length", "cut after 1024"), ("context", "64 tokens is full")])
def test_a_cut_answer_says_so(fake, capsys, reason, said) -> None:
    fake.prepare = lambda model: model.stop_reasons.update(hello=reason)
    code, out, err = llmq(capsys, "run", "hello")
    assert code == 0
    assert said in err
    assert said not in out


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["run", "overflow"], 3, "context holds 64"),
        (["run", "-m", "nobody", "hi"], 2, "no model is named 'nobody'"),
        (["run", "-m", "no.gguf", "hi"], 2, "no file 'no.gguf'"),
        (["run", "--temp", "hot", "hi"], 2, "--temp"),
        (["run", "--temp", "-1", "hi"], 2, "temperature"),
        (["run", "--temp", "nan", "hi"], 2, "temperature"),
        (["run", "--top-p", "7", "hi"], 2, "top_p"),
        (["run", "-n", "0", "hi"], 2, "-n"),
        (["run", "--threads", "0", "hi"], 2, "--threads"),
        (["run", "--nothing", "hi"], 2, "--nothing"),
        (["frobnicate"], 2, "frobnicate"),
        (["frob\x1b[31mnicate\n"], 2, "frob"),
        (["rm", "storyteller"], 2, "part of llmq"),
        (["rm", "../../etc/passwd"], 2, "not a model name"),
        (["rm"], 2, "NAME"),
        (["verify"], 2, "--all"),
        (["import"], 2, "FILE"),
        (["where", "nobody"], 2, "no model"),
        (["show", "nobody"], 2, "no model"),
        (["run", "interrupt"], 130, ""),
        (["run", "crash"], 1, "bug in llmq"),
    ],
)
@pytest.mark.usefixtures("fake")
def test_errors_are_one_line_with_a_documented_code(capsys, arguments, code, said) -> None:
    got, out, err = llmq(capsys, *arguments)
    assert (got, out) == (code, "")
    assert said in err
    assert "Traceback" not in err
    if said:
        assert err.startswith("llmq: ")
        assert err.count("\n") == 1
        assert len(err) <= 241
        assert err.rstrip("\n").isprintable()


@pytest.mark.usefixtures("fake")
def test_a_bug_shows_its_place_when_asked(capsys, monkeypatch) -> None:
    monkeypatch.setenv("LLMQ_DEBUG", "1")
    code, _, err = llmq(capsys, "run", "crash")
    assert code == 1
    assert "Traceback" in err
    assert "in reply" in err


@pytest.mark.usefixtures("fake")
def test_a_traceback_holds_no_values(capsys, monkeypatch) -> None:
    monkeypatch.setenv("LLMQ_DEBUG", "1")
    monkeypatch.setenv("HF_TOKEN", "hf_canary")
    for arguments in (["run", "crash"], ["run", "overflow"], ["run", "--temp", "x", "hi"], ["show", "x"]):
        _, _, err = llmq(capsys, *arguments, "--system", "canary") if "crash" in arguments else llmq(capsys, *arguments)
        assert "canary" not in err


@pytest.mark.parametrize("arguments", [["--version"], ["-h"], ["--help"], [], ["run", "--help"], ["chat", "-h"]])
def test_help_and_version(capsys, arguments) -> None:
    code, out, err = llmq(capsys, *arguments)
    assert (code, err) == (0, "")
    assert out == f"llmq {__version__}\n" if "--version" in arguments else "Usage: llmq" in out
    assert "\x1b" not in out


def test_help_and_the_store_load_nothing_heavy(tmp_path) -> None:
    heavy = {"numba", "llvmlite", "numpy", "sentencepiece", "prompt_toolkit", "rich", "llmq.model", "gguf", "torch"}
    script = (
        "import sys; from cli.main import execute; code = execute(sys.argv[1:]); "
        f"print(sorted({heavy!r} & set(sys.modules)), file=sys.stderr); sys.exit(code)"
    )
    environment = os.environ | {"LLMQ_HOME": str(tmp_path)}
    for arguments, allowed in (
        (["--help"], "[]"),
        (["run", "--help"], "[]"),
        (["list"], "['numpy']"),
        (["list", "-a"], "[]"),
        (["where"], "[]"),
        (["prune"], "[]"),
        (["list", "--json"], "['numpy']"),
        (["show"], "['numpy']"),
        (["verify", "--all"], "['numpy']"),
        (["import", str(ROOT / "llmq" / "storyteller.gguf"), "--name", "story"], "['numpy', 'sentencepiece']"),
        (["rm", "story"], "[]"),
    ):
        done = subprocess.run(
            [sys.executable, "-c", script, *arguments], cwd=ROOT, env=environment, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        assert done.stderr.splitlines()[-1] in ("[]", allowed)


def test_completion_offers_commands_and_models(home) -> None:
    folder = home / "models"
    folder.mkdir(parents=True)
    (folder / "pebble.gguf").write_bytes(b"")
    for words, expected in (("llmq q", "quantize"), ("llmq chat peb", "pebble"), ("llmq rm peb", "pebble")):
        environment = os.environ | {
            "_LLMQ_COMPLETE": "complete_bash",
            "COMP_WORDS": words,
            "COMP_CWORD": str(words.count(" ")),
        }
        done = subprocess.run(FAKE, cwd=ROOT, env=environment, capture_output=True, text=True)
        assert done.stdout.split() == [expected], done.stderr


# What a terminal would act on, each as a whole and as the pieces it may arrive in.
HOSTILE = [
    "\x1b[2J", "\x1b]0;title\x07", "\x1b]8;;http://x\x1b\\link\x1b]8;;\x1b\\", "\x1b]52;c;AAAA\x07", "\x1bP$q\x1b\\",
    "\x1b]1337;File=:AAAA\x07", "\x1b_apc\x1b\\", "\x9b31m", "\x9d0;x\x9c", "\x90q\x9c", "safe\rover", "ab\b\b",
    "\x07", "\x00", "\x7f", "\u202eabc\u202c", "\u2066x\u2069", "\U000e0041\U000e0042", "\ufeff", "\x0c", "\x0b",
    "\ud800",
]  # fmt: skip


@pytest.mark.parametrize("text", HOSTILE)
def test_hostile_text_is_disarmed_wherever_it_is_split(fake, capsys, text) -> None:
    for cut in range(len(text) + 1):
        fake.prepare = lambda model, cut=cut: model.replies.update(hello=["a ", text[:cut], text[cut:], " b"])
        _, out, _ = llmq(capsys, "run", "hello")
        assert out.startswith("a ")
        assert out.endswith(" b\n")
        assert all(character == "\n" or character.isprintable() for character in out)


@given(st.lists(st.text(), max_size=8))
def test_cleaning_pieces_is_cleaning_the_whole(pieces) -> None:
    cleaned = "".join(map(screen.clean, pieces))
    assert cleaned == screen.clean("".join(pieces))
    assert not any(ord(character) < 32 and character not in "\n\t" for character in cleaned)
    assert not any(0x7F <= ord(character) < 0xA0 for character in cleaned)


@given(st.text(st.characters(exclude_categories=["C"])))
def test_ordinary_text_is_left_alone(text) -> None:
    assert screen.clean(text) == text


MARKUP = ["[/INST]", "[link=http://x]y[/link]", "[/]", "\\[", "[bold", "[red]x", "[INST] [/INST] [[", ":smile:"]


@pytest.mark.parametrize("text", MARKUP)
def test_markup_is_shown_as_it_is(fake, capsys, text) -> None:
    fake.prepare = lambda model: model.replies.update(hello=[text])
    assert llmq(capsys, "run", "hello")[1] == text + "\n"


def spawn(
    arguments: list[str], stdin: str = "", shell: str = "", **environment: str
) -> subprocess.CompletedProcess[bytes]:
    command = ["bash", "-c", f'"$@" {shell}; exit ${{PIPESTATUS[0]}}', "bash", *FAKE, *arguments]
    return subprocess.run(command, cwd=ROOT, env=os.environ | environment, input=stdin.encode(), capture_output=True)


needs_bash = pytest.mark.skipif(os.name == "nt", reason="redirections are POSIX")


@needs_bash
def test_a_reader_that_leaves_is_no_error() -> None:
    for arguments, lines in ((["chat"], 20_000), (["run", "hello"], 0)):
        done = spawn(arguments, "hello\n" * lines, "| true")
        assert done.returncode in (141, 0)
        assert done.stdout == b""
        assert b"Traceback" not in done.stderr
        assert b"rror" not in done.stderr
    assert spawn(["chat"], "hello\n" * 20_000, "| head -c 10").returncode == 141


@needs_bash
def test_a_full_disk_is_one_line() -> None:
    for arguments in (["run", "hello"], ["run", "--json", "hello"], ["--help"], ["list", "--all"], ["--version"]):
        done = spawn(arguments, shell="> /dev/full")
        assert done.returncode == 1
        last = done.stderr.decode().splitlines()[-1]
        assert last == "llmq: No space left on device; free some disk space"
        assert b"Exception ignored" not in done.stderr
    assert spawn(["list"], shell="2> /dev/full").returncode == 1


@needs_bash
@pytest.mark.parametrize("shell", ["< /dev/null", "<&-", ">&-", "2>&-", "<&- >&- 2>&-", "2> /dev/full", "2>&1 | true"])
def test_closed_and_broken_streams_give_no_traceback(shell) -> None:
    for arguments in (["run", "hello"], ["chat"], ["list"], ["run"], ["show", "nobody"]):
        done = spawn(arguments, "hello\n", shell)
        assert b"Traceback" not in done.stdout + done.stderr
        assert done.returncode in (0, 1, 2, 141), done


@needs_bash
@pytest.mark.parametrize(
    "environment",
    [
        {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"},
        {"PYTHONIOENCODING": "ascii"},
        {"PYTHONIOENCODING": "latin-1"},
        {"TERM": "dumb"},
        {"COLUMNS": "0"},
        {"COLUMNS": "20"},
        {"HOME": "/nonexistent", "LLMQ_HOME": "", "XDG_DATA_HOME": ""},
        {"HOME": "relative/home", "LLMQ_HOME": ""},
    ],
)
def test_odd_environments(environment) -> None:
    done = spawn(["run", "caf\u00e9 \u4f60\u597d \U0001f600"], **environment)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(b"one two. [1: caf")
    assert b"\x1b" not in done.stdout + done.stderr
    assert spawn(["--help"], **environment).returncode == 0
    assert spawn(["list"], **environment).returncode == 0


EARLY = """
import os, signal, sys
class Press:
    def find_spec(self, name, path, target=None):
        if name == "cli.main":
            os.kill(os.getpid(), signal.SIGINT)
sys.meta_path.insert(0, Press())
from cli.start import start
start()
"""


@pytest.mark.skipif(os.name == "nt", reason="signals are POSIX's")
def test_ctrl_c_before_the_program_is_loaded_says_nothing() -> None:
    done = subprocess.run([sys.executable, "-c", EARLY], cwd=ROOT, capture_output=True)
    assert (done.returncode, done.stderr) == (-signal.SIGINT, b"")


def test_bytes_that_are_no_text_do_not_stop_a_prompt() -> None:
    done = subprocess.run([*FAKE, "run", b"caf\xe9 \xff"], cwd=ROOT, env=os.environ, capture_output=True)
    assert done.returncode == 0, done.stderr
    piped = subprocess.run([*FAKE, "run"], cwd=ROOT, env=os.environ, capture_output=True, input=b"caf\xe9 \xff\x00 ok")
    assert piped.returncode == 0, piped.stderr
    assert piped.stdout.startswith(b"one two. [1: caf")


def test_a_command_line_error_points_to_the_help(capsys) -> None:
    assert llmq(capsys, "run", "--nothing") == (2, "", "llmq: No such option: --nothing; try `llmq run --help`\n")
    assert llmq(capsys, "rm") == (2, "", "llmq: Missing argument 'NAME'; try `llmq rm --help`\n")


def test_os_errors_name_the_file_and_the_next_step() -> None:
    name = "a\x1b[31m\nb"
    assert os_error_line(PermissionError(13, "Permission denied", name)) == (
        "'a\\x1b[31m\\nb': Permission denied; check who may read or write there"
    )


def test_sizes() -> None:
    shown = [screen.size(n) for n in (0, 999, 1000, 13_467_776, 4_368_000_000)]
    assert shown == ["0 B", "999 B", "1.0 kB", "13.5 MB", "4.4 GB"]


def option_names(text: str) -> set[str]:
    return set(re.findall(r"(?<![\w-])--?[a-z][a-z-]*", text))


def test_the_manual_names_every_command_and_option(capsys) -> None:
    manual = (ROOT / "docs" / "cli.md").read_text("utf-8")
    commands = re.findall(r"^## llmq (\w+)", manual, re.MULTILINE)
    assert commands == re.findall(r"^  (\w+)  ", llmq(capsys, "--help")[1].partition("Commands:")[2], re.MULTILINE)
    helps = [llmq(capsys, command, "--help")[1] for command in commands]
    assert option_names("\n".join([*helps, llmq(capsys, "--help")[1]])) == option_names(manual)
    for name, command in COMMANDS.items():
        assert f"| `{command.usage}` |" in manual, name


def test_the_readme_uses_commands_that_exist(capsys) -> None:
    readme = (ROOT / "README.md").read_text("utf-8")
    names = re.findall(r"^  (\w+)  ", llmq(capsys, "--help")[1].partition("Commands:")[2], re.MULTILINE)
    used = re.findall(rf"llmq ({'|'.join(names)})\b([^`\n]*)", readme)
    assert {command for command, _ in used} == set(names)
    for command, rest in used:
        assert option_names(rest.partition('"')[0]) <= option_names(llmq(capsys, command, "--help")[1])


@pytest.mark.parametrize("page", ["cli.md", "models.md", "reliability.md", "quantization.md"])
def test_pages_give_commands_options_that_they_have(capsys, page: str) -> None:
    text = (ROOT / "docs" / page).read_text("utf-8")
    names = re.findall(r"^  (\w+)  ", llmq(capsys, "--help")[1].partition("Commands:")[2], re.MULTILINE)
    for command, rest in re.findall(rf"llmq ({'|'.join(names)})\b([^`\n|;]*)", text):
        assert option_names(re.sub('"[^"]*"', "", rest)) <= option_names(llmq(capsys, command, "--help")[1]), rest
