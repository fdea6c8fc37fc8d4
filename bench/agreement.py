"""llmq against llama.cpp on one GGUF file: the same greedy text, and the same next-token probabilities.

    python bench/agreement.py MODEL.gguf STORIES.json [--prompts 10] [--tokens 2000]

STORIES.json is a list of texts that the model was not trained on. The file's window is not exceeded: llama.cpp has none
for this architecture. Prints for each prompt how many greedy tokens agree, then the mean KL divergence (nats) from
llama.cpp's probabilities to llmq's and how often the first choice is the same. Needs llama-cpp-python.
"""

import argparse
import json
from collections.abc import Iterator
from pathlib import Path

import llama_cpp
import numpy as np

import llmq

SUBJECTS = [
    "a cat", "a boat", "a big red ball", "a dog and a bird", "a tree",
    "the moon", "a fish", "a girl named Lily", "a lost hat", "a bear",
]  # fmt: skip
LENGTH = 200  # positions scored in one go, inside the window of 256


def greedy_agreement(model: llmq.Model, other: llama_cpp.Llama, n: int) -> list[int]:
    """For each prompt, the number of greedy tokens (at most 80) before the two part; all of a short reply counts."""
    agreed = []
    for subject in SUBJECTS[:n]:
        message = llmq.Message("user", f"Tell me a story about {subject}.")
        generation = model.chat([message], sampling=llmq.Sampling(temperature=0), max_tokens=80)
        text = "".join(generation)
        prompt = llmq.prompt.build_prompt(model.tokenizer, [message], model.prompt_version)
        theirs = []
        other.reset()
        for token in other.generate(prompt, temp=0.0, repeat_penalty=1.0):
            if token == model.tokenizer.eos_id or len(theirs) == 80:
                break
            theirs.append(token)
        same = next((i for i, (a, b) in enumerate(zip(generation.ids, theirs, strict=False)) if a != b), None)
        agreed.append(len(theirs) if same is None else same)
        print(f"{agreed[-1]:3} tokens agree  {message.content:45} {text[:50]!r}", flush=True)  # noqa: T201
    return agreed


def pieces(model: llmq.Model, stories: list[str], n_tokens: int) -> Iterator[list[int]]:
    for story in stories:
        if n_tokens <= 0:
            return
        ids = model.encode(story)[: min(LENGTH, n_tokens + 1)]
        n_tokens -= len(ids) - 1
        yield ids


def log_softmax(logits: np.ndarray) -> np.ndarray:
    shifted = logits.astype(np.float64) - logits.max(axis=-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))


def divergence(
    model: llmq.Model, other: llama_cpp.Llama, stories: list[str], n_tokens: int
) -> tuple[float, float, int]:
    """Mean KL(llama.cpp || llmq) in nats, share of equal first choices, and positions scored."""
    kl, same = [], []
    for ids in pieces(model, stories, n_tokens):
        ours = log_softmax(model.logits(ids)[:-1])
        other.reset()
        other.eval(ids)
        theirs = log_softmax(np.asarray(other.scores[: len(ids) - 1]))
        kl.append((np.exp(theirs) * (theirs - ours)).sum(axis=-1))
        same.append(ours.argmax(-1) == theirs.argmax(-1))
    scores = np.concatenate(kl)
    return float(scores.mean()), float(np.concatenate(same).mean()), len(scores)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("stories", type=Path)
    parser.add_argument("--prompts", type=int, default=10)
    parser.add_argument("--tokens", type=int, default=2000)
    arguments = parser.parse_args()
    other = llama_cpp.Llama(arguments.model, n_ctx=512, logits_all=True, verbose=False)
    with llmq.load(arguments.model) as model:
        agreed = greedy_agreement(model, other, arguments.prompts)
        print(f"{sum(n >= 40 for n in agreed)} of {len(agreed)} prompts agree for at least 40 tokens")  # noqa: T201
        mean, same, n = divergence(model, other, json.loads(arguments.stories.read_text()), arguments.tokens)
        print(f"mean KL divergence {mean:.6f} nats, first choice equal {same:.2%}, {n} positions")  # noqa: T201


if __name__ == "__main__":
    main()
