"""ModelConfig: what a file declares, every way it can be wrong, and the tensor and vocabulary table."""

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from llmq.config import ModelConfig, check_tensors, read_config
from llmq.errors import FileFormatError, LlmqError, UnsupportedError
from llmq.formats import F16, FORMATS, Q4_K, Q6_K, Format
from llmq.gguf import GGUF, TensorInfo, open_gguf
from tests.tiny import tiny_gguf

DENSE = {"vocab_size": 352, "dim": 64, "n_heads": 4, "n_kv_heads": 2, "head_dim": 16, "ffn_dim": 96}


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> GGUF:
    path = tmp_path_factory.mktemp("config") / "dense.gguf"
    tiny_gguf(path, **DENSE)
    return open_gguf(path)


@pytest.fixture(scope="module")
def mixture(tmp_path_factory: pytest.TempPathFactory) -> GGUF:
    path = tmp_path_factory.mktemp("config") / "mixture.gguf"
    tiny_gguf(path, **DENSE, n_experts=4)
    return open_gguf(path)


def changed(gguf: GGUF, changes: dict[str, Any]) -> GGUF:
    """A copy with metadata set, or removed where the change is None."""
    metadata = {key: value for key, value in {**gguf.metadata, **changes}.items() if value is not None}
    return GGUF(gguf.path, metadata, gguf.tensors, None)


def retensored(gguf: GGUF, changes: dict[str, TensorInfo | None]) -> GGUF:
    tensors = {**gguf.tensors, **changes}
    return GGUF(gguf.path, gguf.metadata, {name: info for name, info in tensors.items() if info is not None}, None)


def test_a_dense_model(dense: GGUF) -> None:
    config = read_config(dense)
    assert config == ModelConfig(
        n_layers=2, dim=64, n_heads=4, n_kv_heads=2, head_dim=16, ffn_dim=96, vocab_size=352, context_length=4096,
        rms_eps=float(np.float32(1e-5)), rope_base=10_000.0, rope_interleaved=True, n_experts=0, n_experts_used=0,
        window=0, tied_embeddings=False, name="tiny",
    )  # fmt: skip
    check_tensors(dense, config)


def test_a_tied_windowed_mixture_with_wide_heads(tmp_path: Path) -> None:
    tiny_gguf(
        tmp_path / "m.gguf", dim=256, n_heads=4, n_kv_heads=1, head_dim=128, n_experts=8, n_experts_used=3, window=64,
        rope_base=1e6, tied=True, format={"attn_v.weight": Q6_K, "token_embd.weight": F16, "": Q4_K},
    )  # fmt: skip
    with open_gguf(tmp_path / "m.gguf") as gguf:
        config = read_config(gguf)
        check_tensors(gguf, config)
    assert (config.dim, config.head_dim, config.n_heads) == (256, 128, 4)
    assert (config.n_experts, config.n_experts_used, config.window) == (8, 3, 64)
    assert (config.rope_base, config.tied_embeddings) == (1e6, True)


def test_defaults_of_absent_keys(dense: GGUF) -> None:
    names = ["attention.head_count_kv", "attention.key_length", "attention.value_length", "rope.dimension_count"]
    names += ["rope.freq_base", "vocab_size"]
    gguf = changed(dense, {"general.name": None} | {f"llama.{name}": None for name in names})
    config = read_config(gguf)
    assert (config.n_kv_heads, config.head_dim, config.rope_base) == (4, 16, 10_000.0)
    assert (config.vocab_size, config.name) == (352, "dense")


def test_other_number_types_are_numbers(dense: GGUF) -> None:
    gguf = changed(dense, {"llama.block_count": np.uint64(2), "llama.rope.freq_base": np.float64(500_000)})
    config = read_config(gguf)
    assert (type(config.n_layers), config.n_layers) == (int, 2)
    assert (type(config.rope_base), config.rope_base) == (float, 500_000.0)


