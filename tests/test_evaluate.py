"""llmq eval's figures: against arithmetic done another way, the naive forward pass, and simulated samples."""

import dataclasses
import math
from pathlib import Path
from typing import Any

import naive
import numpy as np
import pytest
from conftest import Tiny
from hypothesis import given
from hypothesis import strategies as st

from llmq import Model, load
from llmq.config import read_config
from llmq.errors import FileFormatError, UsageError
from llmq.formats import Q8_0
from llmq.gguf import open_gguf
from llmq.store import BUNDLED_PATH
from quant import evaluate as ev
from quant.statistics import Estimate, mean, share, student_t

BOS = 1


def some_ids(n: int, seed: int = 0) -> list[int]:
    return [BOS, *np.random.default_rng(seed).integers(3, 512, n - 1).tolist()]


@pytest.fixture(scope="module")
def tiny(tiny_model: Tiny) -> tuple[Path, dict[str, np.ndarray]]:
    return tiny_model(n_layers=1)


@pytest.fixture(scope="module")
def model(tiny: tuple[Path, dict[str, np.ndarray]]) -> Any:
    with load(tiny[0], n_ctx=64, threads=2) as opened:
        yield opened


@pytest.fixture(scope="module")
def coarse(tiny_model: Tiny) -> Any:
    """Another model of the same vocabulary."""
    with load(tiny_model(n_layers=1, format=Q8_0)[0], n_ctx=64, threads=2) as opened:
        yield opened


def compared(model: Model, reference: Model, pieces: list[list[int]]) -> ev.Comparison:
    records = ev.compare(ev.log_probs(model, pieces), ev.log_probs(reference, pieces), pieces)
    return ev.comparison(np.stack(list(records)))


# ---- chunks
def test_chunks_are_whole_and_begin_with_bos() -> None:
    ids = list(range(100, 210))
    assert ev.chunks(ids, 40, BOS) == [[BOS, *range(101, 140)], [BOS, *range(141, 180)]]
    assert ev.chunks(ids, 40, None) == [[*range(100, 140)], [*range(140, 180)]]
    assert ev.chunks(ids, 110, None) == [ids]
    assert ev.chunks(ids, 512, BOS) == [[BOS, *ids[1:]]]
    assert ids[0] == 100


@pytest.mark.parametrize(("n_ids", "n_ctx"), [(0, 512), (31, 512), (512, 31)])
def test_too_little_is_refused(n_ids: int, n_ctx: int) -> None:
    with pytest.raises(UsageError, match="of the 32 tokens"):
        ev.chunks([5] * n_ids, n_ctx, None)
    assert len(ev.chunks([5] * 32, 32, None)) == 1


