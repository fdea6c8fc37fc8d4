"""Names, configuration and vocabulary: from config.json and tokenizer.model to GGUF keys and tensors."""

import json
import random
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sentencepiece
from checkpoints import hf_config, hf_shapes, write_checkpoint
from vocabularies import model_bytes, trained_model

from llmq.errors import FileFormatError, LlmqError, UnsupportedError
from quant.checkpoint import open_checkpoint
from quant.names import check_tensors, interleaved, model_metadata, read_hf_config, tensor_map
from quant.protobuf import fields
from quant.safetensors import Stored
from quant.vocab import vocab_metadata

MIXTRAL = {"model_type": "mixtral", "num_local_experts": 4, "num_experts_per_tok": 2}


def stubs(config: dict[str, Any]) -> dict[str, Stored]:
    return {name: Stored("F32", shape, np.empty(0)) for name, shape in hf_shapes(config).items()}


@pytest.mark.parametrize("changes", [{}, MIXTRAL, {"tie_word_embeddings": True}, {"num_attention_heads": 8}])
def test_every_tensor_has_a_place(changes: dict[str, Any]) -> None:
    values = hf_config(**changes)
    config = read_hf_config(values, "x")
    entries = list(tensor_map(config))
    check_tensors(entries, config, stubs(values))
    assert sorted(source for entry in entries for source in entry.sources) == sorted(hf_shapes(values))
    assert len({entry.name for entry in entries}) == len(entries)


def test_names_are_those_of_gguf() -> None:
    gguf = pytest.importorskip("gguf")
    table = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, 2)
    for values in (hf_config(), hf_config(**MIXTRAL)):
        for entry in tensor_map(read_hf_config(values, "x")):
            for source in entry.sources:
                merged = re.sub(r"experts\.\d+\.", "experts.", source)
                assert table.get_name(merged, try_suffixes=(".weight",)) == entry.name


def test_missing_misshaped_and_unknown_tensors_are_refused() -> None:
    values = hf_config()
    config = read_hf_config(values, "x")
    entries, sound = list(tensor_map(config)), stubs(values)
    name = "model.layers.1.self_attn.k_proj.weight"
    with pytest.raises(FileFormatError, match=name):
        check_tensors(entries, config, {k: v for k, v in sound.items() if k != name})
    with pytest.raises(FileFormatError, match=r"is 127x256 and config\.json asks for 128x256"):
        check_tensors(entries, config, sound | {name: Stored("F32", (127, 256), np.empty(0))})
    bias = {"model.layers.0.self_attn.q_proj.bias": Stored("F32", (256,), np.empty(0))}
    with pytest.raises(UnsupportedError, match=r"q_proj\.bias"):
        check_tensors(entries, config, sound | bias)
    derived = {"model.layers.0.self_attn.rotary_emb.inv_freq": Stored("F32", (32,), np.empty(0))}
    check_tensors(entries, config, sound | derived)


