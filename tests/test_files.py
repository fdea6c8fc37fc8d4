"""What the smallest parts of lasting files promise."""

import errno
import os
from pathlib import Path

import pytest

from llmq import files

fcntl = pytest.importorskip("fcntl")


@pytest.mark.parametrize("can", [True, False])
def test_a_drive_is_told_to_empty_its_cache_where_it_can_be(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, can: bool
) -> None:
    """As on macOS, where fsync alone does not; a file system that cannot gets an fsync."""
    done = []

    def full(descriptor: int, command: int) -> None:
        done.append(("full", descriptor, command))
        if not can:
            raise OSError(errno.ENOTSUP, "no")

    monkeypatch.setattr(files, "FULL_SYNC", 51)
    monkeypatch.setattr(fcntl, "fcntl", full)
    monkeypatch.setattr(os, "fsync", lambda descriptor: done.append(("fsync", descriptor)))
    with (tmp_path / "file").open("wb") as file:
        files.sync(file.fileno())
        assert done == [("full", file.fileno(), 51)] + [("fsync", file.fileno())] * (not can)
