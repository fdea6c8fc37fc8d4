"""What a file says of how it was made: against hashes and errors worked out from the files' own bytes."""

import hashlib
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from checkpoints import safetensors_bytes, stored, write_checkpoint
from tiny import tiny_gguf

from llmq import __version__
from llmq.formats import BF16, F16, F32, Q4_K, Q8_0, Format, dequantize
from llmq.gguf import GGUFWriter, TensorSpec, open_gguf
from quant.quantize import quantize
from quant.receipt import describe
from quant.recipe import parse_override

EXPERTS = {"model_type": "mixtral", "num_local_experts": 8, "num_experts_per_tok": 2}
COMMIT = "0123456789abcdef0123456789abcdef01234567"


def receipt_of(path: Path) -> dict[str, Any]:
    return {key: value for key, value in open_gguf(path).metadata.items() if key.startswith("llmq.")}


def made(source: Path, out: Path, preset: str = "q8_0", **settings: Any) -> dict[str, Any]:
    list(quantize(source, out, preset, fast=True, **settings))
    return receipt_of(out)


def weights_sha256(path: Path) -> str:
    """By the definition, row by row from the bytes of a GGUF file; what is not a float format as float32."""
    lines = []
    with open_gguf(path) as gguf:
        for name, info in gguf.tensors.items():
            rows = gguf.data(name).reshape(-1, gguf.data(name).shape[-1])
            if info.format not in (F32, F16, BF16):
                rows = dequantize(info.format, rows)
            experts = rows.reshape(-1, info.shape[-2], rows.shape[-1]) if len(info.shape) == 3 else [rows]
            found = [hashlib.sha256(b"".join(hashlib.sha256(row).digest() for row in each)) for each in experts]
            digest = found[0] if len(found) == 1 else hashlib.sha256(b"".join(each.digest() for each in found))
            sizes = "x".join(str(size) for size in info.shape)
            lines.append(f"{name} {sizes} {digest.hexdigest()}\n")
    return hashlib.sha256("".join(sorted(lines)).encode()).hexdigest()


def relative_error(source: Path, out: Path) -> float:
    """Of all matrices together."""
    off = size = 0.0
    with open_gguf(source) as before, open_gguf(out) as after:
        for name, info in before.tensors.items():
            if len(info.shape) > 1:
                expected = dequantize(info.format, before.data(name)).astype(np.float64)
                found = dequantize(after.tensors[name].format, after.data(name))
                off += ((found.reshape(expected.shape) - expected) ** 2).sum()
                size += (expected**2).sum()
    return float(np.sqrt(off / size))


@pytest.mark.parametrize("fmt", [F32, BF16, F16, Q8_0, Q4_K], ids=lambda fmt: fmt.name)
def test_every_key_of_a_file(tmp_path: Path, fmt: Format) -> None:
    source = tmp_path / "in.gguf"
    tiny_gguf(source, n_layers=1, n_experts=4, format=fmt)
    overrides = [parse_override("attn_v=Q6_K"), parse_override("ffn_(up|down)=q4_k")]
    remarks = ("calibrated on a.txt", "twice")
    found = made(source, tmp_path / "out.gguf", "q3_k_m", overrides=overrides, remarks=remarks)
    assert found.pop("llmq.rms_error") == pytest.approx(relative_error(source, tmp_path / "out.gguf"), rel=1e-6)
    assert found == {
        "llmq.version": __version__,
        "llmq.source": "in.gguf",
        "llmq.source_sha256": weights_sha256(source),
        "llmq.type": "q3_k_m",
        "llmq.settings": "fast; attn_v=q6_k; ffn_(up|down)=q4_k; calibrated on a.txt; twice",
    }


def test_what_guided_and_what_mix(tmp_path: Path) -> None:
    tiny_gguf(tmp_path / "in.gguf", n_layers=1)
    list(quantize(tmp_path / "in.gguf", tmp_path / "out.gguf", "q8_0"))
    assert receipt_of(tmp_path / "out.gguf")["llmq.settings"] == "thorough"
    found = made(tmp_path / "in.gguf", tmp_path / "out.gguf", guided_by="ab" * 32, mix={"output.weight": Q4_K})
    assert found["llmq.calibration_sha256"] == "ab" * 32
    assert found["llmq.type"] == "mix near q8_0"


