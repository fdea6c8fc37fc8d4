"""What a file says of how it was made: metadata under `llmq.`, the same for every run of the same job.

Without times, paths and machines, which would make equal files differ.
"""

import hashlib
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from llmq import __version__
from llmq.gguf import TensorSpec
from llmq.part import Note
from quant.recipe import Override

PREFIX = "llmq."
SOURCE, SOURCE_SHA256, SOURCE_REVISION = "llmq.source", "llmq.source_sha256", "llmq.source_revision"
TYPE, SETTINGS, CALIBRATION, RMS_ERROR = "llmq.type", "llmq.settings", "llmq.calibration_sha256", "llmq.rms_error"


def receipt(source: str, revision: str, preset: str, settings: str, calibration_sha256: str) -> dict[str, Any]:
    """The keys of a file that is to be made of `source`, those that are measured on the way with a value of their size.

    `llmq.source` is the name of a file or folder, or of a repository, whose commit is `llmq.source_revision`.
    """
    keys = {
        "llmq.version": __version__,
        SOURCE: source,
        SOURCE_SHA256: "0" * 64,
        SOURCE_REVISION: revision,
        TYPE: preset,
        SETTINGS: settings,
        CALIBRATION: calibration_sha256,
        RMS_ERROR: 0.0,
    }
    return {key: _valid(value) if isinstance(value, str) else value for key, value in keys.items() if value != ""}


def is_made_of(metadata: Mapping[str, Any], source: str, revision: str, preset: str, settings: str) -> bool:
    """Whether a file's receipt says that it was made so, uncalibrated, by whatever version."""
    said = receipt(source, revision, preset, settings, "")
    stays = (SOURCE, SOURCE_REVISION, TYPE, SETTINGS, CALIBRATION)
    return all(metadata.get(key) == said.get(key) for key in stays)


def settings(fast: bool, overrides: Sequence[Override], remarks: Sequence[str]) -> str:
    """How the encoders searched, which tensors got another type, and what else there is to say."""
    others = [f"{pattern.pattern}={fmt.name.lower()}" for pattern, fmt in overrides]
    return "; ".join(["fast" if fast else "thorough", *others, *remarks])


def measured(tensors: Sequence[TensorSpec], notes: Sequence[Note]) -> dict[str, Any]:
    """What is known at the end, from the notes of all tensors.

    `llmq.source_sha256` is that of a line `NAME ROWSxCOLUMNS SHA256` for each tensor, sorted; SHA256 is that of the
    SHA256 digests of its rows, a matrix's as BF16 or F16 where the source has them so, all else as F32; of a tensor of
    experts, that of the experts' SHA256 digests. It stands for the weights: in which files and in how many they lay,
    and in what order, makes no difference.

    `llmq.rms_error`: the root mean square difference to the source's weights over their root mean square, of all
    matrices.
    """
    pairs = list(zip(tensors, notes, strict=True))
    lines = sorted(f"{spec.name} {'x'.join(map(str, spec.shape))} {note['sha256']}\n" for spec, note in pairs)
    matrices = [note for spec, note in pairs if len(spec.shape) > 1]
    off, size = (sum(note[key] for note in matrices) for key in ("squared_error", "squared_size"))
    return {
        SOURCE_SHA256: hashlib.sha256("".join(lines).encode()).hexdigest(),
        RMS_ERROR: np.float32(relative(off, size)),
    }


def relative(squared_error: float, squared_size: float) -> float:
    """Root mean square error over root mean square."""
    return math.sqrt(squared_error / squared_size) if squared_size else 0.0


def row_digests(rows: np.ndarray, source: str) -> bytes:
    """SHA256 of each row of float32 [n, n_cols], one after the other; `source` names the type they came in."""
    if source == "BF16":
        rows = rows.view(np.uint16)[:, 1::2].copy()
    elif source == "F16":
        rows = rows.astype(np.float16)
    return b"".join(hashlib.sha256(row).digest() for row in rows)


def describe(metadata: Mapping[str, Any]) -> list[tuple[str, str]]:
    """A file's receipt as labels and texts, none for a file without. The texts are as the file has them."""
    texts = {key: value for key, value in metadata.items() if key.startswith(PREFIX) and isinstance(value, str)}
    error = metadata.get(RMS_ERROR)
    share = f"{error:.3%}" if isinstance(error, float) and math.isfinite(error) else ""
    maker = " ".join(("llmq", texts["llmq.version"])) if "llmq.version" in texts else ""
    rows = [
        ("made from", texts.get(SOURCE, "")),
        ("revision", texts.get(SOURCE_REVISION, "")),
        ("weights", _sha256(texts.get(SOURCE_SHA256, ""))),
        ("made by", maker),
        ("made as", ", ".join(texts[key] for key in (TYPE, SETTINGS) if key in texts)),
        ("calibration", _sha256(texts.get(CALIBRATION, ""))),
        ("error", f"{share} of the weights' root mean square" if share else ""),
    ]
    return [(label, text) for label, text in rows if text]


def _sha256(digest: str) -> str:
    return f"sha256 {digest}" if digest else ""


def _valid(text: str) -> str:
    """File names and arguments that are not UTF-8 come with lone surrogates."""
    return text.encode(errors="replace").decode()
