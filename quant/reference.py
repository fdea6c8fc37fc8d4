"""A source's probabilities, for what was made of it to be compared with: layer by layer, as calibration runs it.

Every weight is read from disk once, and a checkpoint's experts are together one layer at a time.
"""

from collections.abc import Iterator, Sequence
from contextlib import closing
from pathlib import Path

import numpy as np

from llmq.config import ModelConfig
from llmq.cores import usable_cores
from llmq.engine.cpu import Engine
from llmq.errors import FileFormatError
from llmq.formats import dequantize
from llmq.gguf import GGUF
from llmq.layout import BATCH
from llmq.sampler import NOT_NUMBERS
from quant.calibrate import rms_norm
from quant.evaluate import log_softmax
from quant.limits import check_finite
from quant.memory import BASE_BYTES, TEXT_BYTES, check_room
from quant.model import SourceModel, open_model

# Rows of the output matrix that are float32 at a time; what a probability takes on the way, of two models and compared.
OUTPUT_ROWS = 1 << 10
PROBABILITY_BYTES = 64


def source_log_probs(src: Path, pieces: Sequence[Sequence[int]], *, threads: int | None = None) -> Iterator[np.ndarray]:
    """What quant.evaluate.chunk_log_probs gives, of a checkpoint folder or a GGUF file: float64 [n, vocab_size] for
    each chunk of up to 512 ids. All layers are run before the first.

    Raises what open_model raises, ResourceError (memory), and FileFormatError for weights that give no numbers.
    """
    model = open_model(src)
    check_room("comparing with the source", predicted_memory(model, pieces))
    hidden = _run(model, pieces, threads or usable_cores())
    for piece, x in zip(pieces, hidden, strict=True):
        yield output_log_probs(model.gguf, model.config, x[len(piece) // 2 :])


def predicted_memory(model: SourceModel, pieces: Sequence[Sequence[int]]) -> int:
    """Bytes at the peak: the compiler and the vocabulary, the text's hidden states, one layer as the source has it, a
    strip of the output matrix, and the probabilities of a chunk.
    """
    tensors, config = model.gguf.tensors, model.config
    layer = sum(info.n_bytes for name, info in tensors.items() if name.startswith("blk.0."))
    return (
        BASE_BYTES
        + TEXT_BYTES * config.vocab_size
        + 4 * sum(map(len, pieces)) * config.dim
        + layer
        + 8 * OUTPUT_ROWS * config.dim
        + PROBABILITY_BYTES * len(pieces[0]) // 2 * config.vocab_size
    )


def output_log_probs(gguf: GGUF, config: ModelConfig, hidden: np.ndarray) -> np.ndarray:
    """float64 [n, vocab_size] of hidden states after the last layer, float32 [n, dim]; raises as output_logits()."""
    return log_softmax(output_logits(gguf, config, hidden))


def output_logits(gguf: GGUF, config: ModelConfig, hidden: np.ndarray) -> np.ndarray:
    """float32 [n, vocab_size] of hidden states after the last layer, float32 [n, dim].

    Raises FileFormatError where they are no numbers.
    """
    logits = _logits(gguf, config, hidden)
    if not np.isfinite(logits).all():
        check_finite(gguf, "output")
        raise FileFormatError(NOT_NUMBERS)
    return logits


def output_name(config: ModelConfig) -> str:
    return "token_embd.weight" if config.tied_embeddings else "output.weight"


def _run(model: SourceModel, pieces: Sequence[Sequence[int]], n_threads: int) -> list[np.ndarray]:
    """Hidden states after the last layer, float32 [n - 1, dim] for each chunk of n ids, of all but its last."""
    inputs = [list(piece[:-1]) for piece in pieces]
    hidden = [np.empty((len(ids), model.config.dim), np.float32) for ids in inputs]
    assert max(map(len, inputs)) <= BATCH
    with closing(Engine(model.gguf, model.config, n_threads)) as engine:
        ring = engine.ring(max(map(len, inputs)))
        for i in range(model.config.n_layers):
            model.prepare(i)
            for ids, x in zip(inputs, hidden, strict=True):
                state = engine.embed(ids, range(len(ids)), [ring] * len(ids))
                if i > 0:
                    state[:] = x
                engine.run_layer(i)
                x[:] = state
            model.release()
    return hidden


# What is not finite is found by the caller.
@np.errstate(over="ignore", invalid="ignore")
def _logits(gguf: GGUF, config: ModelConfig, x: np.ndarray) -> np.ndarray:
    """float32 [n, vocab_size] of hidden states [n, dim]."""
    name = output_name(config)
    normed = rms_norm(x, gguf, "output_norm.weight", config.rms_eps)
    rows, fmt = gguf.data(name), gguf.tensors[name].format
    blocks = (dequantize(fmt, rows[at : at + OUTPUT_ROWS]) for at in range(0, len(rows), OUTPUT_ROWS))
    return np.concatenate([normed @ block.reshape(-1, normed.shape[1]).T for block in blocks], axis=1)
