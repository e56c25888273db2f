"""Region features from real shards into batches, training and evaluation."""

import json

import numpy as np
import pytest
import torch
import yaml

from preprocessing.features.statistics import restore, store
from sat import files
from sat.captioning import Captioning
from sat.config import load_config
from sat.data.loader import Reading, evaluation_batches
from sat.data.options import LoaderOptions
from sat.data.reader import BadSample
from sat.evaluation.split import evaluate
from sat.export import load_model
from sat.learner import build_learner
from sat.shards.manifest import load_manifest, load_statistics
from sat.shards.schema import sample_rows
from sat.text import CaptionTokenizer
from sat.train import train
from sat.training_data import open_data, reading_options
from tests.helpers_engines import launch
from tests.helpers_import import (
    D,
    boxes_of,
    ids_of,
    make_region_dataset,
    regions_of,
    run_import,
    values_of,
    write_annotations,
)
from tests.helpers_shards import flip_bit, read_batches
from tests.helpers_training import SMALL, engine_alone, with_tokenizer


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    folder = tmp_path_factory.mktemp("regions")
    make_region_dataset(folder, {"train": 23, "val": 7}, dtype="fp16")
    return folder


@pytest.fixture(scope="module")
def settings(root):
    return [*SMALL, *with_tokenizer(root)]


def batches_of(root, **changes):
    with_tokenizer(root)
    tokenizer = CaptionTokenizer.load(root / "tokenizer.json")
    return read_batches([(load_manifest(root / "data"), 1.0)], tokenizer, **changes)


def assert_holds_its_images(batch, manifest):
    spec, scale = manifest.spec, load_statistics(manifest)["scale"]
    counts = [regions_of(int(image)) if image else 0 for image in batch.image_ids]
    assert batch.regions.tolist() == counts and batch.regions.dtype == torch.int64
    assert batch.grid.shape == (len(counts), max(1, *counts), D) and batch.boxes.shape == (*batch.grid.shape[:2], 4)
    for row, (image, count) in enumerate(zip(batch.image_ids, counts)):
        if image:
            stored = store(values_of(int(image), count), spec.dtype, scale)
            found = batch.grid[row, :count].float().numpy() * scale
            assert np.array_equal(found, restore(stored, spec.dtype, scale))
            assert np.allclose(batch.boxes_of(row), boxes_of(int(image), count), atol=1e-6)
        assert not batch.grid[row, count:].float().any() and not batch.boxes[row, count:].any()


@pytest.mark.parametrize("dtype", ["bf16", "fp16", "fp32", "int8"])
def test_a_batch_is_padded_to_the_image_that_has_most(tmp_path, dtype):
    manifest = make_region_dataset(tmp_path, {"train": 13}, dtype=dtype)
    seen = []
    for batch in batches_of(tmp_path, global_batch=3):
        assert_holds_its_images(batch, manifest)
        seen += batch.image_ids
    assert len(set(seen)) == 13


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_ranks_and_workers_share_the_same_images(root, world_size):
    manifest, seen = load_manifest(root / "data"), []
    for rank in range(world_size):
        share = {"rank": rank, "world_size": world_size}
        here, by_worker = (batches_of(root, num_workers=workers, **share) for workers in (0, 2))
        for one, other in zip(here, by_worker, strict=True):
            assert_holds_its_images(one, manifest)
            assert torch.equal(one.grid, other.grid) and torch.equal(one.regions, other.regions)
            assert torch.equal(one.boxes, other.boxes) and one.image_ids == other.image_ids
            seen += filter(None, one.image_ids)
    assert sorted(seen) == [str(100 + index) for index in range(23)]


def test_regions_without_boxes_have_none(tmp_path):
    annotations = write_annotations(tmp_path, {"train": 6})
    (tmp_path / "npy").mkdir()
    for number, _ in ids_of(annotations):
        np.save(tmp_path / "npy" / f"{number}.npy", values_of(number, regions_of(number)))
    manifest = run_import(annotations, tmp_path / "npy", tmp_path / "data")
    assert not manifest.spec.boxes and manifest.spec.max_regions == 100
    for batch in batches_of(tmp_path, global_batch=4):
        assert batch.boxes is None and batch.boxes_of(0) is None and batch.grid.shape[1] == int(batch.regions.max())


