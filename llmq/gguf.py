"""GGUF files: open one as a validated memory map, or write one. `gguf_header` has the layout."""

import mmap
import os
import stat
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from llmq.errors import FileFormatError, UsageError
from llmq.formats import row_bytes
from llmq.gguf_header import MAGIC, Header, TensorInfo, quoted, read_header
from llmq.gguf_writer import GGUFWriter, TensorSpec

__all__ = ["GGUF", "GGUFWriter", "TensorInfo", "TensorSpec", "drop_pages", "open_gguf", "quoted"]

# How files that are often taken for a GGUF file begin, what they are, and what to do.
STRANGERS = {
    b"version https://git-lfs": "is a git-lfs pointer, not the model itself; run `git lfs pull` or download it again",
    b"PK\x03\x04": "is a PyTorch or zip archive; pickled weights can run code, so use safetensors or GGUF",
    b"\x80\x02": "is a Python pickle, which can run code when read; use safetensors or GGUF",
    b"\0\0\0\0": "begins with zeros: an unfinished download or copy; fetch it again",
    b"tjgg": "is a GGML file from before GGUF; get the model as GGUF",
}


class GGUF:
    """An open file. Metadata numbers, booleans and strings are plain values (numbers other than u32 and f32 keep their
    NumPy type), arrays of numbers are NumPy arrays of the exact dtype, arrays of strings are list[bytes].
    """

    __slots__ = ("_data", "_mapped", "metadata", "path", "tensors")

    def __init__(
        self, path: Path, metadata: dict[str, Any], tensors: dict[str, TensorInfo], data: np.ndarray | mmap.mmap | None
    ) -> None:
        self.path = path
        self.metadata = metadata
        self.tensors = tensors
        self._mapped = data if isinstance(data, mmap.mmap) else None
        self._data = np.frombuffer(data, np.uint8) if isinstance(data, mmap.mmap) else data

    def data(self, name: str) -> np.ndarray:
        """The packed rows of one tensor: a read-only uint8 view [*shape[:-1], row_bytes] into the mapped file."""
        assert self._data is not None, f"{self.path} is closed"
        info = self.tensors[name]
        raw = self._data[info.offset : info.offset + info.n_bytes]
        return raw.reshape(*info.shape[:-1], row_bytes(info.format, info.shape[-1]))

    def release(self) -> None:
        """Lets the pages read so far go, so that a large file does not pile up in this process's memory."""
        if self._mapped:
            drop_pages(self._mapped)

    def close(self) -> None:
        """Lets go of the file; it stays mapped for as long as a view from data() lives, so no view can dangle."""
        self._data = self._mapped = None

    def __enter__(self) -> "GGUF":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()


def open_gguf(path: str | os.PathLike[str]) -> GGUF:
    """Maps a GGUF file and reads its header.

    Raises UsageError where there is no such file, FileFormatError where it is damaged or something else, and
    UnsupportedError where it is sound but of a version, byte order, tensor type or layout that llmq does not read.
    """
    path = Path(path)
    data = _map(path)
    if data[:4] != MAGIC:
        raise FileFormatError(f"{quoted(path.name)} {_stranger(data[:64])}")
    metadata, tensors = read_header(Header(data, quoted(path.name)))
    return GGUF(path, metadata, tensors, data)


def drop_pages(mapped: mmap.mmap) -> None:
    """Takes a file's pages out of this process's memory; they are read again, mostly from the cache, when needed."""
    if hasattr(mmap, "MADV_DONTNEED"):
        mapped.madvise(mmap.MADV_DONTNEED)


def _map(path: Path) -> mmap.mmap:
    # O_NONBLOCK: opening a named pipe must not wait for a writer.
    def opener(name: str, flags: int) -> int:
        return os.open(name, flags | getattr(os, "O_NONBLOCK", 0))

    try:
        with open(path, "rb", opener=opener) as file:
            status = os.fstat(file.fileno())
            if not stat.S_ISREG(status.st_mode):
                raise UsageError(f"{quoted(path.name)} is not a regular file; give the path of a .gguf file")
            if status.st_size == 0:
                raise FileFormatError(f"{quoted(path.name)} is empty; download or make it again")
            return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except OSError as error:
        raise UsageError(f"cannot open {quoted(str(path), 120)}: {error.strerror}; check the path") from error


def _stranger(start: bytes) -> str:
    for prefix, what in STRANGERS.items():
        if start.startswith(prefix):
            return what
    if start.lstrip().lower().startswith((b"<!doctype", b"<html", b"<?xml")):
        return "is a web page, not a model: the download met a login or error page; fetch it again"
    if start[8:9] == b"{":
        return "is a safetensors file; give its folder to `llmq quantize` to make a GGUF file"
    return "is not a GGUF file (it does not begin with GGUF); check what was downloaded"
