"""What a training moves, keeps and hands on: from pictures and from features, average, sampling, word vectors."""

import itertools
import json
from math import nan
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from preprocessing import shard_images
from sat import caption, scoring, train
from sat.config import Config, load_config, refuse_ranks
from sat.data.plan import Cursor
from sat.evaluation.split import evaluate
from sat.export import load_model
from sat.learner import build_learner
from sat.meter import Meter
from sat.model.encoders.end_to_end import EndToEnd
from sat.model.encoders.resnet import ResNet
from sat.model.encoders.table import load_encoder
from sat.model.objectives.teacher_forcing import TeacherForcing
from sat.run_folder import Run
from sat.shards.manifest import load_manifest
from sat.training_data import open_data, reading_options
from tests.helpers_shards import make_coco, make_feature_dataset
from tests.helpers_training import SMALL, with_tokenizer


@pytest.fixture(scope="module")
def pictures(tmp_path_factory) -> list[str]:
    """Settings of a training from twelve 64 px pictures, two steps, of which only the encoder's last stage is open."""
    root = tmp_path_factory.mktemp("pictures")
    make_coco(root, {"train": 12, "val": 3}, size=(64, 64))
    files = [f"{split}={root}/annotations/captions_{split}.json" for split in ("train", "val")]
    shard_images.main(out=root / "data", annotations=files, images=root / "images", shard_size=5, num_workers=1)
    torch.manual_seed(0)
    encoder = ResNet()
    for module in encoder.modules():
        if isinstance(module, nn.BatchNorm2d):  # in eval mode nothing else keeps a random network's values small
            nn.init.constant_(module.weight, 0.5)
    save_file(encoder.state_dict(), root / "encoder.safetensors")
    return (
        SMALL
        + with_tokenizer(root)
        + [
            "encoder.train=true",
            f"encoder.weights={root}/encoder.safetensors",
            "encoder.image_size=64",
            "encoder.open_stages=[4]",
            "encoder.learning_rate=0.00002",
            "train.learning_rate=0.003",
        ]
    )


@pytest.fixture(scope="module")
def features(tmp_path_factory) -> list[str]:
    """Settings of a training from 18 images' grids: three steps."""
    root = tmp_path_factory.mktemp("features")
    make_feature_dataset(root / "data", {"train": 18, "val": 4})
    return SMALL + with_tokenizer(root) + ["train.learning_rate=0.01"]


def fresh(given: list[str], alone):
    config = load_config(None, given)
    data = open_data(config)
    return build_learner(config, data, alone), data


def trained(given: list[str], folder: Path, alone) -> Config:
    config = load_config(None, [*given, f"train.run_dir={folder}"])
    train.train(config, alone)
    return config


def stopped_then_continued(given: list[str], folder: Path, alone) -> Path:
    """The folder of a training that is asked to stop in its first step, and then started again."""
    asked = itertools.chain([False], itertools.repeat(True))  # before the first step, then in it
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Run, "stop_wanted", lambda run: next(asked))
        trained(given, folder, alone)
    assert [path.name for path in (folder / "checkpoints").iterdir()] == ["step-00000001"]
    trained(given, folder, alone)
    return folder


def saved(folder: Path, step: int, name: str = "model") -> dict[str, torch.Tensor]:
    return load_file(folder / f"checkpoints/step-{step:08d}/{name}.safetensors")


