"""llmq bench: its tables, its JSON, its errors, and what it predicts."""

import json
import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
from cli_runs import llmq
from conftest import Tiny
from hypothesis import given
from hypothesis import strategies as st
from test_catalog import PUBLISHED

from cli.forecast import forecast
from llmq import machine, speed
from llmq.errors import UsageError
from llmq.figures import Machine
from llmq.speed import Rate, Speed
from llmq.work import Work
from quant.size import parse_size, scaled

ROOT = Path(__file__).parents[1]
MACHINE = Machine(2, {1: 20.0, 2: 40.0}, 400.0, 1.7e9)
# A layer that reads 30 of 40 GB/s and makes 600 of 800 billion products.
LAYER = Speed(
    Work(0.5e9, 1e9), (Rate(128, (500.0,)), Rate(512, (590.0, 600.0, 610.0))), Rate(16, (59.0, 60.0, 62.0)), True
)


@pytest.fixture
def model(tiny_model: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A tiny model; the machine and the layer are known."""
    monkeypatch.setenv("LLMQ_HOME", str(tmp_path / "home"))
    monkeypatch.delenv("LLMQ_DEBUG", raising=False)
    monkeypatch.setattr(speed, "MOST_RUNS", 3)
    monkeypatch.setattr(machine, "measure_and_remember", lambda _n, _tell: MACHINE)
    monkeypatch.setattr(speed, "measure_layer", lambda _n, _tell: LAYER)
    return tiny_model(n_layers=1)[0]


def cells(line: str) -> list[str]:
    return [cell for cell in line.split("  ") if cell]


def test_plain_columns_in_a_pipe(model, capsys, monkeypatch) -> None:
    monkeypatch.setattr(psutil, "virtual_memory", lambda: psutil_memory(16e9))
    code, out, err = llmq(capsys, "bench", model, "-t", "2")
    assert code == 0, err
    assert "\x1b" not in out + err
    facts, rates, predictions = out.split("\n\n")
    assert "reads GB/s: 20.0 with 1, 40.0 with 2" in facts
    assert "threads    2\n" in facts
    lines = [[cell.strip() for cell in cells(line)] for line in rates.splitlines()]
    assert [line[:2] for line in lines[1:]] == [
        [model.stem, "prompt of 128"], [model.stem, "prompt of 512"], [model.stem, "reply"],
        ["7B layer", "prompt of 128"], ["7B layer", "prompt of 512"], ["7B layer", "reply"],
    ]  # fmt: skip
    assert lines[3][-1] == "in the cache"
    assert lines[5][2:] == ["600", "590", "610", "75% of products"]
    assert lines[6][2:] == ["60.0", "59.0", "62.0", "75% of memory"]
    by_name = {line.split()[0]: [cell.strip() for cell in cells(line)] for line in predictions.splitlines()[1:]}
    assert set(by_name) == set(PUBLISHED)
    # 600e9 products a second over 6.98e9 of the layers; 30e9 bytes over the file's 4.372e9 but the embedding's.
    assert by_name["mistral-7b"][1:] == ["Q4_K_M", "7.2 B", "4.4 GB", "86.0", "6.98"]
    assert by_name["mixtral-8x7b"][-2:] == ["needs more memory", "-"]


def psutil_memory(total: float) -> object:
    from types import SimpleNamespace

    return SimpleNamespace(total=total, available=total)


def test_json_has_all_of_it(model, capsys) -> None:
    code, out, _ = llmq(capsys, "bench", model, "--json", "--predict", "7B:Q8_0", "--threads", "1")
    assert code == 0
    found = json.loads(out)
    assert (found["model"], found["threads"]) == (model.stem, 1)
    assert found["machine"]["read_rates"] == {"1": 20, "2": 40}
    assert found["machine"]["dot_rate"] == 400
    assert set(found["kernels"]) == {"compiled", "seconds", "cached"}
    mine, layer = found["speed"]["model"], found["speed"]["layer"]
    assert [rate["tokens"] for rate in mine["prefill"]] == [128, 512]
    assert all(len(rate["runs"]) == 3 for rate in (*mine["prefill"], mine["decode"]))
    assert mine["memory_share"] is None
    # One thread makes 400 billion products at most.
    assert (layer["memory_share"], layer["product_share"]) == (0.75, 1.5)
    (predicted,) = found["predictions"]
    assert (predicted["model"], predicted["type"], predicted["weights"]) == ("7B", "q8_0", 7e9)


def test_a_model_beyond_the_caches_is_its_own_measure(model, capsys, monkeypatch) -> None:
    monkeypatch.setattr(speed, "last_cache_bytes", lambda: 1000)
    monkeypatch.setattr(speed, "measure_layer", None)
    code, out, _ = llmq(capsys, "bench", model, "--json", "--predict", "7B:F32")
    assert code == 0
    found = json.loads(out)
    assert list(found["speed"]) == ["model"]
    mine = found["speed"]["model"]
    assert mine["memory_share"] == pytest.approx(mine["bytes_per_token"] * mine["decode"]["median"] / 40e9)
    (predicted,) = found["predictions"]
    assert predicted["prefill"] is None or predicted["prefill"] == pytest.approx(
        mine["products_per_token"] * mine["prefill"][-1]["median"] / 7e9
    )


def test_rules_on_a_terminal_and_no_markup(model, tmp_path, capsys, monkeypatch) -> None:
    path = tmp_path / "[red]x[link=y]\x1b[2J.gguf"
    path.write_bytes(model.read_bytes())
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "120")
    code, out, _ = llmq(capsys, "bench", path)
    assert code == 0
    assert "\u2500" * 20 in out
    assert "[red]x[link=y]" in out
    assert "\x1b[2J" not in out


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["nobody"], "no model is named 'nobody'"),
        (["no.gguf"], "no file"),
        (["--predict", "7B:Q9"], "no type 'Q9'"),
        (["--predict", "seven"], "cannot predict 'seven'"),
        (["--predict", "7B/13B"], "no more than there are"),
        (["--predict", "0B"], "give 1M to 10000B weights"),
        (["--predict", "99999B"], "give 1M to 10000B weights"),
        (["--predict", "13B:"], "there is no type"),
        (["--predict", "\x1b[2J\n:Q4_K_M"], "cannot predict"),
        (["--threads", "0"], "--threads"),
        (["--threads", "99999"], "99999 threads"),
        (["a", "b"], "b"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_is_measured(model, capsys, monkeypatch, arguments, said) -> None:
    del model
    monkeypatch.setattr(machine, "measure_and_remember", None)
    code, out, err = llmq(capsys, "bench", *arguments)
    assert (code, out) == (2, "")
    assert said in err
    assert err.count("\n") == 1
    assert err.rstrip("\n").isprintable()


@pytest.mark.skipif(os.name == "nt", reason="signals are POSIX's")
def test_ctrl_c_ends_it_in_silence(tmp_path, model) -> None:
    environment = os.environ | {"LLMQ_HOME": str(tmp_path)}
    command = [sys.executable, "-m", "cli.main", "bench", str(model)]
    with subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as child:
        assert child.stderr is not None
        while child.stderr.readline() != "measuring\n":
            assert child.poll() is None
        child.send_signal(signal.SIGINT)
        out, rest = child.communicate(timeout=60)
    assert (child.returncode, out) == (130, "")
    assert "Traceback" not in rest


# ---- what is predicted
@pytest.mark.parametrize("name", PUBLISHED)
def test_sizes_are_those_of_published_files(name) -> None:
    n_weights, n_bytes = PUBLISHED[name]
    size = parse_size(name)
    assert size.n_weights / 1e9 == pytest.approx(n_weights, abs=0.0006)
    assert size.n_bytes / 1e9 == pytest.approx(n_bytes, rel=0.002)


def test_a_mixture_takes_what_its_used_experts_take() -> None:
    """Mixtral 8x7B: 12.9 billion of its weights for a token, of which the embedding's are not read."""
    size = parse_size("mixtral-8x7b:q4_k_m")
    assert size.work.n_products / 1e9 == pytest.approx(12.88 - 2 * 0.131, abs=0.01)
    assert size.work.n_bytes / size.n_bytes == pytest.approx(12.75 / 46.7, rel=0.02)


@pytest.mark.parametrize(
    ("text", "total", "used", "bits"),
    [
        ("7B", 7e9, 7e9, 4.82),
        ("7B:Q4_K_M", 7e9, 7e9, 4.82),
        ("7b:q8_0", 7e9, 7e9, 8.5),
        ("350M:f16", 350e6, 350e6, 16),
        ("22.2B:F32", 22.2e9, 22.2e9, 32),
        ("47B/13B:Q6_K", 47e9, 13e9, 6.56),
        ("1B/900m", 1e9, 900e6, 4.82),
    ],
)
def test_sizes_by_weights(text: str, total: float, used: float, bits: float) -> None:
    size = parse_size(text)
    assert (size.n_weights, size.work.n_products) == (total, used)
    assert size.n_bytes == pytest.approx(total * bits / 8, rel=0.003)
    assert size.work.n_bytes == pytest.approx(used * bits / 8, rel=0.003)


@given(st.text(max_size=30) | st.from_regex(r"[0-9.]{1,4}[BMbm](/[0-9.]{1,4}[BM])?(:[qQ][4-8]_[0k])?", fullmatch=True))
def test_any_text_is_a_size_or_refused_in_a_sentence(text: str) -> None:
    try:
        size = parse_size(text)
    except UsageError as error:
        refusal = str(error)
    else:
        assert 0 < size.work.n_products <= size.n_weights
        return
    assert refusal.isprintable()
    assert len(refusal) < 240


def test_a_forecast_is_the_measured_rates_over_the_work() -> None:
    size = replace(scaled("x", 8e9, 8e9, "q4_k_m"), n_bytes=5e9, work=Work(4e9, 6e9))
    found = forecast(size, LAYER, 10e9)
    assert (found.fits, found.prefill, found.decode) == (True, 100, 7.5)
    large = replace(size, n_bytes=9.5e9)
    found = forecast(large, LAYER, 10e9)
    assert (found.fits, found.prefill, found.decode) == (False, None, None)
