"""Verification sees every changed byte and names it; repair brings back exactly what was there."""

import errno
import os
import random
import shutil
from pathlib import Path

import pytest

from preprocessing.extract_features import extract_stripe
from preprocessing.features.plan import plan_features
from preprocessing.features.recipe import FeatureOptions
from preprocessing.shard_images import shard_stripe
from preprocessing.sharding import verify as verify_module
from preprocessing.sharding.finalize import finalize
from preprocessing.sharding.made_on import Machines
from preprocessing.sharding.plan import load_plan
from preprocessing.sharding.verify import check_shard, recorded_bytes, verify
from preprocessing.verify_shards import repair
from sat import files
from sat.shards.manifest import load_manifest
from sat.shards.sealed import seal, unseal
from tests.helpers_shards import flip_bit, make_coco, make_feature_dataset, run_program, snapshot
from tests.test_extract_features import SMALL, extract, make_images, random_weights


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    root = tmp_path_factory.mktemp("made")
    make_coco(root / "coco")
    make_images(root / "coco", root / "images")
    random_weights(root / "weights.safetensors")
    extract(root, root / "features")
    return root


@pytest.fixture
def images(made, tmp_path):
    """A copy of the image shards to damage."""
    return shutil.copytree(made / "images", tmp_path / "images")


@pytest.fixture
def features(made, tmp_path):
    return shutil.copytree(made / "features", tmp_path / "features")


def one_row(root, shard=1, row=2):
    return load_manifest(root).rows(shard).to_pylist()[row]


def flip_payload(root):
    row = one_row(root)
    flip_bit(root / row["shard"], 8 * (row["offset"] + 700))
    return f"{row['shard']}: key {row['key']}: not the bytes that were written"


def flip_header(root):
    row = one_row(root)
    flip_bit(root / row["shard"], 8 * row["offset"])
    return f"{row['shard']}: key {row['key']}: not the bytes that were written"


def flip_end(root):
    flip_bit(root / "train-000001.tar", 8 * ((root / "train-000001.tar").stat().st_size - 1))
    return "train-000001.tar: the bytes after the last sample"


def cut(root):
    row = one_row(root, row=-1)
    with open(root / row["shard"], "r+b") as file:
        file.truncate(row["offset"] + 512)
    return f"{row['shard']}: key {row['key']}: cut off"


def lengthen(root):
    with open(root / "val-000000.tar", "ab") as file:
        file.write(bytes(512))
    return "val-000000.tar: "


def remove(root):
    (root / "train-000000.tar").unlink()
    return "train-000000.tar: missing"


def swap(root):
    first, second = root / "train-000000.tar", root / "train-000001.tar"
    first.rename(root / "x"), second.rename(first), (root / "x").rename(second)
    return "train-000000.tar: "


def flip_in(name, place=400):
    def damage(root):
        flip_bit(root / name, place)
        return f"{name}: "

    damage.__name__ = name
    return damage


def lose(name):
    def damage(root):
        (root / name).unlink()
        return f"{name}: missing"

    damage.__name__ = f"lose {name}"
    return damage


TABLES = ["manifest.json", "shards.parquet", "samples.parquet"]
DAMAGES = [flip_payload, flip_header, flip_end, cut, lengthen, remove, swap]
DAMAGES += [flip_in(name) for name in (*TABLES, "work/train-000002.json")]
DAMAGES += [lose(name) for name in (*TABLES, "left_out.jsonl", "work/val-000000.json")]


@pytest.mark.faults
@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__)
def test_every_damage_is_named_and_repaired_to_the_same_bytes(made, images, damage):
    expected = damage(images)
    report = verify(images)
    assert any(str(fault).startswith(expected) for fault in report.faults), report.faults
    repair(images, report)
    assert not verify(images).faults
    assert snapshot(images) == snapshot(made / "images")


@pytest.mark.faults
def test_repair_leaves_sound_shards_alone(images):
    before = {path.name: path.stat().st_mtime_ns for path in images.glob("*.tar")}
    flip_payload(images)
    repair(images, verify(images))
    after = {path.name: path.stat().st_mtime_ns for path in images.glob("*.tar")}
    assert {name for name in before if before[name] != after[name]} == {"train-000001.tar"}


