"""The vocabulary of a checkpoint as GGUF metadata: tokens, scores, types and special ids.

Token types, padding and the score of added tokens: llama.cpp's converter.
"""

import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import sentencepiece

from llmq.errors import FileFormatError, UnsupportedError
from llmq.gguf import quoted
from quant.checkpoint import Checkpoint
from quant.files import damaged, locate, read_file
from quant.protobuf import fields

MODEL = "tokenizer.model"
MODEL_LIMIT = 64 << 20
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6
TYPES = (NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE)
# Fields of sentencepiece_model.proto: of a piece, of trainer_spec, of normalizer_spec.
TEXT, SCORE, TYPE = 1, 2, 3
MODEL_TYPE, BPE = 3, 2
ALGORITHMS = {1: "unigram", 2: "bpe", 3: "word", 4: "char"}
ADD_DUMMY_PREFIX = 3
ADDED_SCORE, PADDING_SCORE = -1000.0, -10000.0


@dataclass(frozen=True, slots=True)
class Vocab:
    """Three lists of the vocabulary's size."""

    tokens: list[bytes]
    scores: list[float]
    types: list[int]


def vocab_metadata(checkpoint: Checkpoint, vocab_size: int) -> tuple[dict[str, Any], Path]:
    """The tokenizer.* keys for a vocabulary of `vocab_size` ids, and the path of the file they come from.

    Raises UnsupportedError where there is no SentencePiece model, FileFormatError where it is damaged or too large.
    """
    if not (checkpoint.folder / MODEL).exists():
        raise no_model(checkpoint.folder.name)
    path = locate(checkpoint.folder, MODEL)
    vocab, special_keys = _read(path, vocab_size)
    for token_id, text, special in _added(checkpoint, vocab_size):
        # What the model itself calls control, unknown or byte stays so.
        if vocab.types[token_id] in (NORMAL, USER_DEFINED, UNUSED):
            vocab.tokens[token_id] = text.encode()
            vocab.scores[token_id] = ADDED_SCORE
            vocab.types[token_id] = CONTROL if special else USER_DEFINED
    keys: dict[str, Any] = {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.pre": "default",
        "tokenizer.ggml.tokens": vocab.tokens,
        "tokenizer.ggml.scores": np.array(vocab.scores, np.float32),
        "tokenizer.ggml.token_type": np.array(vocab.types, np.int32),
    }
    return keys | special_keys | _behaviour(checkpoint.tokenizer_config), path


def no_model(owner: str) -> UnsupportedError:
    return UnsupportedError(f"{quoted(owner)} has no {MODEL}; llmq quantizes models with a SentencePiece vocabulary")


def _read(path: Path, vocab_size: int) -> tuple[Vocab, dict[str, Any]]:
    proto = read_file(path, MODEL_LIMIT)
    processor = sentencepiece.SentencePieceProcessor()
    try:
        processor.LoadFromSerializedProto(proto)
        parts = _parts(proto)
        trainer, normalizer = (dict(fields(b"".join(parts[number]))) for number in (2, 3))
        vocab = _pieces(parts[1], vocab_size)
    # sentencepiece raises RuntimeError; struct.error is a score that is not 4 bytes.
    except (RuntimeError, ValueError, struct.error) as error:
        raise damaged(MODEL, "it is not a SentencePiece model") from error
    algorithm = trainer.get(MODEL_TYPE, 1)
    if algorithm != BPE:
        name = ALGORITHMS.get(int(algorithm), "an unknown algorithm")
        raise UnsupportedError(f"{MODEL} is a SentencePiece model of kind {name}; llmq reads bpe")
    keys: dict[str, Any] = {}
    if normalizer.get(ADD_DUMMY_PREFIX, 1) == 0:
        keys["tokenizer.ggml.add_space_prefix"] = False
    return vocab, _special_ids(processor) | keys


def _parts(proto: bytes) -> dict[int, list[bytes]]:
    """The sub-messages of a ModelProto: 1 pieces, 2 trainer_spec, 3 normalizer_spec."""
    parts: dict[int, list[bytes]] = {1: [], 2: [b""], 3: [b""]}
    for number, value in fields(proto):
        if number in parts and isinstance(value, bytes):
            parts[number].append(value)
    return parts


