"""Outputs of one command: by whatever name, none may destroy an input or another output."""

import os
from pathlib import Path

import pytest

from llmq.errors import UsageError
from quant.outputs import check_outputs


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """in.gguf with other names for it, names for files that are not there yet, and things that are no files."""
    monkeypatch.chdir(tmp_path)
    Path("in.gguf").write_bytes(b"precious")
    Path("old.gguf").write_bytes(b"from an earlier run")
    Path("sub").mkdir()
    Path("sub/far.gguf.part").write_bytes(b"precious too")
    for link, to in (
        ("soft.gguf", "in.gguf"),
        ("softer.gguf", "soft.gguf"),
        ("again", "sub"),
        ("far.gguf", "sub/far.gguf"),
        ("new.gguf", "sub/new.gguf"),
        ("older.gguf", "old.gguf"),
        ("loop.gguf", "loop.gguf"),
    ):
        Path(link).symlink_to(to)
    os.link("in.gguf", "hard.gguf")
    os.link("old.gguf", "as-old.gguf")
    for suffix in ("part", "part.journal", "part.journal.new"):
        os.link("in.gguf", f"{suffix}.gguf.{suffix}")
    os.mkfifo("pipe")
    return tmp_path


def check(outputs: list[str], inputs: list[str]) -> None:
    """Relative names of outputs, absolute ones of inputs; leaves everything as it is."""
    before = sorted(Path.cwd().rglob("*"))
    try:
        check_outputs([Path(name) for name in outputs], [Path.cwd() / name for name in inputs])
    finally:
        assert sorted(Path.cwd().rglob("*")) == before


def test_outputs_that_can_be() -> None:
    """New ones and those of an earlier run, also where an input is missing, which others tell."""
    check(["new.gguf", "old.gguf", "sub/page.html"], ["in.gguf", "absent.txt", "pipe"])
    check(["sub/in.gguf", "sub/old.gguf"], ["in.gguf", "old.gguf"])
    check([], ["in.gguf"])
    check(["new.gguf"], ["loop.gguf"])
    check(["loop.gguf"], ["in.gguf"])


@pytest.mark.parametrize(
    "out",
    [
        "in.gguf",
        "sub/../in.gguf",
        "again/../in.gguf",
        "soft.gguf",
        "softer.gguf",
        "hard.gguf",
        "part.gguf",
        "part.journal.gguf",
        "part.journal.new.gguf",
    ],
)
@pytest.mark.parametrize("source", ["in.gguf", "soft.gguf", "hard.gguf"])
def test_an_input_is_no_output(out: str, source: str) -> None:
    for outputs in ([out], ["new.gguf", out]):
        with pytest.raises(UsageError, match="is an input, which would be destroyed"):
            check(outputs, ["absent.txt", source])


def test_the_part_of_a_link_lies_beside_the_file_it_leads_to() -> None:
    with pytest.raises(UsageError, match=r"^'far\.gguf\.part' is an input"):
        check(["far.gguf"], ["sub/far.gguf.part"])


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("x.gguf", "x.gguf"),
        ("sub/x.gguf", "again/x.gguf"),
        ("sub/x.gguf", "sub/../sub/x.gguf"),
        ("new.gguf", "sub/new.gguf"),
        ("old.gguf", "older.gguf"),
        ("old.gguf", "as-old.gguf"),
    ],
)
def test_no_output_is_another_one(one: str, other: str) -> None:
    for outputs in ([one, other], [other, one], [one, "page.html", other]):
        with pytest.raises(UsageError, match="would be written twice"):
            check(outputs, ["in.gguf"])


@pytest.mark.parametrize(
    ("out", "why"),
    [
        ("missing/x.gguf", "its folder is not there"),
        ("in.gguf/x.gguf", "its folder is not there"),
        ("sub", "it is a folder"),
        ("again", "it is a folder"),
        ("pipe", "it is not a regular file"),
        ("x" * 256, "File name too long"),
        ("x.gguf.part", "names that end so are those of files in the making"),
        ("sub/x.part.journal", "names that end so are those of files in the making"),
        ("x.part.journal.new", "names that end so are those of files in the making"),
    ],
)
def test_where_no_file_can_be(out: str, why: str) -> None:
    with pytest.raises(UsageError, match=f"cannot write .*{why}"):
        check(["new.gguf", out], [])