def test_harmless_scaling_keys_are_accepted(dense: GGUF) -> None:
    read_config(changed(dense, {"llama.rope.scaling.type": "none", "llama.rope.scaling.factor": 4.0}))
    read_config(changed(dense, {"llama.rope.scaling.factor": 1.0}))


WRONG: list[tuple[dict[str, Any], type[LlmqError], str]] = [
    ({"general.architecture": None}, FileFormatError, "general.architecture"),
    ({"general.architecture": 3}, FileFormatError, "general.architecture"),
    ({"general.architecture": "falcon\x1b[2J"}, UnsupportedError, r"'falcon\x1b[2J'"),
    ({"general.name": 3}, FileFormatError, "general.name"),
    ({"llama.block_count": None}, FileFormatError, "llama.block_count"),
    ({"llama.block_count": 0}, FileFormatError, "llama.block_count is 0"),
    ({"llama.block_count": 2**32 - 1}, FileFormatError, "llama.block_count is 4294967295"),
    ({"llama.block_count": np.int32(-2)}, FileFormatError, "llama.block_count is -2"),
    ({"llama.block_count": True}, FileFormatError, "llama.block_count"),
    ({"llama.block_count": 2.0}, FileFormatError, "llama.block_count"),
    ({"llama.block_count": "2"}, FileFormatError, "llama.block_count"),
    ({"llama.attention.head_count": np.array([4, 4], np.int32)}, UnsupportedError, "layer to layer"),
    ({"llama.embedding_length": None}, FileFormatError, "llama.embedding_length"),
    ({"llama.feed_forward_length": 0}, FileFormatError, "llama.feed_forward_length"),
    ({"llama.context_length": 0}, FileFormatError, "llama.context_length"),
    ({"llama.attention.head_count": 0}, FileFormatError, "llama.attention.head_count"),
    ({"llama.attention.head_count_kv": 0}, FileFormatError, "llama.attention.head_count_kv"),
    ({"llama.attention.head_count_kv": 8}, FileFormatError, "llama.attention.head_count_kv"),
    ({"llama.attention.head_count_kv": 3}, FileFormatError, "share 3"),
    ({"llama.attention.key_length": None, "llama.attention.head_count": 128}, FileFormatError, "key_length is 0"),
    ({"llama.attention.value_length": 32}, UnsupportedError, "value_length"),
    ({"llama.rope.dimension_count": 8}, UnsupportedError, "dimension_count"),
    ({"llama.attention.layer_norm_rms_epsilon": None}, FileFormatError, "epsilon"),
    ({"llama.attention.layer_norm_rms_epsilon": float("nan")}, FileFormatError, "epsilon"),
    ({"llama.attention.layer_norm_rms_epsilon": -1e-5}, FileFormatError, "epsilon"),
    ({"llama.rope.freq_base": float("inf")}, FileFormatError, "freq_base"),
    ({"llama.rope.freq_base": 0.0}, FileFormatError, "freq_base"),
    ({"llama.rope.freq_base": "10000"}, FileFormatError, "freq_base"),
    ({"llama.rope.scaling.type": "yarn"}, UnsupportedError, "'yarn'"),
    ({"llama.rope.scaling.type": 1}, FileFormatError, "llama.rope.scaling.type"),
    ({"llama.rope.scaling.factor": 4.0}, UnsupportedError, "llama.rope.scaling.factor"),
    ({"llama.rope.scaling.factor": np.ones(3, np.float32)}, FileFormatError, "llama.rope.scaling.factor"),
    ({"llama.rope.scale_linear": 0.25}, UnsupportedError, "llama.rope.scale_linear"),
    ({"llama.attention.sliding_window": 2**31}, FileFormatError, "sliding_window"),
    ({"llama.expert_count": 65, "llama.expert_used_count": 2}, FileFormatError, "llama.expert_count is 65"),
    ({"llama.expert_count": 1, "llama.expert_used_count": 1}, UnsupportedError, "one expert"),
    ({"llama.expert_count": 4}, FileFormatError, "llama.expert_used_count"),
    ({"llama.expert_count": 4, "llama.expert_used_count": 0}, FileFormatError, "llama.expert_used_count is 0"),
    ({"llama.expert_count": 4, "llama.expert_used_count": 5}, FileFormatError, "llama.expert_used_count is 5"),
    ({"llama.expert_count": 64, "llama.expert_used_count": 9}, FileFormatError, "llama.expert_used_count is 9"),
    ({"llama.vocab_size": 0}, FileFormatError, "llama.vocab_size"),
    (
        {f"llama.{name}": 24 for name in ("attention.key_length", "attention.value_length", "rope.dimension_count")},
        UnsupportedError,
        "head size is 24",
    ),
    (
        {f"llama.{name}": 1040 for name in ("attention.key_length", "attention.value_length", "rope.dimension_count")},
        UnsupportedError,
        "head size is 1040",
    ),
    ({"llama.embedding_length": 72}, UnsupportedError, "width size is 72"),
    ({"llama.feed_forward_length": 100}, UnsupportedError, "feed-forward size is 100"),
]


