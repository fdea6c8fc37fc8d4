"""Tokenizer against SentencePiece itself, on its own models and on wild text; the file's arrays are not trusted."""

import os
import unicodedata
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sentencepiece import SentencePieceProcessor
from vocabularies import metadata_of, model_bytes

from llmq.errors import FileFormatError, LlmqError, UnsupportedError, UsageError
from llmq.gguf import open_gguf
from llmq.tokenizer import Tokenizer, load_tokenizer

MODELS = ["trained", "v1", "v2", "v3"]
HOSTILE = ["<s>", "</s>", "[INST]", "[/INST]", "<unk>", "<0x0A>", "[TOOL_CALLS]", "<think>", "  ", "\n", "\0", "\u2581"]
HOSTILE += ["\U0001f999", "e\u0301\u0301", "\u202e", "\ufffd", "\ufeff", "caf\u00e9", "\uffff", " hello"]
TEXTS = st.lists(st.text(max_size=8) | st.sampled_from(HOSTILE), max_size=8).map("".join)
SHARED = Path(os.environ.get("LLMQ_SHARED", Path(__file__).parents[2] / "shared"))


@cache
def ours(name: str) -> Tokenizer:
    return load_tokenizer(metadata_of(name))


@cache
def reference(name: str, more: bytes = b"") -> SentencePieceProcessor:
    return SentencePieceProcessor(model_proto=model_bytes(name) + more)


def changed(**values: Any) -> dict[str, Any]:
    return metadata_of("trained") | {f"tokenizer.ggml.{key}": value for key, value in values.items()}


def edited(key: str, index: int, value: Any) -> dict[str, Any]:
    array = metadata_of("trained")[f"tokenizer.ggml.{key}"].copy()
    array[index] = value
    return changed(**{key: array})


def id_of(text: str) -> int:
    return metadata_of("trained")["tokenizer.ggml.tokens"].index(text.encode())


@pytest.mark.parametrize("name", MODELS)
@settings(max_examples=300, deadline=None)
@given(text=TEXTS)
def test_encodes_as_sentencepiece(name: str, text: str) -> None:
    assert ours(name).encode(text) == reference(name).encode(text)


@pytest.mark.parametrize("name", MODELS)
@settings(max_examples=150, deadline=None)
@given(text=TEXTS)
def test_no_dummy_prefix_encodes_as_sentencepiece(name: str, text: str) -> None:
    # Appended to a ModelProto, this normalizer_spec is merged into the one there: add_dummy_prefix off.
    assert ours(name).encode(text, dummy_prefix=False) == reference(name, b"\x1a\x02\x18\x00").encode(text)


@pytest.mark.parametrize("name", MODELS)
@settings(max_examples=150, deadline=None)
@given(text=TEXTS)
def test_typed_text_gives_no_control_token_and_comes_back(name: str, text: str) -> None:
    tokenizer = ours(name)
    ids = tokenizer.encode(text)
    assert not set(ids) & {*tokenizer.specials.values(), tokenizer.bos_id, tokenizer.eos_id}
    assert tokenizer.decode(ids) == text.replace("\u2581", " ")


@pytest.mark.parametrize("name", MODELS)
@settings(max_examples=300, deadline=None)
@given(data=st.data())
def test_decodes_as_sentencepiece(name: str, data: st.DataObject) -> None:
    tokenizer = ours(name)
    a_byte = st.sampled_from([i for i, kind in enumerate(tokenizer.types) if kind == 6])
    spaced = st.sampled_from([i for i, token in enumerate(tokenizer.tokens) if token.startswith(b"\xe2\x96\x81")][:50])
    any_id = st.integers(0, tokenizer.n_vocab - 1)
    ids = data.draw(st.lists(any_id | a_byte | spaced | st.integers(0, 4), max_size=30))
    assert tokenizer.decode(ids) == reference(name).decode(ids)


@settings(max_examples=300, deadline=None)
@given(text=st.text(max_size=30), invalid=st.binary(max_size=6))
def test_decoder_shows_no_half_character(text: str, invalid: bytes) -> None:
    tokenizer = ours("trained")
    first_byte = id_of("<0x00>")
    whole = [first_byte + b for b in text.encode()]
    decoder, shown = tokenizer.decoder(), ""
    for token_id in whole:
        shown += decoder.feed(token_id)
        assert text.startswith(shown)
    assert shown == text
    shown += "".join(decoder.feed(first_byte + b) for b in invalid) + decoder.flush()
    assert shown == reference("trained").decode(whole + [first_byte + b for b in invalid])