def test_rotary_rows_move_from_halves_to_pairs() -> None:
    """Rotating row pairs (i, i + half) before equals rotating neighbours after, for every head."""
    heads, head_dim = 3, 8
    rows = np.random.default_rng(0).standard_normal(heads * head_dim)
    angles = np.arange(head_dim // 2) * 0.7
    cos, sin = np.cos(angles), np.sin(angles)
    order = interleaved(heads * head_dim, heads)
    moved = rows[order]
    for head in range(heads):
        part = rows[head * head_dim : (head + 1) * head_dim]
        low, high = part[: head_dim // 2], part[head_dim // 2 :]
        by_halves = np.stack([low * cos - high * sin, high * cos + low * sin], 1).reshape(-1)
        pairs = moved[head * head_dim : (head + 1) * head_dim].reshape(-1, 2)
        by_pairs = np.stack([pairs[:, 0] * cos - pairs[:, 1] * sin, pairs[:, 1] * cos + pairs[:, 0] * sin], 1)
        np.testing.assert_allclose(by_pairs.reshape(-1), by_halves)


def test_metadata_has_the_keys_of_a_llama_file() -> None:
    config = read_hf_config(hf_config(**MIXTRAL, num_attention_heads=8), "Ein Name")
    assert model_metadata(config) == {
        "general.architecture": "llama", "general.type": "model", "general.name": "Ein Name",
        "llama.block_count": 2, "llama.context_length": 1024, "llama.embedding_length": 256,
        "llama.feed_forward_length": 512, "llama.vocab_size": 608, "llama.attention.head_count": 8,
        "llama.attention.head_count_kv": 2, "llama.attention.key_length": 64, "llama.attention.value_length": 64,
        "llama.attention.layer_norm_rms_epsilon": 1e-5, "llama.rope.dimension_count": 64,
        "llama.rope.freq_base": 10000.0, "llama.expert_count": 4, "llama.expert_used_count": 2,
        "llama.attention.sliding_window": 64,
    }  # fmt: skip


def test_what_configurations_leave_out() -> None:
    values = hf_config(sliding_window=None, head_dim=None, rope_theta=None)
    values["rope_parameters"] = {"rope_theta": 1e6, "rope_type": "default"}
    config = read_hf_config(values, "x")
    assert (config.window, config.head_dim, config.rope_base) == (0, 64, 1e6)
    assert "llama.attention.sliding_window" not in model_metadata(config)
    llama = hf_config(model_type="llama")
    del llama["rope_theta"], llama["num_key_value_heads"]
    config = read_hf_config(llama, "x")
    assert (config.rope_base, config.n_kv_heads) == (10000.0, 4)
    assert read_hf_config(hf_config(num_local_experts=8), "x").n_experts == 0


@pytest.mark.parametrize(
    ("changes", "shown"),
    [
        ({"model_type": "qwen2"}, "'qwen2'"), ({"model_type": None}, "'None'"), ({"model_type": ["\x1b"]}, "x1b"),
        ({"hidden_act": "gelu"}, "'gelu'"), ({"rope_scaling": {"rope_type": "yarn", "factor": 4}}, "'yarn'"),
        ({"rope_scaling": {"type": "linear"}}, "'linear'"), ({"rope_scaling": 3}, "'3'"),
        ({"rope_parameters": {"rope_type": "llama3", "rope_theta": 1.0}}, "'llama3'"),
    ],
)  # fmt: skip
def test_other_models_are_refused_by_name(changes: dict[str, Any], shown: str) -> None:
    with pytest.raises(UnsupportedError) as error:
        read_hf_config(hf_config(**changes), "x")
    assert shown in str(error.value)
    assert str(error.value).isprintable()


@pytest.mark.parametrize(
    "key",
    [
        "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "rms_norm_eps",
        "rope_theta", "max_position_embeddings", "num_local_experts", "num_experts_per_tok",
    ],
)  # fmt: skip
@pytest.mark.parametrize("value", [None, "7", True, 0, -1, 2**70, 1.5, [4], float("1e999")], ids=str)
def test_impossible_values_are_refused_by_key(key: str, value: Any) -> None:
    if key.startswith("r") and value == 1.5:
        return
    with pytest.raises(FileFormatError, match=key):
        read_hf_config(hf_config(**MIXTRAL) | {key: value}, "x")


def test_heads_must_go_together() -> None:
    for changes in ({"num_key_value_heads": 3}, {"head_dim": 33}, {"num_key_value_heads": 5}):
        with pytest.raises(FileFormatError):
            read_hf_config(hf_config(**changes), "x")


def read_vocab(folder: Path, vocab_size: int = 608) -> dict[str, Any]:
    return vocab_metadata(open_checkpoint(folder), vocab_size)[0]


@pytest.mark.parametrize("version", ["trained", "v1", "v3"])
def test_vocabulary_is_that_of_sentencepiece(tmp_path: Path, version: str) -> None:
    write_checkpoint(tmp_path)
    (tmp_path / "tokenizer.model").write_bytes(model_bytes(version))
    processor = sentencepiece.SentencePieceProcessor(model_proto=model_bytes(version))
    n = processor.vocab_size()
    keys = read_vocab(tmp_path, n + 8)
    tokens = keys["tokenizer.ggml.tokens"]
    assert [token.decode() for token in tokens[:n]] == [processor.id_to_piece(i) for i in range(n)]
    assert tokens[n:] == [f"[PAD{i}]".encode() for i in range(n, n + 8)]
    scores, types = keys["tokenizer.ggml.scores"], keys["tokenizer.ggml.token_type"]
    assert (scores.dtype, types.dtype) == (np.float32, np.int32)
    np.testing.assert_array_equal(scores[:n], np.array([processor.get_score(i) for i in range(n)], np.float32))
    assert (scores[n:] == -10000).all()
    assert (types[n:] == 5).all()
    for kind, test in ((2, processor.is_unknown), (3, processor.is_control), (6, processor.is_byte)):
        assert [i for i in range(n) if types[i] == kind] == [i for i in range(n) if test(i)]
    user_defined = {
        "trained": {"<think>", "\u2581\u2581"}, "v1": set(), "v3": {f"[REFERENCE_DOC_{i}]" for i in range(20)},
    }[version]  # fmt: skip
    assert {processor.id_to_piece(i) for i in range(n) if types[i] == 4} == user_defined
    assert keys["tokenizer.ggml.model"] == "llama"
    assert [keys[f"tokenizer.ggml.{name}_token_id"] for name in ("bos", "eos", "unknown")] == [1, 2, 0]
    assert (keys["tokenizer.ggml.add_bos_token"], keys["tokenizer.ggml.add_eos_token"]) == (True, False)


def test_added_tokens_and_flags(tmp_path: Path) -> None:
    write_checkpoint(tmp_path)
    decoder = {
        "0": {"content": "<unk>", "special": True},
        "601": {"content": "<|im_end|>", "special": True},
        "602": {"content": "<note>"},
    }
    flags = {"add_bos_token": False, "add_eos_token": True, "add_prefix_space": False, "chat_template": "{{ x }}"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"added_tokens_decoder": decoder} | flags))
    (tmp_path / "added_tokens.json").write_text(json.dumps({"<extra>": 600}))
    keys = read_vocab(tmp_path)
    assert keys["tokenizer.ggml.tokens"][600:603] == [b"<extra>", b"<|im_end|>", b"<note>"]
    assert keys["tokenizer.ggml.token_type"][600:604].tolist() == [4, 3, 4, 5]
    assert keys["tokenizer.ggml.token_type"][0] == 2
    assert keys["tokenizer.ggml.scores"][600:604].tolist() == [-1000, -1000, -1000, -10000]
    assert (keys["tokenizer.ggml.add_bos_token"], keys["tokenizer.ggml.add_eos_token"]) == (False, True)
    assert keys["tokenizer.ggml.add_space_prefix"] is False
    assert keys["tokenizer.chat_template"] == "{{ x }}"


