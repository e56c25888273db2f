"""A file that changed after it was packed is noticed though its size is the same, told by name, and packed anew."""

import os
import shutil
from pathlib import Path

import h5py
import numpy as np
import pytest

from preprocessing.import_features import main as import_features
from preprocessing.importing.sources import open_source
from preprocessing.shard_images import main as shard_images
from preprocessing.sharding.verify import verify
from preprocessing.verify_shards import repair
from sat.shards.manifest import load_manifest
from tests.helpers_shards import flip_bit, make_coco, snapshot

SIZES = {"train": 6}


def pack(coco: Path, out: Path, pictures: Path | None = None, **options) -> None:
    """Image shards of the pictures of `make_coco`, or of a copy of them."""
    annotations = [f"train={coco}/annotations/captions_train.json"]
    shard_images(out, annotations, pictures or coco / "images", **{"shard_size": 2, "num_workers": 1} | options)


@pytest.fixture
def packed(tmp_path):
    """A folder of pictures, `coco`, and the shards made from them, `out`."""
    make_coco(tmp_path / "coco", SIZES)
    pack(tmp_path / "coco", tmp_path / "out")
    return tmp_path


def change(path: Path, time_ns: int = 0) -> None:
    """Another picture of the same size, with the time it has or another one."""
    flip_bit(path, 8 * 15)  # the density of its pixels
    if time_ns:
        os.utime(path, ns=(time_ns, time_ns))


@pytest.mark.parametrize("time_ns", [0, 10**18], ids=["now", "an older time"])
def test_a_picture_changed_to_equal_size_is_told_by_name_and_packed_with_overwrite(packed, time_ns):
    coco, out = packed / "coco", packed / "out"
    digest, before = load_manifest(out).digest, snapshot(out)
    change(coco / "images" / "train" / "000003.jpg", time_ns)
    with pytest.raises(ValueError, match=r"1 of 6 files are not those that were packed.*train/000003\.jpg.*overwrite"):
        pack(coco, out)
    assert snapshot(out) == before, "told, and nothing touched"
    pack(coco, out, overwrite=True)
    pack(coco, packed / "anew")
    assert snapshot(out) == snapshot(packed / "anew") and load_manifest(out).digest != digest


def test_a_picture_that_could_not_be_used_is_noticed_once_it_can(tmp_path):
    make_coco(tmp_path / "coco", SIZES)
    path = tmp_path / "coco" / "images" / "train" / "000002.jpg"
    sound = path.read_bytes()
    path.write_bytes(bytes(len(sound)))
    pack(tmp_path / "coco", tmp_path / "out", max_bad_fraction=0.5)
    pack(tmp_path / "coco", tmp_path / "out", max_bad_fraction=0.5)
    path.write_bytes(sound)
    with pytest.raises(ValueError, match=r"1 of 6 files are not those that were packed.*000002\.jpg"):
        pack(tmp_path / "coco", tmp_path / "out")


def test_a_copied_folder_of_other_times_is_the_same_folder(packed):
    copy, before = packed / "copy", snapshot(packed / "out")
    shutil.copytree(packed / "coco" / "images", copy, copy_function=shutil.copyfile)
    for path in copy.rglob("*.jpg"):
        os.utime(path, (1, 1))
    pack(packed / "coco", packed / "out", copy)
    after = snapshot(packed / "out")
    assert str(copy) in after.pop("work/plan.json").decode() and before.pop("work/plan.json")
    assert after == before


def test_a_picture_that_is_gone_is_no_changed_one(packed):
    before = snapshot(packed / "out")
    (packed / "coco" / "images" / "train" / "000001.jpg").unlink()
    with pytest.raises(ValueError, match="1 of 6 pictures have to be left out"):
        pack(packed / "coco", packed / "out")
    assert snapshot(packed / "out") == before


def test_a_restored_sidecar_knows_the_times_of_those_pictures_alone_that_are_as_packed(packed):
    coco, out = packed / "coco", packed / "out"
    (out / "work" / "train-000001.json").unlink()
    before = snapshot(out)
    repair(out, verify(out))
    pack(coco, out)
    (packed / "fresh").mkdir()
    pack(coco, packed / "fresh")
    assert snapshot(out) == snapshot(packed / "fresh") and snapshot(out) != before
    name = load_manifest(out).rows(1)["file_name"][0].as_py()
    change(coco / "images" / name)
    (out / "work" / "train-000001.json").unlink()
    repair(out, verify(out))
    with pytest.raises(ValueError, match=rf"1 of 6 files are not those that were packed.*{name}"):
        pack(coco, out)


@pytest.mark.parametrize("kind", ["npy", "boxes", "h5"])
def test_imported_features_that_changed_are_noticed_too(tmp_path, kind):
    make_coco(tmp_path / "coco", SIZES)
    folder, boxes = tmp_path / "features", tmp_path / "boxes"
    folder.mkdir(), boxes.mkdir()

    def write(number: int, value: float, corner: float) -> None:
        if kind == "h5":
            open_source.cache_clear()  # in a later process it is opened anew
            with h5py.File(tmp_path / "all.h5", "a") as file:
                file.require_dataset(f"{number:06d}", (4, 3), "f4")[:] = value
            return
        np.save(folder / f"{number:06d}.npy", np.full((4, 3), value, np.float32))
        np.save(boxes / f"{number:06d}.npy", np.full((4, 4), corner, np.float32))

    def run(**options) -> None:
        source = tmp_path / "all.h5" if kind == "h5" else folder
        more = {"boxes": boxes} if kind == "boxes" else {}
        annotations = [f"train={tmp_path}/coco/annotations/captions_train.json"]
        import_features(tmp_path / "out", annotations, features=source, shard_size=2, num_workers=1, **more, **options)

    for number in range(1, 7):
        write(number, number, 0.5)
    run()
    before = snapshot(tmp_path / "out")
    write(5, 5, 0.5)
    run()
    assert snapshot(tmp_path / "out") == before, "written anew, and the same"
    write(5, 5 if kind == "boxes" else 7, 0.25)
    with pytest.raises(ValueError, match=r"1 of 6 files are not those that were packed.*000005\.jpg.*--overwrite"):
        run()
    run(overwrite=True)
    assert not verify(tmp_path / "out").faults
    assert snapshot(tmp_path / "out")["manifest.json"] != before["manifest.json"]
