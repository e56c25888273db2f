"""The report is one page that loads nothing, and what it says is what the run's files say."""

import base64
import io
import json
import re
import xml.etree.ElementTree as ET
from dataclasses import replace
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from sat import files
from sat.config import load_config, save_config
from sat.evaluation.attention_file import write_attention
from sat.evaluation.attention_map import Cells, Regions, cells_at
from sat.evaluation.prediction import Prediction
from sat.evaluation.report import write_captions
from sat.evaluation.score_table import ScoreTable, read_table, write_table
from sat.report import pictures
from sat.report.choose import choose
from sat.report.curves import POINTS, thinned
from sat.report.panels import panels
from sat.report.pictures import find_sources, seen_by_encoder
from sat.report.reading import read_runs
from sat.report.report import main
from sat.shards.features import EncoderSpec, FeatureSpec, Transform
from sat.shards.manifest import load_manifest
from sat.tracking.record import Record
from tests.helpers_shards import encoded, make_feature_dataset, picture, self_describing_captions
from tests.test_loader_pictures import make_image_dataset

NASTY = "<script>alert('x')</script> & \"red\""
SPLIT = "val"
COUNT = 6
SPEC = FeatureSpec(
    "grid",
    (2, 3),
    8,
    "fp16",
    EncoderSpec("resnet50", 4, 8, stride=32, first_centre=15.5),
    Transform(96, "center_crop", "", "bicubic"),
)
VOID = {"meta", "link", "img", "input", "br"}


class Page(HTMLParser):
    """Elements with their attributes, every piece of text, and whether each element is closed where it must be."""

    def __init__(self, text: str):
        super().__init__()
        self.elements: list[tuple[str, dict]] = []
        self.text: list[str] = []
        self._open: list[str] = []
        self.feed(text)
        self.close()
        assert self._open == []

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self._open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)

    def all(self, tag: str) -> list[dict]:
        return [attributes for name, attributes in self.elements if name == tag]

    @property
    def words(self) -> str:
        return " ".join(" ".join(self.text).split())


def prediction(image_id: str, caption: str, sure: float) -> Prediction:
    words = tuple(caption.split())
    weights = np.random.default_rng(len(words)).dirichlet(np.ones(6), len(words)).astype(np.float32)
    numbers = np.linspace(0.11, 0.93, len(words), dtype=np.float32)
    return Prediction(image_id, caption, words, sure, sure, True, weights, numbers, numbers[::-1].copy())


def make_run(folder: Path, data: Path, gain: float = 0.0, rate: float = 0.001, digest: str = "d") -> Path:
    """A run folder as training and `sat evaluate --attention` leave one; the third caption is hostile."""
    ids = tuple(f"{SPLIT}-{number}" for number in range(COUNT))
    captions = [f"a dog number {'abcdef'[number]}" for number in range(COUNT)]
    captions[2] = NASTY.replace(" ", "_")
    cider = np.array([1.25, 0.0, 0.5, 2.125, 0.25, 0.75]) + gain
    sure = np.array([-4.0, -3.0, -9.0, -5.0, -8.0, -7.0])
    counts = np.tile([5, 4, 3, 2, 6, 5, 4, 3, 6, 6], (COUNT, 1))
    values = {"CIDEr": float(cider.mean()), "METEOR": None}
    table = ScoreTable(
        ids, tuple(captions), sure, np.ones(COUNT, bool), {"CIDEr": cider}, counts, values, digest, {"CIDEr": NASTY}
    )
    write_table(folder / f"scores-{SPLIT}.parquet", table)
    write_captions(folder / f"captions-{SPLIT}.json", dict(zip(ids, captions)), ())
    document = {
        "split": SPLIT,
        "images": COUNT,
        "unfinished": 0,
        "beam_size": 3,
        "step": 40,
        "search": {"beam_size": 3},
    }
    document |= {"scores": {"model": values, "blind": {"CIDEr": 0.0625}}, "missing": {"model": {"METEOR": "no <java>"}}}
    document |= {
        "intervals": {"model": {"CIDEr": [0.4375, 1.1875]}},
        "attention": {"effective_cells": 4.5, "top_cell": 0.3},
    }
    files.write_json(folder / f"evaluation-{SPLIT}.json", document)
    files.write_json(folder / "status.json", {"state": "finished", "step": 50})
    files.write_json(folder / "best/config.json", {"features": SPEC.to_fingerprint()})
    made = [prediction(*each) for each in zip(ids, captions, sure.tolist())]
    write_attention(folder / f"attention-{SPLIT}.npz", made, SPEC)
    lines = [
        {"step": step, "time": float(step), "nll_per_token": 5.0 / step + gain, "val/CIDEr": step / 50}
        for step in (10, 20, 30)
    ]
    lines += [{"step": 30, "time": 31.0, "test/CIDEr": 0.5}]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    settings = [f"data.features={data}", f"train.learning_rate={rate}", "tracking.mlflow_uri=none"]
    save_config(load_config(None, settings), folder / "config.yaml")
    return folder


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    """References in feature shards, picture files, and two runs."""
    root = tmp_path_factory.mktemp("report")
    make_feature_dataset(root / "features", {"train": 3, SPLIT: COUNT})
    (root / "files").mkdir()
    for number in range(COUNT):
        (root / f"files/{SPLIT}-{number}.jpg").write_bytes(encoded(picture(number, (64, 48))))
    make_run(root / "one", root / "features")
    make_run(root / "two", root / "features", gain=0.125, rate=0.002)
    return root


