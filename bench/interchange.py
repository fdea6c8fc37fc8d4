"""Whether llama.cpp reads what llmq quantize writes as llmq does: perplexities of every type's file, there and here.

    python bench/interchange.py CHECKPOINT BIN TEXT [--ctx 256] [--chunks 100] [--types q4_k_m ...]

CHECKPOINT is a trained model's folder, BIN the folder of llama.cpp's tools, TEXT what both read. llama.cpp attends to
the whole context, so --ctx is no more than a model's sliding window. Exits 1 where perplexities differ by more than
0.2 %: both engines round activations, each in its own way, and that is most of what is left.
"""

import argparse
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np

from llmq.model import load
from quant.evaluate import chunks, evaluate, log_probs, perplexity, shared_ids
from quant.quantize import quantize
from quant.recipe import PRESETS

TOLERANCE = 0.002
TRIES = 20


def tell(line: str) -> None:
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


def perplexity_here(path: Path, text: str, n_ctx: int, n_chunks: int) -> tuple[float, int]:
    with load(path) as model:
        bos_id = model.tokenizer.bos_id if model.tokenizer.add_bos else None
        pieces = chunks(shared_ids([model], text), n_ctx, bos_id)[:n_chunks]
        return perplexity(np.stack(list(evaluate(log_probs(model, pieces), pieces)))).value, len(pieces)


def perplexity_there(tools: Path, path: Path, text: Path, n_ctx: int, n_chunks: int) -> float:
    # What it prints last may be lost when it ends, on its screen and in its log; then it is run again.
    log = path.with_suffix(".log")
    command = [tools / "llama-perplexity", "-m", path, "-f", text, "-c", n_ctx, "-b", n_ctx, "--chunks", n_chunks]
    for _ in range(TRIES):
        done = subprocess.run([*map(str, command), "--log-file", str(log)], check=True, capture_output=True)
        if found := re.search(rb"PPL = ([0-9.]+)", log.read_bytes() + done.stdout + done.stderr):
            return float(found[1])
    raise RuntimeError("llama-perplexity gave no figure")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("tools", type=Path)
    parser.add_argument("text", type=Path)
    parser.add_argument("--ctx", type=int, default=256)
    parser.add_argument("--chunks", type=int, default=100)
    parser.add_argument("--types", nargs="+", choices=PRESETS, default=list(PRESETS))
    arguments = parser.parse_args()
    worst = 0.0
    for preset in arguments.types:
        with tempfile.TemporaryDirectory() as folder:
            out = Path(folder) / f"{preset}.gguf"
            for _ in quantize(arguments.checkpoint, out, preset):
                pass
            here, n_chunks = perplexity_here(out, arguments.text.read_text("utf-8"), arguments.ctx, arguments.chunks)
            there = perplexity_there(arguments.tools, out, arguments.text, arguments.ctx, n_chunks)
        worst = max(worst, abs(here / there - 1))
        tell(f"{preset:8} here {here:10.4f}  there {there:10.4f}  {here / there - 1:+.3%}")
    tell(f"worst {worst:.3%}")
    sys.exit(worst > TOLERANCE)


if __name__ == "__main__":
    main()
