"""The vocabulary comes from training captions alone."""

import json

from sat.text import SPECIALS, CaptionTokenizer
from tests.helpers_shards import make_feature_dataset, real_data, run_program


def captions(split: str, index: int) -> list[str]:
    return [f"A {split} word{index % 2}!", "the same words"]


def test_only_the_named_splits_are_read_and_rare_words_dropped(tmp_path):
    make_feature_dataset(tmp_path / "set", {"train": 9, "restval": 3, "val": 9}, captions=captions)
    run_program("build_vocab", "--features", tmp_path / "set", "--out", tmp_path / "a.json", "--min-count", "5")
    words = CaptionTokenizer.load(tmp_path / "a.json").words[len(SPECIALS) :]
    assert words == ["a", "same", "the", "train", "words", "word0"]
    both = ["--splits", "train", "--splits", "restval", "--min-count", "3", "--out", tmp_path / "b.json"]
    run_program("build_vocab", "--features", tmp_path / "set", *both)
    assert {"restval", "word1"} < set(CaptionTokenizer.load(tmp_path / "b.json").words)


def test_equal_captions_give_an_equal_file_in_any_environment(tmp_path):
    make_feature_dataset(tmp_path / "set", {"train": 9}, captions=captions)
    for name, environment in (("a", {}), ("b", {"PYTHONHASHSEED": "5", "LC_ALL": "tr_TR.UTF-8"})):
        run_program(
            "build_vocab", "--features", tmp_path / "set", "--out", tmp_path / name, "--min-count", "1", **environment
        )
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_missing_splits_and_sources_are_named(tmp_path):
    make_feature_dataset(tmp_path / "set", {"val": 3})
    failed = run_program("build_vocab", "--features", tmp_path / "set", "--out", tmp_path / "x", code=1)
    assert "no split 'train'; it has val" in failed.stderr and not (tmp_path / "x").exists()
    assert "--annotations" in run_program("build_vocab", code=1).stderr


def test_a_vocabulary_without_a_word_is_refused(tmp_path):
    make_feature_dataset(tmp_path / "set", {"train": 3}, captions=captions)
    options = ["--features", tmp_path / "set", "--min-count", 4, "--out", tmp_path / "x"]
    assert "no word occurs 4 times in 6 captions" in run_program("build_vocab", *options, code=1).stderr
    assert not (tmp_path / "x").exists()


def test_statistics_of_the_real_captions_of_coco_val2017(tmp_path):
    annotations = f"val={real_data()}/coco_val2017/captions_val2017.json"
    run_program("build_vocab", "--annotations", annotations, "--splits", "val", "--statistics", tmp_path / "s.json")
    found = json.loads((tmp_path / "s.json").read_text())
    raw = [
        a["caption"]
        for a in json.loads((real_data() / "coco_val2017/captions_val2017.json").read_text())["annotations"]
    ]
    lengths = sorted(len("".join(c if c.isalnum() else " " for c in text).split()) for text in raw)
    assert found["captions"] == len(raw) == 25014
    assert found["words"] == sum(lengths) and found["length_max"] == lengths[-1]
    assert found["length_median"] == lengths[len(lengths) // 2]
    assert 10 < found["length_mean"] < 11 and found["vocabulary"] < found["distinct_words"] and found["coverage"] > 0.95


def test_sentences_taken_for_words_are_warned_of_with_the_setting_that_splits_them(tmp_path):
    make_feature_dataset(
        tmp_path / "set", {"train": 4}, captions=lambda split, i: ["一只棕色的狗在绿色的草地上奔跑", "狗"]
    )
    options = ["--features", tmp_path / "set", "--min-count", 1, "--out", tmp_path / "x"]
    assert (
        "look like sentences" in (said := run_program("build_vocab", *options).stderr) and "--words characters" in said
    )
    assert "warning" not in run_program("build_vocab", *options, "--words", "characters").stderr
    assert CaptionTokenizer.load(tmp_path / "x").word_rule == "characters"
    assert "choose one of basic" in run_program("build_vocab", *options, "--words", "letters", code=1).stderr