@pytest.mark.parametrize(
    "config",
    [
        {"added_tokens_decoder": []}, {"added_tokens_decoder": {"x": {"content": "a"}}},
        {"added_tokens_decoder": {"608": {"content": "a"}}}, {"added_tokens_decoder": {"-1": {"content": "a"}}},
        {"added_tokens_decoder": {"9" * 5000: {"content": "a"}}}, {"added_tokens_decoder": {"601": {"content": ""}}},
        {"added_tokens_decoder": {"601": {"content": "\ud800"}}}, {"added_tokens_decoder": {"601": 5}},
    ],
)  # fmt: skip
def test_impossible_added_tokens_are_refused(tmp_path: Path, config: dict[str, Any]) -> None:
    write_checkpoint(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    with pytest.raises(FileFormatError):
        read_vocab(tmp_path)


def test_vocabularies_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    write_checkpoint(tmp_path)
    with pytest.raises(FileFormatError, match=r"600 pieces and config\.json has room for 599"):
        read_vocab(tmp_path, 599)
    assert len(read_vocab(tmp_path, 600)["tokenizer.ggml.tokens"]) == 600
    (tmp_path / "tokenizer.model").unlink()
    with pytest.raises(UnsupportedError, match="SentencePiece"):
        read_vocab(tmp_path)


def varint(number: int) -> bytes:
    out = b""
    while number > 127:
        out += bytes([number & 127 | 128])
        number >>= 7
    return out + bytes([number])


def counted(field: int, data: bytes) -> bytes:
    return varint(field << 3 | 2) + varint(len(data)) + data


@pytest.mark.parametrize(("algorithm", "name"), [(1, "unigram"), (3, "word"), (4, "char")])
def test_other_algorithms_are_refused_by_name(tmp_path: Path, algorithm: int, name: str) -> None:
    write_checkpoint(tmp_path)
    # Protobuf merges a second trainer_spec into the first.
    (tmp_path / "tokenizer.model").write_bytes(trained_model() + counted(2, b"\x18" + varint(algorithm)))
    with pytest.raises(UnsupportedError, match=name):
        read_vocab(tmp_path)


def test_no_leading_space_is_kept(tmp_path: Path) -> None:
    write_checkpoint(tmp_path)
    assert "tokenizer.ggml.add_space_prefix" not in read_vocab(tmp_path)
    (tmp_path / "tokenizer.model").write_bytes(trained_model() + counted(3, b"\x18\0"))
    assert read_vocab(tmp_path)["tokenizer.ggml.add_space_prefix"] is False


def test_damaged_vocabularies_are_refused(tmp_path: Path) -> None:
    write_checkpoint(tmp_path)
    sound, rng = trained_model(), random.Random(9)
    mutants = [b"", sound[:1000], sound[:-1], b"\xff" * 50, b"\x80\x02", counted(1, b"") + sound]
    for _ in range(150):
        data = bytearray(sound)
        for _ in range(rng.randint(1, 4)):
            data[rng.randrange(len(data))] = rng.randrange(256)
        mutants.append(bytes(data))
    refused = []
    for mutant in mutants:
        (tmp_path / "tokenizer.model").write_bytes(mutant)
        try:
            read_vocab(tmp_path)
        except LlmqError as error:
            refused.append(str(error))
    assert len(refused) >= 6
    assert all(message.isprintable() for message in refused)


def test_wire_format() -> None:
    message = (
        varint(1 << 3)
        + varint(300)
        + counted(2, b"ab")
        + bytes([3 << 3 | 5, 1, 2, 3, 4])
        + bytes([4 << 3 | 1, *range(8)])
    )
    assert list(fields(message)) == [(1, 300), (2, b"ab"), (3, b"\1\2\3\4"), (4, bytes(range(8)))]
    for bad in (b"\x08", b"\x08" + b"\xff" * 11, b"\x12\x05ab", b"\x0b", b"\x1d\0"):
        with pytest.raises(ValueError, match=r"past the end|too long|wire type"):
            list(fields(bad))
