"""The demonstration's table and summary.json: scores as evaluated, shares of truth beside them, nothing stale."""

import pytest

from sat import files, summary

SHARES = {"captions": 0.61, "objects": 0.9, "colours": 0.8, "places": 0.7, "relations": 0.5}


@pytest.fixture
def run(tmp_path):
    scores = {name: {"CIDEr": 1.5, "BLEU-4": None} for name in ("model", "blind", "most_frequent")}
    report = {"images": 3, "beam_size": 2, "scores": scores, "missing": {"model": {"BLEU-4": "no reason"}}}
    files.write_json(tmp_path / "evaluation-test.json", report)
    files.write_json(tmp_path / "captions-test.json", [])
    return tmp_path


def measured(run, **more) -> None:
    truth = {name: dict(SHARES) for name in ("model", "blind", "reference")}
    digest = files.sha256(run / "captions-test.json")
    files.write_json(run / "truth-test.json", {"captions_sha256": digest, "truth": truth} | more)


def test_without_truth_the_summary_is_the_scores(run, capsys):
    summary.main(run, "test", 2.345)
    found = files.read_json(run / "summary.json")
    assert found == {"minutes": 2.35, "scores": files.read_json(run / "evaluation-test.json")["scores"]}
    assert "1.500" in capsys.readouterr().out


def test_shares_of_truth_are_kept_and_shown_beside_the_cider(run, capsys):
    measured(run, attention={"times_area": 5.0, "cells": 0.3, "area": 0.1})
    summary.main(run, "test", 1.0)
    found = files.read_json(run / "summary.json")
    assert found.keys() == {"minutes", "scores", "truth", "attention"}
    assert found["truth"] == {"model": SHARES, "blind": SHARES, "reference": SHARES}
    rows = capsys.readouterr().out.splitlines()
    (model,) = [row for row in rows if row.startswith("model ") and "0.610" in row]
    assert model.split()[1:] == ["1.500", "0.610", "0.900", "0.800", "0.700", "0.500"]
    assert "5.0 times the object's share of the picture (even attention: 3.0 times)" in "\n".join(rows)
    (reference,) = [row for row in rows if row.startswith("a reference left out")]
    assert reference.split()[4:] == ["-", "0.610", "0.900", "0.800", "0.700", "0.500"]


def test_how_widely_attention_is_spread_is_kept_and_shown(run, capsys):
    spread = {"effective_cells": 12.25, "top_cell": 0.375}
    files.write_json(
        run / "evaluation-test.json", files.read_json(run / "evaluation-test.json") | {"attention": spread}
    )
    summary.main(run, "test", 1.0)
    assert files.read_json(run / "summary.json")["attention"] == spread
    assert "attention: 12.2 cells in effect, 0.38 on the first of them" in capsys.readouterr().out
    looked = {"times_area": 5.0, "cells": 0.3, "area": 0.1}
    measured(run, attention=looked)
    summary.main(run, "test", 1.0)
    assert files.read_json(run / "summary.json")["attention"] == spread | looked


def test_truth_of_other_captions_and_a_broken_report_are_refused(run):
    measured(run)
    files.write_json(run / "captions-test.json", [{"image_id": "1", "caption": "a"}])
    with pytest.raises(ValueError, match="captions of an earlier evaluation"):
        summary.main(run, "test", 1.0)
    (run / "evaluation-test.json").write_text("{")
    with pytest.raises(ValueError, match=r"evaluation-test\.json is no report"):
        summary.main(run, "test", 1.0)
    with pytest.raises(ValueError, match=r"evaluation-val\.json is missing"):
        summary.main(run, "val", 1.0)


def test_intervals_stand_below_their_scores(run, capsys):
    report = files.read_json(run / "evaluation-test.json")
    report["scores"] |= {"reference": {"CIDEr": 0.9}, "model_against_rest": {"CIDEr": 0.8}}
    files.write_json(run / "evaluation-test.json", report | {"intervals": {"model": {"CIDEr": [1.4321, 1.5678]}}})
    summary.main(run, "test", 1.0)
    rows = capsys.readouterr().out.splitlines()
    below = rows[next(i for i, row in enumerate(rows) if row.startswith("model ")) + 1]
    assert below.split() == ["95", "%", "interval", "1.432-1.568", *["-"] * 6]
    assert sum("interval" in row for row in rows) == 1 and max(map(len, rows)) <= 125
    assert [row.split()[-7] for row in rows if row.startswith(("a reference", "model against"))] == ["0.900", "0.800"]