def test_the_same_for_any_threads_and_after_a_stop(tmp_path: Path) -> None:
    tiny_gguf(tmp_path / "in.gguf", n_experts=4)
    for threads in (1, 3):
        made(tmp_path / "in.gguf", tmp_path / f"{threads}.gguf", "q4_k_m", threads=threads)
    reports = quantize(tmp_path / "in.gguf", tmp_path / "stopped.gguf", "q4_k_m", fast=True)
    for _ in range(9):
        next(reports)
    reports.close()  # type: ignore[attr-defined]
    resumed = [each.resumed for each in quantize(tmp_path / "in.gguf", tmp_path / "stopped.gguf", "q4_k_m", fast=True)]
    assert sum(resumed) == 9
    whole = (tmp_path / "1.gguf").read_bytes()
    assert receipt_of(tmp_path / "1.gguf")["llmq.source_sha256"] == weights_sha256(tmp_path / "in.gguf")
    assert (tmp_path / "3.gguf").read_bytes() == whole
    assert (tmp_path / "stopped.gguf").read_bytes() == whole


@pytest.mark.parametrize("dtype", ["BF16", "F16", "F32"])
def test_the_hash_is_of_the_weights_in_however_many_files(tmp_path: Path, dtype: str) -> None:
    found = set()
    for shards in (1, 3):
        write_checkpoint(tmp_path / f"{shards}", dtype, shards=shards, num_hidden_layers=1, **EXPERTS)
        found.add(made(tmp_path / f"{shards}", tmp_path / "out.gguf")["llmq.source_sha256"])
    assert len(found) == 1


@pytest.mark.parametrize("dtypes", [("BF16", "BF16"), ("F16", "F16"), ("F32", "F32"), ("BF16", "F32"), ("F32", "F16")])
def test_the_hash_tells_of_one_bit(tmp_path: Path, dtypes: tuple[str, str]) -> None:
    """The last bit of the last weight of one expert, which may have another type than the first expert."""
    first, other = dtypes
    hf = write_checkpoint(tmp_path / "model", num_hidden_layers=1, **EXPERTS)
    tensors = {name: stored(value, other if ".experts.7." in name else first) for name, value in hf.items()}
    found = set()
    for _ in range(2):
        (tmp_path / "model" / "model.safetensors").write_bytes(safetensors_bytes(tensors))
        found.add(made(tmp_path / "model", tmp_path / "out.gguf")["llmq.source_sha256"])
        _dtype, weights = tensors["model.layers.0.block_sparse_moe.experts.7.w2.weight"]
        weights.view(f"u{weights.itemsize}")[-1, -1] ^= 1
    assert len(found) == 2


def test_shape_and_name_belong_to_the_hash(tmp_path: Path) -> None:
    """Two tensors that change places are another model."""
    plain, swapped = tmp_path / "plain.gguf", tmp_path / "swapped.gguf"
    tiny_gguf(plain, n_layers=1)
    others = {"blk.0.attn_k.weight": "blk.0.attn_v.weight", "blk.0.attn_v.weight": "blk.0.attn_k.weight"}
    with open_gguf(plain) as gguf:
        specs = [TensorSpec(info.name, info.shape, info.format) for info in gguf.tensors.values()]
        with GGUFWriter(swapped, gguf.metadata, specs) as writer:
            for spec in specs:
                writer.write(spec.name, gguf.data(others.get(spec.name, spec.name)))
    a, b = (made(path, tmp_path / "out.gguf")["llmq.source_sha256"] for path in (plain, swapped))
    assert a != b


def test_a_file_made_of_a_made_file_has_its_own_receipt(tmp_path: Path) -> None:
    tiny_gguf(tmp_path / "in.gguf", n_layers=1)
    metadata = open_gguf(tmp_path / "in.gguf").metadata | {"llmq.unheard_of": 7, "llmqx": "stays"}
    with open_gguf(tmp_path / "in.gguf") as gguf:
        specs = [TensorSpec(info.name, info.shape, info.format) for info in gguf.tensors.values()]
        with GGUFWriter(tmp_path / "first.gguf", metadata, specs) as writer:
            for spec in specs:
                writer.write(spec.name, gguf.data(spec.name))
    made(tmp_path / "first.gguf", tmp_path / "second.gguf", guided_by="ab" * 32, remarks=("an old remark",))
    found = made(tmp_path / "second.gguf", tmp_path / "third.gguf", "q4_k_m")
    assert found["llmq.source"] == "second.gguf"
    assert found["llmq.source_sha256"] == weights_sha256(tmp_path / "second.gguf")
    assert found["llmq.settings"] == "fast"
    assert not {"llmq.unheard_of", "llmq.calibration_sha256"} & found.keys()
    assert open_gguf(tmp_path / "third.gguf").metadata["llmqx"] == "stays"


