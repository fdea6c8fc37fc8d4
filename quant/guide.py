"""What an encoder is told about the inputs of a tensor: which columns matter, and how their errors add up."""

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from quant.calibrate import HELD, LayerStatistics, plan, run
from quant.calibration import BORROWED_TOKENS, Calibration
from quant.feedback import BLOCK, Feedback, prepare
from quant.recipe import UNTYPED


@dataclass(frozen=True, slots=True)
class Guide:
    """For each expert of a tensor (a dense one has one): `importance` float32 [n_experts, n_cols], and, where the
    model was run, what rounding with feedback needs and moments of text held out, [n_cols / 256, 256, 256], to tell
    whether that is better.
    """

    importance: np.ndarray
    feedback: tuple[Feedback, ...] = ()
    held: np.ndarray | None = None


# By tensor name, asked in the order of the layers; None for a tensor of which nothing is known.
Guides = Callable[[str], Guide | None]


def no_guide(name: str) -> None:  # noqa: ARG001
    return None


def guides_of(calibration: Calibration) -> Guides:
    """From importance alone, such as another program's file has."""
    return lambda name: Guide(calibration.importance(name)) if name in calibration.inputs else None


class Running:
    """Guides from a run of the model, made layer by layer as they are asked for; only one layer's are in memory.

    One run serves one quantization. `calibration` has what it gathered so far, without moments; `n_bytes` is the memory
    that it takes; `remarks` are words for the receipt of what is made with it; `dataset` names the text, `threads` and
    `tell` are those of calibrate, which also tells what is raised.
    """

    def __init__(
        self,
        src: Path,
        text: str,
        dataset: str,
        *,
        threads: int | None = None,
        tell: Callable[[int, int], None] | None = None,
    ) -> None:
        planned = plan(src, text, BLOCK)
        self.n_bytes = planned.n_bytes
        # Without text held out, whether feedback is better cannot be told, and it is not used.
        self.remarks = () if len(planned.chunks) >= HELD else (f"by importance only, having under {HELD} chunks",)
        self._layers: Iterator[LayerStatistics] = run(planned, threads=threads, tell=tell)
        self._guides: dict[str, Guide] = {}
        self.calibration = Calibration({}, dataset, 0, 0)

    def __call__(self, name: str) -> Guide | None:
        if name.endswith(UNTYPED):
            return None
        while name not in self.calibration.inputs:
            if name.startswith("blk."):
                self._guides.clear()  # before the next layer takes its room
            layer = next(self._layers, None)
            if layer is None:
                return None
            self._take(layer)
        assert name in self._guides, f"{name} was asked for after a later layer"
        return self._guides[name]

    def finish(self) -> Calibration:
        """Runs what was not asked for yet, and tells what all matrices read."""
        for layer in self._layers:
            self._take(layer)
        return self.calibration

    def _take(self, layer: LayerStatistics) -> None:
        known = self.calibration
        self.calibration = Calibration(known.inputs | layer.inputs, known.dataset, layer.n_chunks, layer.chunk_size)
        shared: dict[int, Guide] = {}
        for name, moments in layer.moments.items():
            if id(moments) not in shared:
                shared[id(moments)] = self._guide(name, moments, layer.held[name])
        self._guides = {name: shared[id(moments)] for name, moments in layer.moments.items()}

    def _guide(self, name: str, moments: np.ndarray, held: np.ndarray) -> Guide:
        importance = self.calibration.importance(name)
        if moments.shape[-1] != BLOCK:
            return Guide(importance)
        blended = blend(moments, self.calibration.inputs[name].counts)
        return Guide(importance, tuple(prepare(each) for each in blended), held)


def blend(moments: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Moments [n_experts, ...] of which an expert with few tokens borrows from the mean of all, as importance does."""
    if len(moments) == 1 or not counts.any():
        return moments
    shares = counts.reshape(-1, 1, 1, 1).astype(np.float64)
    mean = (moments * shares).sum(axis=0) / shares.sum()
    return (moments * shares + BORROWED_TOKENS * mean) / (shares + BORROWED_TOKENS)


def digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()
