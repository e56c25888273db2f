"""Bootstrap intervals hold the truth as often as they say, agree with scipy's, and corpus BLEU is pycocoevalcap's."""

from dataclasses import replace

import numpy as np
import pytest
from helpers_scores import METRICS, random_counts, random_table
from hypothesis import given, settings
from hypothesis import strategies as st

from sat.evaluation.intervals import bootstrap, bootstrap_all, corpus_bleu, resamples_of
from sat.evaluation.score_table import Candidate, read_table, write_table


def test_the_corpus_bleu_of_summed_counts_is_that_of_pycocoevalcap():
    from pycocoevalcap.bleu.bleu_scorer import BleuScorer

    words = ["a", "dog", "cat", "on", "the", "mat", "runs", "sits"]
    rng = np.random.default_rng(0)
    for images in (1, 2, 30):
        scorer = BleuScorer(n=4)
        for _ in range(images):
            said = " ".join(rng.choice(words, rng.integers(0, 9)))
            scorer += (said, [" ".join(rng.choice(words, rng.integers(1, 12))) for _ in range(3)])
        counts = np.array(
            [
                [*c["correct"], *c["guess"], c["testlen"], min((abs(r - c["testlen"]), r) for r in c["reflen"])[1]]
                for c in scorer.ctest
            ]
        )
        expected, per_image = scorer.compute_score(option="closest")
        np.testing.assert_allclose(corpus_bleu(counts.sum(0).astype(float)), expected, rtol=1e-12)
        np.testing.assert_allclose(corpus_bleu(counts.astype(float)).T, per_image, rtol=1e-12, atol=1e-300)


@pytest.mark.parametrize("metric", METRICS)
def test_an_interval_is_what_scipy_finds(metric):
    """By its own resamples: the ends agree to a fraction of the interval's width."""
    from scipy import stats

    table = random_table(120, seed=3)
    mine = bootstrap(table, metric, resamples=20_000, seed=1)
    rows = np.arange(120)
    shift = table.values["METEOR"] - table.per_image["METEOR"].mean() if metric == "METEOR" else 0.0

    def statistic(drawn: np.ndarray, axis: int) -> np.ndarray:
        if metric.startswith("BLEU"):
            return corpus_bleu(table.bleu_counts[drawn].sum(-2).astype(float))[..., int(metric[-1]) - 1]
        return table.per_image[metric][drawn].mean(axis) + shift

    theirs = stats.bootstrap(
        (rows,), statistic, n_resamples=20_000, method="percentile", rng=np.random.default_rng(7), batch=1000
    ).confidence_interval
    width = theirs.high - theirs.low
    assert abs(mine.low - theirs.low) < 0.05 * width and abs(mine.high - theirs.high) < 0.05 * width
    assert mine.low < table.values[metric] < mine.high


@pytest.mark.parametrize("level", [0.8, 0.95])
def test_an_interval_holds_the_true_mean_as_often_as_it_says(level):
    """400 samples of 60 pictures from a skewed distribution whose mean is known; the bound is 4 standard errors."""
    rng, trials, held = np.random.default_rng(5), 400, 0
    for trial in range(trials):
        table = random_table(60, noise=rng.exponential(0.5, 60))
        table = replace(table, per_image={"CIDEr": rng.exponential(0.5, 60)})
        found = bootstrap(table, "CIDEr", resamples=200, level=level, seed=trial)
        held += found.low <= 0.5 <= found.high
    assert level - 0.03 - 4 * np.sqrt(level * (1 - level) / trials) < held / trials < level + 0.03


def test_an_interval_of_corpus_bleu_holds_the_bleu_of_all_pictures():
    """A population of 4,000 pictures, of which each trial sees 100."""
    rng = np.random.default_rng(2)
    population = random_counts(4000, rng)
    truth = corpus_bleu(population.sum(0).astype(float))[3]
    table, held = random_table(100), 0
    for trial in range(200):
        seen = replace(table, bleu_counts=population[rng.integers(4000, size=100)])
        found = bootstrap(seen, "BLEU-4", resamples=200, seed=trial)
        held += found.low <= truth <= found.high
    assert 0.87 < held / 200 < 0.99


@given(images=st.integers(1, 50), resamples=st.integers(1, 40), seed=st.integers(0, 9))
@settings(max_examples=25, deadline=None)
def test_each_resample_draws_as_many_pictures_as_there_are(images, resamples, seed):
    weights = np.concatenate(list(resamples_of(images, resamples, np.random.default_rng(seed))))
    assert weights.shape == (resamples, images) and (weights.sum(1) == images).all()


def test_intervals_are_the_same_again_and_of_all_metrics_at_once():
    table = random_table()
    every = bootstrap_all(table, seed=4)
    assert set(every) == set(METRICS) and every == bootstrap_all(table, seed=4) != bootstrap_all(table, seed=5)
    assert all(bootstrap(table, metric, seed=4) == every[metric] for metric in METRICS)
    narrower = bootstrap_all(table, seed=4, level=0.5)
    assert all(every[m].low < narrower[m].low < narrower[m].high < every[m].high for m in METRICS)


def test_bleu_without_brevity_penalty_has_its_interval_too():
    table = random_table(80)
    unpenalised = corpus_bleu(table.bleu_counts.sum(0).astype(float), brevity_penalty=False)
    short = replace(table, bleu_counts=table.bleu_counts + np.array([0] * 9 + [5]))  # references are longer
    short = replace(short, values=dict(short.values) | {"BLEU-4-no-BP": float(unpenalised[3])})
    found = bootstrap_all(short)
    assert set(found) == {*METRICS, "BLEU-4-no-BP"}
    assert found["BLEU-4-no-BP"].low < unpenalised[3] < found["BLEU-4-no-BP"].high
    assert found["BLEU-4"].high < found["BLEU-4-no-BP"].low
    assert found["BLEU-4-no-BP"] == bootstrap(short, "BLEU-4-no-BP")


def test_what_allows_no_interval_is_refused():
    table = random_table(2)
    with pytest.raises(ValueError, match="SPICE has no score per picture; there are CIDEr"):
        bootstrap(table, "SPICE")
    for wrong in ({"level": 1.0}, {"level": 95}, {"resamples": 0}):
        with pytest.raises(ValueError, match="must be"):
            bootstrap_all(table, **wrong)
    with pytest.raises(ValueError, match="at least 2 pictures, there are 1"):
        bootstrap_all(random_table(1))


def test_a_table_is_read_as_it_was_written(tmp_path):
    table = random_table(5)
    further = replace(table, others=((), (Candidate("a \u2028 dog", -3.5, True),), (), (), ()))
    for each in (table, further, random_table(1)):
        write_table(tmp_path / "scores-test.parquet", each)
        found = read_table(tmp_path / "scores-test.parquet")
        for name, value in vars(each).items():
            got = getattr(found, name)
            if name == "per_image":
                assert list(got) == list(value) and all((got[m] == value[m]).all() for m in value)
            elif isinstance(value, np.ndarray):
                assert got.shape == value.shape and got.dtype == value.dtype and (got == value).all(), name
            else:
                assert got == value, name


def test_another_file_is_no_table(tmp_path):
    path = tmp_path / "scores-val.parquet"
    with pytest.raises(ValueError, match="run `sat evaluate .* --split val` first"):
        read_table(path)
    path.write_text("nothing")
    with pytest.raises(ValueError, match="is no table of scores"):
        read_table(path)
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.table({"a": [1]}), path)
    with pytest.raises(ValueError, match="is no table of scores"):
        read_table(path)
