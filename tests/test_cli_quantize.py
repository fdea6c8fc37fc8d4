"""llmq quantize: what it replaces, what it checks before it runs anything, and what it says."""

import io
import os
import re
import shlex
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from checkpoints import write_checkpoint
from cli_runs import llmq, made
from rich.progress import Progress
from tiny import tiny_gguf

import quant.sensitivity
from cli import progress
from cli.mix import checked_budget, expected_bytes
from llmq.formats import F16, Q4_K, Q8_0
from llmq.gguf import open_gguf
from llmq.locks import hold
from llmq.records import current_record
from llmq.store import resolve
from quant.pieces import TensorReport
from quant.recipe import takes_type
from quant.source import open_source

TEXT = "The cat sat on the mat, and then the rain came in over the hills and the sea. " * 8


@pytest.fixture(autouse=True)
def models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The store, with a model one.gguf in each of the folders a and b, and a text, beside it."""
    monkeypatch.setenv("LLMQ_HOME", str(tmp_path / "home"))
    monkeypatch.delenv("LLMQ_DEBUG", raising=False)
    monkeypatch.chdir(tmp_path)
    for seed, name in enumerate(("a", "b")):
        Path(name).mkdir()
        tiny_gguf(Path(name, "one.gguf"), n_layers=1, format=F16, seed=seed)
    Path("text.txt").write_text(TEXT)
    return tmp_path / "home" / "models"


def refused(capsys: pytest.CaptureFixture[str], *arguments: str | Path, code: int = 2) -> str:
    """The one line that it says."""
    got, out, err = llmq(capsys, "quantize", *arguments)
    assert (got, out, err.count("\n")) == (code, "", 1), err
    return err


# ---- what is replaced
@pytest.mark.usefixtures("unmeasured")
def test_another_model_of_the_name_stays(models, capsys) -> None:
    """Also one that has the same name and settings in its receipt, and none is measured for it."""
    path = made(capsys, "a/one.gguf")
    before, record = path.read_bytes(), current_record(path)
    for words in (["b/one.gguf"], ["a/one.gguf", "--fast"], ["a/one.gguf", "--tensor-type", ".=q8_0"]):
        said = refused(capsys, *words)
        assert "there is another model named one-q4_k_m" in said
        assert "-o" in said
        assert "--force" in said
    assert path.read_bytes() == before
    assert current_record(path) == record
    for budget in ("--optimize", "--size=1GB", "--bpw=4.5"):
        label = {"--optimize": "q4_k_m-optimized", "--size=1GB": "1gb", "--bpw=4.5": "4.5bpw"}[budget]
        (models / f"one-{label}.gguf").write_bytes(b"the only copy of something")
        assert "there is another model" in refused(capsys, "a/one.gguf", budget)
        assert (models / f"one-{label}.gguf").read_bytes() == b"the only copy of something"


def test_the_same_command_again_replaces_what_it_made(capsys) -> None:
    for words in ([], ["-q", "q8_0", "--text", "text.txt"], ["-q", "q3_k_m", "--tensor-type", "attn=q8_0"]):
        path = made(capsys, "a/one.gguf", *words)
        digest, status = path.read_bytes(), path.stat()
        assert made(capsys, Path("b", "..", "a", "one.gguf"), *words) == path
        assert path.read_bytes() == digest
        assert path.stat().st_ino != status.st_ino or path.stat().st_mtime_ns != status.st_mtime_ns


def test_another_calibration_is_another_model(capsys) -> None:
    """The receipt has the same words, and another sha256."""
    made(capsys, "a/one.gguf", "-q", "q8_0", "--text", "text.txt")
    Path("text.txt").write_text(TEXT.replace("cat", "dog"))
    assert "there is another model" in refused(capsys, "a/one.gguf", "-q", "q8_0", "--text", "text.txt")


def test_force_replaces_and_says_what_is_there_now(capsys) -> None:
    path = made(capsys, "a/one.gguf")
    before, record = path.read_bytes(), current_record(path)
    made(capsys, "b/one.gguf", "--force")
    assert path.read_bytes() != before
    now = current_record(path)
    assert now
    assert record
    assert now.sha256 != record.sha256
    assert now.origin.endswith("b/one.gguf, quantized as q4_k_m")
    assert llmq(capsys, "verify", "one-q4_k_m")[0] == 0


def test_what_was_put_in_its_place_stays(models, capsys) -> None:
    """By hand, of the very size; a link; and what `llmq import` brought."""
    path = made(capsys, "a/one.gguf")
    path.write_bytes(b"x" * path.stat().st_size)
    assert "there is another model" in refused(capsys, "a/one.gguf")
    path.unlink()
    path.symlink_to(Path("b/one.gguf").absolute())
    assert "there is another model" in refused(capsys, "a/one.gguf")
    assert path.is_symlink()
    path.unlink()
    assert llmq(capsys, "import", "b/one.gguf", "--name", "one-q4_k_m")[0] == 0
    assert "there is another model" in refused(capsys, "a/one.gguf")
    assert "there is another model" in refused(capsys, "a/one.gguf", "-o", models / "one-q4_k_m.gguf")
    assert (models / "one-q4_k_m.gguf").samefile("b/one.gguf")


def test_a_model_that_came_while_another_was_measured_stays(models, capsys, monkeypatch) -> None:
    def invented(path: Path, text: str, **options: Any) -> dict[str, float]:
        del text, options
        (models / "one-4.5bpw.gguf").write_bytes(b"the only copy of something")
        return {each.name: 1.0 for each in open_source(path).weights if takes_type(each.name, each.shape)}

    monkeypatch.setattr(quant.sensitivity, "sensitivities", invented)
    code, out, err = llmq(capsys, "quantize", "a/one.gguf", "--bpw", "4.5", "--fast")
    assert (code, out) == (2, "")
    assert "there is another model named one-4.5bpw" in err
    assert [path.name for path in models.iterdir()] == ["one-4.5bpw.gguf"]
    assert (models / "one-4.5bpw.gguf").read_bytes() == b"the only copy of something"


def test_a_folder_that_is_pulled_again_replaces_what_it_made(capsys) -> None:
    write_checkpoint(Path("mine"), num_hidden_layers=1)
    for _ in range(2):
        assert llmq(capsys, "pull", "./mine", "--name", "it", "--type", "q8_0")[0] == 0
    write_checkpoint(Path("other"), num_hidden_layers=1)
    code, _out, err = llmq(capsys, "pull", "./other", "--name", "it", "--type", "q8_0")
    assert code == 2
    assert "there is another model named it" in err
    assert "--name" in err


def test_a_file_elsewhere_is_written_over(capsys) -> None:
    """-o names it; only the store is llmq's to guard."""
    for source in ("a", "b"):
        made(capsys, f"{source}/one.gguf", "-o", "out.gguf")
    with open_gguf(Path("out.gguf")) as gguf:
        assert gguf.metadata["llmq.source"] == "one.gguf"


