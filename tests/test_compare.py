"""Comparing runs: intervals that hold the truth, p-values uniform where nothing differs, and who is refused."""

import itertools
import json
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
from helpers_scores import METRICS, random_table, without

from sat import compare as program
from sat.cli import PROGRAMS
from sat.evaluation.compare import Side, compare
from sat.evaluation.intervals import corpus_bleu
from sat.evaluation.score_table import write_table


def side(name: str, *tables) -> Side:
    return Side(name, {f"{name}{number}": table for number, table in enumerate(tables)})


def only_cider(scores) -> object:
    table = random_table(len(scores))
    return replace(
        table, per_image={"CIDEr": np.asarray(scores, dtype=float)}, values={"CIDEr": float(np.mean(scores))}
    )


def slow_deals(a, b) -> np.ndarray:
    """All differences of CIDEr and BLEU-4 when any set of pictures changes sides, one by one."""
    images, found = len(a.image_ids), []
    for swaps in itertools.product([False, True], repeat=images):
        rows = [[(b, a), (a, b)][not swap] for swap in swaps]
        cider = [np.mean([pair[s].per_image["CIDEr"][i] for i, pair in enumerate(rows)]) for s in (0, 1)]
        counts = [sum(pair[s].bleu_counts[i] for i, pair in enumerate(rows)) for s in (0, 1)]
        bleu = [corpus_bleu(each.astype(float))[3] for each in counts]
        found.append((cider[1] - cider[0], bleu[1] - bleu[0]))
    return np.array(found)


def test_the_permutation_of_pictures_is_that_of_all_exchanges():
    """Nine pictures: 512 exchanges, tried one by one, against 20,000 drawn ones."""
    a, b = random_table(9, seed=1), random_table(9, seed=2, gain=0.05)
    found = {each.metric: each for each in compare(side("a", a), side("b", b), resamples=20_000).differences}
    apart = np.abs(slow_deals(a, b))
    for column, metric in ((0, "CIDEr"), (1, "BLEU-4")):
        exact = (apart[:, column] >= apart[0, column] - 1e-12).mean()
        assert found[metric].p_pictures == pytest.approx(exact, abs=0.015)


def test_the_permutation_is_what_scipy_finds():
    from scipy import stats

    a, b = random_table(50, seed=1), random_table(50, seed=2, gain=0.03)
    (found,) = compare(
        side("a", only_cider(a.per_image["CIDEr"])), side("b", only_cider(b.per_image["CIDEr"])), resamples=10_000
    ).differences
    theirs = stats.permutation_test(
        (a.per_image["CIDEr"], b.per_image["CIDEr"]),
        lambda x, y, axis: (y - x).mean(axis),
        permutation_type="samples",
        vectorized=True,
        n_resamples=5_000,
        batch=500,
        rng=np.random.default_rng(3),
    )
    assert 0.01 < theirs.pvalue < 0.9 and found.p_pictures == pytest.approx(theirs.pvalue, abs=0.02)
    pairs = (b.per_image["CIDEr"] - a.per_image["CIDEr"],)
    interval = stats.bootstrap(
        pairs, np.mean, n_resamples=10_000, method="percentile", rng=np.random.default_rng(3)
    ).confidence_interval
    width = interval.high - interval.low
    assert abs(found.low - interval.low) < 0.06 * width and abs(found.high - interval.high) < 0.06 * width


def test_p_values_are_uniform_where_nothing_differs():
    """300 pairs of runs of the same quality: Kolmogorov-Smirnov against the uniform distribution."""
    from scipy import stats

    rng = np.random.default_rng(8)
    p_pictures, held = [], 0
    for trial in range(300):
        hard = rng.random(40)
        a, b = (only_cider(hard + rng.normal(0, 0.2, 40)) for _ in range(2))
        (found,) = compare(side("a", a), side("b", b), resamples=199, seed=trial, pictures=0).differences
        p_pictures.append(found.p_pictures)
        held += found.low <= 0 <= found.high
    assert stats.kstest(p_pictures, "uniform").pvalue > 0.001
    assert 0.89 < held / 300 < 0.985


def test_several_seeds_widen_the_interval_to_new_seeds():
    """Runs scatter by their seed far more than pictures explain: the interval must hold 0 as often as it says.

    Two sides of 6 runs of the same quality. Pictures alone would hold it in a few cases of a hundred.
    """
    from scipy import stats

    rng, trials, held, p_runs = np.random.default_rng(4), 150, 0, []
    for trial in range(trials):
        hard = rng.random(30)
        runs = [only_cider(hard + rng.normal(0, 0.3) + rng.normal(0, 0.1, 30)) for _ in range(12)]
        (found,) = compare(side("a", *runs[:6]), side("b", *runs[6:]), resamples=99, seed=trial, pictures=0).differences
        held += found.low <= 0 <= found.high
        p_runs.append(found.p_runs)
    assert 0.84 < held / trials < 0.99
    assert stats.kstest(p_runs, "uniform").pvalue > 0.001 and min(p_runs) >= 2 / 924