@pytest.mark.faults
def test_feature_shards_and_statistics_are_repaired_from_the_image_shards(made, features):
    flip_payload(features)
    flip_in("statistics.safetensors")(features)
    failed = run_program("verify_shards", features, code=1)
    assert "FAULT" in failed.stdout and "key" in failed.stdout and "statistics.safetensors" in failed.stdout
    done = run_program("verify_shards", features, "--repair", "--images", made / "images")
    assert f"{features}: sound" in done.stdout
    assert {k: v for k, v in snapshot(features).items() if "work" not in k} == {
        k: v for k, v in snapshot(made / "features").items() if "work" not in k
    }


@pytest.mark.faults
def test_rebuilding_from_other_pictures_publishes_another_data_set_only_where_that_is_wanted(made, images, tmp_path):
    digest = load_manifest(images).digest
    shutil.copytree(made / "coco" / "images", tmp_path / "pictures")
    row = one_row(images, shard=0, row=0)
    path = tmp_path / "pictures" / row["file_name"]
    flip_bit(path, 8 * 15)  # the density of its pixels: another file of the same size that decodes
    (images / row["shard"]).unlink()
    before = snapshot(images)
    with pytest.raises(ValueError, match=rf"{row['shard']}: key {row['key']} .* other bytes .* --allow-new-bytes"):
        repair(images, verify(images), images=tmp_path / "pictures")
    assert snapshot(images) == before
    repair(images, verify(images), images=tmp_path / "pictures", new_bytes=True)
    assert not verify(images).faults and load_manifest(images).digest != digest


@pytest.mark.faults
@pytest.mark.parametrize("damage", [flip_payload, cut, lengthen, flip_in("manifest.json")], ids=lambda d: d.__name__)
def test_repair_loses_nothing_where_the_pictures_are_gone(images, tmp_path, damage):
    flip_header(images), damage(images)
    before = snapshot(images)
    with pytest.raises(ValueError, match="gone: no such image folder"):
        repair(images, verify(images), images=tmp_path / "gone")
    assert snapshot(images) == before
    (tmp_path / "gone").mkdir()
    with pytest.raises(FileNotFoundError, match="gone/"):
        repair(images, verify(images), images=tmp_path / "gone")
    assert snapshot(images) == before


@pytest.mark.faults
def test_a_repair_that_would_leave_out_more_than_before_is_refused(made, images, tmp_path):
    flip_payload(images)
    before = snapshot(images)
    shutil.copytree(made / "coco" / "images", tmp_path / "pictures")
    path = tmp_path / "pictures" / one_row(images)["file_name"]
    path.write_bytes(bytes(path.stat().st_size))
    with pytest.raises(ValueError, match=r"train-000001.tar: .*would be left out \(not a picture\); before, 0 were"):
        repair(images, verify(images), images=tmp_path / "pictures")
    assert snapshot(images) == before


def without_file_times(root):
    """`snapshot`; sidecars without what only the pictures' folder can tell."""
    files = snapshot(root)
    for name in (name for name in files if name.startswith("work/") and name != "work/plan.json" and ".json" in name):
        document = unseal(files[name])
        document["extra"].pop("file_times", None)
        files[name] = seal(document)
    return files


@pytest.mark.faults
@pytest.mark.parametrize("damage", [flip_in("work/train-000002.json"), lose("work/val-000000.json")])
def test_sidecars_of_sound_image_shards_come_back_without_the_pictures(made, images, tmp_path, damage):
    damage(images)
    tars = {path.name: path.stat().st_mtime_ns for path in images.glob("*.tar")}
    repair(images, verify(images), images=tmp_path / "gone")
    assert without_file_times(images) == without_file_times(made / "images")
    assert not verify(images).faults
    assert {path.name: path.stat().st_mtime_ns for path in images.glob("*.tar")} == tars


