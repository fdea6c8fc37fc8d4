"""Errors a user can act on. `cli` catches LlmqError once, prints its sentence and exits with its code."""


class LlmqError(Exception):
    """Base of all errors that llmq raises on purpose; str() is one sentence: what, why, and the next step."""

    exit_code = 1


class UsageError(LlmqError):
    """What was asked for cannot be: a bad option value, an unknown model name, an output that is the input."""

    exit_code = 2


class BusyError(UsageError):
    """Another process is writing the same file: `holder`, 0 where it does not say who it is."""

    def __init__(self, what: str, holder: int) -> None:
        self.holder = holder
        who = f"process {holder}" if holder else "another process"
        super().__init__(f"{what}: {who} is writing it; wait for it to end")


class ResourceError(LlmqError):
    """Refused before it could hurt: too little memory or disk."""

    exit_code = 3


class FileFormatError(LlmqError):
    """A model file is damaged, truncated, or not what it says."""

    exit_code = 4


class UnsupportedError(LlmqError):
    """A valid file that llmq cannot run: an architecture, a tensor type or a tokenizer it does not know."""

    exit_code = 1


class NetworkError(LlmqError):
    """The other side cannot be reached, breaks off, or does not give what it should."""

    exit_code = 5


def quoted(text: str, limit: int = 60) -> str:
    """Text from a file or a path, safe to show: control characters escaped, and cut to `limit` characters."""
    shown = repr(text[:limit])
    return shown if len(shown) <= limit else shown[: limit - 4] + "...'"
