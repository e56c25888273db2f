"""Annotated pictures -> image shards: complete, streamable, equal for equal inputs, resumable."""

import json
import os
import shutil
import stat

import numpy as np
import pytest
import webdataset

from preprocessing.annotations.read import read_annotations
from preprocessing.shard_images import main, plan_images, shard_stripe
from preprocessing.sharding.finalize import finalize
from preprocessing.sharding.jobs import parse_stripe
from preprocessing.sharding.plan import load_plan
from sat.shards.manifest import load_manifest
from sat.shards.pictures import decode
from tests.helpers_shards import (
    REPOSITORY,
    encoded,
    make_coco,
    picture,
    real_data,
    run_program,
    self_describing_captions,
    snapshot,
)


@pytest.fixture(scope="module")
def coco(tmp_path_factory):
    """Pictures 1-12 of train, 13-17 of val; one val picture is a PNG."""
    root = tmp_path_factory.mktemp("coco")
    files = make_coco(root)
    document = json.loads(files["val"].read_text())
    document["images"][0]["file_name"] = "000013.png"
    files["val"].write_text(json.dumps(document))
    (root / "images" / "val" / "000013.jpg").unlink()
    (root / "images" / "val" / "000013.png").write_bytes(encoded(picture(13), "PNG"))
    return root


def options(coco, out, **more):
    """Arguments of the program over the pictures of `coco`, five to a shard, in this process."""
    files = [f"{split}={coco}/annotations/captions_{split}.json" for split in ("train", "val")]
    return {"out": out, "annotations": files, "images": coco / "images", "shard_size": 5, "num_workers": 1} | more


@pytest.fixture(scope="module")
def shards(coco, tmp_path_factory):
    out = tmp_path_factory.mktemp("shards") / "images"
    main(**options(coco, out))
    return out


def test_plain_webdataset_streams_every_picture_with_its_captions(coco, shards):
    seen = {}
    for split, count in (("train", 12), ("val", 5)):
        manifest = load_manifest(shards)
        for index in manifest.shards.of_split(split):
            for sample in webdataset.WebDataset(str(shards / manifest.shards[index].name), shardshuffle=False):
                about = json.loads(sample["json"])
                data = sample["png" if sample["__key__"] == "13" else "jpg"]
                assert data == (coco / "images" / about["file_name"]).read_bytes()
                assert (about["width"], about["height"]) == (64, 48)
                seen[sample["__key__"]] = (split, about["captions"])
        assert manifest.splits[split] == count
    offset = {"train": 1, "val": 13}
    assert set(seen) == {str(i) for i in range(1, 18)}
    for key, (split, captions) in seen.items():
        assert captions == self_describing_captions(split, int(key) - offset[split])


def test_rows_point_at_the_bytes_of_their_sample(shards):
    manifest = load_manifest(shards)
    for index, shard in enumerate(manifest.shards):
        blob = (shards / shard.name).read_bytes()
        for row in manifest.rows(index).to_pylist():
            piece = blob[row["offset"] : row["offset"] + row["nbytes"]]
            name = piece[:100].rstrip(b"\0").decode()
            assert name.partition(".")[0] == row["key"] and row["nbytes"] % 512 == 0


def test_the_order_inside_shards_is_mixed_and_fixed_by_the_seed(coco, shards, tmp_path):
    manifest = load_manifest(shards)
    order = [int(row["key"]) for i in manifest.shards.of_split("train") for row in manifest.rows(i).to_pylist()]
    assert order != sorted(order) and sorted(order) == list(range(1, 13))
    main(**options(coco, tmp_path / "other", seed=2))
    other = load_manifest(tmp_path / "other")
    assert [int(r["key"]) for i in other.shards.of_split("train") for r in other.rows(i).to_pylist()] != order
    assert other.digest != manifest.digest


@pytest.mark.faults
def test_hash_seed_locale_zone_folder_umask_and_workers_change_no_byte(coco, shards, tmp_path):
    before = os.umask(0o027)
    try:
        odd = {"PYTHONHASHSEED": "99", "LC_ALL": "de_DE.UTF-8", "LANG": "tr_TR", "TZ": "Asia/Tokyo"}
        folder = os.path.relpath(tmp_path / "odd", REPOSITORY)
        names = ("train", "val")
        files = [x for name in names for x in ("--annotations", f"{name}={coco}/annotations/captions_{name}.json")]
        more = ["--images", coco / "images", "--out", folder, "--shard-size", 5, "--num-workers", 2]
        run_program("shard_images", *files, *more, **odd)
    finally:
        os.umask(before)
    assert snapshot(tmp_path / "odd") == snapshot(shards)
    files = [path for path in (tmp_path / "odd").rglob("*") if path.is_file() and path.name != "lock"]
    assert {stat.S_IMODE(path.stat().st_mode) for path in files} == {0o640}, "as the umask says"