def test_the_name_of_a_source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    snapshot = tmp_path / "models--mistralai--Mixtral-8x7B" / "snapshots" / COMMIT
    snapshot.mkdir(parents=True)
    write_checkpoint(snapshot, num_hidden_layers=1)
    tiny_gguf(snapshot / "a.gguf", n_layers=1)
    (tmp_path / "link").symlink_to(snapshot)
    for source, name in (
        (snapshot, "mistralai/Mixtral-8x7B"),
        (tmp_path / "link", "mistralai/Mixtral-8x7B"),
        (snapshot / "a.gguf", "a.gguf"),
    ):
        found = made(source, tmp_path / "out.gguf")
        assert (found["llmq.source"], found["llmq.source_revision"]) == (name, COMMIT)
    branch = snapshot.rename(snapshot.with_name("v0.1"))
    assert "llmq.source_revision" not in made(branch, tmp_path / "out.gguf")
    plain = branch.rename(tmp_path / "plain")
    monkeypatch.chdir(plain)
    for source, name in ((Path(), "plain"), (plain, "plain"), (Path("a.gguf"), "a.gguf")):
        found = made(source, tmp_path / "out.gguf")
        assert found["llmq.source"] == name
        assert "llmq.source_revision" not in found


@pytest.mark.skipif(sys.platform != "linux", reason="names are Unicode elsewhere")
def test_a_name_that_is_no_text(tmp_path: Path) -> None:
    source = tmp_path / "caf\udce9.gguf"
    tiny_gguf(source, n_layers=1)
    assert made(source, tmp_path / "out.gguf")["llmq.source"] == "caf?.gguf"


def test_nothing_of_the_machine_or_the_day(tmp_path: Path) -> None:
    tiny_gguf(tmp_path / "in.gguf", n_layers=1)
    for folder in ("a", "b/c"):
        (tmp_path / folder).mkdir(parents=True)
        (tmp_path / folder / "in.gguf").write_bytes((tmp_path / "in.gguf").read_bytes())
        made(tmp_path / folder / "in.gguf", tmp_path / folder / "out.gguf")
    a, b = ((tmp_path / folder / "out.gguf").read_bytes() for folder in ("a", "b/c"))
    assert a == b
    assert str(tmp_path).encode() not in a


def test_a_receipt_in_words() -> None:
    metadata = {
        "general.name": "x",
        "llmq.version": "1.2",
        "llmq.source": "mistralai/M",
        "llmq.source_sha256": "ab",
        "llmq.source_revision": COMMIT,
        "llmq.type": "q4_k_m",
        "llmq.settings": "fast; x=q8_0",
        "llmq.calibration_sha256": "cd",
        "llmq.rms_error": 0.078125,
    }
    assert describe(metadata) == [
        ("made from", "mistralai/M"),
        ("revision", COMMIT),
        ("weights", "sha256 ab"),
        ("made by", "llmq 1.2"),
        ("made as", "q4_k_m, fast; x=q8_0"),
        ("calibration", "sha256 cd"),
        ("error", "7.812% of the weights' root mean square"),
    ]
    assert describe({"general.name": "x"}) == []
    assert describe({"llmq.type": "q8_0"}) == [("made as", "q8_0")]


@pytest.mark.parametrize("value", [7, True, np.uint8(1), [b"a"], np.zeros(3, np.float32), float("nan"), float("inf")])
def test_keys_of_other_types_are_no_receipt(value: Any) -> None:
    keys = ("version", "source", "source_sha256", "source_revision", "type", "settings", "calibration_sha256")
    assert describe({f"llmq.{key}": value for key in keys}) == []
    assert describe({"llmq.rms_error": value}) == []
    assert describe({"llmq.rms_error": "small"}) == []
