"""llmq quantize with a byte budget: what is kept to, what is refused, and that a stopped run goes on."""

import hashlib
import math
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
from checkpoints import write_checkpoint
from cli_runs import llmq, made
from tiny import tiny_gguf

import quant.sensitivity
from cli import quantize as module
from llmq.formats import F16, Q4_0, Q8_0
from llmq.gguf import open_gguf
from quant.recipe import takes_type
from quant.source import open_source

TEXT = (
    "The sea was calm that night, and the keeper counted the ships as they passed. In the morning a letter came from "
    "the harbour: two boats were missing, and nobody knew whether the storm or the fog had taken them. "
) * 4
SHAPES: dict[str, dict[str, Any]] = {
    "dense": {},
    "experts": {"n_experts": 4},
    "tied": {"tied": True},
    "narrow": {"dim": 96, "n_heads": 3, "n_kv_heads": 1, "ffn_dim": 160},
}


@pytest.fixture(autouse=True)
def models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("LLMQ_HOME", str(tmp_path / "home"))
    monkeypatch.delenv("LLMQ_DEBUG", raising=False)
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "home" / "models"
    folder.mkdir(parents=True)
    return folder


@pytest.fixture
def sensitivity(monkeypatch: pytest.MonkeyPatch) -> None:
    """In the place of measuring: some number for each matrix."""

    def invented(path: Path, text: str, **options: Any) -> dict[str, float]:
        del text, options
        names = [each.name for each in open_source(path).weights if takes_type(each.name, each.shape)]
        return {name: 1 / (1 + 7 * i % 5) for i, name in enumerate(names)}

    monkeypatch.setattr(quant.sensitivity, "sensitivities", invented)


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


# ---- what is kept to
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("preset", ["q2_k", "iq4_xs", "q4_k_m", "q6_k"])
@pytest.mark.usefixtures("sensitivity")
def test_optimized_is_never_larger(tmp_path, capsys, shape, preset) -> None:
    """By at most a few hundred bytes smaller where there is much to choose."""
    tiny_gguf(tmp_path / "a.gguf", format=F16, n_layers=1, **SHAPES[shape])
    plain = made(capsys, "a.gguf", "-q", preset, "--fast")
    optimized = made(capsys, "a.gguf", "-q", preset, "--fast", "--optimize")
    assert (plain.stem, optimized.stem) == (f"a-{preset}", f"a-{preset}-optimized")
    assert 0.9 * plain.stat().st_size < optimized.stat().st_size <= plain.stat().st_size
    with open_gguf(plain) as a, open_gguf(optimized) as b:
        assert a.metadata["general.file_type"] == b.metadata["general.file_type"]
        assert b.metadata["llmq.type"] == f"mix near {preset}"
        remark = f"types chosen to fit the bytes of {preset}, by sensitivity on calibration.txt"
        assert b.metadata["llmq.settings"] == f"{a.metadata['llmq.settings']}; {remark}"


@pytest.mark.usefixtures("sensitivity")
def test_the_file_is_within_its_size(tmp_path, capsys) -> None:
    tiny_gguf(tmp_path / "a.gguf", format=F16, n_layers=1)
    words = ["--fast", "--tensor-type", f"({'attn_k|' * 2000}attn_v)=q4_0", "-o", "b.gguf"]
    for n_bytes in (400_001, 500_000, 543_210):
        out = made(capsys, "a.gguf", "--size", f"{n_bytes}", *words)
        assert 0.95 * n_bytes < out.stat().st_size <= n_bytes
    with open_gguf(out) as gguf:
        assert gguf.tensors["blk.0.attn_v.weight"].format is Q4_0


@pytest.mark.usefixtures("sensitivity")
def test_room_for_more_than_there_is(tmp_path, capsys) -> None:
    tiny_gguf(tmp_path / "a.gguf", format=F16, n_layers=1)
    out = made(capsys, "a.gguf", "--size", "999TB")
    assert out.stem == "a-999tb"
    with open_gguf(out) as gguf:
        assert {info.format for info in gguf.tensors.values() if len(info.shape) > 1} == {Q8_0}
        assert gguf.metadata["llmq.type"] == "mix near q8_0"


@pytest.mark.usefixtures("sensitivity")
def test_bits_of_a_weight(tmp_path, capsys) -> None:
    tiny_gguf(tmp_path / "a.gguf", format=F16, n_layers=1, n_experts=4)
    for bits in ("3", "4.5", "6.25"):
        out = made(capsys, "a.gguf", "--bpw", bits, "--fast")
        assert out.stem == f"a-{bits}bpw"
        with open_gguf(out) as gguf:
            matrices = [
                info for name, info in gguf.tensors.items() if len(info.shape) > 1 and "ffn_gate_inp" not in name
            ]
        found = 8 * sum(info.n_bytes for info in matrices) / sum(math.prod(info.shape) for info in matrices)
        assert float(bits) - 0.1 < found <= float(bits)


