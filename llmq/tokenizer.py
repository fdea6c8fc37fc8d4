"""SentencePiece vocabularies, rebuilt in memory from the arrays of a GGUF file.

A GGUF of model kind "llama" carries pieces, scores and piece types, which is all that SentencePiece needs: they are
written into a ModelProto (sentencepiece_model.proto) and given to the library. Decoding is done here, since a reply
arrives one token at a time.
"""

import codecs
import re
import struct
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from sentencepiece import SentencePieceProcessor

from llmq.errors import FileFormatError, UnsupportedError, UsageError

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)  # the values of tokenizer.ggml.token_type
SPACE = "\u2581".encode()
UNKNOWN_SURFACE = " \u2047 "  # what SentencePiece shows for the unknown piece
MAX_TEXT_BYTES = 16 << 20
MAX_TOKEN_BYTES = 1024  # the longest real pieces have tens of bytes; matching time grows with the longest one
_BYTE_TOKEN = re.compile(rb"<0x[0-9A-F]{2}>")
_SURROGATE = re.compile("[\ud800-\udfff]")


def _each_byte(error: UnicodeError) -> tuple[str, int]:
    assert isinstance(error, UnicodeDecodeError)
    return "\ufffd" * (error.end - error.start), error.end


# SentencePiece replaces every byte of a broken character; Python's "replace" would put one mark for several bytes.
codecs.register_error("llmq.each_byte", _each_byte)


class Decoder:
    """Turns ids into text as they come; the pieces of text joined are the text of all the ids.

    Bytes of an unfinished character are held back until the character is whole or cannot become so (U+FFFD).
    """

    def __init__(self, tokenizer: "Tokenizer", strip_space: bool) -> None:
        self._tokenizer = tokenizer
        self._utf8 = codecs.getincrementaldecoder("utf-8")("llmq.each_byte")
        self._strip_space = strip_space

    def feed(self, token_id: int) -> str:
        """Text that this token completes, often one word, "" for a control token or half a character."""
        raw = self._tokenizer.piece(token_id)
        if self._tokenizer.types[token_id] == BYTE:
            self._strip_space = False
            return self._utf8.decode(raw)
        held = self._utf8.decode(b"", final=True)
        if self._strip_space and raw:
            self._strip_space = False
            if self._tokenizer.types[token_id] != UNKNOWN:
                raw = raw.removeprefix(b" ")
        return held + raw.decode()

    def flush(self) -> str:
        """What is still held back, as U+FFFD per byte; call once, after the last token."""
        return self._utf8.decode(b"", final=True)


@dataclass(frozen=True, slots=True, eq=False)
class Tokenizer:
    """A vocabulary. `specials` maps the text of each control token to its id; `tokens` and `types` are by id."""

    tokens: Sequence[bytes]
    types: Sequence[int]
    specials: dict[str, int]
    bos_id: int
    eos_id: int
    add_bos: bool
    add_space_prefix: bool
    _processor: Any

    @property
    def n_vocab(self) -> int:
        return len(self.tokens)

    def encode(self, text: str, *, dummy_prefix: bool = True) -> list[int]:
        """Token ids of `text`, never a control token and no BOS; lone surrogates are read as U+FFFD.

        `dummy_prefix=False` leaves out the space that SentencePiece puts before a text, for one that continues
        another. Raises UsageError for more than 16 MiB of UTF-8.
        """
        if len(text) > MAX_TEXT_BYTES or len(raw := _utf8(text)) > MAX_TEXT_BYTES:
            raise UsageError(f"the text is too long to tokenize: at most {MAX_TEXT_BYTES >> 20} MiB; send less of it")
        if dummy_prefix and self.add_space_prefix and raw:
            raw = b" " + raw
        ids: list[int] = self._processor.encode(raw)
        return ids

    def piece(self, token_id: int) -> bytes:
        """Bytes that one token stands for, its leading space included; b"" for a control token.

        Raises UsageError for an id that is not in the vocabulary.
        """
        if not 0 <= token_id < len(self.tokens):
            raise UsageError(f"token id {token_id} is not in the vocabulary (0 to {len(self.tokens) - 1})")
        kind = self.types[token_id]
        if kind == CONTROL:
            return b""
        if kind == UNKNOWN:
            return UNKNOWN_SURFACE.encode()
        if kind == BYTE:
            return bytes([int(self.tokens[token_id][3:5], 16)])
        return self.tokens[token_id].replace(SPACE, b" ")

    def decode(self, ids: Iterable[int], *, dummy_prefix: bool = True) -> str:
        """Text of `ids`, as SentencePiece gives it; `dummy_prefix=False` keeps a leading space."""
        decoder = self.decoder(dummy_prefix=dummy_prefix)
        return "".join([decoder.feed(i) for i in ids]) + decoder.flush()

    def decoder(self, *, dummy_prefix: bool = True) -> Decoder:
        """A fresh incremental decoder; `dummy_prefix=False` for ids that continue a text, whose first space counts."""
        return Decoder(self, strip_space=dummy_prefix and self.add_space_prefix)


