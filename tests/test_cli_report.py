"""llmq quantize --report, and the receipt that llmq show prints."""

import hashlib
import re
import xml.etree.ElementTree as ET
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from checkpoints import write_checkpoint
from tiny import tiny_gguf

from cli.main import execute
from cli.mix import checked_budget
from llmq import __version__, load
from llmq.formats import BF16
from llmq.gguf import GGUFWriter, TensorSpec, open_gguf
from quant import evaluate as ev

TEXT = "The cat sat on the mat, and then the rain came in. " * 40
Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def llmq(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Runs a command in a folder with a model, in.gguf, and a text, text.txt."""
    monkeypatch.setenv("LLMQ_HOME", str(tmp_path / "home"))
    monkeypatch.delenv("LLMQ_DEBUG", raising=False)
    folder = tmp_path / "work"
    folder.mkdir()
    monkeypatch.chdir(folder)
    tiny_gguf(Path("in.gguf"), n_layers=1, format=BF16)
    Path("text.txt").write_text(TEXT)

    def run(*arguments: str | Path) -> tuple[int, str, str]:
        code = execute([str(argument) for argument in arguments])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return run


def quantize(llmq: Run, *arguments: str | Path) -> tuple[int, str]:
    code, _out, err = llmq("quantize", "in.gguf", "-o", "out.gguf", "--fast", *arguments)
    return code, err


def texts(page: Path) -> list[str]:
    return [text.strip() for text in ET.fromstring(page.read_bytes()).itertext() if text.strip()]


def names() -> list[str]:
    return sorted(path.name for path in Path().iterdir())


def test_a_page_of_a_model_that_was_not_run(llmq: Run) -> None:
    assert quantize(llmq, "--report", "page.html")[0] == 0
    assert names() == ["in.gguf", "out.gguf", "page.html", "text.txt"]
    found = texts(Path("page.html"))
    assert "in.gguf as q4_k_m" in found
    assert any("Not measured" in text for text in found)
    assert not any("KL divergence, nats" in text for text in found)
    assert "blk.0.ffn_down.weight" in found


def test_a_page_of_a_model_that_was_run(llmq: Run) -> None:
    """Figures are those of both files, each run by the engine as a whole, on text that is not the calibration's."""
    assert quantize(llmq, "-q", "q2_k", "--text", "text.txt", "--report", "page.HTM")[0] == 0
    found = texts(Path("page.HTM"))
    with load("out.gguf", n_ctx=512, threads=1) as model, load("in.gguf", n_ctx=512, threads=1) as source:
        pieces = ev.chunks(model.encode(ev.held_text()), 512, model.tokenizer.bos_id)[:8]
        parts = ev.compare(ev.log_probs(model, pieces), ev.log_probs(source, pieces), pieces)
        expected = ev.comparison(np.stack(list(parts)))
    assert any(f"{expected.n_tokens} tokens in 8 chunks of up to 512" in text for text in found)
    for label, figure in (
        ("mean KL divergence, nats", expected.kl),
        ("perplexity of the reference", expected.reference_perplexity),
        ("perplexity", expected.perplexity),
    ):
        at = found.index(label)
        shown = [float(text) for text in found[at + 1 : at + 4]]
        assert shown == pytest.approx([figure.value, figure.low, figure.high], rel=1e-4, abs=2e-5)
    assert found[found.index("all positions") + 1] == f"{expected.kl_quantiles[1.0]:.5f}"
    settings = found[found.index("made as") + 1]
    assert re.fullmatch(r"q2_k, fast; calibrated on text\.txt, \d+ tokens; by importance only, .*", settings)
    assert found[found.index("calibration") + 1] == f"sha256 {hashlib.sha256(TEXT.encode()).hexdigest()}"


def test_a_page_is_written_where_the_model_cannot_be_compared(llmq: Run) -> None:
    """The file has been made by then."""
    write_checkpoint(Path("short"), max_position_embeddings=16, num_hidden_layers=1)
    code, out, err = llmq("quantize", "short", "-o", "out.gguf", "--text", "text.txt", "--report", "page.html")
    assert (code, out) == (0, "out.gguf\n")
    assert "not compared with its source: a chunk would have 16 of the 32 tokens" in err
    found = texts(Path("page.html"))
    assert any(text.startswith("Not measured: a chunk would have 16") for text in found)
    assert "blk.0.ffn_down.weight" in found


def test_a_mix_says_what_it_was_to_fit(llmq: Run) -> None:
    """Without a calibration, too, the model has been run, so that there are figures."""
    assert quantize(llmq, "--optimize", "-q", "q6_k", "--report", "page.html")[0] == 0
    metadata = open_gguf(Path("out.gguf")).metadata
    words = "fast; types chosen to fit the bytes of q6_k, by sensitivity on calibration.txt"
    assert metadata["llmq.settings"] == words
    assert metadata["llmq.type"] == "mix near q6_k"
    assert "llmq.calibration_sha256" not in metadata
    found = texts(Path("page.html"))
    assert "in.gguf as mix near q6_k" in found
    assert "mean KL divergence, nats" in found


@pytest.mark.parametrize(
    ("budget", "goal"),
    [((True, None, None), "the bytes of q6_k"), ((False, "1.2 GB", None), "1200000000 bytes"),
     ((False, None, 4.5), "4.5 bits a weight")],
    ids=["optimize", "size", "bpw"],
)  # fmt: skip
def test_budgets_in_words(budget: tuple[bool, str | None, float | None], goal: str) -> None:
    found = checked_budget("q6_k", *budget)
    assert found
    assert found.goal == goal


@pytest.mark.parametrize(
    ("report", "said"),
    [
        ("page.txt", "'page.txt' is no name for a web page; give --report a name that ends in .html"),
        ("page", "is no name for a web page"),
        ("none/page.html", "its folder is not there"),
        ("folder.html", "it is a folder"),
        ("out.html", "would be written twice"),
        ("text.html", "is an input, which"),
    ],
)
def test_pages_that_cannot_be_are_refused_before_anything(llmq: Run, report: str, said: str) -> None:
    Path("folder.html").mkdir()
    Path("text.html").write_text(TEXT)
    before = names()
    code, _out, err = llmq(
        "quantize", "in.gguf", "-o", "out.html", "--text", "text.html", "--report", report, "-q", "q8_0"
    )
    assert code == 2
    assert said in err
    assert names() == before


def test_a_page_is_replaced_by_a_whole_one_only(llmq: Run) -> None:
    Path("page.html").write_text("old")
    assert quantize(llmq, "--report", "page.html", "--tensor-type", "nowhere=q8_0")[0] == 2
    assert Path("page.html").read_text() == "old"
    assert quantize(llmq, "--report", "page.html")[0] == 0
    assert Path("page.html").read_text().endswith("</html>\n")


def shown(llmq: Run, path: str) -> dict[str, str]:
    code, out, err = llmq("show", path)
    assert (code, err) == (0, "")
    return {label: rest.strip() for label, _, rest in (line.partition("  ") for line in out.splitlines())}


def test_show_prints_the_receipt(llmq: Run) -> None:
    assert "made by" not in shown(llmq, "./in.gguf")
    assert quantize(llmq, "--tensor-type", "attn_v=q8_0")[0] == 0
    found, metadata = shown(llmq, "./out.gguf"), open_gguf(Path("out.gguf")).metadata
    assert found["made from"] == "in.gguf"
    assert found["weights"] == f"sha256 {metadata['llmq.source_sha256']}"
    assert found["made by"] == f"llmq {__version__}"
    assert found["made as"] == "q4_k_m, fast; attn_v=q8_0"
    assert found["error"] == f"{metadata['llmq.rms_error']:.3%} of the weights' root mean square"
    assert not {"calibration", "revision"} & found.keys()


def with_metadata(metadata: dict[str, Any]) -> None:
    with open_gguf(Path("in.gguf")) as gguf:
        specs = [TensorSpec(info.name, info.shape, info.format) for info in gguf.tensors.values()]
        with GGUFWriter("evil.gguf", gguf.metadata | metadata, specs) as out:
            for spec in specs:
                out.write(spec.name, gguf.data(spec.name))


def test_a_hostile_receipt_cannot_act_on_the_terminal(llmq: Run) -> None:
    keys = ("version", "source", "source_sha256", "source_revision", "type", "settings", "calibration_sha256")
    with_metadata({f"llmq.{key}": "x\x1b]0;owned\x07\x9b2J\u202e\r\nsize  1 B\u2028y" + "z" * 100_000 for key in keys})
    code, out, _err = llmq("show", "./evil.gguf")
    assert code == 0
    assert all(character == "\n" or character.isprintable() for character in out)
    assert len(re.findall("^size ", out, re.MULTILINE)) == 1
    assert max(map(len, out.splitlines())) <= 213
    assert len(out.splitlines()) <= 13 + 6 * 20


@pytest.mark.parametrize("value", [7, True, [b"a"], np.zeros(3, np.float32), float("nan"), np.uint64(2**63)])
def test_a_receipt_of_other_types_is_none(llmq: Run, value: Any) -> None:
    keys = ("version", "source", "source_sha256", "source_revision", "type", "settings", "rms_error")
    with_metadata({f"llmq.{key}": value for key in keys})
    assert shown(llmq, "./evil.gguf").keys() == shown(llmq, "./in.gguf").keys()
