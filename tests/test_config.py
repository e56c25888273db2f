"""Settings: what a file or an argument may say, and how a mistake is answered."""

import re
from pathlib import Path

import hypothesis
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sat.config import config_from_dict, config_to_dict, fixed_settings, load_config, save_config
from sat.train_state import Identity

ROOT = Path(__file__).parents[1]
SHIPPED = sorted((ROOT / "configs").glob("*.yaml"))


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.name)
def test_every_shipped_file_loads_and_says_how_to_run_it(path):
    load_config(path)
    header = [line for line in path.read_text().splitlines() if line.startswith("#")]
    assert any("sat.train" in line and path.name in line for line in header)


def test_there_are_shipped_files():
    assert {"demo.yaml", "coco_paper.yaml", "coco_tutorial.yaml"} <= {path.name for path in SHIPPED}


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("train.learning_rat=1", "nearest valid one is 'train.learning_rate'"),
        ("trian.epochs=1", "nearest valid one is 'train'"),
        ("train.epochs=many", "train.epochs"),
        ("train.epochs=1.5", "train.epochs"),
        ("train.learning_rate=-1e-3", "train.learning_rate is -0.001; it must be above 0"),
        ("train.learning_rate=.inf", "finite"),
        ("train.learning_rate=.nan", "finite"),
        ("model.dropout=1", "below 1"),
        ("model.gate=sigmoid", "choose one of scalar, vector, none"),
        ("model.preset=papers", "choose one of paper, tutorial"),
        ("model.scheduled_sampling=2", "at most 1"),
        ("train=3", "must hold settings"),
        ("train.epochs", "not of the form key=value"),
        ("data.eval_split=train", "also in data.train_splits"),
        ("data.train_splits=[]", "name at least one"),
        ("train.accumulation_steps=65", "exceeds train.global_batch"),
        ("encoder.train=true", "encoder.weights"),
        ("eval.metrics=[BLEU]", "CIDEr must be in it"),
        ("data.extra=[{features: a, wait: 1}]", "weight"),
        ("data.extra=[{features: '', weight: 1}]", "data.extra"),
        ("data.extra=[{features: a, weight: 0}]", "data.extra.weight is 0.0; it must be above 0"),
        ("eval.beam_size=0", "eval.beam_size is 0; it must be at least 1"),
        ("eval.top_k=3", "no effect on method beam"),
    ],
)
def test_a_mistake_is_refused_naming_the_setting_and_the_way_out(override, expected):
    with pytest.raises(ValueError, match=r"[a-z]") as refusal:
        load_config(None, [override])
    assert expected in str(refusal.value)


def test_a_later_layer_wins_and_the_preset_lies_under_the_file(tmp_path):
    path = tmp_path / "a.yaml"
    path.write_text("model: {preset: tutorial, gate: none}\ntrain: {epochs: 3, learning_rate: 4e-4}\n")
    config = load_config(path, ["train.epochs=5"])
    assert (config.model.score, config.model.gate) == ("relu", "none")
    assert (config.train.epochs, config.train.learning_rate) == (5, 4e-4)


def test_a_preset_given_as_argument_replaces_the_files(tmp_path):
    path = tmp_path / "a.yaml"
    path.write_text("model: {preset: tutorial}\n")
    assert load_config(path, ["model.preset=paper"]).model.state_init == "mlp"


@pytest.mark.parametrize("text", ["a: [", "- 1\n- 2\n", "just words"])
def test_a_broken_file_is_refused_by_name(tmp_path, text):
    path = tmp_path / "broken.yaml"
    path.write_text(text)
    with pytest.raises(ValueError, match=r"broken\.yaml"):
        load_config(path)


def test_a_missing_file_is_refused_by_name():
    with pytest.raises(ValueError, match=r"no config file nowhere\.yaml"):
        load_config("nowhere.yaml")


@hypothesis.settings(deadline=None, max_examples=20)
@given(epochs=st.integers(1, 10**6), rate=st.floats(1e-9, 10), splits=st.lists(st.text("abc", min_size=1), min_size=1))
def test_what_is_saved_is_what_is_loaded(tmp_path_factory, epochs, rate, splits):
    given_ = [f"train.epochs={epochs}", f"train.learning_rate={rate!r}", f"data.train_splits=[{','.join(splits)}]"]
    config = load_config(None, [*given_, "model.preset=tutorial", "data.extra=[{features: x, weight: 0.5}]"])
    path = tmp_path_factory.mktemp("config") / "config.yaml"
    save_config(config, path)
    assert load_config(path) == config == config_from_dict(config_to_dict(config))


def test_yaml_cannot_run_code(tmp_path):
    path = tmp_path / "a.yaml"
    path.write_text(f"train: !!python/object/apply:pathlib.Path.touch [{tmp_path}/executed]\n")
    with pytest.raises(ValueError):
        load_config(path)
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize(
    ("setting", "before", "now"),
    [("data.train_splits=[train,restval]", "['train']", "['train', 'restval']"), ("data.max_caption_length=7", 50, 7)],
)
def test_a_training_of_other_splits_or_of_captions_cut_elsewhere_is_another_one(setting, before, now):
    def identity(*overrides):
        return Identity(fixed_settings(load_config(ROOT / "configs" / "demo.yaml", overrides)), [], "digest")

    identity().refuse(identity())
    name = setting.partition("=")[0]
    with pytest.raises(ValueError, match=re.escape(f"another training ({name}: the run has {before}, now {now})")):
        identity().refuse(identity(setting))