@pytest.mark.parametrize("size", [32, 33, 64])
def test_predictions_of_the_second_half_count(model: Model, size: int) -> None:
    """Positions size // 2 .. size - 2, each of which predicts what follows it."""
    chunk = some_ids(size)
    counted = range(size // 2, size - 1)
    assert ev.targets(chunk).tolist() == [chunk[position + 1] for position in counted]
    expected = model.logits(chunk)[list(counted)].astype(np.float64)
    expected -= np.logaddexp.reduce(expected, axis=1)[:, None]
    np.testing.assert_allclose(ev.chunk_log_probs(model, chunk), expected, rtol=0, atol=1e-12)


# ---- figures
def test_all_figures_against_the_naive_model(model: Model, coarse: Model, tiny, tiny_model) -> None:
    """Loops over probabilities of the naive forward pass, which knows no batches, no half chunks and no log-softmax."""
    pieces = ev.chunks(some_ids(97), 48, BOS)
    assert len(pieces) == 2
    probabilities = []
    for path, weights in (tiny_model(n_layers=1, format=Q8_0), tiny):
        with open_gguf(path) as gguf:
            config = read_config(gguf)
        probabilities.append([[naive.softmax(row) for row in naive.forward(config, weights, ids)] for ids in pieces])
    right, wanted, kl, same = [], [], [], []
    for q, p, ids in zip(*probabilities, pieces, strict=True):
        for position in range(24, 47):
            right.append(q[position][ids[position + 1]])
            wanted.append(p[position][ids[position + 1]])
            kl.append(sum(p[position] * np.log(p[position] / q[position])))
            same.append(p[position].argmax() == q[position].argmax())
    n = len(right)
    found = compared(coarse, model, pieces)
    assert (found.n_chunks, found.n_tokens) == (2, n)
    # Activations of the coarse model are rounded to bytes, which the naive one does not do.
    assert found.reference_perplexity.value == pytest.approx(math.prod(wanted) ** (-1 / n), rel=1e-5)
    assert found.perplexity.value == pytest.approx(math.prod(right) ** (-1 / n), rel=3e-3)
    assert found.perplexity_ratio.value == pytest.approx(
        found.perplexity.value / found.reference_perplexity.value, rel=1e-12
    )
    assert found.kl.value == pytest.approx(sum(kl) / n, rel=0.02)
    assert found.kl_quantiles[1.0] == pytest.approx(max(kl), rel=0.05)
    assert found.kl_quantiles[0.5] == pytest.approx(sorted(kl)[n // 2], rel=0.1)
    assert found.top1.value == pytest.approx(sum(same) / n, abs=2 / n)
    off = np.subtract(right, wanted)
    assert found.p_difference.value == pytest.approx(off.mean(), abs=0.02 * off.std())
    assert found.p_rms.value == pytest.approx(math.sqrt((off**2).mean()), rel=0.02)


def test_divergence_of_two_coins() -> None:
    p, q = np.log([[0.5, 0.5], [0.25, 0.75]]), np.log([[0.25, 0.75], [0.25, 0.75]])
    records = ev.divergence(p, q, np.array([0, 1]))
    assert records["kl"] == pytest.approx([0.5 * math.log(4 / 3), 0])
    assert np.exp(records["logp"]) == pytest.approx([0.25, 0.75])
    assert np.exp(records["reference_logp"]) == pytest.approx([0.5, 0.75])
    assert records["same_top"].tolist() == [False, True]


def test_a_perplexity_that_is_no_float_is_infinite() -> None:
    """Also where only the end of an interval is."""
    assert ev.evaluation(np.full((2, 3), -800.0)).perplexity == Estimate(math.inf, math.inf, math.inf)
    found = ev.evaluation(np.array([[-1.0, -900.0]])).perplexity
    assert found.value == pytest.approx(math.exp(450.5))
    assert (found.low, found.high) == (0, math.inf)


def test_of_a_model_and_itself(model: Model) -> None:
    found = compared(model, model, ev.chunks(some_ids(64 * 9), 64, BOS))
    assert found.kl == found.p_difference == found.p_rms == Estimate(0, 0, 0)
    assert found.perplexity_ratio == Estimate(1, 1, 1)
    assert set(found.kl_quantiles.values()) == {0}
    assert found.top1.value == found.top1.high == 1
    assert found.perplexity == found.reference_perplexity


def test_a_reference_that_was_kept_is_as_good(model: Model, coarse: Model) -> None:
    pieces = ev.chunks(some_ids(128), 64, BOS)
    kept = [logp.astype(np.float32) for logp in ev.log_probs(model, pieces)]
    records = np.stack(list(ev.compare(ev.log_probs(coarse, pieces), kept, pieces)))
    fresh = compared(coarse, model, pieces)
    assert ev.comparison(records).kl.value == pytest.approx(fresh.kl.value, rel=1e-3)
    assert ev.comparison(records).top1 == fresh.top1


def test_only_one_chunk_is_held_at_a_time(model: Model) -> None:
    """The second chunk is not computed before the first one's result is asked for and taken."""
    pieces = ev.chunks(some_ids(192), 64, BOS)
    read = []

    def told(chunk: list[int]) -> list[int]:
        read.append(chunk)
        return chunk

    results = ev.evaluate(ev.log_probs(model, map(told, pieces)), pieces)
    for n in (1, 2, 3):
        next(results)
        assert len(read) == n


def test_weights_that_give_no_numbers_are_told(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model, "logits", lambda ids: np.full((len(ids), 4), np.nan, np.float32))
    with pytest.raises(FileFormatError, match="not numbers"):
        ev.chunk_log_probs(model, some_ids(32))


@pytest.mark.skipif(not BUNDLED_PATH.is_file(), reason=f"{BUNDLED_PATH.name} is not in the package")
def test_of_the_bundled_model_in_one_batch_or_several() -> None:
    """The window of 256 comes round several times in each chunk."""
    found = []
    for batch in (512, 200):
        with load("storyteller", n_ctx=512) as model:
            ids = ev.shared_ids([model], "Once upon a time there was a little cat who lived by the sea. " * 80)
            pieces = ev.chunks(ids, 512, model.tokenizer.bos_id)
            model._engine.batch = batch
            found.append(ev.evaluation(np.stack(list(ev.evaluate(ev.log_probs(model, pieces), pieces)))))
    assert found[0].n_tokens == 255 * found[0].n_chunks > 255
    assert found[0].perplexity.value == pytest.approx(found[1].perplexity.value, rel=1e-3)
    assert 1 < found[0].perplexity.value < 20


# ---- two vocabularies
def test_models_that_cannot_be_compared(model: Model, tiny_model: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    ids = ev.shared_ids([model, model], "the cat")
    assert ids == model.encode("the cat")
    assert ids[0] == BOS
    larger = load(tiny_model(n_layers=1, vocab_size=544)[0], n_ctx=64)
    with larger, pytest.raises(UsageError, match="512 and 544"):
        ev.shared_ids([model, larger], "the cat")
    with load(tiny_model(n_layers=1)[0], n_ctx=64) as other:
        monkeypatch.setattr(other, "_tokenizer", dataclasses.replace(other.tokenizer, add_bos=False))
        with pytest.raises(UsageError, match="different tokens"):
            ev.shared_ids([model, other], "the cat")


def test_the_text_that_ships_gives_several_chunks_to_any_vocabulary() -> None:
    assert 12_000 < len(ev.held_text().encode()) < 16_000


# ---- intervals
@pytest.mark.parametrize(("freedom", "published"), [(7, 2.3646), (10, 2.2281), (30, 2.0423), (1000, 1.9623)])
def test_student_t_is_that_of_printed_tables(freedom: int, published: float) -> None:
    assert student_t(freedom) == pytest.approx(published, rel=1e-3)


@given(st.integers(0, 60), st.integers(1, 60))
def test_wilson_ends_are_where_the_share_is_a_whole_interval_away(hits: int, n: int) -> None:
    """(p - x)^2 = z^2 x (1 - x) / n at either end x, solved as a polynomial."""
    hits = min(hits, n)
    p, z2 = hits / n, 1.959964**2
    ends = sorted(np.roots([1 + z2 / n, -2 * p - z2 / n, p * p]).real)
    found = share((np.arange(n) < hits)[None])
    assert found.value == p
    assert (found.low, found.high) == pytest.approx(ends, abs=1e-6)


def test_the_mean_of_few_chunks_is_that_of_positions() -> None:
    values = np.random.default_rng(0).lognormal(size=(7, 50))
    found = mean(values)
    assert found.value == pytest.approx(values.mean())
    assert found.high - found.value == pytest.approx(1.9669 * values.std(ddof=1) / math.sqrt(350), rel=1e-3)
    assert found.value - found.low == pytest.approx(found.high - found.value)


def test_the_interval_is_that_of_a_bootstrap_over_chunks() -> None:
    rng = np.random.default_rng(1)
    values = rng.normal(size=(60, 40)) + rng.normal(size=(60, 1))
    drawn = values[rng.integers(0, 60, (4000, 60))].mean(axis=(1, 2))
    found = mean(values)
    assert (found.low, found.high) == pytest.approx(np.quantile(drawn, [0.025, 0.975]), abs=0.05)
    hits = values > 1
    drawn = hits[rng.integers(0, 60, (4000, 60))].mean(axis=(1, 2))
    found = share(hits)
    assert (found.low, found.high) == pytest.approx(np.quantile(drawn, [0.025, 0.975]), abs=0.01)


def test_the_truth_is_in_95_of_100_intervals_although_positions_hang_together() -> None:
    """8 chunks of 30 positions; taken as 240 independent samples, half of the intervals would miss."""
    rng = np.random.default_rng(2)
    trials = rng.normal(size=(2000, 8, 30)) + rng.normal(size=(2000, 8, 1))
    inside = [found.low <= 0 <= found.high for found in map(mean, trials)]
    assert 0.935 <= np.mean(inside) <= 0.965
    truth = 0.2397501  # of a normal variable with variance 2 above 1
    inside = [found.low <= truth <= found.high for found in (share(trial > 1) for trial in trials)]
    assert 0.88 <= np.mean(inside) <= 0.97


def test_a_rising_function_keeps_the_ends() -> None:
    assert Estimate(0.0, -1.0, 2.0).map(math.exp) == Estimate(1.0, math.exp(-1), math.exp(2))