def unscored(table: ScoreTable) -> ScoreTable:
    """None of whose pictures could be scored."""
    none = np.zeros(0)
    rows = {"image_ids": (), "captions": (), "log_probabilities": none, "finished": none.astype(bool)}
    return replace(table, per_image={}, bleu_counts=np.zeros((0, 10), np.int64), **rows)


def report(root: Path, *runs: str, **options) -> tuple[Page, str]:
    options = {"split": SPLIT, "out": root / "page.html", "pictures": str(root / "files"), "track": False} | options
    main([root / each for each in runs], **options)
    text = (root / "page.html").read_text()
    return Page(text), text


def test_the_page_is_well_formed_and_loads_nothing(root):
    page, text = report(root, "one", "two", each=2)
    addresses = [
        value for _, attributes in page.elements for name, value in attributes.items() if name in ("src", "href")
    ]
    assert addresses and all(each.startswith(("data:", "#")) for each in addresses)
    assert all(each.startswith("data:image/") for each in re.findall(r"url\((?!#)(.*?)\)", text))
    assert "http" not in re.sub("http-equiv", "", text) and not {"script", "iframe"} & {tag for tag, _ in page.elements}
    ids = [attributes["id"] for _, attributes in page.elements if "id" in attributes]
    assert len(ids) == len(set(ids)), "of charts too"
    targets = {each[1:] for each in addresses if each.startswith("#")} | set(re.findall(r"url\(#(.*?)\)", text))
    assert targets <= set(ids)


def test_captions_names_and_reasons_are_no_html(root, tmp_path):
    hostile = tmp_path / "<b>run&"
    make_run(hostile, root / "features")
    main([hostile], split=SPLIT, out=tmp_path / "page.html", pictures=str(root / "files"), track=False)
    page = Page((tmp_path / "page.html").read_text())
    assert not {"script", "b>run&", "java"} & {tag for tag, _ in page.elements}
    assert NASTY in page.words and NASTY.replace(" ", "_") in page.words
    assert "no <java>" in page.words and "<b>run&" in page.words


def test_the_figures_are_those_of_the_runs_files(root):
    page, _ = report(root, "one", each=COUNT)
    evaluation = files.read_json(root / f"one/evaluation-{SPLIT}.json")
    cider, low, high = evaluation["scores"]["model"]["CIDEr"], *evaluation["intervals"]["model"]["CIDEr"]
    assert f"model {cider:.3f} [{low:.3f}, {high:.3f}] -" in page.words
    assert "blind (shuffled features) 0.062 -" in page.words and "METEOR is missing" in page.words
    assert "6 pictures, model of step 40, beam 3; training finished at step 50" in page.words
    (run,) = read_runs([root / "one"], SPLIT)
    for row, (caption, score, sure) in enumerate(
        zip(run.table.captions, run.table.per_image["CIDEr"], run.table.log_probabilities)
    ):
        per_word = sure / (len(caption.split()) + 1)
        assert f"{caption} CIDEr {score:.3f}, log-probability {sure:.2f} ({per_word:.2f} per word)" in page.words, row
    references = [text for index in range(COUNT) for text in self_describing_captions(SPLIT, index)]
    assert all(text in page.words for text in references)
    assert "train.learning_rate 0.001" in page.words and "val.beam_size 3" in page.words


