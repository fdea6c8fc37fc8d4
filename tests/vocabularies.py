"""Vocabularies to test with: one trained here, and those of mistral-common where it is installed."""

import importlib.util
import io
import random
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from sentencepiece import SentencePieceProcessor, SentencePieceTrainer

FILES = {
    "v1": "tokenizer.model.v1",
    "v2": "mistral_instruct_tokenizer_240216.model.v2",
    "v3": "mistral_instruct_tokenizer_240323.model.v3",
    "v7": "mistral_instruct_tokenizer_241114.model.v7",
}


def mistral_file(version: str) -> Path:
    """Path of a tokenizer model in the mistral-common package; skips the test where that is not installed."""
    found = importlib.util.find_spec("mistral_common")
    if found is None or found.origin is None:
        pytest.skip("mistral-common is not installed")
    return Path(found.origin).parent / "data" / FILES[version]


@cache
def trained_model() -> bytes:
    """A ModelProto of 600 pieces: bytes, control tokens [INST] and [/INST], user-defined <think> and two spaces."""
    rng = random.Random(5)
    words = ["".join(rng.choices("aeioubcdfghklmnprst", k=rng.randint(1, 7))) for _ in range(400)]
    lines = [" ".join(rng.choices(words, k=12)) + rng.choice([".", "!", "\u00e9\u00e8", " 42"]) for _ in range(1500)]
    model = io.BytesIO()
    SentencePieceTrainer.train(
        sentence_iterator=iter(lines),
        model_writer=model,
        model_type="bpe",
        vocab_size=600,
        byte_fallback=True,
        control_symbols=["[INST]", "[/INST]"],
        user_defined_symbols=["<think>", "\u2581\u2581"],
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        allow_whitespace_only_pieces=True,
        minloglevel=2,
    )
    return model.getvalue()


def model_bytes(name: str) -> bytes:
    """ModelProto of "trained", or of a mistral-common version."""
    return trained_model() if name == "trained" else mistral_file(name).read_bytes()


def piece_type(model: SentencePieceProcessor, i: int, user_defined: tuple[str, ...]) -> int:
    flags = (model.is_unknown(i), model.is_control(i), model.id_to_piece(i) in user_defined)
    for kind, is_kind in zip((2, 3, 4, 5, 6), (*flags, model.is_unused(i), model.is_byte(i)), strict=True):
        if is_kind:
            return kind
    return 1


@cache
def metadata_of(name: str) -> dict[str, Any]:
    """GGUF metadata of a model, as llmq.gguf reads it."""
    model = SentencePieceProcessor(model_proto=model_bytes(name))
    user_defined = ("<think>", "\u2581\u2581") if name == "trained" else ()
    ids = range(model.get_piece_size())
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": [model.id_to_piece(i).encode() for i in ids],
        "tokenizer.ggml.scores": np.array([model.get_score(i) for i in ids], np.float32),
        "tokenizer.ggml.token_type": np.array([piece_type(model, i, user_defined) for i in ids], np.int32),
        "tokenizer.ggml.bos_token_id": model.bos_id(),
        "tokenizer.ggml.eos_token_id": model.eos_id(),
    }