@pytest.mark.faults
def test_a_restored_sidecar_lists_what_was_left_out(tmp_path):
    make_coco(tmp_path / "coco", {"train": 12})
    (tmp_path / "coco" / "images" / "train" / "000003.jpg").write_bytes(b"text")
    make_images(tmp_path / "coco", tmp_path / "images", max_bad_fraction=1)
    before = without_file_times(tmp_path / "images")
    for number in range(3):
        flip_bit(tmp_path / "images" / "work" / f"train-{number:06d}.json", 400)
    repair(tmp_path / "images", verify(tmp_path / "images"), images=tmp_path / "gone")
    assert without_file_times(tmp_path / "images") == before and b"not a picture" in before["left_out.jsonl"]


@pytest.mark.faults
def test_feature_repair_loses_nothing_without_the_image_shards_or_with_other_weights(made, features, tmp_path):
    flip_payload(features)
    before = snapshot(features)
    for sources, message in (
        ({"images": tmp_path / "gone"}, "gone: not a finished data set"),
        ({"images": made / "images", "weights": tmp_path / "gone"}, "encoder weights .*gone do not exist"),
        ({"images": made / "images", "weights": made / "images" / "train-000000.tar"}, "is not a whole safetensors"),
    ):
        with pytest.raises(ValueError, match=message):
            repair(features, verify(features), **sources)
        assert snapshot(features) == before


@pytest.mark.faults
def test_other_weights_than_planned_are_refused_before_a_shard_is_written(made, tmp_path):
    weights = Path(shutil.copy(made / "weights.safetensors", tmp_path / "weights.safetensors"))
    plan = plan_features(made / "images", tmp_path / "features", weights, FeatureOptions(**SMALL))
    flip_bit(weights, 8 * (weights.stat().st_size - 2))
    with pytest.raises(ValueError, match="not the file the features were planned with"):
        extract_stripe(plan)
    assert not list((tmp_path / "features").glob("*.tar"))


def test_what_a_progress_line_needs_is_had_without_hashing_the_tables(images, monkeypatch):
    monkeypatch.setattr(files, "sha256", None)
    assert recorded_bytes(images) == sum(path.stat().st_size for path in images.glob("*.tar"))


def test_the_rows_of_sidecars_are_read_when_asked_for_and_not_kept(images):
    (shard, *_), faults = verify_module._check_sidecars(load_plan(images), {}, Machines())
    assert not faults and len(shard.rows()) == 5
    shutil.rmtree(images / "work")
    with pytest.raises(ValueError, match="vanished"):
        shard.rows()


@pytest.mark.faults
def test_every_shard_that_the_disk_cannot_read_is_named_and_rebuilt(images, monkeypatch):
    before, bad = snapshot(images), {"train-000000.tar", "val-000000.tar"}
    whole = files.sha256

    def fails(path: Path) -> None:
        if path.name in bad and path.parent == images:
            raise OSError(errno.EIO, os.strerror(errno.EIO))

    def opened(path, *arguments, **options):
        fails(Path(path))
        return open(path, *arguments, **options)

    monkeypatch.setattr(verify_module, "open", opened, raising=False)
    monkeypatch.setattr(files, "sha256", lambda path: fails(Path(path)) or whole(path))
    flip_bit(images / "train-000001.tar", 8 * 700)
    report = verify(images)
    assert {fault.shard for fault in report.faults} == {*bad, "train-000001.tar"}
    assert {str(f) for f in report.faults if f.shard in bad} == {
        f"{b}: cannot be read (Input/output error)" for b in bad
    }
    replaced = os.replace
    monkeypatch.setattr(os, "replace", lambda old, new: bad.discard(Path(new).name) or replaced(old, new))
    repair(images, report)
    assert not bad and not verify(images).faults and snapshot(images) == before


def test_strangers_and_leftovers_are_told_and_left_alone(images):
    (images / "foreign.tar").write_bytes(b"x" * 1024)
    (images / "work" / "train-000000.tar.tmp-0123").write_bytes(b"x")
    done = run_program("verify_shards", images, "--repair")
    assert "foreign.tar is not part of the data set" in done.stdout
    assert "work/train-000000.tar.tmp-0123 is not part of the data set" in done.stdout
    assert (images / "foreign.tar").exists() and load_manifest(images).splits == {"train": 12, "val": 5}