def _pieces(pieces: list[bytes], vocab_size: int) -> Vocab:
    """Text, score and type as the model's own file has them; Python's SentencePiece does not tell user-defined ones."""
    if not 0 < len(pieces) <= vocab_size:
        raise FileFormatError(
            f"{MODEL} has {len(pieces)} pieces and config.json has room for {vocab_size}; get matching files"
        )
    vocab = Vocab([], [], [])
    for piece in pieces:
        found = {TEXT: b"", SCORE: bytes(4), TYPE: NORMAL} | dict(fields(piece))
        text, score, kind = found[TEXT], found[SCORE], found[TYPE]
        if not isinstance(text, bytes) or not text or not isinstance(score, bytes) or kind not in TYPES:
            raise ValueError("a piece without text or with an unknown type")
        text.decode()
        vocab.tokens.append(text)
        vocab.scores.append(struct.unpack("<f", score)[0])
        vocab.types.append(int(kind))
    missing = range(len(pieces), vocab_size)
    tokens = vocab.tokens + [f"[PAD{i}]".encode() for i in missing]
    return Vocab(tokens, vocab.scores + [PADDING_SCORE] * len(missing), vocab.types + [UNUSED] * len(missing))


def _added(checkpoint: Checkpoint, vocab_size: int) -> list[tuple[int, str, bool]]:
    """(id, text, special) of tokens that were added to the SentencePiece model."""
    found: list[tuple[Any, Any, bool]] = [(token_id, text, False) for text, token_id in checkpoint.added_tokens.items()]
    decoder = checkpoint.tokenizer_config.get("added_tokens_decoder", {})
    if not isinstance(decoder, dict):
        raise damaged("tokenizer_config.json", "added_tokens_decoder is not an object")
    for key, entry in decoder.items():
        if not key.isdecimal() or len(key) > 9 or not isinstance(entry, dict):
            raise damaged(
                "tokenizer_config.json", f"added_tokens_decoder has an entry {quoted(key)} that is not a token"
            )
        found.append((int(key), entry.get("content"), entry.get("special") is True))
    for token_id, text, _special in found:
        if type(token_id) is not int or not 0 <= token_id < vocab_size:
            raise FileFormatError(
                f"an added token has the id {quoted(str(token_id))}, outside the vocabulary of {vocab_size}"
            )
        if not isinstance(text, str) or not text or not _encodes(text):
            raise damaged("tokenizer_config.json", f"added token {token_id} has no text")
    return found


def _encodes(text: str) -> bool:
    """JSON can spell lone surrogates, which no UTF-8 can hold."""
    return not any("\ud800" <= character <= "\udfff" for character in text)


def _special_ids(processor: sentencepiece.SentencePieceProcessor) -> dict[str, int]:
    ids = {
        "bos": processor.bos_id(),
        "eos": processor.eos_id(),
        "unknown": processor.unk_id(),
        "padding": processor.pad_id(),
    }
    if ids["bos"] < 0 or ids["eos"] < 0:
        raise UnsupportedError(f"{MODEL} has no begin or end token, which a chat needs")
    return {f"tokenizer.ggml.{name}_token_id": token_id for name, token_id in ids.items() if token_id >= 0}


def _behaviour(tokenizer_config: dict[str, Any]) -> dict[str, Any]:
    """Flags as the tokenizer's configuration sets them, else as Llama tokenizers have them."""
    keys: dict[str, Any] = {
        "tokenizer.ggml.add_bos_token": tokenizer_config.get("add_bos_token") is not False,
        "tokenizer.ggml.add_eos_token": tokenizer_config.get("add_eos_token") is True,
    }
    if isinstance(tokenizer_config.get("add_prefix_space"), bool):
        keys["tokenizer.ggml.add_space_prefix"] = tokenizer_config["add_prefix_space"]
    template = tokenizer_config.get("chat_template")
    if isinstance(template, str) and _encodes(template):
        keys["tokenizer.chat_template"] = template
    return keys
