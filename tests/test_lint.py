"""The lint of data finds the same picture, captions, words, statistics on both sides of a split, and nothing else."""

import io
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageEnhance

from preprocessing.annotations.read import Records
from preprocessing.lint import check_captions, gather, lint
from preprocessing.linting.pictures import are_alike, hashes_of, thumbnail_of
from preprocessing.prepare import warn_of_leaks
from preprocessing.shard_images import plan_images, shard_stripe
from preprocessing.sharding.finalize import finalize
from preprocessing.sharding.plan import ImageRecord
from sat import files
from sat.doctor.rows import FAILED, OK, WARNING, verdict
from sat.text import build_tokenizer
from tests.helpers_shards import make_feature_dataset, real_data


def painting(seed: int, size: tuple[int, int] = (160, 120)) -> Image.Image:
    """A picture with large and small structures, no two seeds alike."""
    coarse = np.random.default_rng(seed).integers(0, 256, (6, 8, 3), np.uint8)
    return Image.fromarray(coarse).resize(size, Image.Resampling.BICUBIC)


def compressed(picture: Image.Image, quality: int) -> Image.Image:
    file = io.BytesIO()
    picture.save(file, "JPEG", quality=quality)
    return Image.open(file)


COPIES = {
    "compressed": lambda picture: compressed(picture, 40),
    "half": lambda picture: picture.resize((picture.width // 2, picture.height // 2)),
    "larger": lambda picture: picture.resize((picture.width * 2, picture.height * 2)),
    "brighter": lambda picture: ImageEnhance.Brightness(picture).enhance(1.1),
}


def make_images(root: Path, pictures: dict[str, dict[str, tuple[Image.Image, list[str]]]]) -> Path:
    """A finished set of image shards: split -> image id -> picture and captions."""
    records = []
    (root / "files").mkdir(parents=True)
    for split, images in pictures.items():
        for image_id, (picture, captions) in images.items():
            path = root / "files" / f"{image_id}.png"
            picture.save(path)
            size = path.stat().st_size
            records.append(ImageRecord(image_id, path.name, split, tuple(captions), image_id, size))
    records.sort(key=lambda each: (each.split, each.image_id))
    found = Records(tuple(records), (), {}, root / "files")
    plan = plan_images(
        found, root / "files", root / "images", shard_size=8, seed=1, max_bad_fraction=0.1, overwrite=False
    )
    shard_stripe(plan)
    finalize(plan)
    return root / "images"


def clean(split: str, first: int, count: int = 6) -> dict[str, tuple[Image.Image, list[str]]]:
    numbers = range(first, first + count)
    return {f"{split}{i}": (painting(i), [f"{split} number {i} is red", f"a {split} of {i} things"]) for i in numbers}


def rows_of(*roots, **options) -> dict[str, object]:
    given = gather([str(root) for root in roots], options.get("train", []), options.get("vocabulary"))
    return {row.check: row for row in lint(given)}


@pytest.mark.parametrize("how", COPIES)
def test_a_copy_of_a_picture_is_found_whatever_was_done_to_it(tmp_path, how):
    data = {"train": clean("train", 0), "val": clean("val", 50)}
    data["val"]["copy"] = (COPIES[how](painting(3)).convert("RGB"), ["some other words"])
    row = rows_of(make_images(tmp_path, data))["pictures"]
    assert row.state == FAILED and row.values["in_two_splits"] == 1
    assert "train/train3.png is val/copy.png" in row.found


def test_pictures_in_one_split_and_different_pictures_are_no_leak(tmp_path):
    data = {"train": clean("train", 0, 12), "val": clean("val", 50, 12)}
    data["train"]["again"] = (painting(3), ["the same within training"])
    rows = rows_of(make_images(tmp_path, data))
    assert rows["pictures"].state == rows["ids"].state == rows["captions"].state == OK
    assert rows["vocabulary"].state == WARNING and "--vocabulary FILE" in rows["vocabulary"].mend


def test_one_small_shape_makes_another_picture_and_flat_ones_are_compared_by_colour():
    ground = Image.new("RGB", (224, 224), (90, 60, 30))
    one, other = ground.copy(), ground.copy()
    one.paste((230, 110, 20), (20, 160, 60, 200))
    other.paste((230, 110, 20), (20, 160, 60, 180))
    thumbs = [np.asarray(thumbnail_of(each)) for each in (one, other, ground, Image.new("RGB", (50, 50), (91, 60, 30)))]
    assert are_alike(thumbs[0], thumbs[0]) and not are_alike(thumbs[0], thumbs[1])
    assert are_alike(thumbs[2], thumbs[3]) and not are_alike(thumbs[0], thumbs[2])
    white = np.full_like(thumbs[2], 255)
    assert not are_alike(white, thumbs[2]) and are_alike(white, white)


def test_the_hash_is_the_signs_of_a_cosine_transform():
    from scipy.fft import dctn

    thumbs = np.stack([np.asarray(thumbnail_of(painting(seed))) for seed in range(5)])
    for row, thumb in zip(hashes_of(thumbs), thumbs):
        low = dctn(thumb @ np.array([0.299, 0.587, 0.114]), type=2)[:8, :8].ravel()[1:]
        assert (np.sign(low - np.median(low))[low != np.median(low)] == row[low != np.median(low)]).all()


@pytest.mark.faults
def test_photographs_of_anybody_are_told_apart():
    """Those of SAT_REAL_DATA: each is found in its copy and in no other."""
    paths = sorted((real_data() / "coco_mini" / "train2017").rglob("*.jpg"))[:60]
    pictures = [Image.open(path).convert("RGB") for path in paths]
    thumbs = [np.asarray(thumbnail_of(each)) for each in pictures]
    copies = [np.asarray(thumbnail_of(compressed(COPIES["half"](each), 70).convert("RGB"))) for each in pictures]
    found = np.array([[are_alike(a, b) for b in copies] for a in thumbs])
    assert (found == np.eye(len(paths), dtype=bool)).mean(1).min() == 1


def test_an_id_with_its_file_in_two_sets_splits_is_found(tmp_path):
    first = make_images(tmp_path / "a", {"train": clean("train", 0), "val": clean("val", 50, 2)})
    second = make_images(tmp_path / "b", {"test": {"train2": (painting(99), ["other"])}})
    row = rows_of(first, second)["ids"]
    assert row.state == FAILED and "test/train2.png is train/train2.png" in row.found


def test_captions_of_held_out_images_in_training_are_counted(tmp_path):
    train = {f"t{i}": (painting(i), [f"A dog, {i}.", f"a cat {i}"]) for i in range(4)}
    val = {
        "v0": (painting(50), ["a DOG 2", "A cat 2!", "a dog 2"]),
        "v1": (painting(51), ["a dog 1", "a cat 3"]),
        "v2": (painting(52), ["a dog 1"]),
        "v3": (painting(53), ["nothing of it", "a cat 0"]),
    }
    given = gather([str(make_images(tmp_path, {"train": train, "val": val}))], [], None)
    (row,) = check_captions(given)
    assert row.values == {"captions": 8, "repeated": 7, "wholly": 1}
    assert row.state == WARNING and "v0 as t2" in row.found


def test_words_of_held_out_captions_alone_are_a_leak(tmp_path):
    images = make_images(tmp_path, {"train": clean("train", 0), "val": clean("val", 50)})
    texts = [
        text
        for split, first in (("train", 0), ("val", 50))
        for _, each in clean(split, first).values()
        for text in each
    ]
    seen = {}
    for name, words, least in (
        ("all", texts, 1),
        ("train", texts[:12], 1),
        ("frequent", texts[:12], 3),
        ("odd", ["train zebra"], 1),
    ):
        build_tokenizer(words, least).save(tmp_path / f"{name}.json")
        seen[name] = rows_of(images, vocabulary=tmp_path / f"{name}.json")["vocabulary"]
    assert {name: row.state for name, row in seen.items()} == {
        "all": FAILED,
        "train": OK,
        "frequent": OK,
        "odd": WARNING,
    }
    assert "val" in seen["all"].found and "at least 6 times" in seen["frequent"].found
    assert "1 of which no caption has" in seen["odd"].found


def test_statistics_of_held_out_splits_are_a_leak(tmp_path, monkeypatch):
    manifest = make_feature_dataset(tmp_path / "data")
    assert "does not say" in rows_of(tmp_path / "data")["statistics"].found
    from preprocessing import lint as module

    for named, state in ((["train"], OK), (["train", "val"], FAILED), (["val"], FAILED), (["elsewhere"], FAILED)):
        changed = type(manifest)(
            **{**vars(manifest), "fingerprint": manifest.fingerprint | {"statistics_splits": named}}
        )
        monkeypatch.setattr(module, "load_manifest", lambda root, changed=changed: changed)
        rows = rows_of(tmp_path / "data")
        assert rows["statistics"].state == state and rows["pictures"].state == WARNING


def test_the_command_ends_with_a_table_an_exit_status_and_all_pairs(tmp_path):
    data = {"train": clean("train", 0), "val": clean("val", 50)}
    good = make_images(tmp_path / "good", data)
    data["val"] |= {f"copy{i}": (painting(i), [f"copied {i}"]) for i in range(5)}
    bad = make_images(tmp_path / "bad", data)
    for root, status, words in ((good, 0, "no leak found"), (bad, 1, "too good"), (tmp_path / "none", 1, "error: ")):
        command = [sys.executable, "-m", "sat.cli", "lint", str(root), "--json", str(tmp_path / "out.json")]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120)
        assert done.returncode == status and words in done.stdout + done.stderr, done.stderr
        assert "Traceback" not in done.stderr
    found = json.loads((tmp_path / "out.json").read_text())
    assert found["verdict"] == FAILED and len(found["same_pictures"]) == 5
    assert found["same_pictures"][0]["first"] == {"split": "train", "image_id": "train0", "file_name": "train0.png"}
    with pytest.raises(ValueError, match="--train tran: there is no such split, only train, val"):
        gather([str(good)], ["tran"], None)
    assert verdict(list(lint(gather([str(bad)], [], None), pictures=False))) == WARNING


def test_preparing_warns_once_of_what_the_splits_share(tmp_path, capsys):
    data = {"train": clean("train", 0), "val": clean("val", 50)}
    data["val"]["copy"] = (COPIES["half"](painting(3)), ["copied"])
    make_images(tmp_path, data)
    files.write_json(tmp_path / "prepare.json", {"made_by": "sat prepare"})
    warn_of_leaks(tmp_path)
    said = capsys.readouterr().out
    assert "1 of 13 pictures are in two splits: train/train3.png is val/copy.png" in said and "ok " not in said
    warn_of_leaks(tmp_path)
    assert capsys.readouterr().out == ""
