"""`sat evaluate`: what it writes, in whose formats, by which search, and what the model is held against."""

import contextlib
import io
import json

import numpy as np
import pytest

from sat import evaluate, files, train
from sat.config import load_config
from sat.evaluation import split as split_module
from sat.evaluation.metrics import Scores
from sat.evaluation.options import DecodeOptions
from sat.evaluation.report import write_captions
from sat.evaluation.score_table import read_table
from sat.evaluation.search_options import Asked
from sat.model.at_rest import PackableLinear
from tests.helpers_shards import make_feature_dataset, self_describing_captions
from tests.helpers_training import SMALL, with_tokenizer


def overlap(references, hypotheses, metrics=(), **_) -> Scores:
    """In place of the metrics: the share of the caption's words that are in a reference; image val-3 has no score."""
    ids = tuple(sorted(set(references) - {"val-3"}))
    assert set(references) == set(hypotheses)
    shares = []
    for each in ids:
        words, known = hypotheses[each].split(), set(" ".join(references[each]).split())
        shares.append(sum(word in known for word in words) / max(len(words), 1))
    refs = sorted({len(texts) for texts in references.values()})
    return Scores(
        {"CIDEr": float(np.mean(shares)), "METEOR": None},
        {"METEOR": "needs Java"},
        len(ids),
        ids,
        {"CIDEr": np.array(shares)},
        np.ones((len(ids), 10), np.int64),
        {"CIDEr": f"overlap|refs:{refs}"},
        files.sha256_of(repr(sorted(references.items()))),
    )


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run folder, trained for one epoch; its own search is a beam of two."""
    from tests.helpers_training import engine_alone

    root = tmp_path_factory.mktemp("evaluate")
    make_feature_dataset(root / "data", {"train": 18, "val": 5})
    settings = [*SMALL, *with_tokenizer(root), f"train.run_dir={root}/run", "eval.block_ngram=2"]
    with pytest.MonkeyPatch.context() as patch, engine_alone() as engine:
        patch.setattr(split_module, "score", overlap)
        train.train(load_config(None, settings), engine)
    return root / "run"


@pytest.fixture
def program(trained, monkeypatch):
    """`sat evaluate RUN --split val` with these options; what it has printed as JSON."""
    monkeypatch.setattr(split_module, "score", overlap)
    monkeypatch.setattr(evaluate, "score", overlap)

    def run(**options):
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            evaluate.main(trained, split="val", **options)
        text = printed.getvalue()
        return json.loads(text[text.index("{\n") :])

    return run


def test_the_scores_of_every_image_are_a_table(program, trained):
    report = program()
    assert report == files.read_json(trained / "evaluation-val.json")
    captions = json.loads((trained / "captions-val.json").read_text())
    table = read_table(trained / "scores-val.parquet")
    assert [each["image_id"] for each in captions] == [f"val-{i}" for i in range(5)]
    assert table.image_ids == tuple(f"val-{i}" for i in (0, 1, 2, 4)), "what has no score is not in the table"
    assert list(table.captions) == [each["caption"] for each in captions if each["image_id"] != "val-3"]
    assert (table.log_probabilities < 0).all() and table.others == ()
    assert report["scores"]["model"]["CIDEr"] == pytest.approx(table.per_image["CIDEr"].mean())
    low, high = report["intervals"]["model"]["CIDEr"]
    assert low <= report["scores"]["model"]["CIDEr"] <= high
    assert report["signature"] == dict(table.signature) == {"CIDEr": "overlap|refs:[5]"}
    assert (
        report["search"] | {"method": "beam", "beam_size": 2, "block_ngram": 2, "precision": "fp32"} == report["search"]
    )


def test_weights_are_at_rest_while_captions_are_searched_for(program, monkeypatch):
    found, plain = set(), split_module.decode

    def decode(models, *given):
        found.update(
            each.kernels_at_rest for model in models for each in model.modules() if isinstance(each, PackableLinear)
        )
        return plain(models, *given)

    monkeypatch.setattr(split_module, "decode", decode)
    program()
    assert found == {"auto"}


def test_the_search_is_the_runs_but_for_what_is_asked(program, trained):
    assert program(n_best=2, max_length=4)["search"]["max_length"] == 4
    table = read_table(trained / "scores-val.parquet")
    assert all(len(each) == 1 for each in table.others)
    assert all(row[0].log_probability <= best for row, best in zip(table.others, table.log_probabilities))
    drawn = program(method="sample", temperature=1.5, top_k=5, n_best=3, seed=4)
    assert drawn["search"] | {"method": "sample", "temperature": 1.5, "top_k": 5, "seed": 4} == drawn["search"]
    first = read_table(trained / "scores-val.parquet")
    assert all(len(each) == 2 for each in first.others)
    program(method="sample", temperature=1.5, top_k=5, n_best=3, seed=4)
    assert read_table(trained / "scores-val.parquet").captions == first.captions
    program(method="sample", temperature=1.5, top_k=5, n_best=3, seed=5)
    assert read_table(trained / "scores-val.parquet").captions != first.captions


def test_a_reference_left_out_is_scored_beside_the_model_against_the_same_ones(program, trained):
    report = program(with_baselines=True)
    assert list(report["scores"]) == ["model", "blind", "most_frequent", "reference", "model_against_rest"]
    assert set(report["intervals"]) == set(report["scores"])
    left_out = {
        each["image_id"]: each["caption"] for each in json.loads((trained / "captions-val-reference.json").read_text())
    }
    references = {f"val-{i}": self_describing_captions("val", i) for i in range(5)}
    assert set(left_out) == set(references) and all(left_out[i] in references[i] for i in references)
    rest = {i: [text for text in texts if text != left_out[i]] for i, texts in references.items()}
    assert all(len(each) == 4 for each in rest.values())
    assert report["scores"]["reference"]["CIDEr"] == overlap(rest, left_out).values["CIDEr"]
    ours = captions_of(trained / "captions-val.json")
    assert report["scores"]["model_against_rest"]["CIDEr"] == overlap(rest, ours).values["CIDEr"]


def captions_of(path) -> dict[str, str]:
    return {each["image_id"]: each["caption"] for each in json.loads(path.read_text())}


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"precision": "fp64"}, "--precision is 'fp64'; choose one of fp32, bf16, fp16"),
        ({"beam_size": 0}, "eval.beam_size is 0; it must be at least 1"),
        ({"n_best": 3}, "n_best 3 captions cannot come from a width of 2; raise beam_size"),
        ({"temperature": 0.5}, "temperature, top_k and top_p have no effect on method beam; use method sample"),
        ({"method": "dice"}, "eval.method is 'dice'; choose one of beam, greedy, sample"),
    ],
)
def test_options_that_cannot_work_are_refused_before_any_work(program, options, words):
    with pytest.raises(ValueError) as found:
        program(**options)
    assert words in str(found.value)


def test_a_run_that_samples_can_be_asked_for_a_beam():
    sampling = DecodeOptions(method="sample", temperature=0.7, top_k=3, n_best=2)
    assert Asked("beam", 4).over(sampling) == DecodeOptions(method="beam", beam_size=4, n_best=2)
    assert Asked().over(sampling) == sampling
    assert Asked(temperature=0.9).over(sampling).top_k == 3


# ------------------------------------------------------------------ ids


def test_results_of_whole_number_ids_are_read_by_pycocotools(tmp_path):
    from pycocotools.coco import COCO

    images = [{"id": number, "file_name": f"{number}.jpg"} for number in (0, 42, 391895)]
    annotations = [{"id": i, "image_id": each["id"], "caption": "a dog"} for i, each in enumerate(images)]
    files.write_json(tmp_path / "captions.json", {"info": {}, "images": images, "annotations": annotations})
    write_captions(
        tmp_path / "captions-test.json", {"0": "a cat", "391895": "a man", "42": "two men"}, {"0", "42", "391895"}
    )
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO(str(tmp_path / "captions.json"))
        results = truth.loadRes(str(tmp_path / "captions-test.json"))
    assert {each["image_id"]: each["caption"] for each in results.dataset["annotations"]} == {
        0: "a cat",
        42: "two men",
        391895: "a man",
    }


def test_ids_are_written_as_the_annotations_have_them(tmp_path):
    write_captions(tmp_path / "captions.json", dict.fromkeys(["1", "-2", "3", "007"], "a dog"), {"-2", "3"})
    rows = json.loads((tmp_path / "captions.json").read_text())
    assert [each["image_id"] for each in rows] == ["1", -2, 3, "007"]
