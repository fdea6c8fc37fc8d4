"""Checkpoints published at a hub, and the same files laid out as a cache of the hub has them."""

import contextlib
import itertools
import json
import random
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from checkpoints import safetensors_bytes, stored, write_checkpoint
from hub import COMMIT, TOKEN, Hub

from llmq import fetcher
from llmq.fetcher import Limits
from llmq.hub import snapshot
from quant import quantize, remote, stream
from quant.quantize import TensorReport
from quant.remote import open_remote
from quant.source import Source

REPO = "org/model"
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
CHUNK, WINDOW, HEADER_PIECE = 1 << 14, 1 << 17, 1000
QUICK = Limits(idle_seconds=0.4, slow_seconds=0.4, tries=3, first_wait=0.01, longest_wait=0.02)
# Where nothing goes wrong but that the machine is busy.
PATIENT = Limits(idle_seconds=20.0, slow_seconds=20.0, first_wait=0.01, longest_wait=0.1)
DTYPES = {"F32": "<f4", "F16": "<f2", "BF16": "<u2"}


def make_small(patch: pytest.MonkeyPatch) -> None:
    """Checkpoints for tests are many chunks then, and their headers more than one piece."""
    for each in (fetcher, stream):
        patch.setattr(each, "CHUNK", CHUNK)
    patch.setattr(stream, "TICK_SECONDS", 0.01)
    patch.setattr(remote, "FIRST_PIECE", HEADER_PIECE)
    patch.setattr(quantize, "CHUNK", 256 * 50)


def snapshot_folder(folder: Path, commit: str = COMMIT) -> Path:
    made = folder / f"models--{REPO.replace('/', '--')}" / "snapshots" / commit
    made.mkdir(parents=True)
    return made


def written(folder: Path, dtype: str = "BF16", shards: int = 1, seed: int = 4, **changes: object) -> Path:
    """A checkpoint in the layout of a cache; of several shards, they share its tensors out at random."""
    made = snapshot_folder(folder)
    write_checkpoint(made, dtype, **changes)
    if shards > 1:
        spread(made, shards, seed)
    return made


def publish(hub: Hub, folder: Path, patch: pytest.MonkeyPatch, mapped: Mapping[str, Any] | None = None) -> None:
    """All files of a folder, some as what they are `mapped` to; the environment leads to this hub."""
    files = mapped or {}
    hub.repos[REPO] = {path.name: files.get(path.name) or path.read_bytes() for path in folder.iterdir()}
    hub.small = {name for name in hub.repos[REPO] if name.endswith(".json")}
    patch.setenv("HF_ENDPOINT", hub.url)
    patch.setenv("HF_TOKEN", TOKEN)
    for name in ("HF_HUB_OFFLINE", "LLMQ_OFFLINE"):
        patch.delenv(name, raising=False)


def tensors_of(raw: bytes) -> dict[str, tuple[str, np.ndarray]]:
    """Of a whole file, as safetensors_bytes() takes them."""
    start = 8 + int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8:start])
    header.pop("__metadata__", None)
    found = {}
    for name, entry in header.items():
        first, last = (start + at for at in entry["data_offsets"])
        found[name] = entry["dtype"], np.frombuffer(raw[first:last], DTYPES[entry["dtype"]]).reshape(entry["shape"])
    return found


def spread(folder: Path, shards: int, seed: int = 4) -> None:
    """Instead of one file several, of different size, whose order is not that of their names, nor the tensors' theirs.

    Between tensors lie some that a model may have and llmq does not use.
    """
    rng = random.Random(seed)
    tensors = tensors_of((folder / SINGLE).read_bytes())
    unused = np.zeros(32, np.float32)
    tensors |= {f"model.layers.{i}.self_attn.rotary_emb.inv_freq": stored(unused, "F32") for i in range(9)}
    if json.loads((folder / "config.json").read_text())["tie_word_embeddings"]:
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]
    names = list(tensors)
    rng.shuffle(names)
    cuts = [0, *sorted(rng.sample(range(1, len(names)), shards - 1)), len(names)]
    files = [f"{letter}.safetensors" for letter in rng.sample("abcdefghijklmnop", shards)]
    weight_map = {}
    for file, (first, last) in zip(files, itertools.pairwise(cuts), strict=True):
        (folder / file).write_bytes(safetensors_bytes({name: tensors[name] for name in names[first:last]}))
        weight_map |= dict.fromkeys(names[first:last], file)
    (folder / INDEX).write_text(json.dumps({"weight_map": weight_map}))
    (folder / SINGLE).unlink()


def opened(limits: Limits = QUICK) -> Source:
    return open_remote(snapshot(REPO, limits=limits), limits, WINDOW)


def run(source: Path | Source, out: Path, kind: str = "q8_0", threads: int = 2) -> list[TensorReport]:
    return list(quantize.quantize(source, out, kind, threads=threads, fast=True))


def stopped(out: Path, n_tensors: int) -> int:
    """A run that is closed after so many tensors; how many of them it wrote."""
    with contextlib.closing(quantize.quantize(opened(), out, "q8_0", threads=2, fast=True)) as reports:  # type: ignore[type-var]
        return sum(not next(reports).resumed for _ in range(n_tensors))


def left(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def asked_twice(hub: Hub, folder: Path) -> int:
    """Chunks of weights that were asked for again, pieces of headers aside."""
    answers = [seen for seen in hub.answers() if seen.path.endswith(".safetensors")]
    spans = [(seen.start, seen.stop) for seen in answers if seen.start % CHUNK == 0 and seen.stop > HEADER_PIECE]
    used = {seen.path.rpartition("/")[2] for seen in answers if seen.stop > HEADER_PIECE}
    asked = sum(-(-stop // CHUNK) - start // CHUNK for start, stop in spans)
    return asked - sum(-(-(folder / name).stat().st_size // CHUNK) for name in used)


def most_twice(folder: Path, tensors: int) -> int:
    """Chunks: so many of the largest tensors, what was fetched ahead of them in one file and the next, and one more for
    each connection."""
    arrays = [array for path in folder.glob("*.safetensors") for _, array in tensors_of(path.read_bytes()).values()]
    head = 2 * 64 * 256 * arrays[0].itemsize  # of what is read together; the window grows by it
    return (2 * (WINDOW + head) + tensors * max(array.nbytes for array in arrays)) // CHUNK + 2 * QUICK.connections
