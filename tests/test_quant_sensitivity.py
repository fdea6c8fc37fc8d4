"""Sensitivity: what probing finds is what the ordinary evaluation says of a file in which that tensor is altered."""

import math
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from checkpoints import write_checkpoint
from encoded import decoded
from tiny import tiny_gguf

from llmq.errors import FileFormatError, ResourceError, UnsupportedError, UsageError
from llmq.formats import BF16, F16, F32, Q3_K, Q4_0, Q8_0
from llmq.gguf import GGUFWriter, TensorSpec, open_gguf
from llmq.model import load
from quant import evaluate as ev
from quant import sensitivity as module
from quant.encode import FAST, encode
from quant.quantize import quantize
from quant.sensitivity import probe_format, sensitivities

TEXT = (
    "The sea was calm that night, and the keeper counted the ships as they passed. In the morning a letter came from "
    "the harbour: two boats were missing, and nobody knew whether the storm or the fog had taken them. "
)
EXPERTS = {"model_type": "mixtral", "num_local_experts": 4, "num_experts_per_tok": 2}
SMALL: dict[str, Any] = {"max_position_embeddings": 64, "num_hidden_layers": 1}


def with_other_rows(path: Path, out: Path, name: str, rows: np.ndarray) -> Path:
    """The file with one tensor replaced, in F32."""
    with open_gguf(path) as gguf:
        formats = {each: info.format for each, info in gguf.tensors.items()} | {name: F32}
        specs = [TensorSpec(each, info.shape, formats[each]) for each, info in gguf.tensors.items()]
        with GGUFWriter(out, gguf.metadata, specs) as writer:
            for spec in specs:
                writer.write(spec.name, rows if spec.name == name else gguf.data(spec.name))
    return out


def altered(weights: np.ndarray) -> np.ndarray:
    """What three bits leave of a matrix."""
    rows = weights.reshape(-1, weights.shape[-1])
    fmt = Q3_K if rows.shape[1] % 256 == 0 else Q4_0
    return decoded(fmt, encode(fmt, rows, rounds=FAST)).astype(np.float32).reshape(weights.shape)


def divergence(path: Path, reference: Path, n_chunks: int) -> float:
    """Mean KL on the text's first chunks, both models loaded and run as anyone would."""
    with load(path, n_ctx=512, threads=2) as model, load(reference, n_ctx=512, threads=2) as other:
        ids = model.tokenizer.encode(TEXT * 12)
        bos = model.tokenizer.bos_id
        pieces = [[bos, *ids[511 * i : 511 * i + 511]] for i in range(n_chunks)]
        records = ev.compare(ev.log_probs(model, pieces), ev.log_probs(other, pieces), pieces)
        return ev.comparison(np.stack(list(records))).kl.value


@pytest.mark.parametrize(
    ("changes", "roles"),
    [
        ({}, ["token_embd", "blk.0.attn_v", "blk.1.attn_q", "blk.1.ffn_down"]),
        ({"tied": True, "n_layers": 1}, ["token_embd", "attn_q", "ffn_down"]),
        ({"n_experts": 4, "n_layers": 1}, ["token_embd", "output.weight", "ffn_gate_exps", "ffn_down_exps"]),
        (
            {"dim": 96, "n_heads": 3, "n_kv_heads": 1, "ffn_dim": 160, "n_layers": 1, "window": 32},
            ["attn_v", "ffn_up", "output.weight"],
        ),
        ({"format": BF16, "n_layers": 1}, ["token_embd", "attn_v", "ffn_down", "output.weight"]),
    ],
    ids=["dense", "tied", "experts", "narrow", "bf16"],
)
def test_a_probe_is_the_evaluation_of_an_altered_file(
    tmp_path: Path, changes: dict[str, Any], roles: list[str]
) -> None:
    source = tmp_path / "in.gguf"
    weights = tiny_gguf(source, vocab_size=608, **changes)
    found = sensitivities(source, TEXT * 12, threads=2)
    matrices = [name for name in weights if weights[name].ndim > 1 and "ffn_gate_inp" not in name]
    assert sorted(found) == sorted(matrices)
    # What is altered is rounded to 16 bits where the source is.
    tolerance = 0.02 if "format" in changes else 1e-5
    n_chunks = len(load(source, n_ctx=512).tokenizer.encode(TEXT * 12)) // 511
    assert 1 < n_chunks <= module.MOST_CHUNKS
    for name in (name for name in matrices if any(role in name for role in roles)):
        path = with_other_rows(source, tmp_path / "altered.gguf", name, altered(weights[name]))
        assert found[name] == pytest.approx(divergence(path, source, n_chunks), rel=tolerance), name
        assert found[name] > 1e-6