def load_tokenizer(metadata: dict[str, Any]) -> Tokenizer:
    """Tokenizer from the `tokenizer.ggml.*` keys of a GGUF.

    BOS and EOS count as control tokens whatever their type says, so that typed text can never end a turn.
    Raises UnsupportedError for another kind than "llama" and FileFormatError for arrays that make no vocabulary.
    """
    model = metadata.get("tokenizer.ggml.model")
    if model != "llama":
        pre = metadata.get("tokenizer.ggml.pre")
        shown = ascii(model)[:40] + (f" ({ascii(pre)[:40]})" if pre else "")
        raise UnsupportedError(
            f"the model's tokenizer is {shown}; llmq reads SentencePiece vocabularies ('llama') only"
        )
    tokens = _tokens(metadata)
    scores = _array(metadata, "scores", "f", len(tokens))
    types = _array(metadata, "token_type", "iu", len(tokens))
    if not np.isfinite(scores).all():
        raise FileFormatError("tokenizer.ggml.scores holds a value that is not finite; the file is damaged")
    bos_id, eos_id = _token_id(metadata, "bos_token_id", tokens), _token_id(metadata, "eos_token_id", tokens)
    kinds = _kinds(metadata, tokens, types, bos_id, eos_id)
    return Tokenizer(
        tokens=tokens,
        types=kinds,
        specials={tokens[i].decode(): i for i, kind in enumerate(kinds) if kind == CONTROL},
        bos_id=bos_id,
        eos_id=eos_id,
        add_bos=_flag(metadata, "add_bos_token"),
        add_space_prefix=_flag(metadata, "add_space_prefix"),
        _processor=SentencePieceProcessor(model_proto=_model_proto(tokens, scores, kinds)),
    )


def _utf8(text: str) -> bytes:
    return _SURROGATE.sub("\ufffd", text).encode()


def _tokens(metadata: dict[str, Any]) -> list[bytes]:
    tokens = metadata.get("tokenizer.ggml.tokens")
    if not isinstance(tokens, list) or not tokens or not all(isinstance(token, bytes) for token in tokens):
        raise FileFormatError("tokenizer.ggml.tokens is not a list of strings; the file has no usable vocabulary")
    for i, token in enumerate(tokens):
        if not 0 < len(token) <= MAX_TOKEN_BYTES or b"\0" in token:
            raise FileFormatError(f"token {i} is empty, longer than {MAX_TOKEN_BYTES} bytes or holds a zero byte")
        try:
            token.decode()
        except UnicodeDecodeError:
            raise FileFormatError(f"token {i} is not UTF-8 text: {ascii(token)[:60]}") from None
    twice, count = Counter(tokens).most_common(1)[0]
    if count > 1:
        raise FileFormatError(f"token {ascii(twice)[:60]} is in the vocabulary {count} times")
    return tokens


def _array(metadata: dict[str, Any], name: str, kinds: str, n_vocab: int) -> np.ndarray:
    array = metadata.get(f"tokenizer.ggml.{name}")
    if not isinstance(array, np.ndarray) or array.dtype.kind not in kinds or array.shape != (n_vocab,):
        raise FileFormatError(
            f"tokenizer.ggml.{name} is missing or does not hold one number for each of {n_vocab} tokens"
        )
    return array


