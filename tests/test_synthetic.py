"""Scenes: the same picture whoever renders it, whole files only, and captions that are true and can be checked."""

import json
import re
from dataclasses import replace
from random import Random

import numpy as np
import pytest
from PIL import Image

from preprocessing.scenes.captions import check_claims, describe
from preprocessing.scenes.scenes import COLOURS, SHAPES, SIZE, Scene, SceneObject, render, sample_scene
from preprocessing.synthetic import Picture, load_truth, make_scenes
from sat import files

COUNTS = {"train": 12, "val": 3, "test": 4}


def tree(folder) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def thing(shape: str, colour: str, x: float, y: float, size: str = "large") -> SceneObject:
    return SceneObject(shape, colour, size, x, y, 34.0 if size == "large" else 21.0, 0.0, (255, 0, 0))


def scene(*objects: SceneObject, layout: str = "row", background: str = "gray") -> Scene:
    return Scene(objects, background, layout, (128, 128, 128), 0)


@pytest.fixture(scope="module")
def scene_set(tmp_path_factory):
    out = tmp_path_factory.mktemp("scenes")
    assert make_scenes(out, COUNTS, seed=1) == 19
    return out


def test_bytes_do_not_depend_on_the_number_of_workers(scene_set, tmp_path):
    make_scenes(tmp_path / "two", COUNTS, seed=1, num_workers=2)
    assert tree(tmp_path / "two") == tree(scene_set)


def test_another_seed_or_split_is_another_picture(scene_set, tmp_path):
    make_scenes(tmp_path / "other", {"train": 3}, seed=2)
    images = [data for name, data in tree(scene_set).items() if name.endswith(".jpg")]
    others = [data for name, data in tree(tmp_path / "other").items() if name.endswith(".jpg")]
    assert len(set(images + others)) == 19 + 3


def test_a_second_run_touches_nothing(scene_set):
    before = {path: path.stat().st_mtime_ns for path in scene_set.rglob("*") if path.is_file()}
    assert make_scenes(scene_set, COUNTS, seed=1) == 0
    assert {path: path.stat().st_mtime_ns for path in scene_set.rglob("*") if path.is_file()} == before


def test_an_interrupted_run_goes_on_to_the_same_bytes(scene_set, tmp_path, monkeypatch):
    out = tmp_path / "interrupted"
    genuine = Picture.jpeg
    done = []

    def failing(picture):
        if len(done) == 7:
            path = out / "images" / picture.file_name
            files.temporary_name(path, path.parent).write_bytes(b"half")
            raise KeyboardInterrupt
        done.append(picture)
        return genuine(picture)

    monkeypatch.setattr(Picture, "jpeg", failing)
    with pytest.raises(KeyboardInterrupt):
        make_scenes(out, COUNTS, seed=1)
    assert not list(out.rglob("captions_*.json"))
    monkeypatch.setattr(Picture, "jpeg", genuine)
    assert make_scenes(out, COUNTS, seed=1) == 19 - 7
    assert tree(out) == tree(scene_set)


def test_a_larger_set_extends_a_smaller_one(scene_set, tmp_path):
    make_scenes(tmp_path / "grown", {"train": 5}, seed=1)
    assert make_scenes(tmp_path / "grown", COUNTS, seed=1) == 19 - 5
    assert tree(tmp_path / "grown") == tree(scene_set)


def test_a_folder_of_another_recipe_is_refused(scene_set):
    with pytest.raises(ValueError, match="seed.: 1.*seed.: 5"):
        make_scenes(scene_set, COUNTS, seed=5)


def test_annotations_are_cocos_and_truth_is_complete(scene_set):
    truth = load_truth(scene_set / "truth.jsonl")
    ids = []
    for split, count in COUNTS.items():
        coco = json.loads((scene_set / "annotations" / f"captions_{split}.json").read_text())
        assert len(coco["images"]) == count and len(coco["annotations"]) == 5 * count
        for image in coco["images"]:
            with Image.open(scene_set / "images" / image["file_name"]) as picture:
                assert picture.size == (image["width"], image["height"]) == (SIZE, SIZE)
            captions = [row["caption"] for row in coco["annotations"] if row["image_id"] == image["id"]]
            assert len(set(captions)) == 5
            assert all(claim.holds for caption in captions for claim in check_claims(caption, truth[image["id"]]))
        ids += [image["id"] for image in coco["images"]]
    assert sorted(ids) == sorted(truth) and len(set(ids)) == len(ids)


