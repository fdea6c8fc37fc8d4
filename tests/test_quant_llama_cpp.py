"""Against llama.cpp's own quantizer: the same types for every tensor, the same size, and no more error."""

import ctypes
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from checkpoints import write_checkpoint

from llmq.formats import dequantize
from llmq.gguf import GGUF, open_gguf
from quant.quantize import quantize
from quant.recipe import PRESETS

STORYTELLER = Path(__file__).parents[2] / "shared" / "data" / "storyteller"
QUANTIZED = [preset for preset in PRESETS if preset not in ("f16", "bf16", "f32")]


@pytest.fixture(scope="module")
def llama_cpp() -> Any:
    return pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed")


def quantize_theirs(llama_cpp: Any, source: Path, out: Path, preset: str) -> None:
    parameters = llama_cpp.llama_model_quantize_default_params()
    parameters.ftype, parameters.nthread = PRESETS[preset].file_type, 1
    assert llama_cpp.llama_model_quantize(str(source).encode(), str(out).encode(), ctypes.byref(parameters)) == 0


def rms_error(gguf: GGUF, reference: GGUF, name: str) -> float:
    exact = dequantize(reference.tensors[name].format, reference.data(name)).astype(np.float64)
    ours = dequantize(gguf.tensors[name].format, gguf.data(name))
    return float(np.sqrt(np.square(ours.reshape(exact.shape) - exact).mean()))


def compare(llama_cpp: Any, source: Path, folder: Path, preset: str) -> None:
    list(quantize(source, folder / "f32.gguf", "f32"))
    list(quantize(source, folder / "ours.gguf", preset))
    quantize_theirs(llama_cpp, folder / "f32.gguf", folder / "theirs.gguf", preset)
    ours, theirs, exact = (open_gguf(folder / f"{name}.gguf") for name in ("ours", "theirs", "f32"))
    # All but the receipt, which theirs has from the F32 file.
    a, b = ({key for key in gguf.metadata if not key.startswith("llmq.")} for gguf in (ours, theirs))
    assert a == b
    assert sum(info.n_bytes for info in ours.tensors.values()) == sum(info.n_bytes for info in theirs.tensors.values())
    for name, info in theirs.tensors.items():
        assert ours.tensors[name].format == info.format, name
        assert rms_error(ours, exact, name) <= 1.005 * rms_error(theirs, exact, name), name


@pytest.mark.parametrize("preset", QUANTIZED)
@pytest.mark.parametrize("shape", ["experts", "tied", "uneven"])
def test_small_models(llama_cpp: Any, tmp_path: Path, preset: str, shape: str) -> None:
    changes: dict[str, Any] = {
        "experts": {"model_type": "mixtral", "num_local_experts": 8, "num_experts_per_tok": 2, "num_hidden_layers": 3},
        "tied": {"tie_word_embeddings": True, "num_hidden_layers": 9},
        "uneven": {"hidden_size": 96, "head_dim": 32, "intermediate_size": 160},
    }[shape]
    write_checkpoint(tmp_path / "model", **changes)
    compare(llama_cpp, tmp_path / "model", tmp_path, preset)


@pytest.mark.slow
@pytest.mark.parametrize("preset", QUANTIZED)
def test_a_trained_model(llama_cpp: Any, tmp_path: Path, preset: str) -> None:
    if not STORYTELLER.is_dir():
        pytest.skip("the storyteller checkpoint is not beside the repository")
    compare(llama_cpp, STORYTELLER, tmp_path, preset)
