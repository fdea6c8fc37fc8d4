"""The GGUF reader: hostile files, mutants, truncation, and files written by the gguf package."""

import os
import random
import subprocess
import sys
import tracemalloc
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import gguf as oracle
import numpy as np
import pytest

from llmq.errors import LlmqError, UnsupportedError, UsageError
from llmq.formats import F32, FORMATS, Q4_K
from llmq.gguf import open_gguf
from tests.hostile import HOSTILE, STRING, aligned, head, mutant, pair, sound, string, u32

SHARED = Path(__file__).parents[2] / "shared"


@contextmanager
def allocating_at_most(n_bytes: int) -> Iterator[None]:
    tracemalloc.start()
    try:
        yield
        assert tracemalloc.get_traced_memory()[1] <= n_bytes
    finally:
        tracemalloc.stop()


def assert_one_clean_line(error: LlmqError) -> None:
    text = str(error)
    assert text.isprintable()
    assert 20 < len(text) <= 240


def read_everything(path: Path) -> None:
    with open_gguf(path) as gguf:
        for info in gguf.tensors.values():
            assert gguf.data(info.name).nbytes == info.n_bytes
            int(gguf.data(info.name).sum())


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_file_is_refused_in_one_line(tmp_path: Path, name: str) -> None:
    parts, kind, fragment = HOSTILE[name]
    path = tmp_path / "model.gguf"
    path.write_bytes(b"".join(parts))
    with allocating_at_most(2_000_000), pytest.raises(LlmqError) as caught:
        open_gguf(path)
    assert type(caught.value) is kind
    assert fragment in str(caught.value)
    assert "model.gguf" in str(caught.value)
    assert_one_clean_line(caught.value)


def test_there_are_as_many_kinds_as_promised() -> None:
    assert len(HOSTILE) >= 46


def test_mutants_are_refused_or_read(tmp_path: Path) -> None:
    rng = random.Random(20_261_120)
    parts = sound()
    path = tmp_path / "mutant.gguf"
    accepted = 0
    with allocating_at_most(2_000_000):
        for _ in range(4000):
            path.write_bytes(mutant(parts, rng))
            try:
                read_everything(path)
                accepted += 1
            except LlmqError as error:
                assert_one_clean_line(error)
    assert 200 < accepted < 3000, "the mutator damages everything or nothing"


def test_truncation_at_every_byte(tmp_path: Path) -> None:
    whole = b"".join(sound())
    path = tmp_path / "cut.gguf"
    path.write_bytes(whole)
    read_everything(path)
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        with pytest.raises(LlmqError):
            open_gguf(path)


def test_things_that_are_not_files(tmp_path: Path) -> None:
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    for path, fragment in (
        (tmp_path / "missing", "No such file"),
        (tmp_path, "directory"),
        (fifo, "not a regular file"),
        (tmp_path / "\x1b[2J\n", r"\x1b[2J\n"),
    ):
        with pytest.raises(UsageError, match=r"check the path|regular file") as caught:
            open_gguf(path)
        assert fragment in str(caught.value)
        assert_one_clean_line(caught.value)


def test_a_symbolic_link_is_followed(tmp_path: Path) -> None:
    (tmp_path / "model.gguf").write_bytes(b"".join(sound()))
    (tmp_path / "link.gguf").symlink_to(tmp_path / "model.gguf")
    read_everything(tmp_path / "link.gguf")