# ---- what is refused before anything is run
@pytest.mark.skipif(not Path("/proc/self").is_dir(), reason="a folder that nobody can write to")
@pytest.mark.parametrize("option", ["-o", "--report", "--save-imatrix"])
@pytest.mark.usefixtures("unmeasured")
def test_an_output_that_cannot_be_made(capsys, option) -> None:
    before = sorted(Path().rglob("*"))
    words = ["-o", "out.gguf", option, "/proc/x.html", "--calibrate", "--bpw", "5"]
    assert "cannot write '/proc/x.html'" in refused(capsys, "a/one.gguf", *words)
    assert sorted(path for path in Path().rglob("*") if "home" not in path.parts) == before


@pytest.mark.parametrize("words", [["-q", "q8_0"], ["--bpw", "5"], ["--size", "600kB"], ["--optimize"]])
@pytest.mark.usefixtures("unmeasured")
def test_a_disk_that_is_full(models, capsys, monkeypatch, words) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=54_321))
    said = refused(capsys, "a/one.gguf", *words, code=3)
    assert re.search(r"takes [5-9]\d\d\.\d kB more of disk and 54\.3 kB is free; make room", said)
    assert not list(models.iterdir())


def test_room_is_what_the_file_takes(capsys, monkeypatch) -> None:
    """The size that is asked for may be more than any type takes."""
    n_bytes = made(capsys, "a/one.gguf", "-q", "q8_0").stat().st_size
    for free, code in ((n_bytes, 0), (n_bytes - 1000, 3)):
        monkeypatch.setattr(shutil, "disk_usage", lambda _, free=free: SimpleNamespace(free=free))
        assert llmq(capsys, "quantize", "a/one.gguf", "-q", "q8_0", "-o", f"{code}.gguf")[0] == code
    source = open_source(Path("a/one.gguf"))
    budget = checked_budget("q4_k_m", False, "999TB", None)
    assert expected_bytes(source, "q4_k_m", budget, [], calibrated=False) <= n_bytes