def test_pictures_are_chosen_by_score_and_confidence(root):
    (run,) = read_runs([root / "one"], SPLIT)
    best, worst, wrong, drawn = choose([run], 2, every=False)
    assert [each.title for each in (best, worst, wrong)] == ["Best", "Worst", "Most confidently wrong"]
    assert best.image_ids == ("val-3", "val-0") and worst.image_ids == ("val-1", "val-4")
    assert wrong.image_ids == ("val-1", "val-4"), "of the two lowest scores of six, the surer first"
    assert len(drawn.image_ids) == 2 and drawn == choose([run], 2, every=False)[-1]
    assert choose([run], 1, every=True)[-1].image_ids == run.table.image_ids
    apart, *_ = choose(read_runs([root / "one", root / "two"], SPLIT), 3, every=False)
    assert apart.title == "Where they differ most" and len(apart.image_ids) == 3


def test_every_word_has_its_attention_and_gate_over_what_the_encoder_saw(root):
    page, text = report(root, "one", each=0, every=True)
    (run,) = read_runs([root / "one"], SPLIT)
    words = [word for each in run.predictions.values() for word in each.words]
    overlays = [each for each in page.all("img") if each["src"].startswith("data:image/png")]
    assert len(overlays) == len(page.all("figure")) == len(words)
    for each in run.predictions.values():
        for word, sure, gate in zip(each.words, each.probabilities, each.gates):
            assert f"{word} p {sure:.2f} gate {gate:.2f}" in page.words
    under = re.findall(r"--seen: url\(data:image/jpeg;base64,(.*?)\)", text)
    seen = np.asarray(Image.open(io.BytesIO(base64.b64decode(under[0]))), dtype=float)
    assert len(under) == COUNT and seen.shape == (96, 96, 3)
    crop = picture(0, (64, 48)).crop((8, 0, 56, 48)).resize((96, 96), Image.Resampling.BICUBIC)
    assert np.abs(seen - np.asarray(crop, dtype=float)).mean() < 4


@pytest.mark.parametrize(("side", "first", "stride"), [(7, 0, 32), (7, 31, 32), (14, 7.5, 16), (1, 111.5, 224)])
def test_a_strong_cell_lies_over_the_picture_where_it_looks(side, first, stride):
    cell, size = (2 * side + 4) % (side * side), 224
    along = (first + stride * np.arange(side) + 0.5) / size
    centres = np.stack(np.meshgrid(along, along), axis=-1).reshape(-1, 2)
    where, ones = cells_at(centres, "", size, size), np.ones(1, np.float32)
    attention = np.eye(side * side, dtype=np.float32)[[cell]]
    found = panels(
        Prediction("1", "x", ("x",), 0, 0, True, attention, ones, ones), Image.new("RGB", (size, size)), where
    )
    assert isinstance(where, Cells) and (found.width, found.height, found.even) == (size, size, 1 / side**2)
    x, y = strongest(found.words[0])
    if side > 1:
        assert (x, y) == pytest.approx(tuple(centres[cell]), abs=2e-4)


def strongest(panel) -> tuple[float, float]:
    """Where the opaquest pixel of a panel lies in the picture, 0 to 1."""
    box = {name: float(value) / 100 for name, value in re.findall(r"(\w+): ([\d.-]+)%", panel.box)}
    pixels = np.asarray(Image.open(io.BytesIO(base64.b64decode(panel.overlay.split(",")[1]))))
    row, column = np.unravel_index(pixels[..., 3].argmax(), pixels.shape[:2])
    x = box["left"] + (column + 0.5) * box["width"] / pixels.shape[1]
    return x, box["top"] + (row + 0.5) * box["height"] / pixels.shape[0]


