"""The GGUF writer: round trips through our reader and the gguf package's, and what a failure leaves on the disk."""

import os
import resource
import shutil
from pathlib import Path
from typing import Any, NamedTuple

import gguf as oracle
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from llmq.errors import ResourceError, UsageError
from llmq.formats import F32, FORMATS, Q4_K, Format, row_bytes
from llmq.gguf import GGUFWriter, TensorSpec, open_gguf

DTYPES = [np.dtype(kind) for kind in ("u1", "i1", "u2", "i2", "u4", "i4", "f4", "?", "u8", "i8", "f8")]
text = st.text(st.characters(codec="utf-8"), max_size=20)
numbers = st.sampled_from(DTYPES).flatmap(lambda dtype: hnp.arrays(dtype, st.integers(0, 9)))
scalars = st.sampled_from(DTYPES).flatmap(lambda dtype: hnp.arrays(dtype, 1)).map(lambda array: array[0])
values = st.one_of(
    st.integers(0, 2**32 - 1),
    st.floats(width=32),
    st.booleans(),
    text,
    scalars,
    numbers,
    st.lists(st.binary(max_size=9)),
)
metadata = st.dictionaries(text.map(lambda key: "k" + key), values, max_size=8)


class Drawn(NamedTuple):
    spec: TensorSpec
    rows: np.ndarray


@st.composite
def tensors(draw: st.DrawFn) -> list[Drawn]:
    names = draw(st.lists(st.text(st.characters(codec="ascii"), min_size=1, max_size=64), max_size=4, unique=True))
    drawn = []
    for name in names:
        fmt = draw(st.sampled_from(list(FORMATS.values())))
        shape = (*draw(st.lists(st.integers(1, 3), max_size=3)), fmt.block_size * draw(st.integers(1, 3)))
        rng = np.random.default_rng(draw(st.integers(0, 99)))
        rows = rng.integers(0, 256, (*shape[:-1], row_bytes(fmt, shape[-1])), dtype=np.uint8)
        drawn.append(Drawn(TensorSpec(name, shape, fmt), rows))
    return drawn


def write(path: Path, pairs: dict[str, Any], content: list[Drawn], n_chunks: int = 1) -> None:
    with GGUFWriter(path, pairs, [spec for spec, _ in content]) as writer:
        for spec, rows in content:
            for chunk in np.array_split(rows.reshape(-1), min(n_chunks, rows.size)):
                writer.write(spec.name, chunk)
    assert path.stat().st_size == writer.n_bytes


def assert_same_value(ours: Any, given: Any) -> None:
    if isinstance(given, np.ndarray):
        assert (ours.dtype, ours.tobytes()) == (given.dtype, given.tobytes())
    elif isinstance(given, np.generic):
        assert np.asarray(ours, given.dtype).tobytes() == given.tobytes()
    elif isinstance(given, float):
        assert np.float32(ours).tobytes() == np.float32(given).tobytes()
    else:
        assert (type(ours), ours) == (type(given), given)


@settings(max_examples=150, deadline=None)
@given(metadata, tensors(), st.sampled_from([8, 32, 4096]), st.integers(1, 3))
def test_what_is_written_is_read(
    tmp_path_factory: pytest.TempPathFactory,
    pairs: dict[str, Any],
    content: list[Drawn],
    alignment: int,
    n_chunks: int,
) -> None:
    folder = tmp_path_factory.mktemp("round")
    pairs = {"general.alignment": alignment} | pairs
    write(folder / "first.gguf", pairs, content, n_chunks)
    with open_gguf(folder / "first.gguf") as gguf:
        assert list(gguf.metadata) == list(pairs)
        for key, value in pairs.items():
            assert_same_value(gguf.metadata[key], value)
        assert list(gguf.tensors) == [spec.name for spec, _ in content]
        for spec, rows in content:
            info = gguf.tensors[spec.name]
            assert (info.shape, info.format, info.n_bytes) == (spec.shape, spec.format, rows.nbytes)
            assert info.offset % alignment == 0
            np.testing.assert_array_equal(gguf.data(spec.name), rows)
        copies = [Drawn(TensorSpec(i.name, i.shape, i.format), gguf.data(i.name)) for i in gguf.tensors.values()]
        write(folder / "second.gguf", gguf.metadata, copies)
    assert (folder / "second.gguf").read_bytes() == (folder / "first.gguf").read_bytes()
    assert len(list(folder.iterdir())) == 2
    shutil.rmtree(folder)