@pytest.mark.usefixtures("unmeasured")
def test_a_file_that_is_being_written(capsys) -> None:
    descriptor = hold(Path("out.gguf.part"))
    assert descriptor is not None
    assert "is writing it; wait for it to end" in refused(capsys, "a/one.gguf", "-o", "out.gguf", "--bpw", "5")
    os.close(descriptor)


@pytest.mark.parametrize("kind", ["q4_0", "Q4_1", "q5_0", "q5_1", "q4_k"])
def test_a_type_of_tensors_is_no_type_of_models(capsys, kind) -> None:
    words = ["--tensor-type", f".={kind.lower()}"]
    said = refused(capsys, "a/one.gguf", "-q", kind)
    assert f"`llmq quantize {words[0]} '{words[1]}'`" in said
    with open_gguf(made(capsys, "a/one.gguf", "--fast", *words)) as gguf:
        quantized = {info.format.name for info in gguf.tensors.values() if len(info.shape) > 1}
    assert quantized == {kind.upper()}
    assert "--tensor-type" not in refused(capsys, "a/one.gguf", "-q", "q4_9")


# ---- what is quantized
@pytest.mark.parametrize("given", [".", "", "../folder", "../folder/sub/.."])
def test_a_folder_without_a_name_has_one(models, capsys, monkeypatch, given) -> None:
    Path("folder/sub").mkdir(parents=True)
    monkeypatch.chdir("folder")
    assert "'folder' has neither" in refused(capsys, given)
    write_checkpoint(Path(), num_hidden_layers=1)
    assert made(capsys, given, "-q", "q8_0") == models / "folder-q8_0.gguf"


def test_a_model_of_the_store_is_a_source_by_its_name(models, capsys) -> None:
    models.mkdir(parents=True)
    tiny_gguf(models / "mine-f16.gguf", n_layers=1, format=F16)
    for name in ("mine-f16", "mine", "mine:f16"):
        assert made(capsys, name, "-q", "q8_0", "--force") == models / "mine-q8_0.gguf"
        (models / "mine-q8_0.gguf").unlink()
    Path("mine").mkdir()
    assert "'mine' has neither" in refused(capsys, "mine")


def test_what_is_not_there_and_how_to_get_it(capsys) -> None:
    said = refused(capsys, "org/repo")
    assert "no file or folder 'org/repo'" in said
    assert "`llmq pull org/repo --from-source`" in said
    assert "no model is named 'nowhere'" in refused(capsys, "nowhere")
    assert "there is no file 'nowhere.gguf'" in refused(capsys, "nowhere.gguf")


