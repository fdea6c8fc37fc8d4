"""What the quantizer takes of memory: less than it says beforehand, however large a tensor is."""

import json
import math
import mmap
import subprocess
import sys
import tracemalloc
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import psutil
import pytest
from checkpoints import hf_config, hf_shapes, write_checkpoint
from hub import Hub
from published import publish

from llmq.errors import ResourceError
from llmq.formats import F16, F32, IQ4_XS, Q2_K, Q6_K, Format
from llmq.gguf import GGUFWriter, TensorSpec
from quant import calibrate, memory
from quant import quantize as module
from quant.feedback import prepare
from quant.files import map_file
from quant.guide import Guide, Running
from quant.pieces import pieces_of
from quant.quantize import predicted_memory, quantize
from quant.source import Weights, open_source
from quant.stream import WINDOW

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
    config = hf_config(**LARGE)
    (folder / "config.json").write_text(json.dumps(config))
    write_empty(folder / "model.safetensors", hf_shapes(config))
    return folder


def write_empty(path: Path, shapes: dict[str, tuple[int, ...]]) -> None:
    header, at = {}, 0
    for name, shape in shapes.items():
        end = at + 4 * math.prod(shape)
        header[name] = {"dtype": "F32", "shape": shape, "data_offsets": [at, end]}
        at = end
    raw = json.dumps(header).encode()
    with path.open("wb") as file:
        file.write(len(raw).to_bytes(8, "little") + raw)
        file.truncate(8 + len(raw) + at)


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


# The same of weights that arrive over the network, and how many bytes the streams held together.
STREAMED = """
import re, sys
from pathlib import Path
from llmq.hub import snapshot
from quant.quantize import predicted_memory, quantize
from quant.remote import open_remote
from quant.stream import Stream
source = open_remote(snapshot("org/model"))
streams, held, put = set(), [0], Stream._put
def counted(self, index, data):
    put(self, index, data)
    streams.add(self)
    held.append(sum(len(chunk) for stream in streams for chunk in list(stream._chunks.values())))
Stream._put = counted
for _ in quantize(source, Path(sys.argv[1]), "q8_0", threads=2):
    pass
peak = int(re.search(r"VmHWM:\\s*(\\d+) kB", Path("/proc/self/status").read_text())[1]) << 10
print(predicted_memory(source, 2), peak, source.course.n_bytes, max(held))
"""


def empty_shards(folder: Path) -> dict[str, mmap.mmap]:
    """The embedding in one file and all else in another, 160 MB each."""
    write_checkpoint(folder)
    config = hf_config(**LARGE | {"vocab_size": 40_000, "tie_word_embeddings": False})
    (folder / "config.json").write_text(json.dumps(config))
    shapes = hf_shapes(config)
    first = "model.embed_tokens.weight"
    parts = {"a.safetensors": {first: shapes.pop(first)}, "b.safetensors": shapes}
    weight_map = {name: file for file, tensors in parts.items() for name in tensors}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    (folder / "model.safetensors").unlink()
    for file, tensors in parts.items():
        write_empty(folder / file, tensors)
    return {file: map_file(folder / file) for file in parts}


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux to tell a process's peak")
def test_the_peak_of_a_stream_is_below_the_prediction(hub: Hub, tmp_path: Path, monkeypatch) -> None:
    folder = tmp_path / "model"
    large = empty_shards(folder)
    publish(hub, folder, monkeypatch, large)
    command = [sys.executable, "-c", STREAMED, str(tmp_path / "out.gguf")]
    done = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    predicted, peak, streams, held = map(int, done.split())
    assert peak < predicted < 600e6
    assert WINDOW // 2 < held <= streams < 3 * WINDOW
    assert (
        predicted - predicted_memory(open_source(folder), 2)
        == streams - (module.RELEASED_CHUNKS - 4) * 4 * module.CHUNK
    )


