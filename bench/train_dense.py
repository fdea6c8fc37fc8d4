"""Train a small dense checkpoint to measure quantizers on: 13 M weights, 4 layers of 512, grouped heads.

python bench/train_dense.py OUT MINUTES TEXT...        (needs the oracles group)

Writes the folder OUT as a Hugging Face checkpoint in BF16: config.json, model.safetensors, tokenizer.model, and
held.txt, the last fiftieth of the texts, which training did not see. Rows are whole blocks of 256, so every type
applies. What it says is of no use; that its weights were trained is.
"""

import argparse
import json
import math
import sys
import time
from pathlib import Path

import numpy as np
import sentencepiece
import torch
from transformers import MistralConfig, MistralForCausalLM

CONFIG = {
    "vocab_size": 4096, "hidden_size": 512, "intermediate_size": 1024, "num_hidden_layers": 4,
    "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 64, "max_position_embeddings": 2048,
    "sliding_window": None, "tie_word_embeddings": False, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
LENGTH, BATCH, PEAK_RATE, WARM_UP = 256, 8, 2e-3, 100
HELD = 50


def tell(line: str) -> None:
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


def train_tokenizer(out: Path, texts: list[str]) -> sentencepiece.SentencePieceProcessor:
    lines = [line for text in texts for line in text.splitlines() if line.strip()]
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines), model_prefix=str(out / "tokenizer"), vocab_size=CONFIG["vocab_size"],
        model_type="bpe", byte_fallback=True, unk_id=0, bos_id=1, eos_id=2, pad_id=-1,
        normalization_rule_name="identity", split_digits=True, minloglevel=2,
    )  # fmt: skip
    (out / "tokenizer.vocab").unlink()
    return sentencepiece.SentencePieceProcessor(model_file=str(out / "tokenizer.model"))


def split(texts: list[str]) -> tuple[str, str]:
    """Training text, and the last fiftieth of each file."""
    cuts = [len(text) - len(text) // HELD for text in texts]
    return tuple("\n".join(text[part] for text, part in zip(texts, parts, strict=True)) for parts in (
        [slice(0, cut) for cut in cuts], [slice(cut, None) for cut in cuts]
    ))  # type: ignore[return-value]  # fmt: skip


def train(ids: np.ndarray, minutes: float) -> MistralForCausalLM:
    torch.manual_seed(0)
    rng = np.random.default_rng(0)
    model = MistralForCausalLM(MistralConfig(**CONFIG))
    optimizer = torch.optim.AdamW(model.parameters(), lr=PEAK_RATE, betas=(0.9, 0.95), weight_decay=0.05)
    start, step = time.monotonic(), 0
    while (done := (time.monotonic() - start) / 60 / minutes) < 1:
        rate = min(1.0, (step + 1) / WARM_UP) * (0.05 + 0.475 * (1 + math.cos(math.pi * done)))
        for group in optimizer.param_groups:
            group["lr"] = PEAK_RATE * rate
        first = rng.integers(0, len(ids) - LENGTH, BATCH)
        batch = torch.from_numpy(np.stack([ids[at : at + LENGTH] for at in first]).astype(np.int64))
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(input_ids=batch, labels=batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        step += 1
        if step % 50 == 0:
            tell(f"step {step}  {done:.0%}  loss {loss.item():.3f}")
    return model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("minutes", type=float)
    parser.add_argument("text", type=Path, nargs="+")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    texts = [path.read_text("utf-8-sig").replace("<|endoftext|>", "") for path in args.text]
    training, held = split(texts)
    (args.out / "held.txt").write_text(held, "utf-8")
    tokenizer = train_tokenizer(args.out, [training])
    ids = np.array(tokenizer.encode(training), np.uint16)
    tell(f"{len(ids) / 1e6:.2f} M tokens of text")
    model = train(ids, args.minutes)
    model.to(torch.bfloat16).save_pretrained(args.out)
    (args.out / "tokenizer_config.json").write_text(json.dumps({"add_bos_token": True, "add_eos_token": False}))


if __name__ == "__main__":
    main()
