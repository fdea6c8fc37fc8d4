"""What a cache of bytes costs: the same model on the same text with keys and values as f16 and as q8_0.

    python bench/cache_cost.py MODEL STORIES.json [--tokens 2000] [--positions 400]

STORIES.json is a list of texts. Each is read from its start, up to --positions tokens; prints the mean KL divergence of
the next-token distributions in nats, its largest value, and how often the first choice is the same.
"""

import argparse
import json
from pathlib import Path

import numpy as np

import llmq


def log_softmax(logits: np.ndarray) -> np.ndarray:
    """float64 log probabilities of logits [n, vocab_size]."""
    scores = logits.astype(np.float64) - logits.max(axis=1, keepdims=True)
    return scores - np.log(np.exp(scores).sum(axis=1, keepdims=True))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("stories", type=Path)
    parser.add_argument("--tokens", type=int, default=2000)
    parser.add_argument("--positions", type=int, default=400)
    arguments = parser.parse_args()
    divergences: list[float] = []
    same = 0
    with llmq.load(arguments.model) as exact, llmq.load(arguments.model, kv_type="q8_0") as bytes_:
        for story in json.loads(arguments.stories.read_text()):
            ids = exact.encode(story)[: arguments.positions]
            p, q = (log_softmax(model.logits(ids)) for model in (exact, bytes_))
            divergences += (np.exp(p) * (p - q)).sum(axis=1).tolist()
            same += int((p.argmax(axis=1) == q.argmax(axis=1)).sum())
            if len(divergences) >= arguments.tokens:
                break
    n = len(divergences)
    mean, largest = np.mean(divergences), max(divergences)
    print(f"{n} tokens: mean KL {mean:.6f} nats, largest {largest:.4f}; first choice the same at {same / n:.2%}")  # noqa: T201


if __name__ == "__main__":
    main()