@settings(max_examples=50, deadline=None)
@given(tensors(), st.sampled_from([32, 64]))
def test_the_gguf_package_reads_it(
    tmp_path_factory: pytest.TempPathFactory, content: list[Drawn], alignment: int
) -> None:
    path = tmp_path_factory.mktemp("oracle") / "model.gguf"
    pairs: dict[str, Any] = {"general.architecture": "llama", "general.alignment": alignment} | {
        f"v{i}": dtype.type(1) for i, dtype in enumerate(DTYPES)
    }
    pairs |= {f"a{i}": np.arange(3).astype(dtype) for i, dtype in enumerate(DTYPES)}
    pairs |= {"plain": 7, "real": 0.5, "yes": True, "words": ["a", "\u00e9"], "ints": [1, -2], "reals": [0.5, 2.0]}
    write(path, pairs, content)
    reader = oracle.GGUFReader(path)
    kinds = oracle.GGUFValueType
    for key, value in pairs.items():
        theirs = reader.fields[key].contents()
        assert theirs == (value.tolist() if isinstance(value, np.ndarray) else value)
    assert reader.fields["plain"].types == [kinds.UINT32]
    assert reader.fields["real"].types == [kinds.FLOAT32]
    assert reader.fields["yes"].types == [kinds.BOOL]
    assert reader.fields["ints"].types == [kinds.ARRAY, kinds.INT32]
    assert reader.fields["reals"].types == [kinds.ARRAY, kinds.FLOAT32]
    assert [tensor.name for tensor in reader.tensors] == [spec.name for spec, _ in content]
    for tensor, (spec, rows) in zip(reader.tensors, content, strict=True):
        assert tensor.tensor_type.value == spec.format.id
        assert tuple(reversed(tensor.shape.tolist())) == spec.shape
        assert tensor.data.tobytes() == rows.tobytes()
    shutil.rmtree(path.parent)


def one(shape: tuple[int, ...] = (4, 8), fmt: Format = F32) -> Drawn:
    return Drawn(TensorSpec("t", shape, fmt), np.zeros((shape[0], row_bytes(fmt, shape[-1])), np.uint8))


def test_tensors_follow_each_other_without_gaps(tmp_path: Path) -> None:
    # llama.cpp refuses any other offsets.
    specs = [TensorSpec("a", (5,), F32), TensorSpec("b", (256,), Q4_K), TensorSpec("c", (8,), F32)]
    with GGUFWriter(tmp_path / "x.gguf", {}, specs) as writer:
        for spec in specs:
            writer.write(spec.name, np.ones(spec.n_bytes, np.uint8))
    a, b, c = open_gguf(tmp_path / "x.gguf").tensors.values()
    assert (b.offset - a.offset, c.offset - b.offset) == (32, 160)


