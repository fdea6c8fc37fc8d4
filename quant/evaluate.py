"""How good a quantized model is: its perplexity on a text, and how far its probabilities are from another's.

A text is cut into chunks that are read from an empty context each, and only predictions in the second half of a chunk
count, since all of those have some context. llama.cpp's perplexity tool does so too, and figures can be compared. Log
probabilities are float64, so that the smallest divergences are not those of rounding.

Two models go side by side, one chunk at a time, and a reference may be read many times from wherever it was kept:

    pieces = chunks(ids, 512, bos_id)
    records = compare(log_probs(model, pieces), log_probs(reference, pieces), pieces)
    found = comparison(np.stack(list(records)))
"""

import importlib.resources
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from llmq.errors import FileFormatError, UsageError
from llmq.model import Model
from llmq.sampler import NOT_NUMBERS
from quant.statistics import Estimate, mean, share

LEAST_TOKENS = 32
# The exp() of more is no float.
LARGEST_EXPONENT = 709.0
QUANTILES = (0.5, 0.9, 0.95, 0.99, 0.999, 1.0)

# One prediction: log probability of the right token by the model and by the reference, KL(reference || model) in nats,
# and whether both hold the same token to be the likeliest.
DIVERGENCE = np.dtype([("logp", "f8"), ("reference_logp", "f8"), ("kl", "f8"), ("same_top", "?")])


@dataclass(frozen=True, slots=True)
class Evaluation:
    """How well a model predicts a text: `n_tokens` predictions in `n_chunks` chunks."""

    n_chunks: int
    n_tokens: int
    perplexity: Estimate


@dataclass(frozen=True, slots=True)
class Comparison(Evaluation):
    """That, and how far the model is from a reference, such as the same weights before they were quantized.

    `perplexity_ratio`: the model's over the reference's, with the interval of paired differences. `kl`: mean
    KL(reference || model) in nats; `kl_quantiles`: by share, 1.0 for the largest. `top1`: share of positions where both
    hold the same token to be the likeliest. `p_difference` and `p_rms`: mean and root mean square of the difference
    between the probabilities (0 to 1) of the right token, the model's less the reference's.
    """

    reference_perplexity: Estimate
    perplexity_ratio: Estimate
    kl: Estimate
    kl_quantiles: dict[float, float]
    top1: Estimate
    p_difference: Estimate
    p_rms: Estimate


def held_text() -> str:
    """The text that ships with the package for this and is used for nothing else."""
    return importlib.resources.files("quant").joinpath("data", "held.txt").read_text("utf-8")


def shared_ids(models: Sequence[Model], text: str) -> list[int]:
    """Token ids of the text, BOS first where the models add one.

    Raises UsageError for models that differ in the size of the vocabulary or in the ids of the text.
    """
    sizes = {model.config.vocab_size for model in models}
    if len(sizes) > 1:
        raise UsageError(
            f"the models have vocabularies of {' and '.join(map(str, sorted(sizes)))} tokens, so their probabilities "
            "cannot be compared; give two files of one model"
        )
    ids, *others = (model.encode(text) for model in models)
    if any(other != ids for other in others):
        raise UsageError(
            "the models cut the text into different tokens, so their probabilities cannot be compared; "
            "give two files of one model"
        )
    return ids


def chunks(ids: Sequence[int], n_ctx: int, bos_id: int | None) -> list[list[int]]:
    """The whole chunks of `n_ctx` ids, or one of all ids where there are fewer; each begins with BOS if there is one.

    BOS takes the place of a chunk's first token. Raises UsageError for chunks of fewer than 32 ids.
    """
    size = min(n_ctx, len(ids))
    if size < LEAST_TOKENS:
        raise UsageError(
            f"a chunk would have {size} of the {LEAST_TOKENS} tokens that figures need to mean something; "
            "give a longer text, or a larger --ctx"
        )
    starts = range(0, len(ids) - size + 1, size)
    pieces = [list(ids[start : start + size]) for start in starts]
    if bos_id is not None:
        for piece in pieces:
            piece[0] = bos_id
    return pieces


