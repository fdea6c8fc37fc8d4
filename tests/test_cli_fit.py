"""llmq fit: its table, its JSON, its exit codes, and what is told before a download."""

import contextlib
import dataclasses
import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from cli_runs import llmq
from hypothesis import given
from hypothesis import strategies as st
from tiny import tiny_gguf

from cli.fit import check_fit, choose_contexts, judge_download
from llmq import figures
from llmq.errors import ResourceError, UsageError
from llmq.figures import Machine
from llmq.formats import Q4_K, Q8_0
from quant import fit
from quant.size import parse_size

ROOT = Path(__file__).parents[1]
GB = 10**9
MACHINE = Machine(2, {1: 20.0, 2: 40.0}, 400.0, 1.7e9)


@pytest.fixture(autouse=True)
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine that is known, with 8 GB of memory and 50 GB of disk free."""
    monkeypatch.setenv("LLMQ_HOME", str(tmp_path / "home"))
    monkeypatch.delenv("LLMQ_DEBUG", raising=False)
    monkeypatch.setattr(figures, "remembered", lambda _folder, _n: MACHINE)
    free(monkeypatch, memory=8 * GB, disk=50 * GB)


def free(monkeypatch: pytest.MonkeyPatch, memory: float, disk: float) -> None:
    monkeypatch.setattr(fit, "memory_free", lambda: int(memory))
    monkeypatch.setattr(fit, "disk_free", lambda _folder: int(disk))


def cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.split("  ") if cell.strip()]


def test_types_by_contexts(capsys) -> None:
    code, out, err = llmq(capsys, "fit", "mistral-7b")
    assert (code, err) == (0, "")
    assert "\x1b" not in out
    assert max(map(len, out.splitlines())) <= 80
    head, table, last = out.split("\n\n")
    assert head == "mistral-7b: 7.2 B weights, context of 32768 tokens\nfree: 8.0 GB of memory, 50.0 GB of disk"
    header, *rows = [cells(line) for line in table.splitlines()]
    assert header == ["TYPE", "FILE", "REPLY/S", "PROMPT/S", "CTX 4096", "CTX 8192", "CTX 32768"]
    by_type = {row[0]: row[1:] for row in rows}
    assert len(by_type) == 12
    # 90 % of 40 GB/s over 4.37 GB but the embedding's 0.08, and 32 layers of 20 us; 60 % of 800e9 products over 6.98e9;
    # 4096 tokens at 131,072 bytes.
    assert by_type["q4_k_m"] == ["4.4 GB", "8.33", "68.8", "ok 5.1 GB", "ok 5.7 GB", "needs 8.9 GB"]
    assert by_type["q6_k"][3:] == ["ok 6.7 GB", "tight 7.3 GB", "needs 10.5 GB"]
    assert by_type["bf16"] == ["14.5 GB", "-", "-", "needs 15.3 GB", "needs 15.8 GB", "needs 19.0 GB"]
    assert last == "best for 4096 tokens is q6_k: llmq pull mistral-7b:q6_k\n"


def test_contexts_and_a_type_that_are_asked_for(capsys) -> None:
    code, out, _ = llmq(capsys, "fit", "mixtral-8x7b:Q2_K", "--ctx", "8192", "--ctx", "1024")
    assert code == 3
    assert cells(out.splitlines()[3])[-2:] == ["CTX 1024", "CTX 8192"]
    assert len(out.splitlines()) == 5
    code, out, _ = llmq(capsys, "fit", "7B:q8_0", "--ctx", "100")
    assert code == 0
    assert out.endswith("best for 100 tokens is q8_0\n")  # there is nothing to get


def test_a_file_that_is_there(capsys, tmp_path, monkeypatch) -> None:
    path = tmp_path / "my file.gguf"
    tiny_gguf(path, format=Q8_0)
    free(monkeypatch, memory=8 * GB, disk=0)
    code, out, err = llmq(capsys, "fit", path)
    assert (code, err) == (0, "")
    lines = out.splitlines()
    assert lines[0].startswith("my file: 1.")
    assert cells(lines[3])[4:] == ["CTX 4096"]
    assert len(lines) == 7
    assert cells(lines[4])[0] == "q8_0"
    assert shlex.split(lines[-1].partition(": ")[2]) == ["llmq", "chat", str(path)]


def test_an_installed_model_and_the_bundled_one(capsys, tmp_path) -> None:
    (tmp_path / "home" / "models").mkdir(parents=True)
    tiny_gguf(tmp_path / "home" / "models" / "mine.gguf", format=Q4_K)
    for name in "mine", "storyteller":
        code, out, _ = llmq(capsys, "fit", name)
        assert code == 0
        assert out.endswith(f": llmq chat {name}\n")


def test_json_is_one_object(capsys) -> None:
    code, out, err = llmq(capsys, "fit", "mistral-7b", "--json", "--ctx", "4096")
    assert (code, err) == (0, "")
    found = json.loads(out)
    assert set(found) == {"model", "weights", "context_length", "here", "types", "best", "command"}
    assert found["here"]["memory_free"] == 8 * GB
    (kind,) = (each for each in found["types"] if each["type"] == "q4_k_m")
    assert kind["file_bytes"] == pytest.approx(4.37 * GB, rel=0.005)
    (context,) = kind["contexts"]
    assert (context["n_ctx"], context["answer"]) == (4096, "ok")
    assert context["memory"]["cache"] == 4096 << 17
    assert context["memory"]["total"] == sum(value for name, value in context["memory"].items() if name != "total")
    assert found["best"] == {"type": "q6_k", "n_ctx": 4096}
    assert found["command"] == "llmq pull mistral-7b:q6_k"


@pytest.mark.parametrize("flags", [[], ["--json"]])
def test_nothing_fits(capsys, monkeypatch, flags) -> None:
    free(monkeypatch, memory=2 * GB, disk=50 * GB)
    code, out, err = llmq(capsys, "fit", "mistral-7b", *flags)
    assert code == 3
    assert (json.loads(out)["best"] is None) if flags else out.count("needs") == 36
    assert err.startswith("llmq: mistral-7b as q2_k with a context of 4096 needs 3.5 GB of memory and 2.0 GB are free;")
    assert err.count("\n") == 1


def test_a_full_disk(capsys, monkeypatch) -> None:
    free(monkeypatch, memory=80 * GB, disk=4 * GB)
    code, out, _ = llmq(capsys, "fit", "mistral-7b")
    assert code == 0
    by_type = {cells(line)[0]: cells(line)[4:] for line in out.splitlines()[4:-2]}
    assert by_type["q4_k_m"] == ["no disk"] * 3
    assert by_type["q2_k"][0] == "ok 3.5 GB"
    free(monkeypatch, memory=80 * GB, disk=1 * GB)
    code, _, err = llmq(capsys, "fit", "mistral-7b")
    assert code == 3
    assert "2.8 GB of disk and 1.0 GB are free; free some disk space" in err


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["nobody"], "no model is named 'nobody'"),
        (["no.gguf"], "no file"),
        (["mistral-7b:q9"], "no type 'q9'"),
        (["7B:"], "no type"),
        (["7B/13B"], "no more than there are"),
        (["mistral-7b", "--ctx", "0"], "--ctx"),
        (["mistral-7b", "--ctx", "32769"], "trained for 32768"),
        ([], "MODEL"),
        (["a{b}"], "no model is named"),
    ],
)
def test_what_cannot_be_is_refused_in_a_line(capsys, arguments, said) -> None:
    code, out, err = llmq(capsys, "fit", *arguments)
    assert (code, out) == (2, "")
    assert said in err
    assert err.count("\n") == 1


def test_rules_on_a_terminal(capsys, monkeypatch) -> None:
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "80")
    code, out, _ = llmq(capsys, "fit", "mistral-large-2407", "--ctx", "4096", "--ctx", "8192", "--ctx", "32768")
    assert code == 3
    assert "\u2500" * 20 in out
    rows = [line for line in out.splitlines() if "needs" in line]
    assert len(rows) == 12
    assert all(line.count("needs") == 3 and len(line) <= 80 for line in rows)


def test_a_machine_is_measured_where_nothing_is_remembered(capsys, monkeypatch) -> None:
    monkeypatch.setattr(figures, "remembered", lambda _folder, _n: None)
    asked: list[int] = []

    def measure(n_cores: int, tell) -> Machine:
        asked.append(n_cores)
        tell("measuring this machine")
        return MACHINE

    monkeypatch.setattr("llmq.machine.measure_and_remember", measure)
    code, out, err = llmq(capsys, "fit", "mistral-7b")
    assert code == 0
    assert len(asked) == 1
    assert err == "measuring this machine\n"
    assert "8.33" in out


HEAVY = {"numba", "llmq.machine", "llmq.engine.cpu", "llmq.model", "sentencepiece", "rich", "ssl", "http"}
SCRIPT = f"""
import sys
def watch(event, _arguments):
    assert not event.startswith("socket."), event