# ---- what guides it
@pytest.mark.parametrize("budget", [["--bpw", "5"], ["--size", "600kB"], ["--optimize"]])
def test_a_text_with_a_budget_is_what_is_measured_on(capsys, monkeypatch, budget) -> None:
    """Beside an importance matrix too; without --calibrate nothing is calibrated on it."""
    made(capsys, "a/one.gguf", "--fast", "--text", "text.txt", "--save-imatrix", "x.im", "-o", "out.gguf")
    read: list[str] = []

    def invented(path: Path, text: str, **options: Any) -> dict[str, float]:
        del options
        read.append(text)
        return {each.name: 1.0 for each in open_source(path).weights if takes_type(each.name, each.shape)}

    monkeypatch.setattr(quant.sensitivity, "sensitivities", invented)
    words = ["a/one.gguf", "--fast", *budget, "--text", "text.txt", "-o", "out.gguf"]
    for more, said in (
        ([], ""),
        (["--imatrix", "x.im"], "importance from"),
        (["--calibrate"], "calibrated on text.txt"),
    ):
        with open_gguf(made(capsys, *words, *more)) as gguf:
            settings = gguf.metadata["llmq.settings"]
        assert settings.endswith("by sensitivity on text.txt")
        assert said in settings
        assert ("llmq.calibration_sha256" in gguf.metadata) == bool(said)
        assert ("calibrated" in settings) == ("--calibrate" in more)
    assert read == [TEXT] * 3
    assert "--calibrate and --imatrix" in refused(capsys, *words, "--calibrate", "--imatrix", "x.im")
    assert "--text and --imatrix" in refused(capsys, "a/one.gguf", "--text", "text.txt", "--imatrix", "x.im")


def test_an_importance_matrix_of_another_form(capsys) -> None:
    Path("old.dat").write_bytes(b"\x20\0\0\0" + bytes(100))
    said = refused(capsys, "a/one.gguf", "--imatrix", "old.dat", code=4)
    assert "'old.dat' is not an importance matrix in llama.cpp's GGUF form" in said


# ---- what is said, and when
@pytest.mark.parametrize(
    ("n_done", "words", "said"),
    [
        (0, ["--text", "text.txt"], "stopped; nothing of it was done yet"),
        (1, ["--text", "text.txt"], "stopped; the same command goes on from here"),
        (1, ["--text", "-"], "stopped; the same command goes on from here, given the same text"),
    ],
)
def test_a_stopped_run_promises_what_it_keeps(capsys, monkeypatch, n_done, words, said) -> None:
    def stopped(reports: Iterator[TensorReport], _title: str) -> None:
        if n_done:
            next(reports)
        raise KeyboardInterrupt

    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(TEXT.encode())))
    monkeypatch.setattr("cli.quantize.show_reports", stopped)
    code, _out, err = llmq(capsys, "quantize", "a/one.gguf", *words)
    assert (code, err.splitlines()[-1]) == (130, said)


def test_all_files_are_there_when_the_reader_of_the_path_is_gone(capsys, monkeypatch) -> None:
    def write(text: str) -> int:
        del text
        raise BrokenPipeError

    monkeypatch.setattr(sys.stdout, "write", write)
    words = ["--text", "text.txt", "--save-imatrix", "x.im", "--report", "x.html", "-o", "out.gguf"]
    assert llmq(capsys, "quantize", "a/one.gguf", "--fast", *words)[0] == 141
    assert all(Path(name).is_file() for name in ("out.gguf", "x.im", "x.html"))


class Screen(io.StringIO):
    """A terminal of 80 columns that remembers all that was written."""

    def isatty(self) -> bool:
        return True


