"""Time and memory from a BF16 checkpoint to a Q4_K_M file: llmq beside llama.cpp's converter and llama-quantize.

    python bench/pipeline.py CONVERTER BIN TOKENIZER [--layers 8] [--rounds 3] [--keep FOLDER] [--options ...]

CONVERTER is llama.cpp's convert_hf_to_gguf.py, BIN the folder of its tools, TOKENIZER a SentencePiece model of 32000
pieces. The checkpoint has Mistral 7B's shapes, normal random weights, and as many layers as asked for (32: 14.5 GB).
Each round runs the converter to F16 and then llama-quantize, llmq, and llmq --fast, one after the other, all with two
threads; what is printed are medians, the others' time over ours, weights a second and thread, and peak memory of the
process with the pages it maps. A run of llmq on a small checkpoint comes first, so that nothing is compiled in what is
timed. `--options` are further options of llmq, timed once. Linux.
"""

import argparse
import json
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from synthetic import shape

from llmq.config import ModelConfig
from quant.names import tensor_map

THREADS, PERIOD = 2, 0.05
PYTHON = (sys.executable,)
LLMQ = (*PYTHON, "-m", "cli.main", "quantize")


def tell(line: str) -> None:
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


def make_checkpoint(folder: Path, config: ModelConfig, tokenizer: Path) -> int:
    """Writes it, a file for each layer; returns how many weights it has."""
    folder.mkdir()
    shutil.copy(tokenizer, folder / "tokenizer.model")
    values = {
        "architectures": ["MistralForCausalLM"], "model_type": "mistral", "hidden_act": "silu",
        "torch_dtype": "bfloat16",
        "vocab_size": config.vocab_size, "hidden_size": config.dim, "intermediate_size": config.ffn_dim,
        "num_hidden_layers": config.n_layers, "num_attention_heads": config.n_heads,
        "num_key_value_heads": config.n_kv_heads, "head_dim": config.head_dim, "rms_norm_eps": config.rms_eps,
        "max_position_embeddings": config.context_length, "sliding_window": None, "rope_theta": config.rope_base,
        "tie_word_embeddings": False, "bos_token_id": 1, "eos_token_id": 2,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(values))
    rng = np.random.Generator(np.random.SFC64(0))
    shards = list(_shards(config))
    weight_map = {}
    for i, tensors in enumerate(shards):
        name = f"model-{i + 1:05}-of-{len(shards):05}.safetensors"
        _write_shard(folder / name, tensors, rng)
        weight_map |= dict.fromkeys(tensors, name)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return sum(int(np.prod(dims)) for tensors in shards for dims in tensors.values())


def _shards(config: ModelConfig) -> Iterator[dict[str, tuple[int, ...]]]:
    """Names and shapes: a shard for each layer, and one for the rest."""
    entries = [(source, entry.shape) for entry in tensor_map(config) for source in entry.sources]
    layers = [f"model.layers.{i}." for i in range(config.n_layers)]
    for layer in layers:
        yield {name: dims for name, dims in entries if name.startswith(layer)}
    yield {name: dims for name, dims in entries if not name.startswith("model.layers.")}


def _write_shard(path: Path, tensors: dict[str, tuple[int, ...]], rng: np.random.Generator) -> None:
    header, at = {}, 0
    for name, dims in tensors.items():
        end = at + 2 * int(np.prod(dims))
        header[name] = {"dtype": "BF16", "shape": dims, "data_offsets": [at, end]}
        at = end
    raw = json.dumps({"__metadata__": {"format": "pt"}, **header}).encode()
    with path.open("wb") as file:
        file.write(len(raw).to_bytes(8, "little") + raw)
        for dims in tensors.values():
            x = rng.standard_normal(dims, np.float32) if len(dims) > 1 else np.ones(dims, np.float32)
            x /= np.float32(np.sqrt(dims[-1]) if len(dims) > 1 else 1)
            file.write(np.ascontiguousarray(x.view(np.uint16).reshape(-1)[1::2]).tobytes())


def run(*command: str | Path) -> tuple[float, int]:
    """Seconds, and bytes of memory at the peak, sampled: what getrusage tells begins with this process's own."""
    peak, start = 0, time.perf_counter()
    process = subprocess.Popen([*map(str, command)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    status = Path(f"/proc/{process.pid}/status")
    while process.poll() is None:
        found = re.search(r"VmHWM:\s*(\d+) kB", status.read_text())
        peak = max(peak, int(found[1]) << 10 if found else 0)
        time.sleep(PERIOD)
    assert process.returncode == 0, command
    return time.perf_counter() - start, peak


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("converter", type=Path)
    parser.add_argument("tools", type=Path)
    parser.add_argument("tokenizer", type=Path)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--keep", type=Path)
    parser.add_argument("--options", nargs="+", default=[])
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=arguments.keep) as temporary:
        folder = Path(temporary)
        small, large = folder / "small", folder / "large"
        make_checkpoint(small, shape("small", n_layers=1, ffn_dim=512, dim=512, n_heads=8), arguments.tokenizer)
        n_weights = make_checkpoint(large, shape("large", n_layers=arguments.layers), arguments.tokenizer)
        full, out = folder / "f16.gguf", folder / "out.gguf"
        runs: dict[str, tuple[str | Path, ...]] = {
            "convert": (*PYTHON, arguments.converter, large, "--outtype", "f16", "--outfile", full),
            "llama-quantize": (arguments.tools / "llama-quantize", full, out, "Q4_K_M", str(THREADS)),
            "llmq": (*LLMQ, large, "-o", out),
            "llmq --fast": (*LLMQ, large, "-o", out, "--fast"),
        }
        for options in ((), ("--fast",), arguments.options):
            run(*LLMQ, small, "-o", out, *options)
        seconds: dict[str, list[float]] = {name: [] for name in runs}
        peaks = dict.fromkeys(runs, 0)
        for _ in range(arguments.rounds):
            for name, command in runs.items():
                spent, peak = run(*command)
                seconds[name].append(spent)
                peaks[name] = max(peaks[name], peak)
                out.unlink(missing_ok=True)
        if arguments.options:
            name = " ".join(("llmq", *arguments.options))
            spent, peaks[name] = run(*LLMQ, large, "-o", out, *arguments.options)
            seconds[name] = [spent]
    show(n_weights, seconds, peaks)


def show(n_weights: int, seconds: dict[str, list[float]], peaks: dict[str, int]) -> None:
    both = [sum(pair) for pair in zip(seconds["convert"], seconds["llama-quantize"], strict=True)]
    tell(f"{n_weights / 1e9:.2f} billion weights")
    for name, each in seconds.items():
        median = statistics.median(each)
        ratios = [theirs / ours for theirs, ours in zip(both, each, strict=False)]
        tell(
            f"{name:24} {median:7.1f} s  {n_weights / median / THREADS / 1e6:6.1f} M weights/s and thread  "
            f"convert + llama-quantize take {statistics.median(ratios):.2f} times as long "
            f"[{min(ratios):.2f} {max(ratios):.2f}]  peak {peaks[name] / 1e6:,.0f} MB"
        )


if __name__ == "__main__":
    main()
