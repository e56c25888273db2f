"""A training that begins from another run's model: what is carried over, what is not, what is refused."""

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from preprocessing import shard_images
from sat import train
from sat.config import load_config
from sat.export import save_model
from sat.learner import build_learner
from sat.model.encoders.resnet import ResNet
from sat.text import CaptionTokenizer
from sat.training_data import open_data
from tests.helpers_shards import make_coco, make_feature_dataset
from tests.helpers_training import SMALL, with_tokenizer
from tests.test_two_process import launch

ROWS = ("embedding.weight", "vocabulary.weight", "vocabulary.bias")


def settings(root: Path, **dataset) -> list[str]:
    make_feature_dataset(root / "data", {"train": 18, "val": 4}, **dataset)
    return [*SMALL, *with_tokenizer(root), "train.learning_rate=0.01"]


def other_captions(split: str, index: int) -> list[str]:
    return [f"a new {split} picture of number {index % 3}", "it is made of words"]


@pytest.fixture(scope="module")
def old(alone, tmp_path_factory) -> tuple[list[str], Path]:
    """Settings of a finished run, and its folder."""
    root = tmp_path_factory.mktemp("old")
    given = settings(root)
    train.train(load_config(None, [*given, f"train.run_dir={root}/run"]), alone)
    return given, root / "run"


@pytest.fixture(scope="module")
def new(tmp_path_factory, old) -> list[str]:
    """Settings of a training on other pictures with other captions, from that run."""
    return [
        *settings(tmp_path_factory.mktemp("new"), captions=other_captions, name="other"),
        f"train.start_from={old[1]}",
    ]


def built(given: list[str], alone, *more: str):
    config = load_config(None, [*given, *more])
    return build_learner(config, open_data(config), alone)


def words_of(given: list[str]) -> tuple[str, ...]:
    (path,) = [each.partition("=")[2] for each in given if each.startswith("data.tokenizer=")]
    return CaptionTokenizer.load(path).words


def test_shared_words_keep_their_rows_and_new_ones_begin_as_in_any_training(old, new, alone, tmp_path, capsys):
    given = [*new, f"train.run_dir={tmp_path}/run"]
    warm = built(given, alone).model.state_dict()
    cold = built([each for each in given if "start_from" not in each], alone).model.state_dict()
    best = load_file(old[1] / "best/model.safetensors")
    before, now = words_of(old[0]), words_of(new)
    shared = [word for word in now if word in before]
    assert len(shared) > 4 and set(now) - set(shared) >= {"new", "words"}
    for name, value in warm.items():
        if name in ROWS:
            for index, word in enumerate(now):
                expected = best[name][before.index(word)] if word in before else cold[name][index]
                assert torch.equal(value[index], expected), (name, word)
        else:
            assert torch.equal(value, cold[name] if name == "feature_scale" else best[name]), name
    ordinary = [word for word in shared if not word.startswith("<")]
    (said,) = [line for line in capsys.readouterr().out.splitlines() if "keep their rows" in line]
    assert f"{len(ordinary)} of {len(now) - 4} words" in said and "new: " in said


def test_the_optimizer_is_fresh_and_the_run_goes_on_by_itself_when_the_other_is_gone(old, new, alone, tmp_path):
    shutil.copytree(old[1], tmp_path / "other")
    given = [*new[:-1], f"train.start_from={tmp_path}/other", f"train.run_dir={tmp_path}/run"]
    assert not built(given, alone).stepper.optimizer.state
    assert train.train(load_config(None, given), alone).step == 3
    shutil.rmtree(tmp_path / "other")
    assert train.train(load_config(None, [*given, "train.epochs=2"]), alone).step == 6
    with pytest.raises(ValueError, match=r"train\.start_from: the run has '.*other', now ''"):
        train.train(load_config(None, [*given, "train.epochs=2", "train.start_from="]), alone)


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["model.lstm_dim=9"], r"model\.lstm_dim is 8 there, 9 here"),
        (
            ["model.preset=tutorial"],
            r"state_init is 'mlp' there, 'linear' here; .*gate is 'scalar' there, 'vector' here",
        ),
        (["model.attention=none"], r"model\.attention is 'soft' there, 'none' here"),
        (["train.start_from=nowhere"], r"nowhere/best is not a trained model"),
    ],
)
def test_another_model_is_refused_by_the_names_and_values_of_its_settings(new, alone, tmp_path, more, said):
    with pytest.raises(ValueError, match=said):
        built(new, alone, f"train.run_dir={tmp_path}/run", *more)