@pytest.mark.parametrize(("changes", "kind", "fragment"), WRONG)
def test_a_wrong_declaration_is_refused(
    dense: GGUF, changes: dict[str, Any], kind: type[LlmqError], fragment: str
) -> None:
    with pytest.raises(LlmqError) as caught:
        read_config(changed(dense, changes))
    text = str(caught.value)
    assert type(caught.value) is kind
    assert fragment in text
    assert "dense.gguf" in text
    assert text.isprintable()
    assert len(text) <= 240


def test_every_tensor_is_needed_in_its_shape(dense: GGUF, mixture: GGUF) -> None:
    for gguf in dense, mixture:
        config = read_config(gguf)
        for name, info in gguf.tensors.items():
            with pytest.raises(FileFormatError, match="missing") as caught:
                check_tensors(retensored(gguf, {name: None}), config)
            assert name in str(caught.value)
            longer = (info.shape[0] + 1, *info.shape[1:])
            wrong = TensorInfo(name, longer, info.format, info.offset, info.n_bytes)
            with pytest.raises(FileFormatError, match="shape") as caught:
                check_tensors(retensored(gguf, {name: wrong}), config)
            assert name in str(caught.value)
            assert len(str(caught.value)) <= 240


def test_no_other_tensor_is_allowed(dense: GGUF, mixture: GGUF) -> None:
    norm = dense.tensors["output_norm.weight"]
    for gguf, name in (
        (dense, "blk.0.attn_q.bias"),
        (dense, "blk.2.attn_norm.weight"),
        (dense, "blk.00.attn_norm.weight"),
        (dense, "blk.-1.attn_norm.weight"),
        (dense, "blk.0.ffn_gate_inp.weight"),
        (mixture, "blk.0.ffn_gate.weight"),
    ):
        with pytest.raises(FileFormatError, match="no place"):
            check_tensors(retensored(gguf, {name: norm}), read_config(gguf))
    with pytest.raises(UnsupportedError, match=r"rope_freqs\.weight"):
        read_config(retensored(dense, {"rope_freqs.weight": norm}))


def test_norms_and_routers_are_f32_and_matrices_anything(mixture: GGUF) -> None:
    config = read_config(mixture)
    for name, info in mixture.tensors.items():
        for fmt in FORMATS.values():
            gguf = retensored(mixture, {name: TensorInfo(name, info.shape, fmt, info.offset, info.n_bytes)})
            if fmt.name != "F32" and ("norm" in name or "gate_inp" in name):
                with pytest.raises(FileFormatError, match="must be F32"):
                    check_tensors(gguf, config)
            else:
                check_tensors(gguf, config)


def test_without_embeddings_there_is_no_vocabulary_size(dense: GGUF) -> None:
    gguf = changed(retensored(dense, {"token_embd.weight": None}), {"llama.vocab_size": None})
    with pytest.raises(FileFormatError, match=r"token_embd\.weight is missing"):
        read_config(gguf)


