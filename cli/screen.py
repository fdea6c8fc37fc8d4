"""What reaches the terminal: answers on stdout, the rest on stderr, nobody else's control characters."""

import os
import re
import sys
from collections.abc import Callable, Sequence
from typing import TextIO

# Characters that act on a terminal or lie about what is written: C0 and C1 controls but newline and tab, bidirectional
# overrides and isolates, invisible format characters and tags, lone surrogates.
HOSTILE = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u202a-\u202e\u2060-\u206f\ufeff\ufff9-\ufffb\ud800-\udfff\U000e0000-\U000e007f]"
)
LINE_BREAKS = re.compile("[\t\n\u2028\u2029]+")


def clean(text: str) -> str:
    """The text without anything that acts on a terminal. It looks at one character at a time and keeps no state, so
    an escape sequence that arrives in pieces is disarmed as surely as a whole one: what is left of it is plain text.
    """
    return HOSTILE.sub("", text)


def one_line(text: str, limit: int = 200) -> str:
    """Untrusted text for use within a line: clean, no breaks, and cut to `limit` characters."""
    text = LINE_BREAKS.sub(" ", clean(text))
    return text if len(text) <= limit else text[: limit - 3] + "..."


def is_terminal(stream: TextIO) -> bool:
    return stream.isatty() and os.environ.get("TERM") != "dumb"


def dim(text: str) -> str:
    """Grey on a terminal, unless NO_COLOR asks for none (no-color.org)."""
    return f"\x1b[2m{text}\x1b[0m" if is_terminal(sys.stderr) and not os.environ.get("NO_COLOR") else text


class Status:
    """A line on stderr that tells of work in progress until something else is written; away from a terminal, one note
    for each kind of work. Where a progress bar has the line, `bar` takes what there is to tell.
    """

    def __init__(self) -> None:
        self.label = ""
        self.visible = False
        self.bar: Callable[[str], None] | None = None

    def show(self, label: str, text: str = "") -> None:
        line = f"{label}: {one_line(text, 50)}" if text else label
        if self.bar:
            self.bar(line)
        elif is_terminal(sys.stderr):
            sys.stderr.write("\r\x1b[K" + dim(line))
            sys.stderr.flush()
            self.visible = True
        elif label != self.label:
            note(label)
        self.label = label

    def clear(self) -> None:
        if self.visible:
            sys.stderr.write("\r\x1b[K")
            sys.stderr.flush()
            self.visible = False


status = Status()
NOT_KEPT = "compiling, and at every start again: the cache folder cannot be used; LLMQ_CACHE_DIR names another"


def show_compiling(kernel: str) -> None:
    """Told by the runtime before each kernel that it has to compile."""
    from llmq.jit import cache_folder

    status.show("compiling for this processor, once" if cache_folder() else NOT_KEPT, kernel)


def show_loading(event: str) -> None:
    """Told by the runtime what loading a model has to wait for, once: a measurement, or a kernel."""
    from llmq.cores import MEASURING

    if event == MEASURING:
        status.show(MEASURING)
    else:
        show_compiling(event)


def answer(text: str) -> None:
    """Model text, cleaned, to stdout at once."""
    status.clear()
    sys.stdout.write(clean(text))
    sys.stdout.flush()


def note(text: str) -> None:
    """A line of ours to stderr. Parts that came from outside have been through one_line() or ascii()."""
    status.clear()
    sys.stderr.write(dim(text) + "\n")
    sys.stderr.flush()


def size(n_bytes: int) -> str:
    """1.5 GB, 13.5 MB, 512 B: units of 1000, as file managers and download pages count."""
    for unit, scale in (("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if n_bytes >= scale:
            return f"{n_bytes / scale:.1f} {unit}"
    return f"{n_bytes} B"


def table(rows: Sequence[tuple[str, ...]]) -> str:
    """Left-aligned columns, two spaces apart."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in rows)
    return "\n".join(line.rstrip() for line in lines)
