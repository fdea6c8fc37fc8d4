"""Importance matrices as files that llama.cpp reads and writes: GGUF of the type "imatrix".

For each matrix NAME two F32 tensors: NAME.in_sum2 [n_experts, n_cols], the sums of squares of what its columns read,
and NAME.counts [n_experts, 1], the tokens. Of a dense matrix llama.cpp writes [n_cols] and [1], which is the same data.
Layout: llama.cpp, `tools/imatrix/imatrix.cpp`.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from llmq.errors import FileFormatError
from llmq.files import explained
from llmq.formats import F32
from llmq.gguf import GGUF, GGUFWriter, TensorSpec, open_gguf, quoted
from llmq.gguf_header import MAGIC
from quant.calibration import Calibration, Inputs

SUMS, COUNTS = ".in_sum2", ".counts"
DATASETS, CHUNK_COUNT, CHUNK_SIZE = "imatrix.datasets", "imatrix.chunk_count", "imatrix.chunk_size"
ROUTER = "ffn_gate_inp.weight"
MOST_TOKENS = 1 << 53


def write_imatrix(path: Path, calibration: Calibration) -> None:
    """Writes a calibration for llama.cpp or a later run; raises what GGUFWriter raises."""
    arrays: dict[str, np.ndarray] = {}
    for name in sorted(calibration.inputs):
        inputs = calibration.inputs[name]
        arrays[name + SUMS] = inputs.sum_squares
        arrays[name + COUNTS] = inputs.counts[:, None].astype(np.float32)
    metadata: dict[str, Any] = {
        "general.type": "imatrix",
        DATASETS: [calibration.dataset],
        CHUNK_COUNT: calibration.n_chunks,
        CHUNK_SIZE: calibration.chunk_size,
    }
    with GGUFWriter(path, metadata, [TensorSpec(name, array.shape, F32) for name, array in arrays.items()]) as writer:
        for name, array in arrays.items():
            writer.write(name, array)


def read_imatrix(path: Path, shapes: Mapping[str, tuple[int, ...]]) -> Calibration:
    """Reads a file made for a model whose tensors have these shapes (rows first, experts first of all).

    The output matrix may be missing, which llama.cpp leaves out unless told otherwise; other kinds of statistics are
    not read. Raises UsageError where there is no such file, FileFormatError where it is damaged, is something else, or
    was made for another model.
    """
    _check_form(path)
    with open_gguf(path) as gguf:
        if gguf.metadata.get("general.type") != "imatrix":
            raise FileFormatError(
                f"{quoted(path.name)} is not an importance matrix; give a file that llama-imatrix or llmq made"
            )
        names = sorted({name.rpartition(".")[0] for name in gguf.tensors if name.endswith((SUMS, COUNTS))})
        for name, shape in shapes.items():
            if name.startswith("blk.") and len(shape) > 1 and not name.endswith(ROUTER) and name not in names:
                raise _misfit(gguf, f"it has nothing about {name}")
        inputs = {name: _read_inputs(gguf, name, shapes) for name in names}
        return Calibration(inputs, _dataset(gguf), _integer(gguf, CHUNK_COUNT), _integer(gguf, CHUNK_SIZE))


def _check_form(path: Path) -> None:
    """FileFormatError for llama.cpp's form from before GGUF, or anything else that is a file."""
    if not path.is_file():
        return
    with explained(path, "read"), path.open("rb") as file:
        if file.read(len(MAGIC)) == MAGIC:
            return
    raise FileFormatError(
        f"{quoted(path.name)} is not an importance matrix in llama.cpp's GGUF form, which is needed; "
        "`llama-imatrix --in-file OLD -o NEW.gguf` converts the form from before"
    )


def _read_inputs(gguf: GGUF, name: str, shapes: Mapping[str, tuple[int, ...]]) -> Inputs:
    shape = shapes.get(name, ())
    if len(shape) < 2:
        raise _misfit(gguf, f"the model has no matrix {quoted(name)}")
    n_experts, n_cols = shape[0] if len(shape) == 3 else 1, shape[-1]
    sums, counts = _numbers(gguf, name + SUMS), _numbers(gguf, name + COUNTS)
    if sums.size != n_experts * n_cols:
        raise _misfit(gguf, f"it has {sums.size} sums for {name}, which has {n_experts} x {n_cols} columns")
    # Files from before experts were counted apart have one number for all.
    if counts.size not in (1, n_experts):
        raise _misfit(gguf, f"it has {counts.size} counts for the {n_experts} experts of {name}")
    if counts.max() > MOST_TOKENS:
        raise _damaged(gguf, f"tensor {quoted(name + COUNTS)} counts more tokens than any text has")
    return Inputs(sums.reshape(n_experts, n_cols), np.broadcast_to(np.rint(counts).astype(np.int64), n_experts))


def _numbers(gguf: GGUF, name: str) -> np.ndarray:
    """float32 [n] of one tensor, all finite and none negative."""
    if name not in gguf.tensors:
        raise _damaged(gguf, f"tensor {quoted(name)} is missing")
    if gguf.tensors[name].format != F32:
        raise _damaged(gguf, f"tensor {quoted(name)} is {gguf.tensors[name].format.name}, and must be F32")
    values = gguf.data(name).reshape(-1).view(np.float32)
    if not np.isfinite(values).all() or values.min() < 0:
        raise _damaged(gguf, f"tensor {quoted(name)} holds a number that is negative or not finite")
    return values.copy()


def _dataset(gguf: GGUF) -> str:
    names = gguf.metadata.get(DATASETS)
    if not isinstance(names, list):
        raise _damaged(gguf, f"{DATASETS} is missing or not an array of strings")
    return ", ".join(name.decode(errors="replace") for name in names)


def _integer(gguf: GGUF, key: str) -> int:
    value = gguf.metadata.get(key)
    # type(), not isinstance(): True is an int too, and only a u32 is read as one.
    if type(value) is not int:
        raise _damaged(gguf, f"{key} is missing or not a u32")
    return value


def _damaged(gguf: GGUF, what: str) -> FileFormatError:
    return FileFormatError(f"{quoted(gguf.path.name)} is damaged: {what}; make it again")


def _misfit(gguf: GGUF, what: str) -> FileFormatError:
    return FileFormatError(f"{quoted(gguf.path.name)} was made for another model: {what}; make one for this model")