def test_an_error_leaves_the_target_as_it_was(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(b"precious")
    content = one()

    def interrupted() -> None:
        with GGUFWriter(path, {}, [content.spec]) as writer:
            writer.write("t", content.rows)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert [p.name for p in tmp_path.iterdir()] == ["model.gguf"]
    assert path.read_bytes() == b"precious"


@pytest.mark.parametrize(
    ("name", "n_bytes", "fragment"),
    [("u", 128, "not among"), ("t", 127, "not complete"), ("t", 129, "too many")],
)
def test_the_declaration_is_kept_to(tmp_path: Path, name: str, n_bytes: int, fragment: str) -> None:
    with pytest.raises(AssertionError, match=fragment), GGUFWriter(tmp_path / "x.gguf", {}, [one().spec]) as writer:
        writer.write(name, np.zeros(n_bytes, np.uint8))
    assert list(tmp_path.iterdir()) == []


def test_the_file_is_on_disk_before_it_has_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, done = tmp_path / "model.gguf", []
    fsync, replace = os.fsync, os.replace

    def seen_fsync(handle: int) -> None:
        done.append(("fsync", Path(f"/proc/self/fd/{handle}").readlink().name, path.exists()))
        fsync(handle)

    def seen_replace(source: str, target: str) -> None:
        done.append(("replace", Path(source).name, Path(source).stat().st_size))
        replace(source, target)

    monkeypatch.setattr(os, "fsync", seen_fsync)
    monkeypatch.setattr(os, "replace", seen_replace)
    write(path, {}, [one()])
    assert done == [
        ("fsync", "model.gguf.part", False),
        ("replace", "model.gguf.part", path.stat().st_size),
        ("fsync", tmp_path.name, True),
    ]


def several() -> list[Drawn]:
    rng = np.random.default_rng(1)
    specs = [TensorSpec(name, (3, 8 * i), F32) for i, name in enumerate("abcd", 1)]
    return [Drawn(spec, rng.integers(0, 256, spec.n_bytes, dtype=np.uint8)) for spec in specs]


def interrupted(path: Path, pairs: dict[str, Any], job: str, n_tensors: int) -> None:
    writer = GGUFWriter(path, pairs, [spec for spec, _ in several()], job)
    writer.__enter__()
    for spec, rows in several()[:n_tensors]:
        writer.write(spec.name, rows)
        writer.record({"error": rows[0] / 3})
    writer.__exit__(KeyboardInterrupt, KeyboardInterrupt(), None)


def test_a_job_is_continued_tensor_by_tensor(tmp_path: Path) -> None:
    content, pairs = several(), {"general.name": "a model"}
    write(tmp_path / "whole.gguf", pairs, content)
    for n_tensors in range(1, 5):
        interrupted(tmp_path / "x.gguf", pairs, "job", n_tensors)
        with GGUFWriter(tmp_path / "x.gguf", pairs, [spec for spec, _ in content], "job") as writer:
            notes = []
            for spec, _ in content[:n_tensors]:
                writer.turn_to(spec.name)
                notes.append(writer.take_over(spec.n_bytes))
            assert notes == [{"error": rows[0] / 3} for _, rows in content[:n_tensors]]
            for spec, rows in content[n_tensors:]:
                writer.turn_to(spec.name)
                assert writer.take_over(spec.n_bytes) is None
                writer.write(spec.name, rows)
                writer.record({})
        assert (tmp_path / "x.gguf").read_bytes() == (tmp_path / "whole.gguf").read_bytes()
        assert len(list(tmp_path.iterdir())) == 2


@pytest.mark.parametrize(("name", "job"), [("a model", "another job"), ("another model", "job")])
def test_another_job_or_header_begins_anew(tmp_path: Path, name: str, job: str) -> None:
    interrupted(tmp_path / "x.gguf", {"general.name": "a model"}, "job", 2)
    with GGUFWriter(tmp_path / "x.gguf", {"general.name": name}, [spec for spec, _ in several()], job) as writer:
        for spec, rows in several():
            writer.turn_to(spec.name)
            assert writer.take_over(spec.n_bytes) is None
            writer.write(spec.name, rows)
    assert open_gguf(tmp_path / "x.gguf").metadata == {"general.name": name}


def test_a_number_can_be_filled_in_at_the_end(tmp_path: Path) -> None:
    pairs = {"before": ["a", "error"], "error": 0.0, "text": "x" * 8, "after": 7}
    content = several()
    with GGUFWriter(tmp_path / "x.gguf", pairs, [spec for spec, _ in content]) as writer:
        with pytest.raises(AssertionError, match="not complete"):
            writer.amend("error", 0.25)
        for spec, rows in content:
            writer.write(spec.name, rows)
        writer.amend("error", 0.25)
        writer.amend("text", "8 or more"[:8])
        with pytest.raises(AssertionError):
            writer.amend("text", "longer than it was")
    write(tmp_path / "y.gguf", pairs | {"error": 0.25, "text": "8 or mor"}, content)
    assert (tmp_path / "x.gguf").read_bytes() == (tmp_path / "y.gguf").read_bytes()


def test_targets_that_cannot_be_written(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "missing" / "x.gguf", tmp_path / ("n" * 250)):
        with pytest.raises(UsageError, match="cannot write") as caught:
            write(path, {}, [one()])
        assert len(str(caught.value)) <= 240
    assert list(tmp_path.iterdir()) == []


def test_a_file_larger_than_the_disk_is_refused_at_once(tmp_path: Path) -> None:
    huge = TensorSpec("t", (2**29, 2**29), F32)
    with pytest.raises(ResourceError, match="MB of disk"), GGUFWriter(tmp_path / "x.gguf", {}, [huge]):
        pass
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("missing", [1, 4000, 8000, 8400])
def test_a_disk_that_fills_up(tmp_path: Path, missing: int) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    content, pairs = one((64, 32)), {"general.name": "x" * 200}
    n_bytes = GGUFWriter(tmp_path / "x.gguf", pairs, [content.spec]).n_bytes
    resource.setrlimit(resource.RLIMIT_FSIZE, (n_bytes - missing, hard))
    try:
        with pytest.raises(ResourceError, match="make room"):
            write(tmp_path / "x.gguf", pairs, [content], n_chunks=5)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert list(tmp_path.iterdir()) == []


def thirds(content: list[Drawn]) -> list[tuple[TensorSpec, int, np.ndarray]]:
    """Rows of all tensors, some of the second before any of the first."""
    pieces = [
        (spec, at, rows[at : at + spec.n_bytes // 3])
        for spec, rows in content
        for at in range(0, spec.n_bytes, spec.n_bytes // 3)
    ]
    return [pieces[i] for i in np.random.default_rng(2).permutation(len(pieces))]


@pytest.mark.parametrize("stop", [1, 5, 11])
def test_pieces_may_come_in_any_order_and_be_written_again(tmp_path: Path, stop: int) -> None:
    content, pairs = several(), {"general.name": "a model"}
    specs = [spec for spec, _ in content]
    write(tmp_path / "whole.gguf", pairs, content)
    writer = GGUFWriter(tmp_path / "x.gguf", pairs, specs, "job")
    writer.__enter__()
    for number, (spec, at, rows) in enumerate(thirds(content)[: stop + 1]):
        writer.turn_to(spec.name, at)
        writer.write(spec.name, rows if number % 2 else rows[::-1])
        writer.record({"piece": number})
    writer.keep(stop)
    writer.__exit__(KeyboardInterrupt, KeyboardInterrupt(), None)
    with GGUFWriter(tmp_path / "x.gguf", pairs, specs, "job") as writer:
        for number, (spec, at, rows) in enumerate(thirds(content)):
            writer.turn_to(spec.name, at)
            note = writer.take_over(rows.size)
            assert note == ({"piece": number} if number < stop else None)
            if number == stop:  # as if it turned out wrong that the even ones were written backwards
                writer.keep(0)
                break
        for spec, at, rows in thirds(content):
            writer.turn_to(spec.name, at)
            writer.write(spec.name, rows)
            writer.record({})
    assert (tmp_path / "x.gguf").read_bytes() == (tmp_path / "whole.gguf").read_bytes()
    assert len(list(tmp_path.iterdir())) == 2