def assert_equal(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    assert [name for name in ours if not torch.equal(ours[name], theirs[name])] == []


@pytest.fixture(scope="module")
def run_on_pictures(pictures, alone, tmp_path_factory) -> tuple[Path, Config, dict[str, torch.Tensor]]:
    """The folder of a finished training end to end, its settings and the weights it began with."""
    folder = tmp_path_factory.mktemp("runs") / "end_to_end"
    learner, _ = fresh(pictures, alone)
    assert isinstance(learner.model, EndToEnd)
    before = {name: value.clone() for name, value in learner.model.state_dict().items()}
    return folder, trained(pictures, folder, alone), before


@pytest.fixture(scope="module")
def stopped_on_pictures(pictures, alone, tmp_path_factory) -> Path:
    """The folder of the same training, stopped after its first step and continued."""
    return stopped_then_continued(pictures, tmp_path_factory.mktemp("runs") / "stopped", alone)


def test_training_end_to_end_moves_the_open_stage_and_the_captioner_and_nothing_else(run_on_pictures):
    folder, config, before = run_on_pictures
    begun_with = load_file(config.encoder.weights)
    assert all(torch.equal(before[f"encoder.{name}"], value) for name, value in begun_with.items())
    after = saved(folder, 2)
    moved = {name for name in after if not torch.equal(after[name], before[name])}
    convolutions = {name for name, _ in ResNet().named_parameters() if "conv" in name or "downsample.0" in name}
    opened = {f"encoder.{name}" for name in convolutions if name.startswith("layer4.")}
    captioner = {name for name in before if name.startswith("captioner.") and "feature_" not in name}
    assert len(opened) == 10 and moved == opened | captioner


def test_unfrozen_batchnorms_want_the_whole_batch_and_a_skipped_step_leaves_them_as_they_were(pictures, alone):
    """Any share of a batch has other statistics: several ranks or passes would train another model than one."""
    given = [*pictures, "encoder.freeze_batchnorm=false"]
    for config, ranks in (
        (load_config(None, given), 2),
        (load_config(None, [*given, "train.accumulation_steps=2"]), 1),
    ):
        refuse_ranks(load_config(None, [*pictures, "train.accumulation_steps=2"]), 3)
        with pytest.raises(ValueError, match="train another model; train on one process with train.accumulation"):
            refuse_ranks(config, ranks)
    learner, data = fresh(given, alone)
    norms = learner.model.encoder.layer4.state_dict()
    before = {name: value.clone() for name, value in norms.items()}
    spoils = learner.objective.register_forward_hook(lambda _m, _a, sums: sums._replace(per_token=sums.per_token * nan))
    steps = train.steps_from(learner.config, data, Cursor.start(data.sources, 1), alone.processes, Meter())
    run = Run(Path("."), alone.processes, None)
    skipped, _ = train.take_step(learner.config, learner, next(steps), 0, run, Meter())
    assert bool(skipped.skipped)
    assert_equal(norms, before)
    spoils.remove()
    train.take_step(learner.config, learner, next(steps), 1, run, Meter())
    steps.close()
    assert all(not torch.equal(norms[name], before[name]) for name in norms if "running" in name or "tracked" in name)


def test_the_features_are_standardised_by_the_statistics_of_the_training_pictures(run_on_pictures, alone):
    _, config, before = run_on_pictures
    data, encoder = open_data(config), load_encoder(config.encoder.weights)
    steps = train.steps_from(config, data, Cursor.start(data.sources, 1), alone.processes, Meter())
    grids = [encoder(encoder.normalise(batch.grid)).detach() for batches in steps for batch in batches]
    grids = torch.cat(grids).flatten(0, 1)
    assert len(grids) == 12 * 4  # one epoch: every picture once
    for name, expected in (("mean", grids.mean(0)), ("std", grids.std(0, unbiased=False))):
        torch.testing.assert_close(before[f"captioner.feature_{name}"], expected, rtol=1e-3, atol=1e-4)


def test_a_stopped_training_end_to_end_goes_on_exactly(run_on_pictures, stopped_on_pictures):
    assert_equal(saved(stopped_on_pictures, 2), saved(run_on_pictures[0], 2))


def test_adams_first_step_shows_the_encoders_own_learning_rate(run_on_pictures, stopped_on_pictures):
    """Adam's first update of a weight is its rate, whatever the size of a gradient."""
    before, first = run_on_pictures[2], saved(stopped_on_pictures, 1)
    for part, rate in (("encoder", 2e-5), ("captioner", 3e-3)):
        moved = [(first[name] - before[name]).abs().max().item() for name in before if name.startswith(f"{part}.")]
        assert max(moved) == pytest.approx(rate, rel=0.02)


def test_the_model_trained_end_to_end_is_evaluated_and_captions_files_alike(run_on_pictures, pictures, alone, tmp_path):
    folder, config, _ = run_on_pictures
    model = load_model(folder / "best")
    manifest = load_manifest(config.data.features)
    model.refuse_unfit(manifest)
    with torch.no_grad():  # words that depend on the picture: two steps do not teach them
        generator = torch.Generator().manual_seed(0)
        for parameter in model.model.captioner.parameters():
            parameter.normal_(std=3 / parameter.shape[-1] ** 0.5, generator=generator)
    save_file(model.model.state_dict(), tmp_path / "model.safetensors")
    for name in ("config.json", "tokenizer.json"):
        (tmp_path / name).write_text((folder / "best" / name).read_text())
    model = load_model(tmp_path)
    reading = reading_options(model.config, model.features)
    scored = evaluate([model.model], manifest, "val", model.tokenizer, model.config.eval, reading, alone.processes)
    assert sorted(scored.captions) == ["13", "14", "15"] and len(set(scored.captions.values())) > 1
    files = sorted((Path(config.data.features).parent / "images/val").iterdir())
    caption.main(files, model=tmp_path, weights=tmp_path / "none", out=tmp_path / "out", beam_size=2, limit=0)
    written = json.loads((tmp_path / "out/captions.json").read_text())
    assert [each["caption"] for each in written] == list(scored.captions.values())
    assert all((tmp_path / "out" / f"{file.stem}.png").is_file() for file in files)


def test_a_training_from_features_never_runs_an_encoder(features, alone, tmp_path, monkeypatch):
    for method in ("__init__", "forward"):
        monkeypatch.setattr(ResNet, method, lambda *_: pytest.fail("the encoder was used"))
    trained(features, tmp_path / "run", alone)
    assert (tmp_path / "run/best/model.safetensors").is_file()


def test_the_average_is_what_is_saved_scored_and_exported(features, alone, tmp_path, monkeypatch):
    given = [*features, "train.ema=0.5", "train.eval_every=100", "model.weight_init=uniform"]
    weights, scored = [], []
    plain_after_step, plain_evaluate = train.Learner.after_step, scoring.caption_split

    def after_step(learner, *arguments):
        plain_after_step(learner, *arguments)
        weights.append({name: value.detach().clone() for name, value in learner.model.named_parameters()})

    def evaluated(models, *arguments):
        (model,) = models
        scored.append({name: value.clone() for name, value in model.state_dict().items()})
        return plain_evaluate(models, *arguments)

    monkeypatch.setattr(train.Learner, "after_step", after_step)
    monkeypatch.setattr(scoring, "caption_split", evaluated)
    trained(given, tmp_path / "run", alone)
    assert len(weights) == 3 and len(scored) == 1
    exported = load_file(tmp_path / "run/best/model.safetensors")
    kept = {name.removeprefix("module."): value for name, value in saved(tmp_path / "run", 3, "average").items()}
    for name in weights[0]:
        first, second, third = (each[name].double() for each in weights)
        expected = ((first + second) / 2 + third) / 2  # the first update takes the weights as they are
        torch.testing.assert_close(exported[name].double(), expected, rtol=0, atol=1e-6)
        assert (expected - third).abs().max() > 1e-4, name
        assert torch.equal(kept[name], exported[name]) and torch.equal(scored[0][name], exported[name]), name
    buffers = {name: value for name, value in exported.items() if name.startswith("feature_")}
    assert_equal(saved(tmp_path / "run", 3), weights[-1] | buffers)


def test_a_stopped_training_goes_on_with_its_average(features, alone, tmp_path):
    given = [*features, "train.ema=0.5"]
    trained(given, tmp_path / "whole", alone)
    stopped_then_continued(given, tmp_path / "halves", alone)
    for name in ("model", "average"):
        assert_equal(saved(tmp_path / "halves", 3, name), saved(tmp_path / "whole", 3, name))


def test_scheduled_sampling_grows_linearly_with_the_steps(features, alone, tmp_path, monkeypatch):
    seen, plain = [], TeacherForcing.forward

    def forward(objective, grid, captions, lengths, sampling_probability=0.0, *more):
        seen.append(sampling_probability)
        return plain(objective, grid, captions, lengths, sampling_probability, *more)

    monkeypatch.setattr(TeacherForcing, "forward", forward)
    trained([*features, "model.scheduled_sampling=0.6"], tmp_path / "run", alone)
    assert seen == pytest.approx([0, 0.2, 0.4])


@pytest.mark.parametrize("tune", [True, False])
def test_word_vectors_are_where_training_begins_and_move_only_if_tuned(features, alone, tmp_path, tune):
    vectors = tmp_path / "vectors.txt"
    vectors.write_text("red 1 2 3 4 5 6\nblue -1 0.5 0.25 2 3 4\n")
    given = [*features, f"model.word_vectors={vectors}", f"model.tune_word_vectors={str(tune).lower()}"]
    learner, data = fresh(given, alone)
    before = learner.model.embedding.weight.detach().clone()
    words = data.tokenizer.words
    assert before[words.index("red")].tolist() == [1, 2, 3, 4, 5, 6]
    assert before[words.index("blue")].tolist() == [-1, 0.5, 0.25, 2, 3, 4]
    trained(given, tmp_path / "run", alone)
    after = saved(tmp_path / "run", 3)["embedding.weight"]
    changed = (after != before).any(1)
    assert changed[words.index("red")] == tune and changed.any() == tune
