"""Attention that was kept is drawn over the split's pictures: cells where they look, regions with their boxes."""

import json

import numpy as np
import pytest
from PIL import Image

from sat.draw import find_pictures, main
from sat.evaluation.attention_file import is_attention, read_attention, write_attention
from sat.evaluation.attention_map import Cells, Regions
from sat.evaluation.prediction import Prediction
from sat.shards.features import EncoderSpec, FeatureSpec, Transform

GRID = FeatureSpec(
    "grid", (2, 3), 8, "bf16", EncoderSpec("resnet50", 4, 8, stride=32, first_centre=15.5), Transform(96, "center_crop")
)
REGIONS = FeatureSpec("regions", (0, 0), 8, "bf16", None, None, max_regions=5, boxes=True)


def predicted(image_id: str, words: str, cells: int, gates: bool = True, boxes=None) -> Prediction:
    said = tuple(words.split())
    weights = np.random.default_rng(cells).dirichlet(np.ones(cells), len(said)).astype(np.float32)
    numbers = np.linspace(0.1, 0.9, len(said), dtype=np.float32)
    score = -1.5 * len(said)
    gate = numbers if gates else None
    return Prediction(image_id, words, said, score, 2 * score, True, weights, numbers, gate, None, boxes)


def random_boxes(count: int) -> np.ndarray:
    corners = np.random.default_rng(count).uniform(0, 0.5, (count, 2))
    return np.concatenate([corners, corners + 0.4], axis=1).astype(np.float32)


def assert_same(found: Prediction, expected: Prediction) -> None:
    assert found == expected
    for name in ("attention", "probabilities", "gates", "boxes"):
        mine, theirs = getattr(found, name), getattr(expected, name)
        assert (mine is None) == (theirs is None), name
        if theirs is not None:
            np.testing.assert_array_equal(mine, theirs)


@pytest.mark.parametrize("gates", [True, False])
def test_what_was_kept_is_read_again(tmp_path, gates):
    given = [predicted("7", "a red dog", 6, gates), predicted("eight", "", 6, gates), predicted("9", "cat", 6, gates)]
    write_attention(tmp_path / "a.npz", given, GRID)
    kept = read_attention(tmp_path / "a.npz")
    for found, expected in zip(kept.predictions, given, strict=True):
        if expected.words:
            assert_same(found, expected)
    cells = kept.where(kept.predictions[0], 200, 100)
    assert isinstance(cells, Cells) and cells.seen == (50, 0, 150, 100)
    np.testing.assert_allclose(cells.x, 50 + 100 * np.array([16, 48, 80]) / 96)
    np.testing.assert_allclose(cells.y, 100 * np.array([16, 48]) / 96)


def test_regions_differ_from_picture_to_picture_and_keep_their_boxes(tmp_path):
    given = [predicted("1", "a dog", 3, boxes=random_boxes(3)), predicted("2", "two cats", 5, boxes=random_boxes(5))]
    write_attention(tmp_path / "a.npz", given, REGIONS)
    kept = read_attention(tmp_path / "a.npz")
    for found, expected in zip(kept.predictions, given, strict=True):
        assert_same(found, expected)
        assert isinstance(kept.where(found, 10, 10), Regions)
    write_attention(tmp_path / "b.npz", [predicted("1", "a dog", 3)], REGIONS)
    bare = read_attention(tmp_path / "b.npz")
    with pytest.raises(ValueError, match="image 1: its regions came without boxes"):
        bare.where(bare.predictions[0], 10, 10)


def test_pictures_are_found_by_name_stem_or_number(tmp_path):
    for name in ("train/COCO_000000000042.jpg", "7.png", "dog.jpg", "x/cat.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"")
    found = find_pictures(tmp_path, ["42", "7", "dog.jpg", "cat", "missing"])
    names = {image: path.name for image, path in found.items()}
    assert names == {"42": "COCO_000000000042.jpg", "7": "7.png", "dog.jpg": "dog.jpg", "cat": "cat.png"}


@pytest.mark.parametrize("kind", ["grid", "regions"])
def test_the_program_draws_each_picture_with_its_attention(tmp_path, kind, capsys):
    spec, boxes = (GRID, [None, None]) if kind == "grid" else (REGIONS, [random_boxes(3), random_boxes(5)])
    counts = (6, 6) if kind == "grid" else (3, 5)
    given = [predicted(str(n), "a dog", counts[n], boxes=boxes[n]) for n in range(2)]
    write_attention(tmp_path / "run/attention-test.npz", given, spec)
    for name in ("0.jpg", "1.png"):
        (tmp_path / "pictures").mkdir(exist_ok=True)
        Image.new("RGB", (60, 40), "navy").save(tmp_path / "pictures" / name)
    (tmp_path / "references.json").write_text(json.dumps({"1": ["what a person says"]}))
    main(tmp_path / "run", tmp_path / "pictures", "test", 8, "svg", False, tmp_path / "references.json")
    drawn = sorted((tmp_path / "run/attention-test").iterdir())
    assert [path.name for path in drawn] == ["000-0.svg", "001-1.svg"]
    assert ["what a person says" in path.read_text() for path in drawn] == [False, True]
    assert f"attention on a {'cell' if kind == 'grid' else 'region'}" in drawn[0].read_text()
    assert f"{drawn[0]}: a dog" in capsys.readouterr().out


def test_a_users_mistake_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"no attention-test\.npz; run `sat evaluate .* --attention` first"):
        main(tmp_path, tmp_path, "test", 8, "png", False, None)
    (tmp_path / "attention-test.npz").write_bytes(b"mine")
    assert not is_attention(tmp_path / "attention-test.npz")
    with pytest.raises(ValueError, match="is no file of attention"):
        main(tmp_path, tmp_path, "test", 8, "png", False, None)
    write_attention(tmp_path / "attention-test.npz", [predicted("12", "a dog", 6)], GRID)
    with pytest.raises(ValueError, match="no folder .*nowhere"):
        main(tmp_path, tmp_path / "nowhere", "test", 8, "png", False, None)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="holds no picture whose name is an image id of split 'test'"):
        main(tmp_path, tmp_path / "empty", "test", 8, "png", False, None)
    with pytest.raises(ValueError, match=r"attention of 12 was not kept"):
        write_attention(tmp_path / "a.npz", [Prediction("12", "", (), 0, 0, True)], GRID)