def test_captions_are_varied_true_and_about_twelve_words():
    captions = []
    for index in range(400):
        shown = sample_scene(Random(f"scene {index}"))
        said = describe(shown, Random(f"words {index}"))
        claims = [check_claims(caption, shown) for caption in said]
        assert all(claim.holds for found in claims for claim in found)
        assert min(len(found) for found in claims) >= 2
        captions += said
    lengths = [len(caption.split()) for caption in captions]
    assert 11 <= np.mean(lengths) <= 13.5
    assert len({re.sub("|".join((*SHAPES, *COLOURS)), "_", caption) for caption in captions}) > 300


def test_the_picture_shows_each_object_where_the_truth_says():
    for index in range(40):
        shown = sample_scene(Random(index))
        pixels = np.asarray(render(shown), dtype=int)
        for item in shown.objects:
            exact = np.argwhere((pixels == item.rgb).all(axis=-1))  # [N, 2] as (y, x)
            assert len(exact) > 0.2 * item.radius**2
            middle = (exact.max(axis=0) + exact.min(axis=0)) / 2
            assert np.abs(middle - (item.y, item.x)).max() < 0.35 * item.radius
            assert exact.min() >= 0 and np.ptp(exact, axis=0).max() <= 2.7 * item.radius


def test_shapes_differ_from_one_another_when_drawn():
    masks = []
    for shape in SHAPES:
        pixels = np.asarray(render(scene(thing(shape, "red", 112, 112))), dtype=int)
        masks.append((pixels == (255, 0, 0)).all(axis=-1))
    for first in range(len(SHAPES)):
        for second in range(first):
            assert (masks[first] ^ masks[second]).sum() > 0.15 * 34**2


PAIR = scene(thing("circle", "red", 60, 100), thing("square", "blue", 160, 110, "small"))


@pytest.mark.parametrize(
    "caption, false",
    [
        ("a large red circle left of a small blue square on a gray background", []),
        ("A big red disc to the left of a tiny blue box on a gray backdrop.", []),
        ("a blue square right of a red circle", []),
        ("a red circle and a blue square side by side", []),
        ("a red circle right of a blue square", ["red circle right_of blue square"]),
        ("a green circle left of a blue square", ["green circle", "green circle left_of blue square"]),
        ("a small red circle", ["small red circle"]),
        ("a red circle on a white surface", ["white background"]),
        ("three objects in a column", ["in_a_column", "three shapes"]),
        ("two shapes", []),
        ("a red circle and a red circle", ["red circle"]),
        ("a red circle in the top left corner", ["in_the_top_left_corner"]),
        ("a red circle on the left side", []),
        ("in the middle", ["in_the_center"]),
        ("a red star a red heart and a red moon", ["red star", "red heart", "red moon"]),
    ],
)
def test_check_claims_finds_exactly_what_is_false(caption, false):
    assert sorted(claim.text for claim in check_claims(caption, PAIR) if not claim.holds) == sorted(false)


def test_a_relation_goes_on_over_and():
    three = scene(
        thing("circle", "red", 40, 112), thing("star", "blue", 112, 112, "small"), thing("ring", "pink", 184, 112)
    )
    texts = [claim.text for claim in check_claims("a red circle to the left of a blue star and a pink hoop", three)]
    assert texts[3:] == ["red circle left_of blue star", "red circle left_of pink ring"]
    moved = replace(three, objects=(*three.objects[:2], thing("ring", "pink", 10, 112)))
    wrong = [c.text for c in check_claims("a red circle left of a blue star and a pink ring", moved) if not c.holds]
    assert wrong == ["red circle left_of pink ring"]
