"""Importance matrices as files: what the gguf package reads and writes in llama.cpp's layout, and what is refused."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf as oracle
import numpy as np
import pytest
from checkpoints import write_checkpoint

from llmq.errors import FileFormatError, UsageError
from quant.calibrate import calibrate, gather
from quant.calibration import Calibration, Inputs
from quant.imatrix import read_imatrix, write_imatrix
from quant.source import open_source

SHAPES = {
    "token_embd.weight": (96, 64),
    "blk.0.attn_norm.weight": (64,),
    "blk.0.attn_q.weight": (64, 64),
    "blk.0.ffn_gate_inp.weight": (4, 64),
    "blk.0.ffn_down_exps.weight": (4, 64, 32),
    "output.weight": (96, 64),
}
Arrays = dict[str, np.ndarray]


def arrays() -> Arrays:
    """A sound file for SHAPES as llama-imatrix writes it: no output matrix, a router, dense tensors without experts."""
    rng = np.random.default_rng(8)
    return {
        "blk.0.attn_q.weight.in_sum2": rng.uniform(1, 9, 64).astype(np.float32),
        "blk.0.attn_q.weight.counts": np.array([1024], np.float32),
        "blk.0.ffn_down_exps.weight.in_sum2": rng.uniform(0, 9, (4, 32)).astype(np.float32),
        "blk.0.ffn_down_exps.weight.counts": np.array([[500], [24], [0], [1524]], np.float32),
        "blk.0.ffn_gate_inp.weight.in_sum2": rng.uniform(1, 9, 64).astype(np.float32),
        "blk.0.ffn_gate_inp.weight.counts": np.array([1024], np.float32),
    }


def write_theirs(path: Path, tensors: Arrays, *, kind: str = "imatrix", size: int = 512) -> Path:
    writer = oracle.GGUFWriter(path, "imatrix")
    writer.add_type(kind)
    writer.add_array("imatrix.datasets", ["wiki.txt", "code.txt"])
    writer.add_uint32("imatrix.chunk_count", 2)
    writer.add_uint32("imatrix.chunk_size", size)
    for name, array in tensors.items():
        writer.add_tensor(name, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_the_gguf_package_reads_what_we_write(tmp_path: Path) -> None:
    """Dimensions in the order of the file: columns first."""
    down = Inputs(np.arange(128, dtype=np.float32).reshape(4, 32), np.array([7, 0, 3, 90]))
    query = Inputs(np.arange(64, dtype=np.float32)[None], np.array([50]))
    inputs = {"blk.0.ffn_down_exps.weight": down, "blk.0.attn_q.weight": query}
    write_imatrix(tmp_path / "i.gguf", Calibration(inputs, "some.txt", 3, 512))
    reader = oracle.GGUFReader(tmp_path / "i.gguf")
    values = {key: field.contents() for key, field in reader.fields.items() if not key.startswith("GGUF.")}
    assert values == {
        "general.type": "imatrix",
        "imatrix.datasets": ["some.txt"],
        "imatrix.chunk_count": 3,
        "imatrix.chunk_size": 512,
    }
    assert reader.fields["imatrix.chunk_count"].types == [oracle.GGUFValueType.UINT32]
    found = {tensor.name: tensor for tensor in reader.tensors}
    assert {name: tensor.shape.tolist() for name, tensor in found.items()} == {
        "blk.0.attn_q.weight.in_sum2": [64, 1],
        "blk.0.attn_q.weight.counts": [1, 1],
        "blk.0.ffn_down_exps.weight.in_sum2": [32, 4],
        "blk.0.ffn_down_exps.weight.counts": [1, 4],
    }
    assert all(tensor.tensor_type == oracle.GGMLQuantizationType.F32 for tensor in found.values())
    assert (found["blk.0.ffn_down_exps.weight.in_sum2"].data == down.sum_squares).all()
    assert found["blk.0.ffn_down_exps.weight.counts"].data.ravel().tolist() == [7, 0, 3, 90]


def test_a_file_of_llama_cpp(tmp_path: Path) -> None:
    theirs = arrays()
    other = {"blk.0.attn_q.weight.in_sum": np.ones(64, np.float32)}
    found = read_imatrix(write_theirs(tmp_path / "i.gguf", theirs | other), SHAPES)
    assert (found.dataset, found.n_chunks, found.chunk_size) == ("wiki.txt, code.txt", 2, 512)
    assert found.inputs.keys() == {name.rpartition(".")[0] for name in theirs}
    down = found.inputs["blk.0.ffn_down_exps.weight"]
    assert (down.sum_squares == theirs["blk.0.ffn_down_exps.weight.in_sum2"]).all()
    assert down.counts.tolist() == [500, 24, 0, 1524]
    assert found.inputs["blk.0.attn_q.weight"].sum_squares.shape == (1, 64)
    expected = theirs["blk.0.attn_q.weight.in_sum2"] / 1024
    assert np.allclose(found.importance("blk.0.attn_q.weight"), expected[None], rtol=1e-5)


def test_one_count_for_all_experts(tmp_path: Path) -> None:
    """Files that were converted from llama.cpp's older format have the experts' sums in one row."""
    tensors = arrays()
    tensors["blk.0.ffn_down_exps.weight.in_sum2"] = tensors["blk.0.ffn_down_exps.weight.in_sum2"].ravel()
    tensors["blk.0.ffn_down_exps.weight.counts"] = np.array([64], np.float32)
    found = read_imatrix(write_theirs(tmp_path / "i.gguf", tensors), SHAPES).inputs["blk.0.ffn_down_exps.weight"]
    assert found.counts.tolist() == [64] * 4
    assert (found.sum_squares == arrays()["blk.0.ffn_down_exps.weight.in_sum2"]).all()


def test_a_calibration_comes_back(tmp_path: Path) -> None:
    experts = {"model_type": "mixtral", "num_local_experts": 4, "num_experts_per_tok": 2, "num_hidden_layers": 1}
    write_checkpoint(tmp_path / "model", **experts)
    calibration = gather(calibrate(tmp_path / "model", "a few words " * 12, threads=1))
    write_imatrix(tmp_path / "i.gguf", calibration)
    shapes = {weights.name: weights.shape for weights in open_source(tmp_path / "model").weights}
    found = read_imatrix(tmp_path / "i.gguf", shapes)
    assert (found.dataset, found.n_chunks, found.chunk_size) == ("calibration.txt", 1, calibration.chunk_size)
    assert found.inputs.keys() == calibration.inputs.keys()
    for name, inputs in calibration.inputs.items():
        assert (found.inputs[name].sum_squares == inputs.sum_squares).all()
        assert (found.inputs[name].counts == inputs.counts).all()


def changed(name: str, value: Any) -> Callable[[Arrays], None]:
    return lambda tensors: tensors.update({name: np.asarray(value)})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (changed("blk.0.attn_q.weight.in_sum2", np.full(64, np.nan, np.float32)), "negative or not finite"),
        (changed("blk.0.attn_q.weight.in_sum2", np.full(64, -1, np.float32)), "negative or not finite"),
        (changed("blk.0.attn_q.weight.counts", np.array([np.inf], np.float32)), "negative or not finite"),
        (changed("blk.0.attn_q.weight.counts", np.array([1e30], np.float32)), "more tokens than any text has"),
        (changed("blk.0.attn_q.weight.in_sum2", np.ones(64, np.float16)), "is F16, and must be F32"),
        (changed("blk.0.attn_q.weight.in_sum2", np.ones(32, np.float32)), r"32 sums .* 1 x 64 columns"),
        (changed("blk.0.ffn_down_exps.weight.counts", np.ones(3, np.float32)), "3 counts for the 4 experts"),
        (changed("blk.1.attn_q.weight.in_sum2", np.ones(64, np.float32)), "no matrix 'blk.1.attn_q.weight'"),
        (changed("blk.0.attn_norm.weight.in_sum2", np.ones(64, np.float32)), "no matrix 'blk.0.attn_norm.weight'"),
        (changed("blk.2.attn_q.weight.counts", np.ones(1, np.float32)), "no matrix 'blk.2.attn_q.weight'"),
        (lambda tensors: tensors.pop("blk.0.attn_q.weight.in_sum2"), "in_sum2' is missing"),
        (lambda tensors: tensors.pop("blk.0.attn_q.weight.counts"), "counts' is missing"),
        (
            lambda tensors: [tensors.pop(f"blk.0.attn_q.weight.{end}") for end in ("in_sum2", "counts")],
            "nothing about blk.0.attn_q.weight",
        ),
    ],
)
def test_files_that_do_not_fit(tmp_path: Path, change: Callable[[Arrays], None], message: str) -> None:
    tensors = arrays()
    change(tensors)
    with pytest.raises(FileFormatError, match=f"^'i.gguf' .*{message}"):
        read_imatrix(write_theirs(tmp_path / "i.gguf", tensors), SHAPES)


def test_other_files(tmp_path: Path) -> None:
    with pytest.raises(FileFormatError, match="is not an importance matrix"):
        read_imatrix(write_theirs(tmp_path / "model.gguf", arrays(), kind="model"), SHAPES)
    with pytest.raises(UsageError, match="cannot open"):
        read_imatrix(tmp_path / "absent.gguf", SHAPES)
    writer = oracle.GGUFWriter(tmp_path / "bare.gguf", "imatrix")
    writer.add_type("imatrix")
    for name, array in arrays().items():
        writer.add_tensor(name, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(FileFormatError, match=r"imatrix\.datasets is missing"):
        read_imatrix(tmp_path / "bare.gguf", SHAPES)