def test_not_on_the_number_of_threads(tmp_path: Path) -> None:
    tiny_gguf(tmp_path / "in.gguf", n_experts=4, n_layers=1)
    one, three = (sensitivities(tmp_path / "in.gguf", TEXT * 3, threads=n) for n in (1, 3))
    assert one == three


@pytest.mark.parametrize("changes", [{}, EXPERTS, {"tie_word_embeddings": True}], ids=["dense", "experts", "tied"])
def test_a_checkpoint_is_as_sensitive_as_its_gguf_file(tmp_path: Path, changes: dict[str, Any]) -> None:
    source, converted = tmp_path / "model", tmp_path / "f32.gguf"
    write_checkpoint(source, "F32", **SMALL | changes)
    list(quantize(source, converted, "f32"))
    ours, theirs = (sensitivities(path, TEXT * 2, threads=2) for path in (source, converted))
    assert ours == {name: pytest.approx(value, rel=1e-4) for name, value in theirs.items()}


def test_layers_between_are_interpolated(tmp_path: Path, monkeypatch: Any) -> None:
    tiny_gguf(tmp_path / "in.gguf", n_layers=6, dim=32, n_heads=1, n_kv_heads=1, ffn_dim=32)
    told: list[tuple[int, int]] = []
    whole = sensitivities(tmp_path / "in.gguf", TEXT, threads=2, tell=lambda *step: told.append(step))
    assert told == [(i, 7) for i in range(1, 8)]
    monkeypatch.setattr(module, "PROBED_LAYERS", 3)
    some = sensitivities(tmp_path / "in.gguf", TEXT, threads=2)
    assert some.keys() == whole.keys()
    between = [name for name in some if re.match(r"blk\.[234]\.", name)]
    assert len(between) == 3 * 7
    for name in some.keys() - between:
        assert some[name] == whole[name]
    for name in between:
        _blk, layer, role = name.split(".", 2)
        share = (int(layer) - 1) / 4
        expected = whole[f"blk.1.{role}"] ** (1 - share) * whole[f"blk.5.{role}"] ** share
        assert some[name] == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize(("n_layers", "first"), [(1, [0]), (12, list(range(12))), (13, [0, 1]), (80, [0, 1])])
def test_which_layers_are_probed(n_layers: int, first: list[int]) -> None:
    probed = module._probed(n_layers)
    assert len(probed) == min(n_layers, 12)
    assert probed[: len(first)] == first
    assert probed[-1] == n_layers - 1
    gaps = np.diff(probed[1:])
    assert not len(gaps) or gaps.max() - gaps.min() <= 1


def test_a_large_model_reads_one_chunk_and_a_small_one_eight_from_all_over_the_text(tmp_path: Path) -> None:
    tiny_gguf(tmp_path / "in.gguf", n_layers=1)
    chunks = [[i] * 512 for i in range(20)] + [[20] * 100]
    with open_gguf(tmp_path / "in.gguf") as gguf:
        assert [chunk[0] for chunk in module._spread(chunks, gguf)] == [0, 2, 5, 7, 10, 12, 15, 17]
        assert module._spread(chunks[:3], gguf) == chunks[:2]
        assert module._spread(chunks[-1:], gguf) == chunks[-1:]
        n_weights = sum(math.prod(info.shape) for info in gguf.tensors.values())
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(module, "LARGE", n_weights)
            assert module._spread(chunks, gguf) == chunks[:1]
            patch.setattr(module, "LARGE", n_weights - 1)
            assert module._spread(chunks, gguf) == [chunks[0][:256]]