def test_runs_are_dealt_in_all_ways():
    low, high = [only_cider(np.full(5, v)) for v in (0.1, 0.2, 0.3)], [only_cider(np.full(5, v)) for v in (0.4, 0.9)]
    (found,) = compare(side("a", *low), side("b", *high)).differences
    assert found.p_runs == pytest.approx(1 / 10) and found.difference == pytest.approx(0.45)
    (alone,) = compare(side("a", *low), side("b", high[0])).differences
    assert alone.p_runs is None


def test_a_gain_is_found_and_told_with_its_sign(tmp_path):
    a, b = random_table(200, seed=1), random_table(200, seed=2, gain=0.1)
    found = compare(side("a", a), side("b", b))
    cider = found.differences[0]
    assert (cider.metric, found.images, found.metric) == ("CIDEr", 200, "CIDEr")
    assert cider.difference == pytest.approx(cider.b - cider.a) and 0 < cider.low < cider.difference < cider.high
    assert cider.p_pictures <= 2 / 1001
    meteor = found.differences[1]
    assert (meteor.a, meteor.b) == pytest.approx((0.25, 0.35)) and meteor.low < 0.1 < meteor.high
    turned = compare(side("b", b), side("a", a)).differences[0]
    assert turned.difference == pytest.approx(-cider.difference) and turned.high < 0
    gains = b.per_image["CIDEr"] - a.per_image["CIDEr"]
    assert [each.image_id for each in found.better] == [a.image_ids[i] for i in np.argsort(-gains)[:5]]
    assert [each.image_id for each in found.worse] == [a.image_ids[i] for i in np.argsort(gains)[:5] if gains[i] < 0]
    assert found.better[0].captions_b == (b.captions[int(np.argmax(gains))],)


def test_a_run_against_itself_differs_in_nothing():
    table = random_table(30)
    found = compare(side("a", table), side("b", table))
    assert all(each.low == each.high == each.difference == 0 and each.p_pictures == 1 for each in found.differences)
    assert not found.better and not found.worse


def test_runs_of_other_references_pictures_or_signatures_are_refused():
    table = random_table(10)
    for other, words in (
        (replace(table, references_digest="e" * 64), "other references"),
        (random_table(11), "other pictures .10 and 11; only one has 000010"),
        (replace(table, signature=dict.fromkeys(METRICS, "refs:4")), "was computed in another way for b0"),
        (without(table, *METRICS), "no metric in common"),
    ):
        with pytest.raises(ValueError, match=words):
            compare(side("a", table), side("b", other))
    with pytest.raises(ValueError, match="share runs"):
        compare(side("a", table), side("a", table))


@pytest.fixture
def runs(tmp_path):
    for name, gain in (("soft-1", 0), ("soft-2", 0.01), ("hard-1", 0.1), ("hard-2", 0.12)):
        (tmp_path / "runs" / name).mkdir(parents=True)
        write_table(
            tmp_path / "runs" / name / "scores-val.parquet", random_table(30, seed=len(name) + int(name[-1]), gain=gain)
        )
    return tmp_path


def sat_compare(folder, *arguments):
    command = [sys.executable, "-m", "sat.cli", "compare", *arguments]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=120)


def test_the_command_compares_patterns_and_writes_json(runs):
    done = sat_compare(runs, "runs/soft-*", "runs/hard-*", "runs/hard-1", "--split", "val", "--json", "out.json")
    assert done.returncode == 0, done.stderr
    assert "(2 runs: runs/soft-1, runs/soft-2)" in done.stdout and "new pictures and new seeds" in done.stdout
    first, second = json.loads((runs / "out.json").read_text())["comparisons"]
    assert first["b"] == {"name": "runs/hard-*", "runs": ["runs/hard-1", "runs/hard-2"]}
    assert set(first["differences"]) == set(METRICS)
    assert set(first["differences"]["CIDEr"]) == {"a", "b", "difference", "low", "high", "p_pictures", "p_runs"}
    assert first["differences"]["CIDEr"]["p_runs"] == pytest.approx(2 / 6)
    assert second["differences"]["CIDEr"]["p_runs"] is None and len(second["pictures"]["better"]) == 5


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["runs/none-*", "runs/hard-1"], "runs/none-* fits no folder"),
        (["runs/none", "runs/hard-1"], "runs/none is no folder"),
        (["runs/soft-1", "runs/hard-1", "--split", "test"], "run `sat evaluate runs/soft-1 --split test` first"),
        (["runs/soft-1", "runs/soft-1"], "share runs"),
        (["runs/soft-1", "runs/hard-1", "--level", "95"], "level is 95.0"),
    ],
)
def test_a_mistake_is_one_sentence(runs, arguments, words, monkeypatch):
    monkeypatch.chdir(runs)
    more = {arguments[i][2:]: arguments[i + 1] for i in range(2, len(arguments), 2)}
    with pytest.raises(ValueError) as found:
        program.main(arguments[0], [arguments[1]], split=more.get("split", "val"), level=float(more.get("level", 0.95)))
    assert words in str(found.value) and "\n" not in str(found.value)


def test_the_command_is_known():
    assert PROGRAMS["compare"][0] == "sat.compare"
