"""Killed while a set is overwritten, packed again or repaired, and run again: the bytes are those of a quiet run."""

import os
import shutil
import signal
from pathlib import Path

import pytest

from preprocessing.shard_images import main as shard_images
from preprocessing.sharding.verify import verify
from preprocessing.verify_shards import repair
from sat.shards.manifest import load_manifest
from tests.helpers_shards import flip_bit, make_coco, snapshot

pytestmark = pytest.mark.faults


@pytest.fixture(scope="module")
def coco(tmp_path_factory):
    root = tmp_path_factory.mktemp("coco")
    make_coco(root, {"train": 6})
    return root


def pack(coco: Path, out: Path, size: int = 3, **options) -> None:
    shard_images(
        out,
        [f"train={coco}/annotations/captions_train.json"],
        coco / "images",
        shard_size=size,
        num_workers=1,
        **options,
    )


@pytest.fixture(scope="module")
def undisturbed(coco, tmp_path_factory):
    """A set of two shards, and the same pictures in three."""
    root = tmp_path_factory.mktemp("undisturbed")
    pack(coco, root / "two")
    pack(coco, root / "three", 2)
    return root


@pytest.fixture
def out(undisturbed, tmp_path):
    return shutil.copytree(undisturbed / "two", tmp_path / "out")


def killed(place: str, work) -> None:
    """Do this in a process of its own, which dies at that place."""
    child = os.fork()
    if not child:
        try:
            os.environ["SAT_CRASH_POINT"] = place
            work()
        finally:
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL


@pytest.mark.parametrize("again", ["two", "three"])
def test_killed_when_the_old_set_is_deleted_either_of_both_can_be_made(coco, undisturbed, out, again):
    killed("set-deleted", lambda: pack(coco, out, 2, overwrite=True))
    with pytest.raises(ValueError, match="not a finished data set"):
        load_manifest(out)
    pack(coco, out, {"two": 3, "three": 2}[again], overwrite=True)
    assert snapshot(out) == snapshot(undisturbed / again)


def test_killed_when_the_sidecars_of_damaged_shards_are_taken_a_repair_ends_as_if_it_had_not_been(out):
    before = snapshot(out)
    for path in sorted(out.glob("*.tar")):
        flip_bit(path, 8 * 700)
    damaged = snapshot(out)
    killed("sidecars-taken", lambda: repair(out, verify(out)))
    assert {name for name, blob in damaged.items() if snapshot(out).get(name) != blob} == {
        "work/train-000000.json",
        "work/train-000001.json",
    }
    repair(out, verify(out))
    assert snapshot(out) == before


def test_killed_when_shards_of_changed_pictures_are_withdrawn_they_are_packed_all_the_same(coco, out, tmp_path):
    changed = shutil.copytree(coco, tmp_path / "coco")
    for number in (1, 2, 3, 4, 5, 6):
        path = changed / "images" / "train" / f"{number:06d}.jpg"
        flip_bit(path, 8 * 15)  # the density of its pixels: another file of the same size
    killed("manifest-withdrawn", lambda: pack(changed, out, overwrite=True))
    with pytest.raises(ValueError, match="not a finished data set"):
        load_manifest(out)
    with pytest.raises(ValueError, match="are not those that were packed"):
        pack(changed, out)
    pack(changed, out, overwrite=True)
    pack(changed, tmp_path / "anew")
    assert snapshot(out) == snapshot(tmp_path / "anew")