def test_a_second_run_writes_nothing_and_tells_so(coco, shards, capsys):
    before = {path.name: (path.stat().st_ino, path.stat().st_mtime_ns) for path in shards.glob("*.*")}
    main(**options(coco, shards))
    assert "0 shards written, 4 reused" in capsys.readouterr().out
    assert before == {path.name: (path.stat().st_ino, path.stat().st_mtime_ns) for path in shards.glob("*.*")}


def test_stripes_and_steps_give_the_same_data_set_as_one_run(coco, shards, tmp_path):
    out = tmp_path / "striped"
    main(**options(coco, out, step="plan"))
    main(out, step="shards", stripe="1/2", num_workers=1)
    with pytest.raises(ValueError, match="train-000000.tar is missing"):
        main(out, step="finalize")
    assert not (out / "manifest.json").exists()
    main(out, step="shards", stripe="0/2", num_workers=1)
    main(out, step="finalize")
    assert snapshot(out) == snapshot(shards)


@pytest.mark.parametrize("stripe", ["2/2", "1", "a/b", "-1/2", "0/0"])
def test_a_stripe_that_does_not_exist_is_refused(stripe):
    with pytest.raises(ValueError, match="expected I/N with I from 0 to N-1"):
        parse_stripe(stripe)


def test_another_plan_is_refused_with_what_differs_unless_overwritten(coco, tmp_path):
    out = tmp_path / "images"
    main(**options(coco, out, shard_size=3))
    first = snapshot(out)
    with pytest.raises(ValueError, match=r"other inputs or settings \(records, seed, shard_size\).*--overwrite"):
        main(**options(coco, out, seed=3))
    assert snapshot(out) == first
    (out / "mine.txt").write_text("not written by us")
    main(**options(coco, out, seed=3, overwrite=True))
    main(**options(coco, tmp_path / "fresh", seed=3))
    assert snapshot(out) == snapshot(tmp_path / "fresh") | {"mine.txt": b"not written by us"}


@pytest.mark.faults
def test_bad_pictures_are_left_out_recorded_and_counted_up_to_the_limit(tmp_path, capsys):
    files = make_coco(tmp_path, {"train": 10})
    folder = tmp_path / "images" / "train"
    bad = {"000001": b"", "000002": (folder / "000002.jpg").read_bytes()[:300], "000003": b"<html>404</html>"}
    for name, data in bad.items():
        (folder / f"{name}.jpg").write_bytes(data)
    arguments = {"annotations": [f"train={files['train']}"], "images": tmp_path / "images", "num_workers": 1}
    with pytest.raises(ValueError, match="empty file.*more than --max-bad-fraction 0.2 allows"):
        main(tmp_path / "out", **arguments, max_bad_fraction=0.2)
    assert not (tmp_path / "out" / "manifest.json").exists()
    main(tmp_path / "out", **arguments, max_bad_fraction=0.3)
    assert "left out 1 empty file, 1 not a picture, 1 truncated" in capsys.readouterr().out
    manifest = load_manifest(tmp_path / "out")
    assert manifest.left_out == {"empty file": 1, "not a picture": 1, "truncated": 1} and manifest.splits == {
        "train": 7
    }
    report = [json.loads(line) for line in (tmp_path / "out" / "left_out.jsonl").read_text().splitlines()]
    assert {item["image_id"]: item["reason"] for item in report} == {
        "1": "empty file",
        "2": "truncated",
        "3": "not a picture",
    }


@pytest.mark.faults
def test_a_shard_of_bad_pictures_only_is_no_shard(tmp_path):
    files = make_coco(tmp_path, {"train": 2, "val": 2})
    for path in (tmp_path / "images" / "val").iterdir():
        path.write_bytes(b"")
    records = read_annotations([f"{s}={f}" for s, f in files.items()], image_root=tmp_path / "images")
    plan = plan_images(records, tmp_path / "images", tmp_path / "out", shard_size=5, seed=1, max_bad_fraction=1.0)
    assert shard_stripe(plan).bad == 2
    assert finalize(plan).splits == {"train": 2}
    assert [path.name for path in sorted((tmp_path / "out").glob("*.tar"))] == ["train-000000.tar"]