def test_limits_themselves_are_accepted(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    for alignment in (8, 65_536):
        parts = aligned(4, u32(alignment))
        path.write_bytes(b"".join(parts) + bytes(65_536))
        assert open_gguf(path).tensors["t"].offset % alignment == 0
    path.write_bytes(b"".join([*head(0, 1), *pair(b"k" * 65_535, STRING, *string(b""))]))
    assert open_gguf(path).metadata == {"k" * 65_535: ""}


def test_the_header_may_not_be_huge(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    strings = [*pair(b"k", 9, u32(STRING), (65 << 20).to_bytes(8, "little"))]
    with path.open("wb") as file:
        file.write(b"".join([*head(0, 1), *strings]))
        file.truncate(1 << 30)
    with allocating_at_most(2_000_000), pytest.raises(LlmqError, match="64 MiB"):
        open_gguf(path)


@pytest.mark.parametrize("version", [2, 3])
def test_reads_what_the_gguf_package_writes(tmp_path: Path, version: int) -> None:
    rng = np.random.default_rng(3)
    path = tmp_path / "model.gguf"
    rows = rng.integers(0, 256, (3, 5, 288), dtype=np.uint8)
    tokens = [b"\xff\xfe", b"", "\u2581caf\u00e9".encode(), b"x" * 300]
    writer = oracle.GGUFWriter(path, "llama")
    writer.add_name("caf\u00e9")
    writer.add_uint64("big", 2**63)
    writer.add_int8("small", -7)
    writer.add_float64("exact", 0.1)
    writer.add_bool("yes", True)
    writer.add_token_list(tokens)
    writer.add_token_types([1, 2, -3])
    writer.add_tensor("experts", rows, raw_dtype=oracle.GGMLQuantizationType.Q4_K)
    writer.add_tensor("norm", np.arange(7, dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    data = bytearray(path.read_bytes())
    data[4] = version
    path.write_bytes(data)

    gguf = open_gguf(path)
    assert gguf.metadata["general.name"] == "caf\u00e9"
    assert gguf.metadata["big"] == 2**63
    assert gguf.metadata["small"] == -7
    assert gguf.metadata["exact"] == 0.1
    assert gguf.metadata["yes"] is True
    assert gguf.metadata["tokenizer.ggml.tokens"] == tokens
    assert gguf.metadata["tokenizer.ggml.token_type"].dtype == np.int32
    assert gguf.metadata["tokenizer.ggml.token_type"].tolist() == [1, 2, -3]
    assert (gguf.tensors["experts"].shape, gguf.tensors["experts"].format) == ((3, 5, 512), Q4_K)
    assert (gguf.tensors["norm"].shape, gguf.tensors["norm"].format) == ((7,), F32)
    np.testing.assert_array_equal(gguf.data("experts"), rows)
    np.testing.assert_array_equal(gguf.data("norm").view(np.float32), np.arange(7))


def test_a_view_outlives_the_file_and_is_read_only(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(b"".join(sound()))
    with open_gguf(path) as gguf:
        view = gguf.data("blk.0.weight")
        before = view.copy()
    path.unlink()
    np.testing.assert_array_equal(view, before)
    with pytest.raises(ValueError, match="read-only"):
        view[0, 0] = 1


@pytest.mark.parametrize("type_id", [t.value for t in oracle.GGMLQuantizationType])
def test_every_tensor_type_is_read_or_refused_by_name(tmp_path: Path, type_id: int) -> None:
    block_size, block_bytes = oracle.GGML_QUANT_SIZES[oracle.GGMLQuantizationType(type_id)]
    path = tmp_path / "model.gguf"
    name = string(b"t")
    entry = [*name, u32(1), block_size.to_bytes(8, "little"), u32(type_id), bytes(8)]
    path.write_bytes(b"".join([*head(1, 0), *entry]) + bytes(32 + block_bytes))
    if type_id in FORMATS:
        assert open_gguf(path).tensors["t"].n_bytes == block_bytes
    else:
        with pytest.raises(UnsupportedError, match=oracle.GGMLQuantizationType(type_id).name):
            open_gguf(path)


@pytest.mark.slow
def test_the_shared_hostile_files(tmp_path: Path) -> None:
    script = SHARED / "tools" / "gguf_hostile.py"
    if not script.exists():
        pytest.skip(f"there is no {script.name} beside this checkout")
    subprocess.run([sys.executable, "-B", script, tmp_path], check=True, capture_output=True)
    opened = set()
    for path in tmp_path.glob("*.gguf"):
        try:
            read_everything(path)
            opened.add(path.stem)
        except LlmqError as error:
            assert_one_clean_line(error)
    # Sound as containers; what is wrong with them is for the tokenizer and the configuration to say.
    assert opened == {"ansi_name", "scores_int8", "byte_tok_neg"}