sys.addaudithook(watch)
import quant.fit
from llmq import figures
figures.remembered = lambda folder, n: figures.Machine(2, {{1: 20.0, 2: 40.0}}, 400.0, 1.7e9)
from cli.main import execute
code = execute(["fit", *sys.argv[1:]])
print(sorted({HEAVY!r} & set(sys.modules)), file=sys.stderr)
sys.exit(code)
"""


@pytest.mark.parametrize(("name", "loaded"), [("mistral-7b", []), ("storyteller", ["sentencepiece"])])
def test_a_known_machine_needs_neither_compiler_nor_network(tmp_path, name, loaded) -> None:
    environment = os.environ | {"LLMQ_HOME": str(tmp_path)}
    command = [sys.executable, "-c", SCRIPT, name, "--ctx", "64", "--json"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode in (0, 3), done.stderr
    assert done.stderr.splitlines()[-1] == str(loaded)


# ---- before a download
def test_a_download_that_fits_is_told_in_two_lines(capsys, tmp_path) -> None:
    verdict = judge_download(parse_size("mistral-7b"), None, tmp_path)
    check_fit(verdict, force=False)
    out, err = capsys.readouterr()
    assert out == ""
    assert err.splitlines() == [
        "mistral-7b as q4_k_m: 4.4 GB; about 8.33 tokens/s in replies, 68.8 in prompts",
        "disk: 4.5 GB needed, 50.0 GB free; memory for 4096 tokens: 5.1 GB needed, 8.0 GB free",
    ]


def test_what_has_come_already_needs_no_more_room(capsys, tmp_path, monkeypatch) -> None:
    free(monkeypatch, memory=5.2 * GB, disk=GB)
    verdict = judge_download(parse_size("mistral-7b"), 4096, tmp_path, already=4 * GB)
    check_fit(verdict, force=False)
    assert (
        "disk: 459.5 MB needed, 1.0 GB free; memory for 4096 tokens: 5.1 GB needed, 5.2 GB free, which is tight\n"
        in (capsys.readouterr().err)
    )


@pytest.mark.parametrize(
    ("memory", "disk", "n_ctx", "said"),
    [
        (8, 50, 32768, "with a context of 32768 needs 8.9 GB of memory and 8.0 GB are free; give --ctx 16384, which "),
        (
            4,
            50,
            1024,
            "needs 4.7 GB of memory and 4.0 GB are free; choose q3_k_m, which needs 3.9 GB of memory",
        ),
        (1, 50, 1024, "needs 4.7 GB of memory and 1.0 GB are free; choose a smaller model"),
        (8, 4, 4096, "needs 4.5 GB of disk and 4.0 GB are free; choose q3_k_l, which"),
        (8, 1, 4096, "needs 4.5 GB of disk and 1.0 GB are free; free some disk space"),
    ],
)
def test_what_cannot_work_is_refused_with_what_would(
    capsys, tmp_path, monkeypatch, memory: float, disk: float, n_ctx: int, said: str
) -> None:
    free(monkeypatch, memory * GB, disk * GB)
    verdict = judge_download(parse_size("mistral-7b"), n_ctx, tmp_path)
    with pytest.raises(ResourceError) as refused:
        check_fit(verdict, force=False)
    assert said in str(refused.value)
    # What the disk has no room for does not come by force.
    for_disk = "of disk" in said
    assert str(refused.value).endswith("--force to try all the same") is not for_disk
    assert len(str(refused.value)) < 230
    assert len(capsys.readouterr().err.splitlines()) == 2
    with pytest.raises(ResourceError) if for_disk else contextlib.nullcontext():
        check_fit(verdict, force=True)
    assert for_disk or said in capsys.readouterr().err.splitlines()[2]


def test_a_context_that_the_model_does_not_know_is_refused(tmp_path) -> None:
    with pytest.raises(UsageError, match="trained for 32768"):
        judge_download(parse_size("mistral-7b"), 40_000, tmp_path)


@given(st.integers(1, 200_000), st.lists(st.integers(1, 200_000), max_size=5))
def test_contexts_ascend_within_what_the_model_knows(most: int, wanted: list[int]) -> None:
    config = dataclasses.replace(parse_size("mistral-7b").config, context_length=most)
    assert choose_contexts(config, None)[-1] == min(most, 32768)
    if all(n <= most for n in wanted):
        found = choose_contexts(config, wanted)
        assert found == sorted(set(found))
        assert not wanted or set(found) == set(wanted)
    else:
        with pytest.raises(UsageError):
            choose_contexts(config, wanted)