@pytest.mark.parametrize(
    ("name", "value", "fragment"),
    [
        ("model", None, "tokenizer.ggml.model"),
        ("tokens", None, "tokens is missing"),
        ("tokens", [b"a"] * 351, "351 tokens"),
        ("tokens", [b"a"] * 353, "353 tokens"),
        ("tokens", np.zeros(352, np.int32), "tokens"),
        ("tokens", "text", "tokens"),
        ("scores", None, "scores"),
        ("scores", np.zeros(351, np.float32), "352 numbers of type float32"),
        ("scores", np.zeros(352, np.int8), "float32"),
        ("scores", np.zeros(352, np.float64), "float32"),
        ("scores", [b"0"] * 352, "float32"),
        ("token_type", None, "token_type"),
        ("token_type", np.ones(352, np.uint32), "352 numbers of type int32"),
        ("token_type", np.ones(1, np.int32), "int32"),
    ],
)
def test_a_wrong_vocabulary_is_refused(dense: GGUF, name: str, value: Any, fragment: str) -> None:
    gguf = changed(dense, {f"tokenizer.ggml.{name}": value})
    with pytest.raises(FileFormatError, match=fragment.replace(".", r"\.")):
        check_tensors(gguf, read_config(gguf))


def test_a_damaged_header_is_refused_or_means_something(dense: GGUF, tmp_path: Path) -> None:
    rng = random.Random(20_261_120)
    path = tmp_path / "damaged.gguf"
    whole = dense.path.read_bytes()
    path.write_bytes(whole)
    n_header = next(iter(dense.tensors.values())).offset
    accepted, messages = 0, set()
    for _ in range(1500):
        at, n_bytes = rng.randrange(8, n_header - 8), rng.choice((1, 1, 4, 8))
        with path.open("r+b") as file:
            file.seek(at)
            file.write(rng.choice((rng.randbytes(n_bytes), bytes(n_bytes), b"\xff" * n_bytes)))
        try:
            with open_gguf(path) as gguf:
                check_tensors(gguf, read_config(gguf))
            accepted += 1
        except LlmqError as error:
            messages.add(str(error))
        with path.open("r+b") as file:
            file.seek(at)
            file.write(whole[at : at + n_bytes])
    assert all(text.isprintable() and len(text) <= 240 for text in messages)
    assert 300 < accepted < 1300, "the damage is always or never seen"


def test_vocabulary_size_and_embedding_rows_agree(dense: GGUF) -> None:
    gguf = changed(dense, {"llama.vocab_size": 384})
    with pytest.raises(FileFormatError, match=r"token_embd\.weight has the shape"):
        check_tensors(gguf, read_config(gguf))


def test_a_file_without_a_vocabulary_is_accepted(dense: GGUF) -> None:
    absent = ["llama.vocab_size", *(f"tokenizer.ggml.{name}" for name in ("tokens", "scores", "token_type"))]
    gguf = changed(dense, dict.fromkeys(absent) | {"tokenizer.ggml.model": "no_vocab"})
    config = read_config(gguf)
    assert config.vocab_size == 352
    check_tensors(gguf, config)


def test_a_byte_pair_vocabulary_needs_no_scores(dense: GGUF) -> None:
    gguf = changed(dense, {"tokenizer.ggml.model": "gpt2", "tokenizer.ggml.scores": None})
    check_tensors(gguf, read_config(gguf))


@pytest.mark.parametrize("fmt", FORMATS.values(), ids=lambda fmt: fmt.name)
def test_tiny_weights_are_alike_in_every_format(tmp_path: Path, fmt: Format) -> None:
    weights = tiny_gguf(tmp_path / "tiny.gguf", n_layers=1, format=fmt)
    with open_gguf(tmp_path / "tiny.gguf") as gguf:
        assert gguf.tensors["blk.0.ffn_down.weight"].format == fmt
    down = weights["blk.0.ffn_down.weight"]
    assert down.shape == (256, 512)
    assert 0.02 < down.std() < 0.05
    assert abs(down.mean()) < 0.005
