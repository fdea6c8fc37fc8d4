"""llmq eval: its tables, its JSON, its errors."""

import io
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import Tiny

from cli.main import execute
from llmq import load
from llmq.formats import Q8_0
from quant import evaluate as ev

ROOT = Path(__file__).parents[1]
TEXT = "The cat sat on the mat, and then the rain came in. " * 12


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LLMQ_HOME", str(tmp_path / "home"))
    monkeypatch.delenv("LLMQ_DEBUG", raising=False)


@pytest.fixture
def model(tiny_model: Tiny) -> Path:
    return tiny_model(n_layers=1, format=Q8_0)[0]


@pytest.fixture
def reference(tiny_model: Tiny) -> Path:
    return tiny_model(n_layers=1)[0]


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text(TEXT)
    return path


def llmq(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> tuple[int, str, str]:
    code = execute(["eval", *map(str, arguments)])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def cells(block: str) -> list[list[str]]:
    return [[cell.strip() for cell in line.split("  ") if cell] for line in block.splitlines()]


def test_perplexity_alone(model, text, capsys) -> None:
    code, out, err = llmq(capsys, model, "--text", text, "--ctx", "64", "-t", "2")
    assert code == 0, err
    assert err.splitlines()[-1] == "evaluating"
    facts, figures = map(cells, out.split("\n\n"))
    with load(model, n_ctx=64, threads=1) as opened:
        pieces = ev.chunks(opened.encode(TEXT), 64, opened.tokenizer.bos_id)
        expected = ev.perplexity(np.stack(list(ev.evaluate(ev.log_probs(opened, pieces), pieces))))
    n = len(pieces)
    assert facts == [["model", model.stem], ["scored", f"{31 * n} tokens in {n} chunks of up to 64 tokens"]]
    assert figures[0] == ["FIGURE", "VALUE", "FROM", "TO"]
    assert figures[1] == ["perplexity", *(f"{end:.4f}" for end in (expected.value, expected.low, expected.high))]
    assert len(figures) == 2


def test_json_and_the_tables_say_the_same(model, reference, text, capsys) -> None:
    arguments = (model, "--against", reference, "--text", text, "--ctx", "64", "-t", "2")
    code, out, err = llmq(capsys, *arguments, "--json")
    assert code == 0, err
    assert out.count("\n") == 1
    found = json.loads(out)
    assert (found["model"], found["against"], found["ctx"]) == (model.stem, reference.stem, 64)
    assert found["n_tokens"] == 31 * found["n_chunks"]
    assert 0 < found["kl"]["low"] < found["kl"]["value"] < found["kl"]["high"] < 1
    assert 0 <= found["top1"]["low"] < found["top1"]["high"] <= 1
    assert list(found["kl_quantiles"]) == ["0.5", "0.9", "0.95", "0.99", "0.999", "1.0"]
    alone = json.loads(llmq(capsys, model, "--text", text, "--ctx", "64", "--json")[1])
    assert alone["perplexity"] == found["perplexity"] != found["reference_perplexity"]
    facts, figures, spread = map(cells, llmq(capsys, *arguments)[1].split("\n\n"))
    assert facts[1] == ["against", reference.stem]
    rows = {name: values for name, *values in figures}
    assert [float(cell) for cell in rows["mean KL divergence, nats"]] == pytest.approx(
        list(found["kl"].values()), abs=6e-6
    )
    assert rows["same first choice"] == [f"{end:.2%}" for end in found["top1"].values()]
    assert rows["perplexity ratio"][0] == f"{found['perplexity_ratio']['value']:.4f}"
    assert [float(nats) for _, nats in spread[1:]] == pytest.approx(list(found["kl_quantiles"].values()), abs=6e-6)


def test_json_has_no_number_for_what_is_not_finite(model, text, capsys, monkeypatch) -> None:
    monkeypatch.setattr(ev, "LARGEST_EXPONENT", 0.0)
    code, out, err = llmq(capsys, model, "--text", text, "--ctx", "64", "--json")
    assert code == 0, err
    found = json.loads(out, parse_constant=lambda name: pytest.fail(name))
    assert found["perplexity"]["value"] is None
    assert found["n_tokens"] > 0


def test_stdin_is_a_text_too(model, text, capsys, monkeypatch) -> None:
    from_file = llmq(capsys, model, "--text", text, "--json")[1]
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(TEXT.encode())))
    assert llmq(capsys, model, "--text", "-", "--json")[1] == from_file


def test_the_text_that_comes_with_llmq(model, capsys) -> None:
    found = json.loads(llmq(capsys, model, "--json", "--ctx", "64")[1])
    assert found["n_chunks"] > 100
    assert found["against"] is None


def test_a_window_changes_what_is_seen(model, text, capsys) -> None:
    wide, narrow = (
        json.loads(llmq(capsys, model, "--text", text, "--json", "--window", window)[1]) for window in ("0", "8")
    )
    assert wide["n_tokens"] == narrow["n_tokens"]
    assert wide["perplexity"] != narrow["perplexity"]


@pytest.mark.parametrize(
    ("raw", "said"),
    [
        (b"", "1 of the 32 tokens"),
        (b"a few words", "of the 32 tokens"),
        (b"caf\xe9 " * 100, "not UTF-8 text (byte 3)"),
        (b"x" * ((16 << 20) + 1), "more than 16 MiB"),
        (None, "there is no file"),
    ],
)
def test_texts_that_are_refused(model, tmp_path, capsys, raw, said) -> None:
    path = tmp_path / "odd\x1b[2J.txt"
    if raw is not None:
        path.write_bytes(raw)
    code, out, err = llmq(capsys, model, "--text", path)
    assert (code, out) == (2, "")
    assert said in err
    assert err.splitlines()[-1].startswith("llmq: ")
    assert "\x1b" not in err


def test_a_folder_is_no_text(model, tmp_path, capsys) -> None:
    code, out, err = llmq(capsys, model, "--text", tmp_path)
    assert (code, out) == (2, "")
    assert "is a folder; --text takes the path of a text" in err


def test_models_that_are_refused(model, text, tiny_model, capsys) -> None:
    larger = tiny_model(n_layers=1, vocab_size=544)[0]
    for arguments, said in (
        (("--against", larger), "vocabularies of 512 and 544 tokens"),
        (("--against", "nobody"), "no model is named 'nobody'"),
        (("--against", "no.gguf"), "no file"),
        (("--ctx", "31"), "--ctx"),
        (("--ctx", "5000"), "trained for 4096"),
    ):
        code, out, err = llmq(capsys, model, "--text", text, *arguments)
        assert (code, out) == (2, "")
        assert said in err


@pytest.mark.skipif(os.name == "nt", reason="signals are POSIX's")
def test_ctrl_c_ends_it_in_silence(model, tmp_path) -> None:
    long = tmp_path / "long.txt"
    long.write_text(TEXT * 2000)
    command = [sys.executable, "-m", "cli.main", "eval", str(model), "--text", str(long)]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as child:
        assert child.stderr is not None
        while child.stderr.readline() != "evaluating\n":
            assert child.poll() is None
        child.send_signal(signal.SIGINT)
        out, rest = child.communicate(timeout=60)
    assert (child.returncode, out, rest) == (130, "", "")
