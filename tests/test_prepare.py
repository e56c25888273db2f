"""From anybody's folder to a training in one command, again and again, and nothing of anybody's is touched."""

import json
import os
from collections import Counter
from pathlib import Path

import pytest

from preprocessing.annotations.read import read_annotations
from preprocessing.features.lite import LITE0, convert_lite
from preprocessing.prepare import main
from preprocessing.preparing.discover import discover
from preprocessing.preparing.settings import Prepared, configuration, held_out
from sat.config import load_config
from sat.shards.manifest import load_manifest
from sat.text import CaptionTokenizer
from sat.training_data import open_data
from tests.helpers_shards import encoded, picture, real_data, snapshot


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    path = tmp_path_factory.mktemp("weights") / "lite0.safetensors"
    convert_lite(LITE0, path)
    return str(path)


def make_folder(root: Path, count: int = 10) -> Path:
    """COUNT pictures in ROOT/Images and Kaggle's table of two captions each."""
    (root / "Images").mkdir(parents=True)
    lines = ["image,caption"]
    for index in range(count):
        (root / "Images" / f"{index}.jpg").write_bytes(encoded(picture(index)))
        lines += [f"{index}.jpg,a dog number {index}", f'{index}.jpg,"one more dog, brown"']
    (root / "captions.txt").write_text("\n".join(lines) + "\n")
    return root


def prepare(data, out, weights, **options):
    main(data, out, weights=weights, **{"size": 64} | options)


def test_one_command_makes_all_that_a_training_opens_and_a_second_run_changes_nothing(tmp_path, weights, capsys):
    data = make_folder(tmp_path / "my pictures")
    before, out = snapshot(data), data / "ready"
    prepare(data, out, weights)
    said = capsys.readouterr().out
    assert f"sat train '{out}'/config.yaml" in said and "the scores mean nothing" in said
    made = snapshot(out)
    config = load_config(out / "config.yaml")
    opened = open_data(config)
    assert load_manifest(out / "features").splits == {"train": 8, "val": 2}
    assert opened.total_steps > config.train.warmup_steps
    assert opened.tokenizer.words[4:8] == ["dog", "a", "brown", "more"]
    prepare(data, out, weights)
    assert "0 shards written, 2 reused" in capsys.readouterr().out and snapshot(out) == made
    assert {name: data for name, data in snapshot(data).items() if not name.startswith("ready/")} == before


def test_what_was_edited_is_kept_and_said(tmp_path, weights, capsys):
    data, out = make_folder(tmp_path / "data"), tmp_path / "out"
    prepare(data, out, weights)
    edited = (out / "config.yaml").read_text().replace("epochs: 60", "epochs: 3")
    (out / "config.yaml").write_text(edited)
    prepare(data, out, weights)
    assert "config.yaml: kept, as it was edited" in capsys.readouterr().out
    assert (out / "config.yaml").read_text() == edited
    (out / "config.yaml").unlink()
    prepare(data, out, weights)
    assert "epochs: 60" in (out / "config.yaml").read_text()


@pytest.mark.faults
def test_a_folder_that_holds_other_things_is_refused_untouched(tmp_path, weights):
    data = make_folder(tmp_path / "data")
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "config.yaml").write_text("mine")
    refused = {data: "is the folder of the data", mine: "holds other things", mine / "config.yaml": "is a file"}
    for out, message in refused.items():
        before = snapshot(tmp_path)
        with pytest.raises(ValueError, match=message):
            prepare(data, out, weights)
        assert snapshot(tmp_path) == before


@pytest.mark.faults
def test_too_few_pictures_and_wrong_options_are_one_sentence(tmp_path, weights):
    data = make_folder(tmp_path / "data", 1)
    with pytest.raises(ValueError, match=r"at least one of train and one of val"):
        prepare(data, tmp_path / "a", weights)
    with pytest.raises(ValueError, match="--out DIR"):
        main(data)
    with pytest.raises(ValueError, match="choose one of basic, characters, none"):
        prepare(data, tmp_path / "b", weights, words="letters")
    with pytest.raises(ValueError, match="no such file or folder"):
        prepare(tmp_path / "none", tmp_path / "b", weights)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="a folder without pictures"):
        prepare(tmp_path / "empty", tmp_path / "b", weights)
    assert not (tmp_path / "b").exists()


