"""Downloads seen from outside: what one that was killed left, and the chunks that a hub was asked for."""

from collections.abc import Iterable
from pathlib import Path

from hub import Hub

from llmq import fetcher
from llmq.fetcher import Remote
from llmq.ledger import Ledger
from llmq.part import part_paths


def leave(file: Remote, target: Path, data: bytes, chunks: Iterable[int]) -> None:
    """Chunks and their journal, as a kill leaves them."""
    book, size = Ledger(target, file), fetcher.CHUNK
    assert book.try_open() == {}
    book.reserve()
    for index in chunks:
        book.put(index, memoryview(data)[index * size : (index + 1) * size])
    book.close()


def journalled(target: Path) -> set[int]:
    """The chunks that the journal tells of."""
    journal = part_paths(target)[1]
    lines = journal.read_text().splitlines()[1:] if journal.exists() else []
    return {int(line.split()[0], 16) for line in lines if len(line) == 17} - {0xFFFFFFFF}


def asked(hub: Hub) -> list[int]:
    """Chunks, each as often as it was."""
    size = fetcher.CHUNK
    return [i for seen in hub.answers() for i in range(seen.start // size, -(-seen.stop // size))]
