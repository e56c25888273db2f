"""Pre-training: labels that match the pictures, a file that is whole or absent, a run that goes on where it stopped."""

from dataclasses import replace
from random import Random

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from preprocessing import pretrain_encoder
from preprocessing.pretrain_encoder import LAST_RATE, Pretrainer, Recipe, make_encoder, pretrain, pretraining_loss
from preprocessing.scenes.crops import CLASSES, EXTENT, labelled_crops, sample_crop
from preprocessing.scenes.scenes import BACKGROUNDS, render
from sat.model.encoders.resnet import Encoder, load_encoder

TINY = Recipe(steps=3, batch_size=4, size=32)


def test_an_object_lies_within_its_crop_and_has_its_own_colour_there():
    for seed in range(60):
        crop = sample_crop(Random(seed))
        (thing,) = crop.objects
        assert thing.radius <= min(thing.x, thing.y) and max(thing.x, thing.y) <= EXTENT - thing.radius
        pixels = np.asarray(render(crop, EXTENT, extent=EXTENT), dtype=int)
        near = abs(pixels - np.array(thing.rgb)).max(axis=-1) < 8
        rows, columns = np.nonzero(near)
        assert len(rows) > 0.15 * thing.radius**2
        assert (abs(rows - thing.y) <= 1.3 * thing.radius + 2).all() and (
            abs(columns - thing.x) <= 1.3 * thing.radius + 2
        ).all()


def test_a_batch_follows_from_its_seed_alone():
    first, again, other = (labelled_crops(seed, 3, 48) for seed in ("a", "a", "b"))
    assert np.array_equal(first.pixels, again.pixels) and np.array_equal(first.labels, again.labels)
    assert not np.array_equal(first.pixels, other.pixels)
    assert first.pixels.shape == (3, 48, 48, 3) and first.labels.shape == (3, len(CLASSES))


def test_labels_name_what_is_drawn():
    crops = labelled_crops("x", 200, 48)
    for column, classes in enumerate(CLASSES.values()):
        assert set(crops.labels[:, column]) == set(range(len(classes)))
    corner = crops.pixels[:, 0, 0].astype(int)
    ground = np.array(list(BACKGROUNDS.values()))
    nearest = abs(corner[:, None] - ground[None]).sum(-1).argmin(1)
    assert (nearest == crops.labels[:, list(CLASSES).index("background")]).mean() > 0.95


def test_training_learns():
    torch.manual_seed(0)
    model = Pretrainer().train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    crops = labelled_crops("overfit", 6, 32)
    images = pretrain_encoder._images(crops, torch.device("cpu"))
    losses = []
    for _ in range(8):
        loss = pretraining_loss(model(images), crops)
        losses.append(loss.item())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < 0.6 * losses[0]


def test_rate_warms_up_and_ends_at_its_last_share():
    recipe = replace(TINY, steps=100, learning_rate=1.0, warmup=0.1)
    rates = [recipe.rate(step) for step in range(100)]
    assert rates[0] == pytest.approx(0.1) and max(rates) == rates[9] == 1.0
    assert rates[10:] == sorted(rates[10:], reverse=True) and rates[-1] == pytest.approx(LAST_RATE, abs=1e-3)


def test_the_file_is_an_encoder_that_says_what_it_is_and_is_reused(tmp_path):
    out = tmp_path / "deep" / "encoder.safetensors"
    assert make_encoder(out, TINY)
    encoder = load_encoder(out)
    assert torch.isfinite(encoder(torch.randn(1, 3, 64, 64))).all()
    with safe_open(out, "pt") as file:
        assert "not on ImageNet" in file.metadata()["description"]
        assert "head" not in " ".join(file.keys())
    before = out.stat().st_mtime_ns
    assert not make_encoder(out, TINY)
    assert out.stat().st_mtime_ns == before and [path.name for path in out.parent.iterdir()] == [out.name]


def test_a_broken_file_or_one_of_another_recipe_is_made_again(tmp_path, monkeypatch):
    monkeypatch.setattr(pretrain_encoder, "pretrain", lambda recipe, state_file: Encoder(stage=1))
    out = tmp_path / "encoder.safetensors"
    assert make_encoder(out, TINY) and not make_encoder(out, TINY)
    assert make_encoder(out, replace(TINY, seed=2)) and not make_encoder(out, replace(TINY, seed=2))
    out.write_bytes(out.read_bytes()[:-10])
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
