"""Memory: what a job will take is known before it begins, and compared with what is free."""

import ctypes
import sys

import psutil

from llmq.errors import ResourceError
from llmq.memory import memory_free

# Of a process that has compiled every encoder, and of a token in the metadata.
BASE_BYTES = 350 << 20
TEXT_BYTES = 600


def free_memory() -> int:
    """Bytes that this process may have, those it has already among them."""
    has = psutil.Process().memory_info()
    # Pages of mapped files are free already, as they can be dropped; where the system does not tell, they are few.
    return memory_free() + has.rss - getattr(has, "shared", 0)


def give_back() -> None:
    """What was freed goes back to the system. glibc keeps blocks of up to 32 MB, as arrays of a layer are, and of a
    heap with something left at its end all of it.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim:
        trim(0)


def check_room(what: str, needed: int, otherwise: str = "") -> None:
    """Raises ResourceError where `what` needs more bytes than are free; `otherwise` is another way out."""
    free = free_memory()
    if needed > free:
        raise ResourceError(
            f"{what} needs {needed / 1e9:.2f} GB of memory and {free / 1e9:.2f} GB is free; "
            f"close other programs{otherwise}"
        )