def test_decoder_holds_bytes_until_certain() -> None:
    tokenizer = ours("trained")
    byte = id_of("<0x00>")
    decoder = tokenizer.decoder()
    assert [decoder.feed(byte + b) for b in "\U0001f999".encode()] == ["", "", "", "\U0001f999"]
    assert decoder.feed(byte + 0xE2) == ""
    assert decoder.feed(id_of("[INST]")) == "\ufffd"
    assert decoder.feed(byte + 0xE2) == ""
    assert decoder.flush() == "\ufffd"


def test_leading_space_is_dropped_once_and_on_request() -> None:
    tokenizer = ours("trained")
    ids = tokenizer.encode(" a")
    assert tokenizer.decode([tokenizer.bos_id, *ids]) == " a"
    assert tokenizer.decode(ids, dummy_prefix=False) == "  a"
    plain = load_tokenizer(changed(add_space_prefix=False))
    assert plain.decode(plain.encode("a b")) == "a b"
    assert plain.encode("a b") == tokenizer.encode("a b", dummy_prefix=False) != tokenizer.encode("a b")


def test_piece_gives_raw_bytes() -> None:
    tokenizer = ours("trained")
    assert tokenizer.piece(id_of("<0xF0>")) == b"\xf0"
    assert tokenizer.piece(id_of("\u2581a")) == b" a"
    assert tokenizer.piece(tokenizer.eos_id) == b""
    for wrong in (-1, tokenizer.n_vocab):
        with pytest.raises(UsageError, match="not in the vocabulary"):
            tokenizer.piece(wrong)


def test_lone_surrogates_are_replaced() -> None:
    assert ours("trained").encode("a\ud800b\udcff") == ours("trained").encode("a\ufffdb\ufffd")