def test_regions_are_drawn_where_their_boxes_lie():
    boxes = np.array([[0, 0, 0.5, 0.5], [0.5, 0.5, 1, 1]], np.float32)
    attention = np.array([[0.1, 0.9]], np.float32)
    found = panels(Prediction("1", "x", ("x",), 0, 0, True, attention), Image.new("RGB", (80, 40)), Regions(boxes))
    (word,) = found.words
    assert min(strongest(word)) > 0.5 and found.location == "region" and (word.gate, word.probability) == (None, None)
    assert word.outlines[0] == "left: 50.00%; top: 50.00%; width: 50.00%; height: 50.00%"
    with pytest.raises(ValueError, match="attention over 2 locations, but 1 are known"):
        panels(Prediction("1", "x", ("x",), 0, 0, True, attention), Image.new("RGB", (80, 40)), Regions(boxes[:1]))


def test_curves_show_every_step_of_every_run_in_the_pages_colours(root):
    _, text = report(root, "one", "two", each=0)
    drawn = dict(re.findall(r"<h3>([^<]*)</h3>(<svg.*?</svg>)", text, re.S))
    assert list(drawn) == ["nll_per_token", "val/CIDEr"], "a split scored once has no curve"
    for svg in drawn.values():
        tree = ET.fromstring(svg.replace("xlink:", ""))
        lines = [
            each.get("d")
            for each in tree.iter("path")
            if "var(--run" in each.get("style", "") and each.get("clip-path")
        ]
        assert [each.count("L") for each in lines] == [2, 2] and "var(--run0)" in svg and "var(--run1)" in svg
        assert "currentColor" in svg and "#0" not in re.sub(r"#chart", "", svg)


def test_a_long_curve_is_thinned_to_means_of_stretches():
    steps = np.arange(10 * POINTS + 7, dtype=float)
    few, means = thinned(steps, steps**2)
    ends = np.linspace(0, len(steps), POINTS + 1).astype(int)
    assert means == pytest.approx([np.mean(steps[a:b] ** 2) for a, b in pairwise(ends)])
    assert len(few) == POINTS and thinned(steps[:5], steps[:5])[0] is not None


def test_several_runs_are_compared_on_the_same_pictures_alone(root, tmp_path):
    page, text = report(root, "one", "two", each=1)
    assert "two less one +0.125" in page.words, "the paired difference"
    assert re.search(r"train.learning_rate</th><td>0.001</td><td>0.002</td>", text)
    assert len(re.findall(r'class="said"', text)) == 2 * len(page.all("article"))
    make_run(root / "other", root / "features", digest="e")
    with pytest.raises(ValueError, match="one and other were scored against other references"):
        report(root, "one", "other")
    with pytest.raises(ValueError, match="named twice"):
        report(root, "one", "one")


def test_claims_are_shown_where_the_truth_is_known(root, tmp_path):
    run = make_run(tmp_path / "run", root / "features")
    claims = {
        f"{SPLIT}-0": [
            {"words": ["red", "dog"], "holds": False, "wrong": [0]},
            {"words": ["in", "a", "row"], "holds": True, "wrong": []},
        ]
    }
    claims |= {f"{SPLIT}-3": [{"words": ["dog"], "holds": True, "wrong": []}]}
    shares = dict.fromkeys(("captions", "objects", "colours", "places", "relations"), 0.4375)
    digest = files.sha256(run / f"captions-{SPLIT}.json")
    files.write_json(
        run / f"truth-{SPLIT}.json", {"captions_sha256": digest, "truth": {"model": shares}, "claims": claims}
    )
    main([run], split=SPLIT, out=tmp_path / "page.html", pictures=str(root / "files"), each=1, every=True, track=False)
    text = (tmp_path / "page.html").read_text()
    page = Page(text)
    kinds = [each["class"] for each in page.all("article")][-COUNT:]
    assert kinds == ["fails", "fails", "fails", "holds", "fails", "fails"] and "0.438" in page.words
    assert "✗ <s>red</s> dog" in text and "✓ in a row" in text and "claims nothing" in text
    wrong = choose(read_runs([run], SPLIT), 6, every=False)[2]
    assert wrong.image_ids[0] == f"{SPLIT}-1" and f"{SPLIT}-3" not in wrong.image_ids


