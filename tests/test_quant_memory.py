"""What the quantizer takes of memory: less than it says beforehand, however large a tensor is."""

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
from checkpoints import hf_config, hf_shapes, write_checkpoint

from llmq.errors import ResourceError
from llmq.formats import F32
from llmq.gguf import GGUFWriter, TensorSpec
from quant import quantize as module
from quant.quantize import predicted_memory, quantize
from quant.source import open_source

# One tensor, the embedding, is 600 MB in F32; the file has no blocks on disk.
LARGE = {"vocab_size": 150_000, "hidden_size": 1024, "num_hidden_layers": 1, "tie_word_embeddings": True}
# The peak of this program's own memory: the one of getrusage begins with that of the process that started it.
PROGRAM = """
import re, sys
from pathlib import Path
from quant.quantize import predicted_memory, quantize
from quant.source import open_source
predicted = predicted_memory(open_source(Path(sys.argv[1])), 2)
for _ in quantize(Path(sys.argv[1]), Path(sys.argv[2]), "q8_0", threads=2):
    pass
print(predicted, int(re.search(r"VmHWM:\\s*(\\d+) kB", Path("/proc/self/status").read_text())[1]) << 10)
"""


def empty_checkpoint(folder: Path) -> Path:
    """All weights are zeros that take no room."""
    write_checkpoint(folder)
    config, header, at = hf_config(**LARGE), {}, 0
    for name, shape in hf_shapes(config).items():
        end = at + 4 * math.prod(shape)
        header[name] = {"dtype": "F32", "shape": shape, "data_offsets": [at, end]}
        at = end
    raw = json.dumps(header).encode()
    (folder / "config.json").write_text(json.dumps(config))
    with (folder / "model.safetensors").open("wb") as file:
        file.write(len(raw).to_bytes(8, "little") + raw)
        file.truncate(8 + len(raw) + at)
    return folder


def empty_gguf(path: Path) -> Path:
    source = open_source(empty_checkpoint(path.with_suffix("")))
    specs = [TensorSpec(weights.name, weights.shape, F32) for weights in source.weights]
    writer = GGUFWriter(path, source.metadata, specs)
    with path.open("wb") as file:
        file.write(writer._header)
        file.truncate(writer.n_bytes)
    return path


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux to tell a process's peak")
@pytest.mark.parametrize("make", [empty_checkpoint, empty_gguf])
def test_the_peak_is_below_the_prediction(tmp_path: Path, make) -> None:
    source = make(tmp_path / "model.gguf")
    command = [sys.executable, "-c", PROGRAM, str(source), str(tmp_path / "out.gguf")]
    predicted, peak = map(int, subprocess.run(command, capture_output=True, text=True, check=True).stdout.split())
    (tmp_path / "out.gguf").unlink()
    assert peak < predicted < 600e6


def test_the_prediction_grows_with_threads_and_not_with_tensors(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "small")
    small, large = open_source(tmp_path / "small"), open_source(empty_checkpoint(tmp_path / "large"))
    assert predicted_memory(small, 1) < predicted_memory(small, 8) < 1e9
    assert predicted_memory(large, 2) - predicted_memory(small, 2) == (150_000 - 608) * module.TEXT_BYTES


def test_too_little_memory_is_refused_before_the_first_byte(tmp_path: Path, monkeypatch) -> None:
    write_checkpoint(tmp_path / "model")
    monkeypatch.setattr(module, "BASE_BYTES", 10**15)
    with pytest.raises(
        ResourceError, match=r"2 threads need 1000000\.\d\d GB of memory to quantize and \d+\.\d\d GB is"
    ):
        next(quantize(tmp_path / "model", tmp_path / "out.gguf", "q8_0", threads=2))
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