# The same with guides of a run of the model: what is asked for before the first byte is for both.
GUIDED = """
import re, sys
from pathlib import Path
from quant import quantize as module
from quant.guide import Running
source, out, text = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3]
predicted = []
module.check_room = lambda _what, needed, _otherwise: predicted.append(needed)
for _ in module.quantize(source, out, "q4_k_m", threads=2, guides=Running(source, text, "text", threads=2)):
    pass
print(sum(predicted), int(re.search(r"VmHWM:\\s*(\\d+) kB", Path("/proc/self/status").read_text())[1]) << 10)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux to tell a process's peak")
@pytest.mark.parametrize("n_experts", [0, 8])
def test_the_peak_of_a_calibrated_run_is_below_the_prediction(tmp_path: Path, n_experts: int) -> None:
    shape = {"hidden_size": 1024, "intermediate_size": 2048 if n_experts else 8192, "num_hidden_layers": 2}
    experts = {"num_local_experts": n_experts, "num_experts_per_tok": 2, "model_type": "mixtral"} if n_experts else {}
    write_checkpoint(tmp_path / "model", **shape, **experts)
    text = "The keeper of the light went down to the harbour and asked for bread. " * 120
    command = [sys.executable, "-c", GUIDED, str(tmp_path / "model"), str(tmp_path / "out.gguf"), text]
    predicted, peak = map(int, subprocess.run(command, capture_output=True, text=True, check=True).stdout.split())
    assert peak < predicted < 2 * peak


def test_the_prediction_grows_with_threads_and_not_with_tensors(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "small")
    small, large = open_source(tmp_path / "small"), open_source(empty_checkpoint(tmp_path / "large"))
    assert predicted_memory(small, 1) < predicted_memory(small, 8) < 1e9
    assert predicted_memory(large, 2) - predicted_memory(small, 2) == (150_000 - 608) * module.TEXT_BYTES


@pytest.mark.skipif(not hasattr(psutil.Process().memory_info(), "shared"), reason="the system does not tell")
def test_what_a_process_has_counts_once(tmp_path: Path, monkeypatch) -> None:
    """Its own memory adds to what is free; pages of a file, which are free as they are, do not."""
    monkeypatch.setattr(memory, "memory_free", lambda: 10**9)
    with (tmp_path / "file").open("wb") as file:
        file.truncate(64 << 20)
    before = memory.free_memory()
    pages = np.frombuffer(map_file(tmp_path / "file"), np.uint8)
    assert not pages[::4096].any()
    assert abs(memory.free_memory() - before) < 8 << 20
    own = np.ones(64 << 20, np.uint8)
    assert abs(memory.free_memory() - before - own.size) < 8 << 20
    assert before > 10**9


def test_where_a_system_does_not_tell_of_mapped_files(monkeypatch) -> None:
    monkeypatch.setattr(memory, "memory_free", lambda: 10**9)
    monkeypatch.setattr(psutil.Process, "memory_info", lambda _: SimpleNamespace(rss=70))
    assert memory.free_memory() == 10**9 + 70


def test_calibrating_and_quantizing_have_room_together(tmp_path: Path, monkeypatch) -> None:
    write_checkpoint(tmp_path / "model")
    running = Running(tmp_path / "model", "The keeper of the light went down to the harbour. " * 9, "text")
    alone = predicted_memory(open_source(tmp_path / "model"), 2)
    both = alone + running.n_bytes - memory.BASE_BYTES
    assert both > max(alone, running.n_bytes) + 1
    for free in both - 1, both:
        monkeypatch.setattr(memory, "free_memory", lambda free=free: free)
        reports = quantize(tmp_path / "model", tmp_path / "out.gguf", "q8_0", threads=2, guides=running)
        if free < both:
            with pytest.raises(ResourceError, match=r"quantizing with 2 threads while calibrating needs .* shorter"):
                next(reports)
            assert [path.name for path in tmp_path.iterdir()] == ["model"]
        else:
            next(reports)
            reports.close()


def guide_of(n_cols: int) -> Guide:
    """Of columns that have nothing to do with each other."""
    moments = np.tile(np.eye(256, dtype=np.float32), (n_cols // 256, 1, 1))
    return Guide(np.ones((1, n_cols), np.float32), (prepare(moments),), moments[None])


@pytest.mark.parametrize("fmt", [Q2_K, Q6_K, IQ4_XS, F16], ids=lambda fmt: fmt.name)
@pytest.mark.parametrize("is_guided", [False, True])
def test_a_threads_share_is_what_encoding_takes(tmp_path: Path, fmt: Format, is_guided: bool) -> None:
    """Measured by what NumPy allocates for a whole chunk of weights; the kernels allocate nothing."""
    rows = np.random.default_rng(0).standard_normal((module.CHUNK // 1024, 1024), np.float32)
    weights = Weights("blk.0.attn_q.weight", rows.shape, "F32", lambda start, stop: rows[start:stop].copy())
    (piece,) = pieces_of(weights, TensorSpec(weights.name, weights.shape, fmt))
    guide = guide_of(rows.shape[1]) if is_guided else None
    chunk = module._Chunk(piece, 0, len(rows), measured=True, guide=guide, rounds=0)
    module._encode(chunk)  # what it takes once
    tracemalloc.start()
    packed = module._encode(chunk).packed
    needed = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()

    write_checkpoint(tmp_path)
    source = open_source(tmp_path)
    share = predicted_memory(source, 9) - predicted_memory(source, 8)
    assert needed + 2 * packed.nbytes <= share < 4 * needed


def test_too_little_memory_is_refused_before_the_first_byte(tmp_path: Path, monkeypatch) -> None:
    write_checkpoint(tmp_path / "model")
    for each in module, calibrate:
        monkeypatch.setattr(each, "BASE_BYTES", 10**15)
    with pytest.raises(
        ResourceError, match=r"quantizing with 2 threads needs 1000000\.\d\d GB of memory and \d+\.\d\d GB is"
    ):
        next(quantize(tmp_path / "model", tmp_path / "out.gguf", "q8_0", threads=2))
    with pytest.raises(ResourceError, match=r"calibrating needs 1000000\.\d\d GB of memory"):
        Running(tmp_path / "model", "The keeper of the light went down to the harbour. " * 9, "text")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