def _token_id(metadata: dict[str, Any], name: str, tokens: list[bytes]) -> int:
    value = metadata.get(f"tokenizer.ggml.{name}")
    if type(value) is not int or not 0 <= value < len(tokens):
        raise FileFormatError(f"tokenizer.ggml.{name} is missing or not an id below {len(tokens)}: {ascii(value)[:40]}")
    return value


def _flag(metadata: dict[str, Any], name: str) -> bool:
    value = metadata.get(f"tokenizer.ggml.{name}", True)
    if type(value) is not bool:
        raise FileFormatError(f"tokenizer.ggml.{name} is not true or false: {ascii(value)[:40]}")
    return value


def _kinds(
    metadata: dict[str, Any], tokens: list[bytes], types: np.ndarray, bos_id: int, eos_id: int
) -> tuple[int, ...]:
    """Piece types as SentencePiece wants them: exactly one UNKNOWN, all 256 bytes or none."""
    kinds = [int(kind) for kind in types]
    for i, kind in enumerate(kinds):
        if not NORMAL <= kind <= BYTE:
            raise FileFormatError(f"token {i} has type {kind}; types are {NORMAL} to {BYTE}")
        if kind == BYTE and not _BYTE_TOKEN.fullmatch(tokens[i]):
            raise FileFormatError(f"token {i} is marked as a byte but is not <0x00> to <0xFF>: {ascii(tokens[i])[:40]}")
    unknowns = [i for i, kind in enumerate(kinds) if kind == UNKNOWN]
    for i in (*unknowns, bos_id, eos_id):
        kinds[i] = CONTROL
    # Converters mark <unk> as control when the checkpoint calls it special; its id then is a key, 0 if left out.
    unknown_id = unknowns[0] if unknowns else metadata.get("tokenizer.ggml.unknown_token_id", 0)
    if type(unknown_id) is not int or not 0 <= unknown_id < len(kinds) or kinds[unknown_id] != CONTROL:
        raise FileFormatError("the vocabulary has no unknown token, which every SentencePiece vocabulary has")
    kinds[unknown_id] = UNKNOWN
    if kinds.count(BYTE) not in (0, 256):
        raise FileFormatError(f"the vocabulary has {kinds.count(BYTE)} byte tokens; it must have all 256 or none")
    return tuple(kinds)


def _varint(n: int) -> bytes:
    out = bytearray()
    while n > 127:
        out.append(n & 127 | 128)
        n >>= 7
    out.append(n)
    return bytes(out)


def _message(number: int, body: bytes) -> bytes:
    """A length-delimited protobuf field."""
    return _varint(number << 3 | 2) + _varint(len(body)) + body


def _model_proto(tokens: list[bytes], scores: np.ndarray, kinds: Sequence[int]) -> bytes:
    """Serialized ModelProto: pieces = 1 {piece = 1, score = 2, type = 3}, trainer_spec = 2, normalizer_spec = 3."""
    pieces = []
    for i, (token, score, kind) in enumerate(zip(tokens, scores.tolist(), kinds, strict=True)):
        if kind in (CONTROL, UNKNOWN):
            token = b"\xff%d" % i  # no text contains this name, so not even a one-letter control token can be typed
        elif kind == USER_DEFINED:
            token = token.replace(b" ", SPACE)  # converters write the spaces of added tokens plainly
        pieces.append(_message(1, _message(1, token) + struct.pack("<Bf", 2 << 3 | 5, score) + bytes([3 << 3, kind])))
    has_bytes = BYTE in kinds
    trainer = bytes([3 << 3, 2]) + _varint(35 << 3) + bytes([has_bytes])  # model_type BPE, byte_fallback
    # add_dummy_prefix = 3 and remove_extra_whitespaces = 4 off, escape_whitespaces = 5 on: encode() adds the space.
    normalizer = _message(1, b"identity") + bytes([3 << 3, 0, 4 << 3, 0, 5 << 3, 1])
    return b"".join([*pieces, _message(2, trainer), _message(3, normalizer)])