def test_the_bar_has_its_room(monkeypatch) -> None:
    screen = Screen()
    for name, value in {"COLUMNS": "80", "LINES": "24", "TERM": "xterm", "NO_COLOR": "1"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(sys, "stderr", screen)
    shown: list[str] = []
    bars: list[Progress] = []
    make = progress.tensor_bar
    monkeypatch.setattr(progress, "tensor_bar", lambda: bars.append(make()) or bars[0])

    def reports() -> Iterator[TensorReport]:
        bar_seen()
        for i in range(1000, 1003):
            name = "blk.31.ffn_gate_exps.weight"
            yield TensorReport(name, (8, 14336, 4096), "BF16", Q4_K, 10**9, i, 1003, 0.06, False)
            bar_seen()

    def bar_seen() -> None:
        """The line as it is after what was told last."""
        bars[0].refresh()
        shown.append(re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", screen.getvalue()).split("\r")[-1].rstrip("\n"))

    assert len(progress.show_reports(reports(), "Mixtral-8x7B-Instruct-v0.1 to q4_k_m")) == 3
    assert all(len(line) <= 80 and "\n" not in line for line in shown)
    assert "None" not in shown[0]
    assert "/" not in shown[0]
    for count, line in zip(("1001/1003", "1002/1003", "1003/1003"), shown[1:], strict=True):
        times = r"\d:\d\d:\d\d \S:\S\S:\S\S"
        assert re.match(rf"Mixtral-8x7B-Instruct\S \S{{8}} {count} {times} blk\.31\.ffn_gate_exps", line), line


@pytest.mark.parametrize(
    "name", ["model.bin", "dang2", "-", "-x.gguf", "sp ace/a b.gguf", "plain.gguf", "-d/x", "it's"]
)
def test_what_is_said_to_type_works(capsys, name) -> None:
    Path("sp ace").mkdir()
    Path("-d").mkdir()
    code, out, err = llmq(capsys, "quantize", "a/one.gguf", "--fast", f"--out={name}")
    assert (code, out) == (0, f"{name}\n"), err
    _, command, model = shlex.split(err.splitlines()[-1].partition("talk to it: ")[2])
    assert command == "chat"
    assert resolve(model).samefile(name)
    assert llmq(capsys, "show", model)[0] == 0


def test_models_of_the_store_are_talked_to_by_name(models, capsys) -> None:
    assert llmq(capsys, "quantize", "a/one.gguf")[2].endswith("talk to it: llmq chat one-q4_k_m\n")
    err = llmq(capsys, "quantize", "a/one.gguf", "-o", models / "storyteller.gguf")[2]
    assert err.endswith(f"talk to it: llmq chat {models / 'storyteller.gguf'}\n")


def test_what_cannot_be_run_here_is_said_first(capsys) -> None:
    write_checkpoint(Path("odd"), num_hidden_layers=1, hidden_size=80, num_attention_heads=5, head_dim=16,
                     num_key_value_heads=1)  # fmt: skip
    code, _out, err = llmq(capsys, "quantize", "odd", "-q", "f16")
    assert code == 0
    assert (
        "llmq cannot run 'odd': its width size is 80, not a multiple of 32; what is made is for" in err.splitlines()[0]
    )
    assert "chat" not in err
    write_checkpoint(Path("even"), num_hidden_layers=1)
    err = llmq(capsys, "quantize", "even", "-q", "f16")[2]
    assert "cannot run" not in err
    assert "llmq chat even-f16" in err


def test_what_is_quantized_already_is_said(capsys) -> None:
    tiny_gguf(Path("small.gguf"), n_layers=1, format={"attn_v.weight": F16, "attn_k.weight": Q4_K, "": Q8_0})
    code, _out, err = llmq(capsys, "quantize", "small.gguf", "-q", "q6_k", "-o", "out.gguf")
    assert code == 0
    assert err.splitlines()[0] == "small.gguf is Q8_0 already: errors are measured against its weights as they are"
    with open_gguf(Path("out.gguf")) as gguf:
        assert gguf.metadata["llmq.settings"] == "thorough; from weights that were Q8_0"
    assert "already" not in llmq(capsys, "quantize", "a/one.gguf", "-o", "out.gguf")[2]
    with open_gguf(Path("out.gguf")) as gguf:
        assert gguf.metadata["llmq.settings"] == "thorough"
