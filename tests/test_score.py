"""`sat score`: anybody's captions against references of any format, and `sat bench metrics`."""

import json

import pytest

from preprocessing import score
from sat.bench import metrics as bench
from sat.evaluation.caption_statistics import statistics_of

CAPTIONS = {
    7: ["a dog runs on grass", "the dog is running"],
    10: ["two men eat", "men at a table"],
    9: ["a red bus", ""],
}
RESULTS = [
    {"image_id": 10, "caption": "two men at a table"},
    {"image_id": 9, "caption": "a bus"},
    {"image_id": 7, "caption": "a dog runs"},
]


@pytest.fixture
def given(tmp_path):
    """COCO references and results; returns the folder."""
    rows = [{"image_id": i, "id": 10 * i + n, "caption": t} for i, ts in CAPTIONS.items() for n, t in enumerate(ts)]
    images = [{"id": i, "file_name": f"{i}.jpg"} for i in CAPTIONS]
    (tmp_path / "references.json").write_text(json.dumps({"images": images, "annotations": rows}))
    (tmp_path / "results.json").write_text(json.dumps(RESULTS))
    return tmp_path


def call(folder, **options):
    """`sat score` in this process; returns its JSON."""
    names = {"references": str(folder / "references.json"), "results": folder / "results.json"}
    score.main(**names | {"metrics": ["BLEU", "CIDEr-D"], "json_file": folder / "out.json"} | options)
    return json.loads((folder / "out.json").read_text())


def test_scores_of_all_and_of_each_image_with_signature_and_statistics(given, capsys):
    document = call(given)
    printed = capsys.readouterr().out
    assert list(document["per_image"]) == ["10", "7", "9"]
    assert document["per_image"]["7"]["BLEU-3"] == pytest.approx(2.718281828 ** (1 - 4 / 3), abs=1e-6)
    assert document["scores"]["CIDEr-D"] == pytest.approx(
        sum(each["CIDEr-D"] for each in document["per_image"].values()) / 3
    )
    assert document["signature"]["BLEU"].startswith("BLEU|images:3|refs:2|")
    assert document["statistics"]["mean_words"] == pytest.approx(10 / 3) and document["statistics"]["novel"] is None
    assert "CIDEr-D" in printed and document["signature"]["BLEU"] in printed


def test_other_formats_subsets_and_document_frequencies(given):
    rows = "".join(f"{i}.jpg#{n}\t{t}\n" for i, texts in CAPTIONS.items() for n, t in enumerate(texts) if t)
    (given / "flickr.token.txt").write_text(rows)
    by_file = [row | {"image_id": f"{row['image_id']}.jpg"} for row in RESULTS[1:]]
    (given / "by_file.json").write_text(json.dumps(by_file))
    document = call(
        given,
        references=str(given / "flickr.token.txt"),
        results=given / "by_file.json",
        subset=True,
        frequencies=str(given / "references.json"),
        training=str(given / "references.json"),
    )
    assert list(document["per_image"]) == ["7", "9"] and "|df:other-3|" in document["signature"]["CIDEr-D"]
    assert document["statistics"]["novel"] == 1 and document["statistics"]["new_words"] == 0


FAULTS = {
    "an object": ({"a": 1}, "expected a list of {image_id, caption}, COCO's results format, not an object"),
    "no caption": ([{"image_id": 7}], r"entry 0: expected \{image_id, caption\}, found"),
    "a float": ([{"image_id": 7.5, "caption": "x"}], "image_id is 7.5; it must be a whole number or a text"),
    "null": ([{"image_id": 7, "caption": None}], "the caption of image 7 is null, not a text"),
    "twice": ([RESULTS[0]] * 2, "entry 1: image 10 has two captions"),
    "nothing": ([], "no results"),
    "too few": (RESULTS[:1], r"2 have no hypothesis \(7, 9\).*--subset scores only images that have a result"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_mistake_in_the_results_is_named_with_file_and_entry(given, fault):
    rows, message = FAULTS[fault]
    (given / "results.json").write_text(json.dumps(rows))
    with pytest.raises(ValueError, match=f"results.json.*{message}"):
        call(given)


def test_a_split_that_is_not_there_and_an_unknown_metric_are_named(given):
    with pytest.raises(ValueError, match="has no image of split 'val', but {'train': 3}"):
        call(given, split="val")
    with pytest.raises(ValueError, match="unknown metrics"):
        call(given, metrics=["WER"])


def test_statistics_count_words_captions_and_what_is_new():
    found = statistics_of(["A dog.", "a dog", "two cats run"], ["a dog", "cats"])
    assert (found.captions, found.shortest, found.longest, found.vocabulary) == (3, 2, 3, 5)
    assert (found.mean_words, found.distinct, found.commonest) == pytest.approx((7 / 3, 2 / 3, 2 / 3))
    assert found.novel == pytest.approx(1 / 3) and found.new_words == 2
    with pytest.raises(ValueError, match="no captions"):
        statistics_of([])


def test_the_benchmark_finds_equal_scores(tmp_path):
    rows = bench.run(images=60, meteor=False, json_file=tmp_path / "rows.json")
    assert [row["metric"] for row in rows] == ["BLEU", "ROUGE-L", "CIDEr", "CIDEr-D", "the four"]
    assert all(row["equal"] and row["seconds"] > 0 and row["pycocoevalcap_seconds"] > 0 for row in rows)
    assert [row["metric"] for row in json.loads((tmp_path / "rows.json").read_text())] == [r["metric"] for r in rows]
