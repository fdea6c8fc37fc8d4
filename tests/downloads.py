"""What can be seen of a download from outside: chunks that its journal tells of, and chunks that a hub was asked for."""

from pathlib import Path

from hub import Hub

from llmq.fetcher import CHUNK
from llmq.part import part_paths


def journalled(target: Path) -> set[int]:
    journal = part_paths(target)[1]
    lines = journal.read_text().splitlines()[1:] if journal.exists() else []
    return {int(line.split()[0], 16) for line in lines if len(line) == 17} - {0xFFFFFFFF}


def asked(hub: Hub) -> list[int]:
    """Each as often as it was."""
    return [i for seen in hub.answers() for i in range(seen.start // CHUNK, -(-seen.stop // CHUNK))]
