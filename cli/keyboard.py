"""Reading messages: an editable line on a terminal, plain lines from anything else."""

import errno
import json
import os
import signal
import stat
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

from prompt_toolkit import PromptSession
from prompt_toolkit.completion import CompleteEvent, Completer, Completion
from prompt_toolkit.document import Document
from prompt_toolkit.history import History
from prompt_toolkit.key_binding import KeyBindings, KeyPressEvent

from cli.screen import note
from llmq.store import make_private

HISTORY_BYTES = 1 << 20
# Opening through a link, or waiting for a pipe to be opened at its other end, is refused.
NO_TRICKS = getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_CLOEXEC", 0)

# What the editor turned on: marks around a paste, and a hidden cursor while it draws.
PASTE_AND_CURSOR_AS_USUAL = b"\x1b[?2004l\x1b[?25h"


class LineHistory(History):
    """What was typed, one JSON string a line, for this user's eyes only. A history that cannot be read or written
    costs one note, never the chat; what is not a whole record is passed over.
    """

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.path = path
        self.writable = True

    def load_history_strings(self) -> Iterable[str]:
        """Newest first, from the last megabyte."""
        try:
            with os.fdopen(_open_regular(self.path, os.O_RDONLY), "rb") as file:
                file.seek(max(0, os.fstat(file.fileno()).st_size - HISTORY_BYTES))
                lines = file.read().split(b"\n")
        except OSError:
            return
        for line in reversed(lines):
            try:
                entry = json.loads(line)
            except ValueError:
                continue
            if isinstance(entry, str):
                yield entry

    def store_string(self, string: str) -> None:
        if not self.writable:
            return
        try:
            make_private(self.path.parent)
            fd = _open_regular(self.path, os.O_RDWR | os.O_APPEND | os.O_CREAT)
            with os.fdopen(fd, "a+b", buffering=0) as file:
                file.write(_after_torn_line(file.fileno()) + json.dumps(string).encode() + b"\n")
        except OSError as error:
            self.writable = False
            note(f"[what you type is not kept: {error.strerror} in {str(self.path)!a}]")


def _open_regular(path: Path, flags: int) -> int:
    fd = os.open(path, flags | NO_TRICKS, 0o600)
    if stat.S_ISREG(os.fstat(fd).st_mode):
        return fd
    os.close(fd)
    raise OSError(errno.EINVAL, "not a regular file", str(path))


def _after_torn_line(fd: int) -> bytes:
    """A newline where the last record was cut short, so that the next one stands alone."""
    end = os.fstat(fd).st_size
    return b"\n" if end and os.pread(fd, 1, end - 1) != b"\n" else b""


class CommandCompleter(Completer):
    """Tab completes a command at the start of a line, and the settings' names after /set."""

    def __init__(self, commands: list[str], settings: list[str]) -> None:
        self.commands = commands
        self.settings = settings

    def get_completions(self, document: Document, complete_event: CompleteEvent) -> Iterator[Completion]:
        del complete_event
        words = document.text_before_cursor.split(" ")
        choices = self.commands if len(words) == 1 else self.settings if words[0] == "/set" and len(words) == 2 else []
        if words[0].startswith("/"):
            for choice in choices:
                if choice.startswith(words[-1]):
                    yield Completion(choice, start_position=-len(words[-1]))


def key_bindings() -> KeyBindings:
    """Enter sends, Alt-Enter breaks the line, Ctrl-C empties the line and only then means to leave."""
    bindings = KeyBindings()

    @bindings.add("enter")
    def send(event: KeyPressEvent) -> None:
        event.current_buffer.validate_and_handle()

    @bindings.add("escape", "enter")
    def break_line(event: KeyPressEvent) -> None:
        event.current_buffer.insert_text("\n")

    @bindings.add("c-c")
    @bindings.add("<sigint>")
    def drop(event: KeyPressEvent) -> None:
        if event.current_buffer.text:
            event.current_buffer.reset()
        else:
            event.app.exit(exception=KeyboardInterrupt, style="class:aborting")

    return bindings


@contextmanager
def kept_terminal() -> Iterator[None]:
    """Puts the terminal back as it was, at the end or when a signal ends the program.

    The line editor runs an event loop, in which an exception that a signal raises would be reported and not unwind; so
    here the signal ends the program itself. Nothing is lost: what was typed or said has been written by then.
    """
    if sys.platform == "win32":
        yield
        return
    import termios

    before = termios.tcgetattr(sys.stdin)

    def leave(number: int, frame: FrameType | None) -> None:
        del frame
        termios.tcsetattr(sys.stdin, termios.TCSADRAIN, before)
        os.write(sys.stdout.fileno(), PASTE_AND_CURSOR_AS_USUAL)
        os._exit(128 + number)

    ended = (signal.SIGTERM, signal.SIGHUP)
    handlers = [signal.signal(number, leave) for number in ended]
    try:
        yield
    finally:
        for number, handler in zip(ended, handlers, strict=True):
            signal.signal(number, handler)
        termios.tcsetattr(sys.stdin, termios.TCSADRAIN, before)


def editor(history: Path, commands: list[str], settings: list[str]) -> PromptSession[str]:
    """A line editor in which a paste of several lines stays one message."""
    return PromptSession(
        history=LineHistory(history),
        completer=CommandCompleter(commands, settings),
        complete_while_typing=False,
        multiline=True,
        prompt_continuation="  ",
        key_bindings=key_bindings(),
        enable_open_in_editor=True,
        enable_suspend=True,
    )


def typed_messages(session: PromptSession[str]) -> Iterator[str]:
    """Messages until Ctrl-D, or until Ctrl-C is pressed twice in a row at an empty line."""
    presses = 0
    while presses < 2:
        try:
            text = session.prompt("> ")
        except KeyboardInterrupt:
            presses += 1
            if presses == 1:
                note("[Ctrl-C again, Ctrl-D or /exit leaves]")
        except EOFError:
            return
        else:
            presses = 0
            yield text


def piped_messages() -> Iterator[str]:
    """Each line of stdin is one message."""
    yield from sys.stdin
