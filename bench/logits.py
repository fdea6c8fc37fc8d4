"""llmq against transformers on a trained checkpoint: relative error of the logits, prefill and decode.

    python bench/logits.py CHECKPOINT STORIES.json [--tokens 800] [--type bf16]

Quantizes CHECKPOINT (a Hugging Face folder) to a float type, then compares logits on held texts strung together, more
than three windows long. Prints the relative error (norm of the difference over norm of the reference) over all
positions, the largest of any position, and how often the first choice is the same. Needs torch and transformers.
"""

import argparse
import json
import tempfile
from pathlib import Path

import numpy as np
import torch
import transformers

import llmq
from quant.quantize import quantize


def report(name: str, found: np.ndarray, expected: np.ndarray) -> None:
    rows = np.linalg.norm(found - expected, axis=1) / np.linalg.norm(expected, axis=1)
    whole = np.linalg.norm(found - expected) / np.linalg.norm(expected)
    same = np.mean(found.argmax(1) == expected.argmax(1))
    print(  # noqa: T201
        f"{name:8} relative error {whole:.2e}, worst position {rows.max():.2e}, first choice equal {same:.2%}, "
        f"{len(rows)} positions",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("stories", type=Path)
    parser.add_argument("--tokens", type=int, default=800)
    parser.add_argument("--type", default="bf16")
    arguments = parser.parse_args()
    reference = transformers.AutoModelForCausalLM.from_pretrained(arguments.checkpoint, dtype=torch.float32)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.gguf"
        for _ in quantize(arguments.checkpoint, path, arguments.type):
            pass
        with llmq.load(path) as model:
            ids = model.encode(" ".join(json.loads(arguments.stories.read_text())[:50]))[: arguments.tokens]
            with torch.no_grad():
                expected = reference(torch.tensor([ids])).logits[0].numpy()
            report("prefill", model.logits(ids), expected)
            model.start(ids)
            report("decode", np.concatenate([model.read([token]) for token in ids]), expected)


if __name__ == "__main__":
    main()
