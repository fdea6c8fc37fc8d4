"""Checkpoints: what is read is what was written, and nothing outside the folder or inside a pickle is touched."""

import json
import os
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from checkpoints import safetensors_bytes, stored, write_checkpoint

from llmq.errors import FileFormatError, LlmqError, UnsupportedError, UsageError
from quant.checkpoint import open_checkpoint
from quant.files import locate, parse_json
from quant.safetensors import header_bytes, open_safetensors, to_float32


def small_tensors(dtype: str = "F32") -> dict[str, tuple[str, np.ndarray]]:
    rng = np.random.default_rng(0)
    return {"a": stored(rng.standard_normal((3, 8)), dtype), "b": stored(rng.standard_normal(5), dtype)}


def opened(tmp_path: Path, data: bytes) -> dict[str, Any]:
    (tmp_path / "x.safetensors").write_bytes(data)
    return open_safetensors(tmp_path / "x.safetensors")[1]


@pytest.mark.parametrize("dtype", ["F32", "F16", "BF16"])
def test_weights_come_back(tmp_path: Path, dtype: str) -> None:
    torch = pytest.importorskip("torch")
    from safetensors.torch import save_file

    theirs = {"w": torch.randn(7, 33).to({"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}[dtype])}
    save_file(theirs, tmp_path / "x.safetensors")
    tensor = open_safetensors(tmp_path / "x.safetensors")[1]["w"]
    assert (tensor.dtype, tensor.shape) == (dtype, (7, 33))
    ours = to_float32(dtype, tensor.data)
    assert ours.dtype == np.float32
    np.testing.assert_array_equal(ours, theirs["w"].float().numpy())


def test_a_header_of_odd_length_is_read(tmp_path: Path) -> None:
    tensors = small_tensors()
    for spaces in range(4):
        raw = safetensors_bytes(tensors, __metadata__={"pad": " " * spaces})
        found = opened(tmp_path, raw)
        np.testing.assert_array_equal(to_float32("F32", found["a"].data), tensors["a"][1])


def entry(dtype: Any = "F32", shape: Any = (3, 8), offsets: Any = (0, 96)) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


BAD_ENTRIES = {
    "negative offset": entry(offsets=[-96, 0]),
    "offsets reversed": entry(offsets=[96, 0]),
    "past the end": entry(offsets=[0, 10**6], shape=[250000]),
    "far past the end": entry(shape=[2**40, 2**40], offsets=[0, 2**82]),
    "product that wraps 64 bits": entry(shape=[2**62, 4, 2], offsets=[0, 96]),
    "gap": entry(shape=[2, 8], offsets=[32, 96]),
    "overlap": entry(shape=[3, 9], offsets=[0, 108]),
    "boolean dimension": entry(shape=[True, 24]),
    "float dimension": entry(shape=[3.0, 8]),
    "negative dimensions": entry(shape=[-3, -8]),
    "text for a shape": entry(shape="38"),
    "three offsets": entry(offsets=[0, 48, 96]),
    "five dimensions": entry(shape=[3, 2, 2, 2, 1]),
    "shape for another size": entry(shape=[3, 7]),
    "no dtype": {"shape": [3, 8], "data_offsets": [0, 96]},
    "one key more": entry() | {"scale": 1},
    "a list": [1, 2],
    "nothing": None,
}


@pytest.mark.parametrize("case", BAD_ENTRIES)
def test_damaged_entries_are_refused(tmp_path: Path, case: str) -> None:
    with pytest.raises(FileFormatError, match="damaged"):
        opened(tmp_path, safetensors_bytes(small_tensors(), a=BAD_ENTRIES[case]))


@pytest.mark.parametrize("dtype", ["F8_E4M3", "I64", "BOOL", "", "\x1b[31m", 7])
def test_other_types_are_refused_by_name(tmp_path: Path, dtype: Any) -> None:
    with pytest.raises(UnsupportedError) as error:
        opened(tmp_path, safetensors_bytes(small_tensors(), a=entry(dtype=dtype)))
    assert repr(str(dtype)) in str(error.value)
    assert str(error.value).isprintable()


@pytest.mark.parametrize("size", [0, 5, 7])
def test_a_file_too_short_to_have_a_header_says_its_size(tmp_path: Path, size: int) -> None:
    with pytest.raises(FileFormatError, match=f"its {size} bytes are too few to tell the length of a header"):
        header_bytes("x.safetensors", SOUND[:size], size)
    if size:
        with pytest.raises(FileFormatError, match=f"its {size} bytes are too few"):
            opened(tmp_path, SOUND[:size])


def with_header(raw: bytes, data: bytes = b"") -> bytes:
    return len(raw).to_bytes(8, "little") + raw + data


SOUND = safetensors_bytes(small_tensors())
BAD_FILES = {
    "empty": b"",
    "seven bytes": b"\x10\0\0\0\0\0\0",
    "header past the end": (200).to_bytes(8, "little") + b"{}",
    "huge header": (2**63).to_bytes(8, "little") + b"{}",
    "header over the limit": (100_000_001).to_bytes(8, "little") + b"{}",
    "not an object": with_header(b"[1]"),
    "not JSON": with_header(b"{x}"),
    "not UTF-8": with_header(b'{"\xff":1}'),
    "NaN": with_header(b'{"a":NaN}'),
    "duplicate names": with_header(b'{"a":1,"a":1}'),
    "deep": with_header(b'{"a":' + b"[" * 100_000 + b"]" * 100_000 + b"}"),
    "a number of 5000 digits": with_header(b'{"a":' + b"9" * 5000 + b"}"),
    "more data than tensors": SOUND + b"\0",
    "less data than tensors": SOUND[:-1],
    "git-lfs pointer": b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n",
}


@pytest.mark.parametrize("case", BAD_FILES)
def test_damaged_files_are_refused(tmp_path: Path, case: str) -> None:
    with pytest.raises(FileFormatError) as error:
        opened(tmp_path, BAD_FILES[case])
    assert len(str(error.value)) <= 240
    assert str(error.value).isprintable()


def test_mutants_are_read_or_refused(tmp_path: Path) -> None:
    rng = random.Random(4)
    refused = []
    for _ in range(400):
        data = bytearray(SOUND)
        for _ in range(rng.randint(1, 3)):
            data[rng.randrange(230)] = rng.randrange(256)
        try:
            for tensor in opened(tmp_path, bytes(data)).values():
                to_float32(tensor.dtype, tensor.data)
        except LlmqError as error:
            refused.append(str(error))
    assert len(refused) > 300
    assert all(message.isprintable() for message in refused)


def test_shards_and_one_file_hold_the_same(tmp_path: Path) -> None:
    whole = write_checkpoint(tmp_path / "one")
    write_checkpoint(tmp_path / "many", shards=3)
    one, many = open_checkpoint(tmp_path / "one"), open_checkpoint(tmp_path / "many")
    assert [path.name for path in one.files] == ["model.safetensors", "config.json", "tokenizer_config.json"]
    assert len(many.files) == 3 + 3
    assert one.tensors.keys() == many.tensors.keys() == whole.keys()
    for name, weights in whole.items():
        for checkpoint in (one, many):
            tensor = checkpoint.tensors[name]
            np.testing.assert_array_equal(to_float32(tensor.dtype, tensor.data), weights)
    many.release()
    tensor = many.tensors["lm_head.weight"]
    np.testing.assert_array_equal(to_float32(tensor.dtype, tensor.data), whole["lm_head.weight"])


def index(folder: Path, weight_map: Any) -> None:
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


NAMES = [
    "../x.safetensors", "/etc/passwd", "a/b.safetensors", "..", ".", "", "x\0.safetensors", "x\n.safetensors",
    "C:\\x.safetensors", "a\\b.safetensors", ".hidden.safetensors", "missing.safetensors", "x" * 300 + ".safetensors",
    "\u202etxt.safetensors", "weights.bin", 5, None, ["x"],
]  # fmt: skip


@pytest.mark.parametrize("name", NAMES, ids=lambda name: ascii(name)[:30])
def test_an_index_cannot_lead_out_of_the_folder(tmp_path: Path, name: Any) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    (tmp_path / "x.safetensors").write_bytes(SOUND)
    index(folder, {"a": name})
    with pytest.raises(FileFormatError) as error:
        open_checkpoint(folder)
    assert str(error.value).isprintable()


def test_links_out_of_the_folder_pipes_and_folders_are_refused(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    (tmp_path / "x.safetensors").write_bytes(SOUND)
    (folder / "link.safetensors").symlink_to(tmp_path / "x.safetensors")
    (folder / "loop.safetensors").symlink_to("loop.safetensors")
    os.mkfifo(folder / "pipe.safetensors")
    (folder / "folder.safetensors").mkdir()
    reasons = {"link": "leads out", "loop": "has no", "pipe": "not a regular", "folder": "not a regular"}
    for name, reason in reasons.items():
        index(folder, {"a": f"{name}.safetensors"})
        with pytest.raises(LlmqError, match=reason):
            open_checkpoint(folder)


def test_a_hub_cache_is_followed_into_its_blobs_only(tmp_path: Path) -> None:
    snapshot, blobs = tmp_path / "snapshots" / "abc", tmp_path / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    (blobs / "0f").write_bytes(b"x")
    (tmp_path / "secret").write_bytes(b"x")
    (snapshot / "good").symlink_to("../../blobs/0f")
    (snapshot / "bad").symlink_to("../../secret")
    assert locate(snapshot, "good") == (blobs / "0f").resolve()
    with pytest.raises(FileFormatError, match="leads out"):
        locate(snapshot, "bad")


def test_index_and_shard_must_agree(tmp_path: Path) -> None:
    (tmp_path / "x.safetensors").write_bytes(SOUND)
    for weight_map in ({"a": "x.safetensors"}, dict.fromkeys("abc", "x.safetensors")):
        index(tmp_path, weight_map)
        with pytest.raises(FileFormatError, match="disagree"):
            open_checkpoint(tmp_path)


def test_an_index_of_too_many_names_is_refused(tmp_path: Path) -> None:
    index(tmp_path, {str(i): f"{i % 2100}.safetensors" for i in range(3000)})
    with pytest.raises(FileFormatError, match="more than any model"):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "model.ckpt", "weights.pkl", "consolidated.00.pth"])
def test_pickles_are_refused_unread(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"\x80\x02")
    with pytest.raises(UnsupportedError, match="pickles, a format that can run code"):
        open_checkpoint(tmp_path)


def only(name: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).write_bytes(b"{}") and None


@pytest.mark.parametrize(
    ("prepare", "error", "message"),
    [
        (lambda _folder: None, UsageError, "neither"),
        (only("README.md"), UsageError, "neither"),
        (only("consolidated.safetensors"), UnsupportedError, "consolidated"),
        (lambda folder: folder.rmdir(), UsageError, "cannot read"),
    ],
)
def test_other_folders_are_refused(
    tmp_path: Path, prepare: Callable[[Path], None], error: type[LlmqError], message: str
) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    prepare(folder)
    with pytest.raises(error, match=message):
        open_checkpoint(folder)


def test_config_must_be_there_and_of_reasonable_size(tmp_path: Path) -> None:
    write_checkpoint(tmp_path)
    (tmp_path / "config.json").write_bytes(b'{"a":"' + b" " * (17 << 20) + b'"}')
    with pytest.raises(FileFormatError, match="larger than 16 MiB"):
        open_checkpoint(tmp_path)
    (tmp_path / "config.json").unlink()
    with pytest.raises(FileFormatError, match=r"no 'config\.json'"):
        open_checkpoint(tmp_path)


def test_json_is_strict() -> None:
    assert parse_json("x", b'{"a": [1, {"b": null}]}') == {"a": [1, {"b": None}]}
    for bad in (b"[]", b'{"a":1,"a":1}', b'{"a":{"b":1,"b":2}}', b'{"a":Infinity}', b'{"a":-Infinity}', b"", b"\xff"):
        with pytest.raises(FileFormatError):
            parse_json("x", bad)