@pytest.mark.faults
def test_pictures_that_vanish_after_the_plan_end_the_job_and_their_return_lets_it_go_on(coco, shards, tmp_path):
    pictures, out = shutil.copytree(coco / "images", tmp_path / "pictures"), tmp_path / "out"
    main(**options(coco, out, images=pictures, step="plan"))
    pictures.rename(tmp_path / "away")
    with pytest.raises(ValueError, match="pictures: no such image folder"):
        main(out, step="shards", num_workers=1)
    pictures.mkdir()
    with pytest.raises(FileNotFoundError, match="pictures/train/"):
        main(out, step="shards", num_workers=1)
    assert not list(out.rglob("*.tar")) and not list((out / "work").glob("train-*"))
    pictures.rmdir(), (tmp_path / "away").rename(pictures)
    main(out, step="shards", num_workers=1), main(out, step="finalize")
    assert {k: v for k, v in snapshot(out).items() if k != "work/plan.json"} == {
        k: v for k, v in snapshot(shards).items() if k != "work/plan.json"
    }


@pytest.mark.faults
def test_an_unfinished_shard_stays_until_its_successor_is_written(coco, shards, tmp_path):
    pictures, out = shutil.copytree(coco / "images", tmp_path / "pictures"), tmp_path / "out"
    main(**options(coco, out, images=pictures))
    os.truncate(out / "train-000000.tar", 4096)
    before = snapshot(out)
    pictures.rename(tmp_path / "away")
    pictures.mkdir()
    with pytest.raises(FileNotFoundError, match="pictures/train/"):
        main(out, step="shards", num_workers=1)
    assert snapshot(out) == before
    pictures.rmdir(), (tmp_path / "away").rename(pictures)
    main(out, step="shards", num_workers=1)
    assert (out / "train-000000.tar").read_bytes() == (shards / "train-000000.tar").read_bytes()


@pytest.mark.faults
def test_a_picture_that_changed_its_size_after_the_plan_ends_the_job(coco, tmp_path):
    pictures, out = shutil.copytree(coco / "images", tmp_path / "pictures"), tmp_path / "out"
    main(**options(coco, out, images=pictures, step="plan"))
    with open(pictures / "train" / "000004.jpg", "ab") as file:
        file.write(b"x")
    with pytest.raises(ValueError, match="000004.jpg is not .* bytes long as it was planned"):
        main(out, step="shards", num_workers=1)


@pytest.mark.faults
def test_the_share_that_may_be_left_out_is_that_of_the_whole_plan_however_it_is_striped(coco, tmp_path):
    pictures, out = shutil.copytree(coco / "images", tmp_path / "pictures"), tmp_path / "out"
    main(**options(coco, out, images=pictures, step="plan"))
    plan = load_plan(out)
    for record in plan.records(plan.shards[0])[:2]:
        (pictures / record.file_name).write_bytes(bytes(record.file_bytes))
    for stripe in ("0/4", "1/4", "2/4", "3/4"):
        main(out, step="shards", stripe=stripe, num_workers=1, max_bad_fraction=2 / 17)
    with pytest.raises(ValueError, match="2 of 17 pictures"):
        main(out, step="finalize", max_bad_fraction=1 / 17)
    main(out, step="finalize", max_bad_fraction=2 / 17)
    assert load_manifest(out).left_out == {"not a picture": 2}


def test_a_wrong_image_folder_is_told_at_once(coco, tmp_path):
    annotations = f"train={coco}/annotations/captions_train.json"
    (tmp_path / "empty").mkdir()
    failed = run_program(
        "shard_images", "--annotations", annotations, "--images", tmp_path / "empty", "--out", tmp_path, code=1
    )
    assert "12 no such file" in failed.stderr and str(tmp_path / "empty") in failed.stderr
    with pytest.raises(ValueError, match="has no plan"):
        main(tmp_path / "new", step="shards")


def test_real_photographs_are_sharded_whole(tmp_path):
    mini = real_data() / "coco_mini"
    annotations = f"train={mini}/annotations/captions_train2017.json"
    main(tmp_path, [annotations], mini, val_fraction=0.2, shard_size=32, num_workers=1)
    manifest = load_manifest(tmp_path)
    assert manifest.splits == {"train": 64, "val": 16} and manifest.left_out == {}
    row = manifest.rows(0).to_pylist()[0]
    image = decode((mini / row["file_name"]).read_bytes())
    assert (row["width"], row["height"]) == image.size and np.asarray(image).std() > 0
