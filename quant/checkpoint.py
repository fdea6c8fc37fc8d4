"""A Hugging Face checkpoint folder: its configuration and its tensors, nothing of it executed or unpickled."""

import mmap
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llmq.errors import FileFormatError, UnsupportedError, UsageError
from llmq.gguf import drop_pages, quoted
from quant.files import damaged, locate, parse_json, read_file
from quant.safetensors import Stored, open_safetensors

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
CONFIG, TOKENIZER_CONFIG, ADDED_TOKENS = "config.json", "tokenizer_config.json", "added_tokens.json"
CONFIG_LIMIT, INDEX_LIMIT = 16 << 20, 64 << 20
MAX_TENSORS, MAX_SHARDS = 200_000, 2_000
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """An open folder: parsed JSON files, tensors by their Hugging Face name, and the real paths of what was opened."""

    folder: Path
    config: dict[str, Any]
    tokenizer_config: dict[str, Any]
    added_tokens: dict[str, Any]
    tensors: dict[str, Stored]
    maps: tuple[mmap.mmap, ...]
    files: tuple[Path, ...]

    def release(self) -> None:
        """Lets the pages read so far go, so that a large checkpoint does not pile up in this process's memory."""
        for mapped in self.maps:
            drop_pages(mapped)


def open_checkpoint(
    folder: Path, elsewhere: Callable[[Sequence[str]], Iterable[dict[str, Stored]]] | None = None
) -> Checkpoint:
    """Reads configurations and headers, and maps the weights, or asks `elsewhere` for the tensors of each file.

    Raises FileFormatError where something is missing or damaged, UnsupportedError for pickles and other layouts.
    """
    shards = {SINGLE: None} if elsewhere and not (folder / INDEX).exists() else _shards(folder)
    files = [] if elsewhere else [locate(folder, shard) for shard in shards]
    maps: list[mmap.mmap] = []
    tensors: dict[str, Stored] = {}
    opened = elsewhere(list(shards)) if elsewhere else _mapped(files, maps)
    for (shard, expected), found in zip(shards.items(), opened, strict=True):
        _check_shard(shard, expected, found)
        tensors |= found
    optional = [name for name in (TOKENIZER_CONFIG, ADDED_TOKENS) if (folder / name).exists()]
    paths = {name: locate(folder, name) for name in (CONFIG, *optional)}
    parsed = {name: parse_json(name, read_file(path, CONFIG_LIMIT)) for name, path in paths.items()}
    index = [] if SINGLE in shards else [locate(folder, INDEX)]
    return Checkpoint(
        folder=folder,
        config=parsed[CONFIG],
        tokenizer_config=parsed.get(TOKENIZER_CONFIG, {}),
        added_tokens=parsed.get(ADDED_TOKENS, {}),
        tensors=tensors,
        maps=tuple(maps),
        files=(*files, *index, *paths.values()),
    )


def _mapped(files: list[Path], maps: list[mmap.mmap]) -> Iterator[dict[str, Stored]]:
    for path in files:
        mapped, found = open_safetensors(path)
        maps.append(mapped)
        yield found


def _shards(folder: Path) -> dict[str, set[str] | None]:
    """The weight files, each with the names of the tensors that the index puts there (None: no index)."""
    if (folder / SINGLE).exists():
        return {SINGLE: None}
    if not (folder / INDEX).exists():
        raise no_weights(folder.name, _names(folder))
    weight_map = parse_json(INDEX, read_file(locate(folder, INDEX), INDEX_LIMIT)).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(shard, str) for shard in weight_map.values()):
        raise damaged(INDEX, "its weight_map does not lead from names to files")
    shards: dict[str, set[str] | None] = {shard: set() for shard in weight_map.values()}
    if len(weight_map) > MAX_TENSORS or len(shards) > MAX_SHARDS:
        raise damaged(INDEX, f"it names {len(weight_map)} tensors in {len(shards)} files, more than any model has")
    for name, shard in weight_map.items():
        if not shard.endswith(".safetensors"):
            raise damaged(INDEX, f"it names {quoted(shard)}, which is not a safetensors file")
        shards[shard].add(name)  # type: ignore[union-attr]
    return shards


def _check_shard(shard: str, expected: set[str] | None, found: dict[str, Stored]) -> None:
    if expected is not None and expected != found.keys():
        name = min(expected ^ found.keys())
        raise FileFormatError(f"{quoted(shard)} and {INDEX} disagree about tensor {quoted(name)}; download both again")


def _names(folder: Path) -> list[str]:
    try:
        return sorted(path.name for path in folder.iterdir())
    except OSError as error:
        raise UsageError(
            f"cannot read the folder {quoted(str(folder), 120)}: {error.strerror}; check the path"
        ) from error


def no_weights(owner: str, names: Iterable[str]) -> UsageError | UnsupportedError:
    """Why a folder or repository of these files is none that can be read."""
    if any(name.endswith(PICKLES) for name in names):
        return UnsupportedError(
            f"{quoted(owner)} has its weights only as pickles, a format that can run code when it is read; "
            "get the safetensors files of this model"
        )
    if any(name.startswith("consolidated") for name in names):
        return UnsupportedError(f"{quoted(owner)} has only consolidated weights; llmq reads {SINGLE} or {INDEX}")
    return UsageError(f"{quoted(owner)} has neither {SINGLE} nor {INDEX}; give a checkpoint's folder or repository")
