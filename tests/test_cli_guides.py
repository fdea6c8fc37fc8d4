"""llmq quantize with --calibrate, --text, --imatrix and --save-imatrix: what it makes, says and refuses."""

import hashlib
import io
from pathlib import Path

import pytest
from checkpoints import write_checkpoint

from cli.main import execute
from cli.screen import status
from llmq.formats import F16
from llmq.gguf import open_gguf
from llmq.tokenizer import load_tokenizer
from quant.calibrate import calibrate, gather
from quant.calibration import DEFAULT_TEXT
from quant.guide import Guides, Running, guides_of, no_guide
from quant.imatrix import read_imatrix, write_imatrix
from quant.quantize import quantize
from quant.source import open_source

TEXT = "The cat sat on the mat, and then the rain came in over the hills and the sea. " * 8


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("LLMQ_HOME", str(tmp_path / "home"))
    monkeypatch.delenv("LLMQ_DEBUG", raising=False)
    monkeypatch.chdir(tmp_path)
    Path("text.txt").write_text(TEXT)
    return tmp_path


@pytest.fixture
def model(folder: Path) -> Path:
    """Chunks of 48 tokens, so that some of a short text is held out."""
    write_checkpoint(folder / "in", num_hidden_layers=1, max_position_embeddings=48)
    return folder / "in"


def llmq(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> tuple[int, str, str]:
    code = execute(["quantize", "in", "-q", "q3_k_m", *map(str, arguments)])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def made(capsys: pytest.CaptureFixture[str], *arguments: str | Path, out: str = "out.gguf") -> dict[str, bytes]:
    code, printed, err = llmq(capsys, "-o", out, *arguments)
    assert (code, printed) == (0, f"{out}\n"), err
    return tensors(Path(out))


def tensors(path: Path) -> dict[str, bytes]:
    with open_gguf(path) as gguf:
        return {name: gguf.data(name).tobytes() for name in gguf.tensors}


def receipt(path: str = "out.gguf") -> tuple[str, str]:
    with open_gguf(Path(path)) as gguf:
        return gguf.metadata["llmq.settings"], gguf.metadata.get("llmq.calibration_sha256", "")


def expected(model: Path, guides: Guides) -> dict[str, bytes]:
    """What the library makes, which tests of its own hold to what it should."""
    list(quantize(model, Path("expected.gguf"), "q3_k_m", guides=guides))
    return tensors(Path("expected.gguf"))


def n_tokens(model: Path, text: str) -> int:
    return len(load_tokenizer(open_source(model).metadata).encode(text))


def test_a_text_from_a_file_or_stdin_guides(model, capsys, monkeypatch) -> None:
    wanted = expected(model, Running(model, TEXT, ""))
    assert wanted != expected(model, no_guide)
    digest, n = hashlib.sha256(TEXT.encode()).hexdigest(), n_tokens(model, TEXT)
    assert made(capsys, "--calibrate", "--text", "text.txt") == wanted
    assert receipt() == (f"thorough; calibrated on text.txt, {n} tokens", digest)
    # --text says that there is to be a calibration.
    assert made(capsys, "--text", "text.txt") == wanted
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(TEXT.encode())))
    assert made(capsys, "--text", "-") == wanted
    assert receipt() == (f"thorough; calibrated on stdin, {n} tokens", digest)


def test_a_text_of_which_nothing_can_be_held_out_says_so(model, capsys) -> None:
    text = TEXT[:100]
    assert 48 < n_tokens(model, text) < 4 * 48
    Path("text.txt").write_text(text)
    made(capsys, "--text", "text.txt")
    remarks = f"calibrated on text.txt, {n_tokens(model, text)} tokens; by importance only, having under 5 chunks"
    assert receipt()[0] == f"thorough; {remarks}"


def test_the_text_that_comes_with_llmq(model, capsys) -> None:
    own = DEFAULT_TEXT.read_bytes()
    write_checkpoint(model, num_hidden_layers=1, intermediate_size=256)
    made(capsys, "--calibrate")
    n = n_tokens(model, own.decode())
    assert receipt() == (f"thorough; calibrated on calibration.txt, {n} tokens", hashlib.sha256(own).hexdigest())


def test_without_them_nothing_is_run(model, capsys, monkeypatch) -> None:
    monkeypatch.setattr(status, "label", "")
    code, _, err = llmq(capsys, "-o", "out.gguf")
    assert code == 0
    assert "calibrating" not in err
    assert tensors(Path("out.gguf")) == expected(model, no_guide)
    assert receipt() == ("thorough", "")


@pytest.mark.usefixtures("model")
def test_a_calibration_shows_itself(capsys, monkeypatch) -> None:
    """Away from a terminal; there is a line for each tensor besides."""
    monkeypatch.setattr(status, "label", "")
    err = llmq(capsys, "-o", "out.gguf", "--text", "text.txt")[2].splitlines()
    assert "calibrating" in err
    assert len([line for line in err if "->" in line]) == len(tensors(Path("out.gguf")))