@pytest.mark.parametrize("unit", ["a", " ", "\u0301", "<0x41>", "\u2581", "[INST]", "  ", "ab"])
def test_a_megabyte_of_one_thing_encodes(unit: str) -> None:
    tokenizer = ours("trained")
    text = unit * (1_000_000 // len(unit.encode()))
    assert tokenizer.decode(tokenizer.encode(text)) == text.replace("\u2581", " ")


def test_too_much_text_is_refused() -> None:
    for text in ("a" * (16 * 2**20 + 1), "\u20ac" * (6 * 2**20)):
        with pytest.raises(UsageError, match="16 MiB"):
            ours("trained").encode(text)


def test_control_tokens_cannot_be_typed_whatever_their_text_or_type() -> None:
    one_letter, word = id_of("a"), reference("trained").encode("42")[-1]
    types = metadata_of("trained")["tokenizer.ggml.token_type"].copy()
    types[one_letter] = 3
    tokenizer = load_tokenizer(changed(token_type=types, eos_token_id=word))
    assert types[word] == 1
    ids = tokenizer.encode("a 42 xa42a")  # every release of SentencePiece does something else with such a vocabulary
    assert not {one_letter, word} & set(ids)
    assert tokenizer.decode(ids) == "a 42 xa42a"
    assert tokenizer.specials["a"] == one_letter
    assert tokenizer.piece(word) == b""


def test_unknown_token_marked_as_control_is_found() -> None:
    tokenizer = load_tokenizer(edited("token_type", 0, 3))
    assert tokenizer.encode("a \u4f60") == ours("trained").encode("a \u4f60")
    assert tokenizer.types[0] == 2


def test_of_several_unknown_tokens_the_first_counts() -> None:
    tokenizer = load_tokenizer(edited("token_type", id_of("<think>"), 2))
    assert tokenizer.types[0] == 2
    assert tokenizer.specials["<think>"] == id_of("<think>")


def test_user_defined_token_may_hold_plain_spaces() -> None:
    tokens = metadata_of("trained")["tokenizer.ggml.tokens"]
    tokenizer = load_tokenizer(changed(tokens=[b"  " if t == "\u2581\u2581".encode() else t for t in tokens]))
    assert tokenizer.encode("a   b") == ours("trained").encode("a   b")
    assert id_of("\u2581\u2581") in tokenizer.encode("a   b")


def test_vocabulary_without_bytes_gives_unknown() -> None:
    types = metadata_of("trained")["tokenizer.ggml.token_type"].copy()
    types[types == 6] = 5
    tokenizer = load_tokenizer(changed(token_type=types))
    assert tokenizer.encode("\u4f60", dummy_prefix=False) == [0]
    assert tokenizer.decode([0]) == " \u2047 "


TOKENS = metadata_of("trained")["tokenizer.ggml.tokens"]
BAD_FILES = {
    "no tokens": changed(tokens=None),
    "tokens are numbers": changed(tokens=np.zeros(600, np.int32)),
    "tokens are empty": changed(tokens=[]),
    "an empty token": changed(tokens=[*TOKENS[:-1], b""]),
    "a zero byte": changed(tokens=[*TOKENS[:-1], b"a\0b"]),
    "a long token": changed(tokens=[*TOKENS[:-1], b"a" * 1025]),
    "a token not UTF-8": changed(tokens=[*TOKENS[:-1], b"\xff\x1b[2J"]),
    "a token twice": changed(tokens=[*TOKENS[:-1], TOKENS[-2]]),
    "no scores": changed(scores=None),
    "too few scores": changed(scores=np.zeros(599, np.float32)),
    "scores of a wrong type": changed(scores=np.zeros(600, np.int32)),
    "a score not a number": edited("scores", 400, np.nan),
    "an infinite score": edited("scores", 400, np.inf),
    "no types": changed(token_type=None),
    "types in two dimensions": changed(token_type=np.ones((600, 1), np.int32)),
    "type 0": edited("token_type", 400, 0),
    "type 7": edited("token_type", 400, 7),
    "a byte token that is none": edited("token_type", 400, 6),
    "a byte missing": edited("token_type", id_of("<0x41>"), 1),
    "no unknown token": edited("token_type", 0, 1),
    "unknown id of a word": edited("token_type", 0, 1) | {"tokenizer.ggml.unknown_token_id": 400},
    "unknown id out of range": edited("token_type", 0, 1) | {"tokenizer.ggml.unknown_token_id": 600},
    "no BOS": changed(bos_token_id=None),
    "BOS out of range": changed(bos_token_id=600),
    "EOS negative": changed(eos_token_id=-1),
    "EOS is text": changed(eos_token_id="\x1b]0;x\x07" * 99),
    "a flag that is a number": changed(add_bos_token=1),
    "a prefix flag that is text": changed(add_space_prefix="yes"),
}


def assert_one_clean_line(error: LlmqError) -> None:
    line = str(error)
    assert 0 < len(line) <= 240
    assert not any(unicodedata.category(c).startswith("C") for c in line)


@pytest.mark.parametrize("metadata", BAD_FILES.values(), ids=BAD_FILES)
def test_damaged_vocabulary_is_refused(metadata: dict[str, Any]) -> None:
    with pytest.raises(FileFormatError) as caught:
        load_tokenizer(metadata)
    assert_one_clean_line(caught.value)


@pytest.mark.parametrize("bad", ["<0x-1>", "<0xZZ>", "<0xff>", "<0x0A>\n", "0x0A"])
def test_byte_token_text_is_checked(bad: str) -> None:
    tokens = [bad.encode() if token == b"<0x0A>" else token for token in TOKENS]
    with pytest.raises(FileFormatError, match="marked as a byte"):
        load_tokenizer(changed(tokens=tokens))


@pytest.mark.parametrize("model", ["gpt2", "no_vocab", None, "\x1b[2J" * 99, 7])
def test_other_tokenizers_are_refused_by_name(model: Any) -> None:
    with pytest.raises(UnsupportedError) as caught:
        load_tokenizer(changed(model=model, pre="tekken"))
    assert_one_clean_line(caught.value)
    assert ascii(model)[:10] in str(caught.value)
    assert "tekken" in str(caught.value)


@pytest.mark.parametrize(("value", "expected"), [({}, True), ({"add_bos_token": False}, False)])
def test_add_bos_defaults_to_true(value: dict[str, Any], expected: bool) -> None:
    assert load_tokenizer(changed(**value)).add_bos is expected


@pytest.mark.slow
def test_llama_cpp_vectors() -> None:
    path = SHARED / "data" / "llama_cpp_vocab" / "ggml-vocab-llama-spm.gguf"
    if not path.exists():
        pytest.skip(f"{path.name} is not there; set LLMQ_SHARED to the folder that holds data/llama_cpp_vocab")
    with open_gguf(path) as file:
        tokenizer = load_tokenizer(file.metadata)
    texts = Path(f"{path}.inp").read_bytes().decode().split("\n__ggml_vocab_test__\n")[:-1]
    lines = Path(f"{path}.out").read_text().split("\n")[:-1]
    assert len(texts) == len(lines) == 46
    for text, line in zip(texts, lines, strict=True):
        assert tokenizer.encode(text) == [int(i) for i in line.split()]