def targets(chunk: Sequence[int]) -> np.ndarray:
    """The tokens that a chunk's counted positions predict, int64 [n]: what follows its second half's, but the last."""
    return np.asarray(chunk[len(chunk) // 2 + 1 :], np.int64)


def chunk_log_probs(model: Model, chunk: Sequence[int]) -> np.ndarray:
    """Log probabilities of the next token, float64 [n, vocab_size], at the positions that targets() is right for.

    Raises UsageError for a chunk longer than the model's context, FileFormatError for weights that give no numbers.
    """
    logits = model.logits(chunk[:-1])[len(chunk) // 2 :]
    if not np.isfinite(logits).all():
        raise FileFormatError(NOT_NUMBERS)
    return log_softmax(logits)


def log_probs(model: Model, pieces: Iterable[Sequence[int]]) -> Iterator[np.ndarray]:
    """chunk_log_probs() of each chunk, when it is asked for."""
    return (chunk_log_probs(model, chunk) for chunk in pieces)


def log_softmax(logits: np.ndarray) -> np.ndarray:
    """In float64, over the last axis."""
    shifted = logits.astype(np.float64)
    shifted -= shifted.max(axis=-1, keepdims=True)
    shifted -= np.log(np.exp(shifted).sum(axis=-1, keepdims=True))
    return shifted


def right_log_probs(logp: np.ndarray, right: np.ndarray) -> np.ndarray:
    """[n] of log probabilities [n, vocab_size]: those of the right tokens, int [n]."""
    return logp[np.arange(len(right)), right]


def divergence(reference: np.ndarray, logp: np.ndarray, right: np.ndarray) -> np.ndarray:
    """DIVERGENCE [n] of two models' log probabilities [n, vocab_size]; `right` holds the tokens that came, int [n]."""
    reference = reference.astype(np.float64, copy=False)
    records = np.empty(len(right), DIVERGENCE)
    records["logp"] = right_log_probs(logp, right)
    records["reference_logp"] = right_log_probs(reference, right)
    records["kl"] = (np.exp(reference) * (reference - logp)).sum(axis=-1)
    records["same_top"] = reference.argmax(axis=-1) == logp.argmax(axis=-1)
    return records


def compare(
    found: Iterable[np.ndarray], reference: Iterable[np.ndarray], pieces: Sequence[Sequence[int]]
) -> Iterator[np.ndarray]:
    """DIVERGENCE [n] chunk by chunk, of a model's and a reference's log probabilities for the same chunks."""
    for logp, expected, chunk in zip(found, reference, pieces, strict=True):
        yield divergence(expected, logp, targets(chunk))


def evaluate(found: Iterable[np.ndarray], pieces: Sequence[Sequence[int]]) -> Iterator[np.ndarray]:
    """Log probabilities of the right tokens, float64 [n], chunk by chunk, of a model's log probabilities."""
    for logp, chunk in zip(found, pieces, strict=True):
        yield right_log_probs(logp, targets(chunk))


def perplexity(logp: np.ndarray) -> Estimate:
    """exp of the mean surprise, of log probabilities of the right tokens [n_chunks, n]."""
    return mean(-logp).map(_exp)


def _exp(nats: float) -> float:
    """Infinite where no float is so large: a bad model may give a token next to no probability."""
    return math.exp(nats) if nats < LARGEST_EXPONENT else math.inf


def evaluation(logp: np.ndarray) -> Evaluation:
    """Of the log probabilities of the right tokens, [n_chunks, n]: what evaluate() gave, stacked."""
    return Evaluation(len(logp), logp.size, perplexity(logp))


def comparison(records: np.ndarray) -> Comparison:
    """Of DIVERGENCE [n_chunks, n]: what compare() gave, stacked."""
    logp, reference_logp, kl = records["logp"], records["reference_logp"], records["kl"]
    difference = np.exp(logp) - np.exp(reference_logp)
    quantiles = np.quantile(kl, QUANTILES).tolist()
    return Comparison(
        n_chunks=len(records),
        n_tokens=records.size,
        perplexity=perplexity(logp),
        reference_perplexity=perplexity(reference_logp),
        perplexity_ratio=perplexity(logp - reference_logp),
        kl=mean(kl).map(lambda value: max(value, 0.0)),
        kl_quantiles=dict(zip(QUANTILES, quantiles, strict=True)),
        top1=share(records["same_top"]),
        p_difference=mean(difference),
        p_rms=mean(difference**2).map(lambda square: math.sqrt(max(square, 0.0))),
    )
