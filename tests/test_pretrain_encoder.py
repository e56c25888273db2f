"""Pre-training: labels that match the pictures, a file that is whole or absent, a run that goes on where it stopped."""

from dataclasses import replace
from random import Random

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import nn

from preprocessing import pretrain_encoder
from preprocessing.crowds import ARRANGEMENTS, label_cells, labelled_batch, sample_crowd
from preprocessing.pretrain_encoder import (
    Pretrainer,
    Recipe,
    calibrate_batchnorm,
    make_encoder,
    pretrain,
    pretraining_loss,
)
from preprocessing.scenes import BACKGROUNDS, COLOURS, SHAPES, SIZE, SIZES, sample_scene
from sat.model.encoder import Encoder, load_encoder

TINY = Recipe(steps=3, batch_size=2, size=64)


@pytest.mark.parametrize("sample", [sample_scene, sample_crowd])
@pytest.mark.parametrize("side", [2, 7])
def test_a_cell_is_labelled_by_the_object_under_its_centre(sample, side):
    cell = SIZE / side
    for seed in range(30):
        scene = sample(Random(seed))
        labels = label_cells(scene, side)
        for row in range(side):
            for column in range(side):
                x, y = (column + 0.5) * cell, (row + 0.5) * cell
                expected = [(len(SHAPES), len(COLOURS), len(SIZES))]
                for thing in scene.objects:
                    reach = max(thing.radius, cell / 2)
                    if abs(thing.x - x) <= reach and abs(thing.y - y) <= reach:
                        classes = SHAPES.index(thing.shape), COLOURS.index(thing.colour), SIZES.index(thing.size)
                        expected.append(classes)
                found = labels[row * side + column]
                assert tuple(found[:3]) == expected[-1]
                assert tuple(found[3:]) == (int(3 * x / SIZE), int(3 * y / SIZE))


def test_every_object_of_a_scene_is_seen_by_a_cell():
    for seed in range(100):
        scene = sample_scene(Random(seed))
        seen = {SHAPES[shape] for shape in label_cells(scene, 7)[:, 0] if shape < len(SHAPES)}
        assert seen == {thing.shape for thing in scene.objects}


def test_objects_of_a_crowd_do_not_hide_one_another():
    for seed in range(50):
        things = sample_crowd(Random(seed)).objects
        assert len(things) > 3
        for index, first in enumerate(things):
            for second in things[:index]:
                apart = max(abs(first.x - second.x), abs(first.y - second.y))
                assert apart > 0.9 * (first.radius + second.radius)


def test_a_batch_follows_from_its_seed_alone():
    first, again, other = (labelled_batch(seed, 3, 64, crowded=0.5) for seed in ("a", "a", "b"))
    assert all(np.array_equal(getattr(first, name), getattr(again, name)) for name in ("pixels", "cells", "pictures"))
    assert not np.array_equal(first.pixels, other.pixels)
    assert first.pixels.shape == (3, 64, 64, 3) and first.cells.shape == (3, 4, 5)


def test_share_of_crowds_and_picture_labels():
    crowds = labelled_batch("x", 20, 64, crowded=1.0).pictures[:, 1]
    assert (crowds == ARRANGEMENTS.index(("crowd", 0))).all()
    scenes = labelled_batch("x", 40, 64, crowded=0.0)
    assert set(scenes.pictures[:, 1]) == set(range(5))
    bright = [scenes.pixels[index, 0, 0].mean() for index in range(40)]
    white = scenes.pictures[:, 0] == tuple(BACKGROUNDS).index("white")
    assert white.any() and np.min(np.array(bright)[white]) > np.max(np.array(bright)[~white])


def test_training_learns():
    torch.manual_seed(0)
    model = Pretrainer().train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    batch = labelled_batch("overfit", 4, 64, crowded=0.5)
    images = pretrain_encoder._images(batch, torch.device("cpu"))
    losses = []
    for _ in range(12):
        loss = pretraining_loss(*model(images), batch)
        losses.append(loss.item())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < 0.5 * losses[0]


