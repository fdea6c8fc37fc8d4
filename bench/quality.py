"""What quantizing costs a model, ours against llama-quantize: mean KL divergence to its own BF16 weights.

    python bench/quality.py CHECKPOINT BIN TEXT [--calibration TEXT] [--types q3_k_m ...] [--chunks 60] [--keep FOLDER]

CHECKPOINT is a trained model's folder, BIN the folder of llama.cpp's tools, TEXT what all files are compared on: text
that calibration did not see. For each type, llama-quantize makes a file without and with an importance matrix (the one
that our calibration saves), and llmq one with the same mix of types, and one that spends the same bytes by measured
sensitivity, each without and with calibration. All divergences come from our engine, at the same positions, and ratios
of means have a 95 % interval of resampled chunks. Exits 1 where a ratio is above PLAIN for the better of the two made
without calibration, or above LIMITS for the better of the calibrated ones; a file larger than the one it is compared
with does not count.
"""

import argparse
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from llmq.model import load
from quant.evaluate import chunks, compare, log_probs, shared_ids

RESAMPLED = 2000
# Divergence over that of llama-quantize's file with the same knowledge: at most this.
LIMITS = {"q3_k_m": 0.85, "q4_k_m": 0.75, "q5_k_m": 0.85}
PLAIN = 0.9
# (name, options of llmq quantize, whose divergence it is over)
OURS = (
    ("plain", (), "theirs"),
    ("plain, same bytes", ("--optimize",), "theirs"),
    ("calibrated", ("--calibrate",), "theirs with imatrix"),
    ("calibrated, same bytes", ("--calibrate", "--optimize"), "theirs with imatrix"),
)


def tell(line: str) -> None:
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


def run(*command: str | Path) -> None:
    subprocess.run([*map(str, command)], check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def llmq_quantize(source: Path, out: Path, *options: str | Path) -> Path:
    run(sys.executable, "-m", "cli.main", "quantize", source, "-o", out, *options)
    return out


def llama_quantize(tools: Path, source: Path, out: Path, preset: str, *options: str | Path) -> Path:
    run(tools / "llama-quantize", *options, source, out, preset.upper(), "2")
    return out


class Ruler:
    """Divergences from a model on a text."""

    def __init__(self, reference: Path, text: str, n_ctx: int, n_chunks: int) -> None:
        with load(reference) as model:
            bos_id = model.tokenizer.bos_id if model.tokenizer.add_bos else None
            self.pieces = chunks(shared_ids([model], text), n_ctx, bos_id)[:n_chunks]
            self.reference = [found.astype(np.float32) for found in log_probs(model, self.pieces)]

    def divergences(self, path: Path) -> np.ndarray:
        """Mean of each chunk, float64 [n_chunks]."""
        with load(path) as model:
            records = compare(log_probs(model, self.pieces), self.reference, self.pieces)
            return np.array([record["kl"].mean() for record in records])


def ratio(ours: np.ndarray, theirs: np.ndarray) -> tuple[float, float, float]:
    """Of the means, and the ends of its interval."""
    picks = np.random.default_rng(0).integers(0, len(ours), (RESAMPLED, len(ours)))
    ratios = ours[picks].mean(1) / theirs[picks].mean(1)
    low, high = np.quantile(ratios, (0.025, 0.975))
    return float(ours.mean() / theirs.mean()), float(low), float(high)


def measure(preset: str, full: Path, ruler: Ruler, folder: Path, tools: Path, text: Sequence[str]) -> bool:
    imatrix = folder / "imatrix.gguf"
    theirs = {
        "theirs": llama_quantize(tools, full, folder / f"theirs-{preset}.gguf", preset),
        "theirs with imatrix": llama_quantize(
            tools, full, folder / f"theirs-i-{preset}.gguf", preset, "--imatrix", imatrix
        ),
    }
    found = {name: ruler.divergences(path) for name, path in theirs.items()}
    for name, path in theirs.items():
        tell(f"{preset:8} {name:24} {path.stat().st_size:11,} bytes  KL {found[name].mean():.5f}")
    ratios: dict[str, float] = {}
    for i, (name, options, baseline) in enumerate(OURS):
        # --text asks for calibration too; a budget alone takes the text that comes with llmq.
        words = text if "--calibrate" in options else ()
        out = llmq_quantize(full, folder / f"ours-{i}-{preset}.gguf", "-q", preset, *options, *words)
        kl = ruler.divergences(out)
        value, low, high = ratio(kl, found[baseline])
        if out.stat().st_size <= theirs[baseline].stat().st_size:
            ratios[name] = value
        tell(
            f"{preset:8} {name:24} {out.stat().st_size:11,} bytes  KL {kl.mean():.5f}  "
            f"{value:.2f} of {baseline} [{low:.2f} {high:.2f}]"
        )
    plain, calibrated = (
        min(ratios.get(name, np.inf) for name, options, _ in OURS if ("--calibrate" in options) is asked)
        for asked in (False, True)
    )
    return plain <= PLAIN and calibrated <= LIMITS[preset]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("tools", type=Path)
    parser.add_argument("text", type=Path)
    parser.add_argument("--calibration", type=Path)
    parser.add_argument("--types", nargs="+", choices=LIMITS, default=list(LIMITS))
    parser.add_argument("--ctx", type=int, default=256)
    parser.add_argument("--chunks", type=int, default=60)
    parser.add_argument("--keep", type=Path)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = arguments.keep or Path(temporary)
        folder.mkdir(exist_ok=True)
        text = ("--text", str(arguments.calibration)) if arguments.calibration else ()
        full = llmq_quantize(arguments.checkpoint, folder / "bf16.gguf", "-q", "bf16")
        first = folder / "first.gguf"
        llmq_quantize(full, first, "--fast", "--calibrate", *text, "--save-imatrix", folder / "imatrix.gguf")
        ruler = Ruler(full, arguments.text.read_text("utf-8"), arguments.ctx, arguments.chunks)
        held = [measure(preset, full, ruler, folder, arguments.tools, text) for preset in arguments.types]
    sys.exit(not all(held))


if __name__ == "__main__":
    main()