@pytest.mark.parametrize("shape", SHAPES)
def test_measured_and_made_twice_it_is_the_same_file(tmp_path, capsys, shape) -> None:
    tiny_gguf(tmp_path / "a.gguf", format=F16, n_layers=1, vocab_size=608, **SHAPES[shape])
    (tmp_path / "words.txt").write_text(TEXT)
    digests = set()
    for _ in range(2):
        code, out, err = llmq(capsys, "quantize", "a.gguf", "--text", "words.txt", "--optimize", "--fast")
        assert code == 0, err
        assert "matrices get " in err
        digests.add(digest(Path(out.rstrip("\n"))))
    assert len(digests) == 1


def test_a_stopped_run_goes_on(tmp_path, models, capsys, monkeypatch) -> None:
    write_checkpoint(tmp_path / "model", max_position_embeddings=64, num_hidden_layers=1)
    (tmp_path / "words.txt").write_text(TEXT)
    command = ["quantize", "model", "--bpw", "4.25", "--calibrate", "--text", "words.txt"]
    whole = digest(made(capsys, *command[1:], "-o", "whole.gguf"))

    def stopped(reports: Iterator[Any], _title: str) -> None:
        list(islice(reports, 6))
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(module, "show_reports", stopped)
        code, _out, err = llmq(capsys, *command)
    assert code == 130
    assert err.endswith("stopped; the same command goes on from here\n")
    code, _out, err = llmq(capsys, *command)
    assert code == 0
    lines = [line for line in err.splitlines() if "->" in line]
    assert [line.endswith(", done before") for line in lines] == [i < 6 for i in range(len(lines))]
    assert digest(models / "model-4.25bpw.gguf") == whole


# ---- what is refused
@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--optimize", "--size", "1GB"], "are three budgets; give one of them"),
        (["--optimize", "--bpw", "4"], "are three budgets; give one of them"),
        (["--size", "1GB", "--bpw", "4"], "are three budgets; give one of them"),
        (["--size", "big"], "'big' is not a size; give one like 4.1GB or 3800MiB"),
        (["--size", "-4GB"], "'-4GB' is not a size"),
        (["--size", ""], "'' is not a size"),
        (["--size", "0"], "bytes more than there are; give a larger budget"),
        (["--size", "10KB"], "bytes more than there are; give a larger budget"),
        (["--size", "0.2MB"], "the smallest types take 2.63 bits a weight"),
        (["--bpw", "0"], "--bpw takes 1 to 32 bits a weight; 4.5 is usual"),
        (["--bpw", "-4"], "--bpw takes 1 to 32 bits"),
        (["--bpw", "nan"], "--bpw takes 1 to 32 bits"),
        (["--bpw", "inf"], "--bpw takes 1 to 32 bits"),
        (["--bpw", "100"], "--bpw takes 1 to 32 bits"),
        (["--bpw", "four"], "Invalid value for '--bpw'"),
        (["--bpw", "2"], "take 2.63 bits a weight, 64,000 bytes more than there are; give a larger budget\n"),
        (["--optimize", "-q", "q8_0"], "nothing to choose for q8_0; drop it"),
        (["--optimize", "-q", "F16"], "nothing to choose for f16; drop it"),
        (["--optimize", "-q", "bf16"], "nothing to choose for bf16; drop it"),
        (["--optimize", "-q", "f32"], "nothing to choose for f32; drop it"),
        (["--optimize", "--tensor-type", "attn_w=q8_0"], "'attn_w' matches no tensor"),
        (["--optimize", "--tensor-type", ".=f32"], "give a larger budget, or leave out --tensor-type\n"),
    ],
)
@pytest.mark.usefixtures("unmeasured")
def test_what_cannot_be_is_refused_before_anything_is_measured(tmp_path, models, capsys, arguments, said) -> None:
    tiny_gguf(tmp_path / "a.gguf", format=F16, n_layers=1)
    code, out, err = llmq(capsys, "quantize", "a.gguf", *arguments)
    assert (code, out) == (2, ""), err
    assert said in err
    assert err.count("\n") == 1
    assert not list(models.iterdir())


@pytest.mark.parametrize("budget", [["--optimize"], ["--size", "1GB"], ["--bpw", "20"]])
def test_a_source_that_is_quantized_or_cannot_be_run_is_refused(tmp_path, models, capsys, budget) -> None:
    tiny_gguf(tmp_path / "a.gguf", format=Q8_0, n_layers=1)
    code, out, err = llmq(capsys, "quantize", "a.gguf", *budget)
    assert (code, out) == (2, "")
    assert "'a.gguf' is quantized already" in err
    write_checkpoint(tmp_path / "model", hidden_size=80, num_attention_heads=5, head_dim=16, num_key_value_heads=1)
    code, out, err = llmq(capsys, "quantize", "model", *budget)
    assert (code, out) == (1, "")
    assert "not a multiple of 32" in err
    assert not list(models.iterdir())