def test_what_is_not_there_is_not_shown_and_said(root, tmp_path, capsys):
    run = make_run(tmp_path / "run", tmp_path / "nowhere")
    (run / f"attention-{SPLIT}.npz").unlink()
    table = read_table(run / f"scores-{SPLIT}.parquet")
    write_table(run / f"scores-{SPLIT}.parquet", unscored(table))
    Record().here(run).write(run)  # of a training that goes on, whose uploader takes the page
    main([run], split=SPLIT, each=1)
    page = Page((run / f"report-{SPLIT}.html").read_text())
    assert page.all("figure") == [] and "no picture" in page.words
    assert "At random" in page.words and not {"Best", "Worst", "Most confidently wrong"} & set(page.text)
    said = capsys.readouterr().out
    for what in ("pictures: ", "references: ", "run: no attention was kept"):
        assert f"not shown: {what}" in said and f"not shown: {what}" in page.words
    assert json.loads((run / "artifacts.jsonl").read_text()) == {"path": f"report-{SPLIT}.html", "folder": "report"}


def test_pictures_come_from_image_shards_that_lie_beside_the_features(tmp_path, monkeypatch):
    manifest = make_image_dataset(tmp_path / "shards", 3)
    found = find_sources(str(tmp_path / "shards"), "", "train", {"1", "7"})
    assert list(found) == ["1"] and found["1"].read() == encoded(picture(1), "PNG")
    assert list(find_sources("", str(tmp_path / "shards"), "train", {"2"})) == ["2"], "end to end it reads pictures"
    make_feature_dataset(tmp_path / "features")
    real, features = load_manifest, str(tmp_path / "features")
    with pytest.raises(ValueError, match="do not lie beside it; give --pictures FOLDER"):
        find_sources("", features, "train", {"2"})

    def made_of_them(root):
        found = real(root)
        if found.kind == "features":
            found.fingerprint["source"] = manifest.digest
        return found

    monkeypatch.setattr(pictures, "load_manifest", made_of_them)
    assert list(find_sources("", features, "train", {"2"})) == ["2"]
    with pytest.raises(ValueError, match="holds no picture whose name is an image id of split 'train'"):
        find_sources(str(tmp_path / "shards"), features, "train", {"nobody"})
    with pytest.raises(ValueError, match="holds features; --pictures takes image shards or picture files"):
        find_sources(features, features, "train", {"2"})


def test_where_the_encoder_is_not_known_it_saw_the_whole_picture():
    whole = picture(1, (64, 48))
    assert seen_by_encoder(whole, None) is whole and seen_by_encoder(whole, SPEC).size == (96, 96)


def test_a_users_mistake_is_named(root, tmp_path):
    run = make_run(tmp_path / "run", root / "features")
    with pytest.raises(ValueError, match=r"evaluation-test\.json is missing; run `sat evaluate .* --attention` first"):
        main([run], split="test")
    with pytest.raises(ValueError, match="no folder"):
        main([run], split=SPLIT, pictures=str(tmp_path / "nowhere"))
    other = [prediction(f"{SPLIT}-{number}", "something else", -1.0) for number in range(COUNT)]
    write_attention(run / f"attention-{SPLIT}.npz", other, SPEC)
    with pytest.raises(ValueError, match=r"attention-val\.npz is of another evaluation than"):
        main([run], split=SPLIT)
    (run / f"attention-{SPLIT}.npz").unlink()
    write_captions(run / f"captions-{SPLIT}.json", {f"{SPLIT}-0": "something else"}, ())
    with pytest.raises(ValueError, match=r"scores-val\.parquet is of another evaluation than .*captions-val\.json"):
        main([run], split=SPLIT)
    (run / f"captions-{SPLIT}.json").write_text("{}]")
    with pytest.raises(ValueError, match=r"captions-val\.json is no list of image_id and caption"):
        main([run], split=SPLIT)
    (run / f"captions-{SPLIT}.json").unlink()
    with pytest.raises(ValueError, match=r"captions-val\.json is missing; run `sat evaluate"):
        main([run], split=SPLIT)
    (run / f"scores-{SPLIT}.parquet").unlink()
    with pytest.raises(ValueError, match=r"scores-val\.parquet is missing"):
        main([run], split=SPLIT)
    files.write_json(run / f"evaluation-{SPLIT}.json", {"images": 1})
    with pytest.raises(ValueError, match="is no report of an evaluation"):
        main([run], split=SPLIT)