def test_other_features_are_refused(old, alone, tmp_path):
    given = [*settings(tmp_path, grid=(2, 3)), f"train.start_from={old[1]}", f"train.run_dir={tmp_path}/run"]
    with pytest.raises(
        ValueError, match=rf"train\.start_from {old[1]}: .*its grid is \[2, 3\], but \[2, 2\] is needed"
    ):
        built(given, alone)


def test_a_run_does_not_begin_from_itself(old):
    with pytest.raises(ValueError, match=r"train\.start_from is train\.run_dir"):
        load_config(None, [f"train.start_from={old[1]}", f"train.run_dir={old[1]}/../run"])


def test_hard_attention_may_begin_from_soft(new, alone, tmp_path):
    learner = built(new, alone, f"train.run_dir={tmp_path}/run", "model.attention=hard")
    assert learner.model.reward_baseline == 0


def test_an_encoder_that_was_trained_comes_along_and_is_needed(new, alone, tmp_path):
    make_coco(tmp_path, {"train": 6, "val": 3}, size=(64, 64))
    files = [f"{split}={tmp_path}/annotations/captions_{split}.json" for split in ("train", "val")]
    shard_images.main(out=tmp_path / "data", annotations=files, images=tmp_path / "images", num_workers=1)
    torch.manual_seed(0)
    save_file(ResNet().state_dict(), tmp_path / "encoder.safetensors")
    weights = f"encoder.weights={tmp_path}/encoder.safetensors"
    given = [*SMALL, *with_tokenizer(tmp_path), "encoder.train=true", weights, "encoder.image_size=64"]
    given += ["train.warmup_steps=0", f"train.run_dir={tmp_path}/run"]
    config = load_config(None, given)
    data = open_data(config)
    model = build_learner(config, data, alone).model
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.01)
    save_model(tmp_path / "other/best", model.state_dict(), data.tokenizer, config, data.features, 1)
    warm = built(given, alone, f"train.start_from={tmp_path}/other", "train.seed=7").model
    expected = model.state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in warm.state_dict().items())
    with pytest.raises(ValueError, match=r"its encoder was trained with it.*set encoder\.train=true"):
        built(new, alone, f"train.start_from={tmp_path}/other", f"train.run_dir={tmp_path}/run")


@pytest.mark.parametrize("engine", ["ddp", "zero2"])
def test_two_real_processes_begin_with_its_weights(old, new, tmp_path, engine):
    given = [*new, f"train.run_dir={tmp_path}/run", "train.learning_rate=1e-20"]
    if engine == "zero2":
        pytest.importorskip("deepspeed")
    (tmp_path / "config.yaml").write_text("train: {}\n")
    said = launch(["-m", "sat.train", str(tmp_path / "config.yaml"), *given], 2, engine)
    assert said.count("keep their rows") == 1
    best, ours = (load_file(folder / "best/model.safetensors") for folder in (old[1], tmp_path / "run"))
    before, now = words_of(old[0]), words_of(new)
    shared = [(before.index(word), now.index(word)) for word in now if word in before]
    for name, value in ours.items():
        if name in ROWS:
            assert all(torch.allclose(value[here], best[name][there], atol=1e-7) for there, here in shared), name
        elif name != "feature_scale":
            assert torch.allclose(value, best[name], atol=1e-7), name