@pytest.mark.parametrize(("n_cols", "fmt"), [(256, Q3_K), (4096, Q3_K), (96, Q4_0)])
def test_three_bits_where_rows_allow(n_cols: int, fmt: Any) -> None:
    assert probe_format(n_cols) is fmt


# ---- refusals
def test_a_source_that_is_quantized_is_refused(tmp_path: Path) -> None:
    tiny_gguf(tmp_path / "in.gguf", format={"attn_v.weight": Q8_0, "": F32})
    with pytest.raises(UsageError, match=r"'in\.gguf' is quantized already; a mix of types is chosen from the"):
        sensitivities(tmp_path / "in.gguf", TEXT)


@pytest.mark.parametrize(("text", "said"), [("", "no tokens"), ("a b c", "of the 32 tokens that measuring needs")])
def test_too_short_a_text_is_refused(tmp_path: Path, text: str, said: str) -> None:
    tiny_gguf(tmp_path / "in.gguf")
    with pytest.raises(UsageError, match=said):
        sensitivities(tmp_path / "in.gguf", text)


@pytest.mark.parametrize(
    ("name", "value", "error", "said"),
    [
        ("blk.0.attn_q.weight", np.nan, FileFormatError, r"blk\.0\.attn_q\.weight has weights that are not finite"),
        ("output.weight", np.inf, FileFormatError, r"output\.weight has weights that are not finite"),
        ("blk.0.ffn_norm.weight", np.nan, FileFormatError, r"blk\.0\.ffn_norm\.weight has weights that are not finite"),
        ("output_norm.weight", np.inf, FileFormatError, r"output_norm\.weight has weights that are not finite"),
        ("blk.0.ffn_up.weight", 1e6, UnsupportedError, r"too large for Q3_K; quantize to bf16 or f32"),
    ],
)
def test_damaged_weights_are_refused(
    tmp_path: Path, name: str, value: float, error: type[Exception], said: str
) -> None:
    weights = tiny_gguf(tmp_path / "in.gguf", n_layers=1)
    rows = weights[name].copy()
    rows.reshape(-1)[:5] = value
    path = with_other_rows(tmp_path / "in.gguf", tmp_path / "damaged.gguf", name, rows)
    with pytest.raises(error, match=said):
        sensitivities(path, TEXT)


def test_too_little_memory_is_refused_beforehand(tmp_path: Path, monkeypatch: Any) -> None:
    tiny_gguf(tmp_path / "in.gguf", n_layers=1)
    monkeypatch.setattr(module, "BASE_BYTES", 10**15)
    with pytest.raises(ResourceError, match=r"sensitivity needs 1000000\.\d\d GB of memory and \d+\.\d\d GB is free"):
        sensitivities(tmp_path / "in.gguf", TEXT, tell=lambda *_: pytest.fail("it began"))


# The peak of this program's own memory: the one of getrusage begins with that of the process that started it.
PROGRAM = """
import re, sys
from pathlib import Path
from quant import sensitivity
from quant.sensitivity import check_memory, predicted_memory, sensitivities
predicted = []
sensitivity.check_memory = lambda *given: predicted.append(predicted_memory(*given))
sensitivities(Path(sys.argv[1]), sys.argv[2], threads=2)
print(*predicted, int(re.search(r"VmHWM:\\s*(\\d+) kB", Path("/proc/self/status").read_text())[1]) << 10)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux to tell a process's peak")
def test_the_peak_is_below_the_prediction(tmp_path: Path) -> None:
    tiny_gguf(tmp_path / "in.gguf", n_layers=1, vocab_size=40_000, tied=True, dim=512, format=F16)
    command = [sys.executable, "-c", PROGRAM, str(tmp_path / "in.gguf"), TEXT * 3]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    predicted, peak = map(int, done.stdout.split())
    assert peak < predicted < 2 * peak