def test_a_saved_calibration_serves_again(model, capsys) -> None:
    wanted = made(capsys, "--text", "text.txt")
    assert made(capsys, "--text", "text.txt", "--save-imatrix", "i.gguf") == wanted
    seen = gather(calibrate(model, TEXT), "text.txt")
    shapes = {weights.name: weights.shape for weights in open_source(model).weights}
    found = read_imatrix(Path("i.gguf"), shapes)
    assert (found.dataset, found.n_chunks, found.chunk_size) == ("text.txt", seen.n_chunks, seen.chunk_size)
    assert found.inputs.keys() == seen.inputs.keys()
    for name, inputs in seen.inputs.items():
        assert (found.inputs[name].sum_squares == inputs.sum_squares).all()
    again = made(capsys, "--imatrix", "i.gguf")
    assert again == expected(model, guides_of(seen))
    assert again not in (wanted, expected(model, no_guide))
    remark = f"importance from i.gguf, {seen.n_chunks * seen.chunk_size} tokens"
    assert receipt() == (f"thorough; {remark}", hashlib.sha256(Path("i.gguf").read_bytes()).hexdigest())


def test_an_interrupted_calibration_saves_all_the_same(model, capsys) -> None:
    """All tensors were done before, so that none asks for a guide; what they read is kept nevertheless."""
    made(capsys, "--text", "text.txt", "--save-imatrix", "whole.gguf")
    Path("out.gguf").unlink()
    reports = quantize(
        Path("in"), Path("out.gguf"), "q3_k_m",
        guides=Running(model, TEXT, ""), guided_by=hashlib.sha256(TEXT.encode()).hexdigest(),
        remarks=[f"calibrated on text.txt, {n_tokens(model, TEXT)} tokens"],
    )  # fmt: skip
    for report in reports:
        if report.index == report.total - 1:
            break
    reports.close()
    code, _, err = llmq(capsys, "-o", "out.gguf", "--text", "text.txt", "--save-imatrix", "rest.gguf")
    assert code == 0, err
    assert err.count("done before") == len(tensors(Path("out.gguf")))
    assert Path("rest.gguf").read_bytes() == Path("whole.gguf").read_bytes()


REFUSED = [
    (["--text", "empty.txt"], 2, "the text for calibration has no tokens"),
    (["--text", "hi.txt"], 2, "of the 32 tokens that it needs; give a longer one"),
    (["--text", "latin.txt"], 2, "'latin.txt' is not UTF-8 text (byte 3)"),
    (["--text", "absent.txt"], 2, "there is no file 'absent.txt'"),
    (["--text", "."], 2, "'.' is a folder"),
    (["--text", "long.txt"], 2, "more than 16 MiB"),
    (["--imatrix", "absent.gguf"], 2, "cannot open"),
    (["--imatrix", "text.txt"], 4, "'text.txt'"),
    (["--imatrix", "other.gguf"], 4, "'other.gguf' is not an importance matrix"),
    (["--imatrix", "others.imatrix"], 4, "'others.imatrix' was made for another model"),
    (["--imatrix", "cut.imatrix"], 4, "'cut.imatrix'"),
    (["--imatrix", "others.imatrix", "--calibrate"], 2, "give one of them"),
    (["--imatrix", "others.imatrix", "--text", "text.txt"], 2, "give one of them"),
    (["--save-imatrix", "i.gguf"], 2, "add --calibrate"),
    (["--save-imatrix", "i.gguf", "--imatrix", "others.imatrix"], 2, "add --calibrate"),
    (["--calibrate", "--save-imatrix", "in/config.json"], 2, "'config.json' is an input"),
    (["--calibrate", "--save-imatrix", "out.gguf"], 2, "'out.gguf' would be written twice"),
    (["--calibrate", "--save-imatrix", "out.gguf.part"], 2, "files in the making"),
    (["--text", "text.txt", "--save-imatrix", "text.txt"], 2, "'text.txt' is an input"),
    (["--text", "text.txt", "-o", "text.txt"], 2, "'text.txt' is an input"),
    (["--imatrix", "others.imatrix", "-o", "others.imatrix"], 2, "'others.imatrix' is an input"),
    (["--calibrate", "--save-imatrix", "nowhere/i.gguf"], 2, "its folder is not there"),
    (["--calibrate", "--save-imatrix", "."], 2, "it is a folder"),
    (["--calibrate", "--report", "i.html", "--save-imatrix", "i.html"], 2, "'i.html' would be written twice"),
]


@pytest.mark.parametrize(("arguments", "code", "said"), REFUSED)
@pytest.mark.usefixtures("model")
def test_refusals_are_one_line_and_leave_everything(tiny_model, capsys, arguments, code, said) -> None:
    Path("empty.txt").write_text("")
    Path("hi.txt").write_text("hi")
    Path("latin.txt").write_bytes(b"caf\xe9")
    Path("long.txt").write_bytes(b"x" * ((16 << 20) + 1))
    other = tiny_model(n_layers=1, dim=512, format=F16)[0]
    Path("other.gguf").write_bytes(other.read_bytes())
    if "imatrix" in said or "others.imatrix" in arguments or "cut.imatrix" in arguments:
        write_imatrix(Path("others.imatrix"), gather(calibrate(other, "a few words " * 12)))
        Path("cut.imatrix").write_bytes(Path("others.imatrix").read_bytes()[:-1000])
    before = {path: path.stat() for path in Path().rglob("*.*")}
    got, out, err = llmq(capsys, "-o", "out.gguf", *arguments)
    assert (got, out) == (code, ""), err
    last = err.splitlines()[-1]
    assert last.startswith("llmq: ")
    assert said in last
    after = {path: path.stat() for path in Path().rglob("*.*")}
    assert after.keys() == before.keys()
    assert all(
        (after[path].st_size, after[path].st_mtime_ns) == (s.st_size, s.st_mtime_ns) for path, s in before.items()
    )
