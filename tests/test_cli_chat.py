"""llmq chat through a pipe, and on a terminal driven by pexpect, with a model that needs no engine."""

import io
import json
import os
import signal
import stat
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import cli_fake
import pytest

from cli.keyboard import LineHistory
from cli.main import execute

ROOT = Path(__file__).parents[1]
FAKE = str(ROOT / "tests" / "cli_fake.py")


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("LLMQ_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    module = cli_fake.module()
    monkeypatch.setitem(sys.modules, "llmq.model", module)
    return module


def piped(monkeypatch, capsys, text: str, *arguments: str) -> tuple[int, str, str]:
    monkeypatch.setattr(sys, "stdin", io.StringIO(text))
    code = execute(["chat", *arguments])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_each_line_of_a_pipe_is_a_message_of_one_conversation(fake, monkeypatch, capsys) -> None:
    code, out, err = piped(monkeypatch, capsys, "hello\n\n  \nmore")
    assert code == 0
    assert out == "one two. [1: hello]\none two. [3: more]\n"
    assert err == ""
    assert fake.loaded[0].calls[1]["messages"] == [
        ("user", "hello"),
        ("assistant", "one two. [1: hello]"),
        ("user", "more"),
    ]


def test_commands_change_what_follows(fake, monkeypatch, capsys) -> None:
    lines = [
        "/system You are a duck.", "/set temp 0", "/set n 5", "/set seed 3", "quack",
        "/clear", "/system -", "more", "/usr/bin is a folder", "/exit", "never said",
    ]  # fmt: skip
    code, out, err = piped(monkeypatch, capsys, "\n".join(lines))
    assert code == 0, err
    first, second, third = fake.loaded[0].calls
    assert first["messages"] == [("system", "You are a duck."), ("user", "quack")]
    assert (first["sampling"].temperature, first["sampling"].seed, first["max_tokens"]) == (0.0, 3, 5)
    assert second["messages"] == [("user", "more")]
    assert third["messages"][-1] == ("user", "/usr/bin is a folder")
    assert "never said" not in out
    assert "duck" not in out


@pytest.mark.usefixtures("fake")
def test_help_set_and_stats_tell_what_there_is(monkeypatch, capsys) -> None:
    _, out, err = piped(monkeypatch, capsys, "/help\n/set\n/set top-k\n/stats\nhello\n/stats\n/system\n")
    assert out == "one two. [1: hello]\n"
    for expected in (
        "/clear", "/exit", "/system [TEXT]", "temp            0.7", "seed            random", "n               1024",
        "top-k  0", "1 turns, 2 threads", "3 tokens, 12.0 tok/s", "prompt 9, 18.0 tok/s, 1 reused",
        "context 13 of 64", "system prompt: none",
    ):  # fmt: skip
        assert expected in err


@pytest.mark.usefixtures("fake")
@pytest.mark.parametrize(
    ("line", "code", "said"),
    [
        ("/frobnicate", 2, "no command /frobnicate"),
        ("/set volume 3", 2, "no setting 'volume'"),
        ("/set temp hot", 2, "temp must be a number, not 'hot'"),
        ("/set top-k 1.5", 2, "top-k must be a whole number"),
        ("/set temp -1", 2, "temperature"),
        ("/set n 0", 2, "at least 1"),
        ("overflow", 3, "context holds 64"),
        ("interrupt", 130, ""),
    ],
)
def test_an_error_ends_a_pipe_with_its_code(monkeypatch, capsys, line, code, said) -> None:
    got, out, err = piped(monkeypatch, capsys, f"hello\n{line}\nmore\n")
    assert (got, out) == (code, "one two. [1: hello]\n")
    assert said in err
    assert err.count("\n") == bool(said)


def test_a_reply_that_does_not_fit_says_so_and_stays(fake, monkeypatch, capsys) -> None:
    fake.prepare = lambda model: model.stop_reasons.update(hello="context")
    code, out, err = piped(monkeypatch, capsys, "hello\nmore\n")
    assert code == 0
    assert "the context of 64 tokens is full" in err
    assert out.endswith("[3: more]\n")


def test_what_the_model_says_is_kept_as_it_is_and_shown_clean(fake, monkeypatch, capsys) -> None:
    fake.prepare = lambda model: model.replies.update(hello=["\x1b[31m", "[/INST]\u202e", "\n"])
    _, out, _ = piped(monkeypatch, capsys, "hello\nmore\n")
    assert out.startswith("[31m[/INST]\none")
    assert fake.loaded[0].calls[1]["messages"][1] == ("assistant", "\x1b[31m[/INST]\u202e\n")


class TestHistory:
    def test_it_keeps_whole_messages_newest_first(self, tmp_path) -> None:
        path = tmp_path / "state" / "chat_history"
        history = LineHistory(path)
        for text in ("one", "two\nlines", "\u4f60\u597d \ud800"):
            history.store_string(text)
        assert list(LineHistory(path).load_history_strings()) == ["\u4f60\u597d \ud800", "two\nlines", "one"]
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
        assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700

    def test_a_file_cut_anywhere_still_gives_the_whole_records(self, tmp_path) -> None:
        path = tmp_path / "history"
        for text in ("first", "second"):
            LineHistory(path).store_string(text)
        whole = path.read_bytes()
        for cut in range(len(whole)):
            path.write_bytes(whole[:cut])
            expected = [json.loads(line) for line in whole[:cut].split(b"\n") if line.endswith(b'"') and len(line) > 1]
            assert list(LineHistory(path).load_history_strings()) == expected[::-1]
            LineHistory(path).store_string("third")
            assert list(LineHistory(path).load_history_strings()) == ["third", *expected[::-1]]

    def test_garbage_is_passed_over_and_never_overwritten(self, tmp_path) -> None:
        path = tmp_path / "history"
        garbage = bytes(range(256)) * 20 + b"\n[1, 2]\n7\nnull\n" + b'{"a": 1}\n'
        path.write_bytes(garbage)
        LineHistory(path).store_string("kept")
        assert list(LineHistory(path).load_history_strings()) == ["kept"]
        assert path.read_bytes().startswith(garbage)

    def test_a_huge_file_is_read_from_its_end(self, tmp_path) -> None:
        path = tmp_path / "history"
        with path.open("wb") as file:
            file.truncate(1 << 30)
        LineHistory(path).store_string("last")
        assert list(LineHistory(path).load_history_strings()) == ["last"]

    @pytest.mark.parametrize("obstacle", ["folder", "link", "pipe", "blocked"])
    def test_what_cannot_be_used_costs_one_note(self, tmp_path, capsys, obstacle) -> None:
        path = tmp_path / "history"
        target = tmp_path / "target"
        if obstacle == "folder":
            path.mkdir()
        elif obstacle == "link":
            target.write_text("precious")
            path.symlink_to(target)
        elif obstacle == "pipe":
            os.mkfifo(path)
        else:
            (tmp_path / "file").write_text("")
            path = tmp_path / "file" / "history"
        history = LineHistory(path)
        assert list(history.load_history_strings()) == []
        history.store_string("a")
        history.store_string("b")
        err = capsys.readouterr().err
        assert err.count("not kept") == 1
        assert not target.exists() or target.read_text() == "precious"


pexpect = pytest.importorskip("pexpect")


def start(program: str, arguments: list[str]) -> "pexpect.spawn":
    return pexpect.spawn(program, arguments, cwd=str(ROOT), encoding="utf-8", timeout=20, dimensions=(24, 80))


@pytest.fixture
def terminal(home: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator["pexpect.spawn"]:
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("PROMPT_TOOLKIT_NO_CPR", "1")
    child = start(sys.executable, [FAKE, "chat"])
    child.home = home
    yield child
    child.close(force=True)


def say(child: "pexpect.spawn", text: str) -> None:
    child.send(text + "\r")


def ready(child: "pexpect.spawn") -> None:
    """Waits for the prompt: the editor asks the terminal to mark pastes, draws it, and shows the cursor."""
    child.expect("\x1b\\[\\?2004h")
    child.expect(">")
    child.expect("\x1b\\[\\?25h")


def gone(child: "pexpect.spawn", code: int = 0) -> None:
    child.expect(pexpect.EOF)
    child.wait()
    assert child.exitstatus == code
    assert "Traceback" not in child.before


def test_a_conversation(terminal) -> None:
    terminal.expect("comes with llmq")
    ready(terminal)
    say(terminal, "hello")
    terminal.expect(r"one two\. \[1: hello\]")
    terminal.expect(r"3 tokens, 12\.0 tok/s")
    ready(terminal)
    say(terminal, "more")
    terminal.expect(r"one two\. \[3: more\]")
    ready(terminal)
    say(terminal, "/exit")
    gone(terminal)
    lines = (terminal.home / "state" / "chat_history").read_text().splitlines()
    assert [json.loads(line) for line in lines] == ["hello", "more", "/exit"]


def test_ctrl_c_stops_the_reply_and_keeps_what_came(terminal) -> None:
    ready(terminal)
    say(terminal, "wait")
    terminal.expect("one ")
    terminal.sendintr()
    terminal.expect(r"\[interrupted\]")
    assert terminal.before.strip("\x1b[02m\r\n ") in ("", "^C", "two.", "^Ctwo.")
    ready(terminal)
    say(terminal, "more")
    terminal.expect(r"\[3: more\]")
    ready(terminal)
    terminal.sendeof()
    gone(terminal)


def test_ctrl_c_before_the_first_word_withdraws_the_message(terminal) -> None:
    ready(terminal)
    say(terminal, "think")
    terminal.expect("hm, ")
    terminal.sendintr()
    terminal.expect(r"\[interrupted\]")
    ready(terminal)
    say(terminal, "more")
    terminal.expect(r"\[1: more\]")
    ready(terminal)
    terminal.sendeof()
    gone(terminal)


def test_ctrl_c_at_the_prompt_leaves_only_twice_in_a_row_and_empty(terminal) -> None:
    ready(terminal)
    terminal.sendintr()
    terminal.expect("Ctrl-C again")
    ready(terminal)
    say(terminal, "hello")
    terminal.expect(r"\[1: hello\]")
    ready(terminal)
    terminal.send("half")
    terminal.expect("half")
    terminal.sendintr()
    say(terminal, "fresh")
    terminal.expect(r"\[3: fresh\]")
    ready(terminal)
    terminal.sendintr()
    terminal.expect("Ctrl-C again")
    ready(terminal)
    terminal.sendintr()
    gone(terminal)


def test_a_paste_of_several_lines_is_one_message(terminal) -> None:
    ready(terminal)
    terminal.send("\x1b[200~first\r\nsecond\nthird\x1b[201~")
    terminal.expect("third")
    terminal.send("\r")
    terminal.expect(r"\[1: first\r*\nsecond\r*\nthird\]")
    ready(terminal)
    terminal.send("above\x1b\rbelow")
    terminal.expect("below")
    terminal.send("\r")
    terminal.expect(r"\[3: above\r*\nbelow\]")


def test_tab_completes_commands_and_settings(terminal) -> None:
    ready(terminal)
    terminal.send("/st\t")
    terminal.expect("ats")
    terminal.send("\r")
    terminal.expect("0 turns")
    ready(terminal)
    terminal.send("/set repe\t")
    terminal.expect("at-penalty")
    terminal.send(" 1.5\r")
    terminal.expect(r"repeat-penalty +1\.5")


def test_an_error_costs_its_turn_only(terminal) -> None:
    ready(terminal)
    say(terminal, "overflow")
    terminal.expect("context holds 64")
    ready(terminal)
    say(terminal, "/frobnicate")
    terminal.expect("no command /frobnicate")
    ready(terminal)
    say(terminal, "hello")
    terminal.expect(r"\[1: hello\]")


def test_a_bug_ends_the_chat_with_one_line(terminal) -> None:
    ready(terminal)
    say(terminal, "crash")
    terminal.expect(r"llmq: a bug in llmq: RuntimeError: wires\[2J crossed; LLMQ_DEBUG=1 shows where")
    gone(terminal, 1)


@pytest.mark.parametrize("way", ["eof", "exit", "interrupt", "term", "bug"])
def test_the_terminal_is_left_as_it_was(monkeypatch, way) -> None:
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("PROMPT_TOOLKIT_NO_CPR", "1")
    script = f'stty -g; "{sys.executable}" "{FAKE}" chat; echo "code=$?"; stty -g'
    child = start("bash", ["-c", script])
    child.expect(r"([0-9a-f:]{20,})")
    before = child.match.group(1)
    ready(child)
    if way == "eof":
        child.sendeof()
    elif way == "exit":
        say(child, "/exit")
    elif way == "interrupt":
        child.sendintr()
        child.expect("again")
        ready(child)
        child.sendintr()
    elif way == "bug":
        say(child, "crash")
    else:
        say(child, "/system " + "x" * 10)
        ready(child)
        os.kill(only_child(child.pid), signal.SIGTERM)
    code = {"term": 143, "bug": 1}.get(way, 0)
    child.expect(f"code={code}")
    text = child.before
    child.expect(r"([0-9a-f:]{20,})")
    assert child.match.group(1) == before
    assert "Traceback" not in text
    assert "\x1b[?1049h" not in text
    assert text.rfind("\x1b[?2004l") > text.rfind("\x1b[?2004h")
    assert text.rfind("\x1b[?25l") <= text.rfind("\x1b[?25h")
    child.close(force=True)


def only_child(pid: int) -> int:
    import psutil

    (process,) = psutil.Process(pid).children()
    return process.pid


def test_storms_of_resizes_and_odd_input_do_not_disturb(terminal) -> None:
    ready(terminal)
    for width in range(100):
        terminal.setwinsize(10 + width % 20, 20 + width)
    terminal.send("\x00\x1bX\x1b[99~\u4f60\u597d\U0001f600\x1c")
    terminal.send("\x01\x0b")
    say(terminal, "hello")
    terminal.expect(r"\[1: hello\]")


def test_no_color_means_none(monkeypatch) -> None:
    monkeypatch.setenv("NO_COLOR", "1")
    child = start(sys.executable, [FAKE, "run", "hello"])
    child.expect(pexpect.EOF)
    assert "tok/s" in child.before
    assert "\x1b[2m" not in child.before
    child.close(force=True)