def test_pictures_without_captions_become_features_and_no_training(tmp_path, weights, capsys):
    data = make_folder(tmp_path / "data", 3)
    (data / "captions.txt").unlink()
    prepare(data, tmp_path / "out", weights)
    assert "sat caption" in (said := capsys.readouterr().out) and "sat train" not in said
    assert load_manifest(tmp_path / "out" / "features").splits == {"test": 3}
    assert not (tmp_path / "out" / "config.yaml").exists()
    settings = [f"data.features={tmp_path}/out/features", "data.train_splits=[test]", "train.precision=fp32"]
    with pytest.raises(ValueError, match="split 'test' of .* have no captions: they can be captioned"):
        open_data(load_config(None, settings))


def test_equal_pictures_do_not_straddle_splits(tmp_path):
    data = make_folder(tmp_path / "data", 40)
    for index in range(20, 40):  # every picture twice
        (data / "Images" / f"{index}.jpg").write_bytes((data / "Images" / f"{index - 20}.jpg").read_bytes())
    records = read_annotations([str(data / "captions.txt")], image_root=data, hold_out=held_out)
    split = {int(record.image_id): record.split for record in records.images}
    assert len(split) == 40 and not records.left_out and Counter(split.values()) == {"train": 32, "val": 8}
    assert all(split[index] == split[index + 20] for index in range(20))


def test_the_same_picture_in_two_splits_of_the_data_is_left_out_of_the_one_learnt_from(tmp_path):
    data = make_folder(tmp_path / "data", 4)
    (data / "Images" / "3.jpg").write_bytes((data / "Images" / "0.jpg").read_bytes())
    lines = (data / "captions.txt").read_text().splitlines()
    (data / "train.csv").write_text("\n".join(lines[:7]))
    (data / "val.csv").write_text("\n".join([lines[0], *lines[7:], "1.jpg,again a dog"]))
    paths = [f"{split}={data}/{split}.csv" for split in ("train", "val")]
    with pytest.raises(ValueError, match="image id 1 stands for .*1.jpg in train and .*1.jpg in val"):
        read_annotations(paths, image_root=data)
    (data / "val.csv").write_text("\n".join([lines[0], *lines[7:]]))
    records = read_annotations(paths, image_root=data)
    assert [(item.image_id, item.reason) for item in records.left_out] == [
        ("0", "the same picture is in another split")
    ]
    assert {record.image_id: record.split for record in records.images} == {"1": "train", "2": "train", "3": "val"}


@pytest.mark.parametrize(
    ("pictures", "splits", "expected"),
    [
        (1, {"train"}, (0, 0)),
        (2, {"train"}, (1, 0)),
        (30, {"train"}, (6, 0)),
        (150, {"train"}, (15, 0)),
        (1000, {"train"}, (100, 100)),
        (100_000, {"train"}, (5000, 5000)),
        (1000, {"train", "val"}, (0, 100)),
        (1000, {"train", "test"}, (100, 0)),
    ],
)
def test_how_many_pictures_are_held_out(pictures, splits, expected):
    assert held_out(pictures, frozenset(splits)) == expected