@pytest.mark.faults
def test_no_flipped_bit_of_a_sample_goes_unnoticed(tmp_path):
    manifest = make_region_dataset(tmp_path, {"train": 5})
    (row, *_) = sample_rows(manifest.rows(0))
    path = tmp_path / "data" / row.shard
    places = range(8 * row.offset + 3, 8 * (row.offset + row.nbytes), 8 * 61)
    assert len(places) > 40
    for place in places:
        flip_bit(path, place)
        with pytest.raises(BadSample, match=f"{row.shard}: key {row.key}: "):
            list(evaluation_batches(manifest, "train", Reading(LoaderOptions(num_workers=0))))
        flip_bit(path, place)


@pytest.mark.faults
def test_a_damaged_sample_becomes_a_row_without_a_region(tmp_path):
    manifest = make_region_dataset(tmp_path, {"train": 5})
    (row, *_) = sample_rows(manifest.rows(0))
    flip_bit(tmp_path / "data" / row.shard, 8 * (row.offset + 700))
    (batch,) = batches_of(tmp_path, global_batch=5, on_bad_sample="quarantine")
    assert batch.bad == 1 and row.image_id not in batch.image_ids
    assert_holds_its_images(batch, manifest)


def test_two_ranks_have_the_gradient_of_one(root, settings):
    with engine_alone() as engine:
        config = load_config(None, [*settings, "model.dropout=0", f"train.run_dir={root}/gradient"])
        learner = build_learner(config, open_data(config), engine)

        def gradients(world_size, **changes):
            learner.model.zero_grad()
            for rank in range(world_size):
                for batch in batches_of(root, rank=rank, world_size=world_size, **changes):
                    learner.learn(batch, 0, 100.0, 20.0, last=True, processes=engine.processes)
            return {name: each.grad.clone() for name, each in learner.model.named_parameters()}

        expected = gradients(1)
        for changes in ({"world_size": 2}, {"world_size": 3, "accumulation_steps": 2}):
            for name, gradient in gradients(**changes).items():
                assert (gradient - expected[name]).norm() <= 1e-5 * max(float(expected[name].norm()), 1e-3), name


@pytest.mark.parametrize("attention", ["soft", "hard", "none"])
def test_a_model_learns_from_regions_and_says_where_it_looked(root, settings, attention, tmp_path):
    run = [f"train.run_dir={tmp_path}/run", f"model.attention={attention}", "eval.keep_attention=true"]
    config = load_config(None, [*settings, *run])
    with engine_alone() as engine:
        train(config, engine)
        trained = load_model(tmp_path / "run" / "best")
        assert trained.features.kind == "regions" and trained.features.boxes
        with pytest.raises(ValueError, match=r"regions that a detector .* reads no pictures; import those of yours"):
            Captioning.from_pretrained(tmp_path / "run")
        manifest = load_manifest(root / "data")
        trained.refuse_unfit(manifest)
        found = evaluate(
            [trained.model],
            manifest,
            "val",
            trained.tokenizer,
            config.eval,
            reading_options(config, trained.features),
            engine.processes,
        )
    assert len(found.predictions) == 7
    for each in found.predictions:
        count = regions_of(int(each.image_id))
        assert each.attention.shape == (len(each.words), count)
        assert np.allclose(each.attention.sum(1), 1, atol=1e-5)
        assert np.allclose(each.boxes, boxes_of(int(each.image_id), count), atol=1e-6)


@pytest.mark.end_to_end
def test_the_programs_train_on_two_ranks_and_evaluate(root, settings, tmp_path):
    given = dict(each.split("=", 1) for each in [*settings, f"train.run_dir={tmp_path}/run"])
    document: dict = {}
    for name, value in given.items():
        section, key = name.split(".")
        document.setdefault(section, {})[key] = yaml.safe_load(value)
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(document))
    launch(["-m", "sat.train", str(tmp_path / "config.yaml")], 2, "cpu")
    launch(["-m", "sat.evaluate", str(tmp_path / "run"), "--split", "val"], 2, "cpu")
    report = files.read_json(tmp_path / "run" / "evaluation-val.json")
    assert report["images"] == 7
    captions = json.loads((tmp_path / "run" / "captions-val.json").read_text())
    assert {each["image_id"] for each in captions} == {200 + index for index in range(7)}