def test_what_a_worker_leaves_that_is_killed_after_another_one_has_published_is_removed_by_a_repair(images):
    before = snapshot(images)
    for path in (images / "work/val-000000.claim", files.temporary_name(images / "train-000000.tar", images / "work")):
        path.write_bytes(b"{}")
    assert not verify(images).faults and len(verify(images).foreign) == 2
    run_program("verify_shards", images, "--repair")
    assert not verify(images).foreign and snapshot(images) == before


def test_a_data_set_copied_without_its_work_folder_is_verified_by_its_manifest(images):
    shutil.rmtree(images / "work")
    assert not verify(images).faults
    expected = flip_payload(images)
    assert [str(fault) for fault in verify(images).faults] == [expected]
    failed = run_program("verify_shards", images, "--repair", code=1)
    assert "has no plan" in failed.stderr


def test_an_unfinished_data_set_is_verified_by_its_sidecars(images):
    (images / "manifest.json").unlink()
    expected = "val-000000.tar: missing"
    (images / "val-000000.tar").unlink()
    faults = [str(fault) for fault in verify(images).faults]
    assert "manifest.json: missing: the data set is not finished" in faults and expected in faults
    with pytest.raises(ValueError, match="no data set"):
        verify(images / "work")


@pytest.mark.faults
def test_a_damaged_plan_is_named_and_planning_again_brings_it_back(made, images):
    flip_in("work/plan.json")(images)
    assert "work/plan.json" in str(verify(images).faults[0])
    with pytest.raises(ValueError, match="run the plan step again"):
        load_plan(images)
    make_images(made / "coco", images)
    assert snapshot(images) == snapshot(made / "images")


@pytest.mark.faults
def test_a_cut_at_every_block_is_seen(tmp_path):
    make_feature_dataset(tmp_path / "set", {"train": 3}, shard_size=3)
    (shard,) = _recorded(tmp_path / "set")
    blob = (tmp_path / "set" / shard.name).read_bytes()
    places = [*range(0, len(blob), 512), *random.Random(1).sample(range(len(blob)), 50)]
    for place in places:
        (tmp_path / "set" / shard.name).write_bytes(blob[:place])
        faults = check_shard(tmp_path / "set", shard)
        assert faults and all(shard.name in str(fault) for fault in faults)
        lost = {row.key for row in shard.rows() if row.offset + row.nbytes > place}
        assert {fault.key for fault in faults if fault.key} == lost


@pytest.mark.faults
def test_a_flipped_bit_anywhere_in_a_shard_is_seen_at_its_key(tmp_path):
    make_feature_dataset(tmp_path / "set", {"train": 3}, shard_size=3)
    (shard,) = _recorded(tmp_path / "set")
    blob = (tmp_path / "set" / shard.name).read_bytes()
    for place in random.Random(2).sample(range(8 * len(blob)), 300):
        damaged = bytearray(blob)
        damaged[place // 8] ^= 1 << place % 8
        (tmp_path / "set" / shard.name).write_bytes(damaged)
        keys = [row.key for row in shard.rows() if row.offset <= place // 8 < row.offset + row.nbytes]
        assert [fault.key for fault in check_shard(tmp_path / "set", shard)] == (keys or [""])


@pytest.mark.faults
@pytest.mark.parametrize(
    "name", ["manifest.json", "work/train-000000.json", "work/plan.json", "shards.parquet", "samples.parquet"]
)
def test_a_flipped_bit_anywhere_in_manifest_sidecar_plan_and_tables_is_seen(tmp_path, name):
    root = tmp_path / "set"
    make_feature_dataset(root, {"train": 3}, shard_size=3)
    blob = (root / name).read_bytes()
    for place in random.Random(3).sample(range(8 * len(blob)), 300):
        flip_bit(root / name, place)
        assert any(name in str(fault) for fault in verify(root, num_workers=1).faults), place
        (root / name).write_bytes(blob)


def _recorded(root):
    from preprocessing.sharding.verify import _recorded as recorded

    return list(recorded(load_manifest(root)))


def test_finalizing_again_after_a_lost_shard_says_which(images):
    (images / "manifest.json").unlink()
    (images / "train-000002.tar").unlink()
    plan = load_plan(images)
    with pytest.raises(ValueError, match="train-000002.tar is missing"):
        finalize(plan)
    shard_stripe(plan)
    assert finalize(plan).splits == {"train": 12, "val": 5}
