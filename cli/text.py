"""Texts that commands read: a file or stdin."""

import contextlib
import sys
from pathlib import Path

from llmq.errors import UsageError

TEXT_LIMIT = 16 << 20


def read_text(name: str) -> str:
    """The text of a file, or of stdin for a dash. UsageError where there is none, or one that is not UTF-8."""
    try:
        with contextlib.nullcontext(sys.stdin.buffer) if name == "-" else Path(name).open("rb") as file:
            raw = file.read(TEXT_LIMIT + 1)
    except IsADirectoryError:
        raise UsageError(f"{name[:100]!a} is a folder; --text takes the path of a text, or - for stdin") from None
    except FileNotFoundError:
        raise UsageError(f"there is no file {name[:100]!a}; --text takes the path of a text, or - for stdin") from None
    where = "stdin" if name == "-" else f"{Path(name).name[:70]!a}"
    if len(raw) > TEXT_LIMIT:
        raise UsageError(f"{where} holds more than {TEXT_LIMIT >> 20} MiB; give a shorter text")
    try:
        return raw.decode()
    except UnicodeDecodeError as error:
        raise UsageError(f"{where} is not UTF-8 text (byte {error.start}); convert it, or give another") from None