@pytest.mark.parametrize("pictures", [1, 2, 24, 99, 100, 999, 6000, 49_999, 100_000, 1_000_000])
def test_settings_of_any_size_are_a_configuration_that_can_be_trained(tmp_path, pictures):
    prepared = Prepared(tmp_path / "it's", ("train",), pictures, 5 * pictures, 5, 15)
    (tmp_path / "c.yaml").write_text(configuration(prepared))
    config = load_config(tmp_path / "c.yaml")
    steps = -(-pictures // config.train.global_batch) * config.train.epochs
    assert config.train.warmup_steps < steps and 0 < config.train.eval_every <= steps
    assert config.data.features == str(tmp_path / "it's" / "features")


def test_of_a_folder_the_captions_and_split_lists_are_found_and_the_rest_is_said(tmp_path):
    data = make_folder(tmp_path / "data", 6)
    (data / "notes.txt").write_text("bought in May\n")
    found = discover(data)
    assert found.format == "table" and found.annotations == (str(data / "captions.txt"),)
    assert any("notes.txt" in line and "not used" in line for line in found.said)
    (data / "captions.txt").rename(data / "captions.csv")
    (data / "copy.csv").write_bytes((data / "captions.csv").read_bytes())
    assert len(discover(data).annotations) == 1, "a copy counts once"
    token = data / "Flickr8k.token.txt"
    token.write_text("".join(f"{n}.jpg#0\ta dog\n" for n in range(6)))
    (data / "Flickr8k.lemma.token.txt").write_text(token.read_text().replace("dog", "dogs"))
    for split, names in (("train", range(4)), ("dev", (4,)), ("test", (5,))):
        (data / f"Flickr_8k.{split}Images.txt").write_text("\ufeff" + "".join(f"{n}.jpg\n" for n in names))
    found = discover(data)
    assert found.format == "flickr" and found.annotations == (str(token),)
    records = read_annotations(found.annotations, image_root=data, split_lists=found.split_lists, hold_out=held_out)
    assert Counter(record.split for record in records.images) == {"train": 4, "val": 1, "test": 1}


def test_explain_says_what_a_folder_is_taken_for(tmp_path, capsys):
    main(make_folder(tmp_path / "data", 3), explained=True)
    said = capsys.readouterr().out
    assert "captions.txt: taken for table" in said and "'a dog number 0'" in said and said.count("image ") == 3
    assert os.listdir(tmp_path) == ["data"]


def test_the_layout_of_real_flickr8k_is_found_with_its_splits():
    data = real_data() / "flickr8k"
    if not data.is_dir():
        pytest.skip(f"no Flickr8k at {data}")
    found = discover(data)
    assert found.format == "flickr" and len(found.annotations) == 1
    assert sorted(item.split("=")[0] for item in found.split_lists) == ["train", "val"]


@pytest.mark.parametrize(
    ("listed", "stored"),
    [
        ("val2014/COCO_val2014_000000000042.jpg", "val2017/000000000042.jpg"),
        ("000000000042.jpg", "val2014/COCO_val2014_000000000042.jpg"),
        ("photos\\42.jpg", "photos/42.jpg"),
        ("42.jpg", "42.JPG"),
        ("caf\u00e9.jpg", "cafe\u0301.jpg"),
        ("42", "deep/er/42.png"),
    ],
)
def test_a_picture_of_another_year_system_case_or_composition_is_found_and_noted(tmp_path, listed, stored):
    path = tmp_path / "images" / stored
    path.parent.mkdir(parents=True)
    path.write_bytes(b"x")
    (tmp_path / "c.jsonl").write_text(json.dumps({"file_name": listed, "text": "a dog"}))
    records = read_annotations([str(tmp_path / "c.jsonl")], image_root=tmp_path / "images")
    assert [record.file_name for record in records.images] == [stored]
    assert records.notes == {"pictures found under another name or folder": 1}


@pytest.mark.faults
def test_of_two_files_that_could_be_meant_none_is_guessed(tmp_path):
    for folder in ("a", "b"):
        (tmp_path / "images" / folder).mkdir(parents=True)
        (tmp_path / "images" / folder / "1.JPG").write_bytes(folder.encode())
    (tmp_path / "c.jsonl").write_text(json.dumps({"file_name": "1.jpg", "text": "a dog"}))
    (item,) = read_annotations([str(tmp_path / "c.jsonl")], image_root=tmp_path / "images").left_out
    assert item.reason == "several files could be meant" and item.detail == "a/1.JPG or b/1.JPG"
    (tmp_path / "c.jsonl").write_text(json.dumps({"file_name": "b/1.jpg", "text": "a dog"}))
    (record,) = read_annotations([str(tmp_path / "c.jsonl")], image_root=tmp_path / "images").images
    assert record.file_name == "b/1.JPG"


def test_the_tokenizer_keeps_the_rule_of_words_that_was_asked_for(tmp_path, weights, capsys):
    data = make_folder(tmp_path / "data", 4)
    sentence = "一只棕色的狗在绿色的草地上奔跑"
    (data / "captions.txt").write_text("image,caption\n" + "".join(f"{n}.jpg,{sentence}\n" for n in range(4)))
    prepare(data, tmp_path / "out", weights)
    assert "--words characters" in capsys.readouterr().err
    prepare(data, tmp_path / "out", weights, words="characters", overwrite=True)
    assert CaptionTokenizer.load(tmp_path / "out" / "tokenizer.json").word_rule == "characters"