def test_rate_warms_up_and_ends_near_zero():
    recipe = replace(TINY, steps=100, learning_rate=1.0, warmup=0.1)
    rates = [recipe.rate(step) for step in range(100)]
    assert rates[0] == pytest.approx(0.1) and max(rates) == rates[9] == 1.0
    assert rates[10:] == sorted(rates[10:], reverse=True) and rates[-1] < 1e-3


def test_the_file_is_an_encoder_that_says_what_it_is_and_is_reused(tmp_path):
    out = tmp_path / "deep" / "encoder.safetensors"
    assert make_encoder(out, TINY)
    encoder = load_encoder(out)
    assert torch.isfinite(encoder(torch.randn(1, 3, 64, 64))).all()
    with safe_open(out, "pt") as file:
        assert "not on ImageNet" in file.metadata()["description"]
        assert not any("head" in name for name in file.keys())
    before = out.stat().st_mtime_ns
    assert not make_encoder(out, TINY)
    assert out.stat().st_mtime_ns == before and [path.name for path in out.parent.iterdir()] == [out.name]
    out.write_bytes(out.read_bytes()[:-10])
    assert make_encoder(out, TINY)
    assert make_encoder(out, replace(TINY, seed=2))


def test_an_interrupted_run_goes_on_to_the_same_weights(tmp_path, monkeypatch):
    make_encoder(tmp_path / "straight.safetensors", TINY)
    genuine = pretrain_encoder._train_step

    def failing(model, optimizer, recipe, step, device):
        if step == 2:
            raise KeyboardInterrupt
        genuine(model, optimizer, recipe, step, device)

    out = tmp_path / "resumed.safetensors"
    monkeypatch.setattr(pretrain_encoder, "SAVE_EVERY", 2)
    monkeypatch.setattr(pretrain_encoder, "_train_step", failing)
    with pytest.raises(KeyboardInterrupt):
        make_encoder(out, TINY)
    assert not out.exists() and out.with_name(out.name + ".unfinished").exists()
    steps = []
    monkeypatch.setattr(pretrain_encoder, "_train_step", lambda *args: (steps.append(args[3]), genuine(*args)))
    assert make_encoder(out, TINY)
    assert steps == [2] and not out.with_name(out.name + ".unfinished").exists()
    straight, resumed = load_file(tmp_path / "straight.safetensors"), load_file(out)
    for name, tensor in straight.items():
        torch.testing.assert_close(resumed[name], tensor, rtol=0, atol=0, msg=name)


def test_an_unfinished_run_of_another_recipe_is_not_continued(tmp_path, monkeypatch):
    monkeypatch.setattr(pretrain_encoder, "SAVE_EVERY", 1)
    state_file = tmp_path / "state"
    pretrain(replace(TINY, steps=1), state_file)
    steps = []
    monkeypatch.setattr(pretrain_encoder, "_train_step", lambda *args: steps.append(args[3]))
    pretrain(TINY, state_file)
    assert steps == [0, 1, 2]


def test_calibrated_statistics_are_the_averages_over_ordinary_scenes():
    torch.manual_seed(0)
    encoder = Encoder(stage=1)
    device = torch.device("cpu")
    inputs = []
    encoder.bn1.register_forward_pre_hook(lambda module, args: inputs.append(args[0].float().mean(dim=(0, 2, 3))))
    calibrate_batchnorm(encoder, TINY, device)
    assert len(inputs) == pretrain_encoder.CALIBRATION_BATCHES
    torch.testing.assert_close(encoder.bn1.running_mean, torch.stack(inputs).mean(dim=0), rtol=1e-3, atol=1e-3)
    assert all(norm.momentum == 0.1 for norm in encoder.modules() if isinstance(norm, nn.BatchNorm2d))
