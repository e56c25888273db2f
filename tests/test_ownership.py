"""Nothing is deleted or replaced that is not known to be ours, and nobody publishes into a folder of another plan."""

import errno
import os
import shutil
from pathlib import Path

import pytest

from preprocessing import build_vocab, prepare
from preprocessing import shard_images as sharding
from preprocessing.shard_images import build_image_shard, main, shard_stripe
from preprocessing.sharding.finalize import finalize
from preprocessing.sharding.plan import load_plan
from preprocessing.sharding.verify import verify
from preprocessing.verify_shards import repair
from sat import files
from sat.shards.manifest import load_manifest
from tests.helpers_shards import flip_bit, make_coco, run_program, snapshot

pytestmark = pytest.mark.faults


@pytest.fixture(scope="module")
def coco(tmp_path_factory):
    root = tmp_path_factory.mktemp("coco")
    make_coco(root)
    return root


def options(coco, out, **changes) -> dict:
    annotations = [f"{split}={coco}/annotations/captions_{split}.json" for split in ("train", "val")]
    return {
        "out": out,
        "annotations": annotations,
        "images": coco / "images",
        "shard_size": 4,
        "num_workers": 1,
    } | changes


@pytest.fixture(scope="module")
def made(coco, tmp_path_factory):
    """Data sets of two plans of the same pictures."""
    root = tmp_path_factory.mktemp("made")
    main(**options(coco, root / "a"))
    main(**options(coco, root / "b", seed=2))
    return root


@pytest.fixture
def images(made, tmp_path):
    return shutil.copytree(made / "a", tmp_path / "images")


@pytest.mark.parametrize("place", ["before it begins", "tar-created", "sample-written", "tar-written"])
def test_a_straggler_of_an_overwritten_plan_ends_and_touches_nothing(coco, made, tmp_path, monkeypatch, place):
    out = tmp_path / "images"
    main(**options(coco, out, step="plan"))
    old, overtaken = load_plan(out), []

    def overtake(name: str) -> None:
        if name == place and not overtaken:
            overtaken.append(name)
            main(**options(coco, out, seed=2, overwrite=True))

    monkeypatch.setattr(files, "crash_point", overtake)
    overtake("before it begins")
    with pytest.raises(
        ValueError, match=r"another plan \(.*\) stands there by now, this job works for .*another --out"
    ):
        shard_stripe(old)
    with pytest.raises(ValueError, match="another plan"):
        finalize(old)
    assert overtaken and snapshot(out) == snapshot(made / "b")


def test_a_straggler_of_a_deleted_set_ends_and_publishes_nothing(coco, tmp_path):
    main(**options(coco, tmp_path / "images", step="plan"))
    plan = load_plan(tmp_path / "images")
    (tmp_path / "images" / "work" / "plan.json").unlink()
    with pytest.raises(ValueError, match="its plan is gone"):
        build_image_shard(plan, plan.shards[0])
    assert not list((tmp_path / "images").rglob("*.tar*"))


def test_repair_and_verify_tell_a_work_folder_of_another_set_and_change_nothing(made, images):
    shutil.rmtree(images / "work")
    shutil.copytree(made / "b" / "work", images / "work")
    before = snapshot(images)
    for damage in (lambda: None, lambda: flip_bit(images / "train-000001.tar", 9000)):
        damage()
        before = snapshot(images)
        report = verify(images)
        assert str(report.faults[0]).startswith("work/plan.json: ") and "another data set" in str(report.faults[0])
        with pytest.raises(ValueError, match="work/plan.json plans another data set than manifest.json lists"):
            repair(images, report)
        assert snapshot(images) == before
    flip_bit(images / "manifest.json", 400)
    before = snapshot(images)
    with pytest.raises(ValueError, match=r"\d+ of \d+ samples are not as work/ records them"):
        repair(images, verify(images))
    assert snapshot(images) == before


def test_overwriting_leaves_what_others_put_beside_a_set_and_into_its_work_folder(coco, made, images):
    theirs = {"samples-mine.parquet", "other.tar", "work/notes.json", "work/notes.tmp-old", "work/folder/file"}
    (images / "work" / "folder").mkdir()
    for name in theirs:
        (images / name).write_text("mine")
    main(**options(coco, images, seed=2, overwrite=True))
    assert snapshot(images) == snapshot(made / "b") | dict.fromkeys(theirs, b"mine")


@pytest.mark.parametrize("name", ["train-000000.tar", "manifest.json", "samples.parquet", "left_out.jsonl"])
@pytest.mark.parametrize("overwrite", [False, True])
def test_a_file_of_one_of_our_names_that_is_not_ours_is_neither_replaced_nor_deleted(coco, tmp_path, name, overwrite):
    (tmp_path / name).write_text("mine")
    with pytest.raises(ValueError, match=f"holds {name}, which are not known to be ours"):
        main(**options(coco, tmp_path, overwrite=overwrite))
    assert (tmp_path / name).read_text() == "mine"


def test_a_set_whose_plan_is_lost_is_taken_up_by_its_own_plan_and_by_no_other(coco, made, images):
    for damage in (lambda path: flip_bit(path, 400), lambda path: path.unlink()):
        damage(images / "work" / "plan.json")
        before = snapshot(images)
        with pytest.raises(ValueError, match=r"planned with other inputs .*--overwrite"):
            main(**options(coco, images, seed=2))
        assert snapshot(images) == before
        main(**options(coco, images))
        assert snapshot(images) == snapshot(made / "a")
    flip_bit(images / "work" / "plan.json", 400)
    main(**options(coco, images, seed=2, overwrite=True))
    assert snapshot(images) == snapshot(made / "b")


def test_a_finished_set_without_its_work_folder_is_not_planned_again(coco, images):
    shutil.rmtree(images / "work")
    with pytest.raises(ValueError, match="holds this very data set, without its work/"):
        main(**options(coco, images))
    assert load_manifest(images).splits == {"train": 12, "val": 5} and not verify(images).faults


def test_a_repair_that_another_one_was_faster_than_builds_nothing(made, images, monkeypatch):
    flip_bit(images / "train-000001.tar", 9000)
    late = verify(images)
    repair(images, late)
    monkeypatch.setattr(sharding, "write_shard", None)
    repair(images, late)
    assert snapshot(images) == snapshot(made / "a")


@pytest.mark.parametrize("code", [errno.EPERM, errno.EXDEV, errno.ENOTSUP])
def test_a_file_system_without_links_publishes_by_renames_and_one_without_either_is_named(
    coco, made, tmp_path, monkeypatch, code
):
    def refuse(*_: object, **__: object) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "link", refuse)
    main(**options(coco, tmp_path / "images"))
    assert snapshot(tmp_path / "images") == snapshot(made / "a")
    assert not files.create(tmp_path / "images" / "work" / "plan.json", b"") and not list(tmp_path.rglob("*.tmp-*"))
    monkeypatch.setattr(files, "_rename", lambda *_: errno.EINVAL)
    with pytest.raises(OSError, match="neither links nor renames that replace nothing.*write to another one"):
        main(**options(coco, tmp_path / "other"))


def test_folders_that_are_urls_are_refused_at_once(coco, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    annotations = f"train={coco}/annotations/captions_train.json"
    given = ("--annotations", annotations, "--images", coco / "images")
    for program, arguments in (("shard_images", given), ("extract_features", ("--images", coco / "images"))):
        failed = run_program(program, *arguments, "--out", "s3://bucket/x", code=1)
        assert "error: s3://bucket/x is a URL, and this needs a folder" in failed.stderr
    failed = run_program("verify_shards", "https://host/x", code=1)
    assert "https://host/x is a URL" in failed.stderr and not list(tmp_path.iterdir())
    for program, arguments in ((prepare.main, (coco, Path("s3://bucket/x"))), (prepare.main, (Path("s3://bucket/x"),))):
        with pytest.raises(ValueError, match="s3://bucket/x is a URL, and this needs a folder"):
            program(*arguments)
    with pytest.raises(ValueError, match="gs://bucket/words.json is a URL"):
        build_vocab.main(Path("gs://bucket/words.json"))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("times", [1, 99])
def test_storage_that_fails_once_is_asked_again_and_one_that_keeps_failing_is_named(
    coco, made, tmp_path, monkeypatch, times
):
    failures: dict[str, int] = {}

    def stale(path, *mode):
        failures[path.name] = failures.get(path.name, 0) + 1
        if failures[path.name] <= times:
            raise OSError(errno.ESTALE, os.strerror(errno.ESTALE), str(path))
        return open(path, *mode)

    monkeypatch.setattr(sharding, "open", stale, raising=False)
    if times == 1:
        main(**options(coco, tmp_path / "images"))
        assert len(failures) == 17 and snapshot(tmp_path / "images") == snapshot(made / "a")
        return
    with pytest.raises(OSError, match=r"0000\d\d.jpg: .*after 5 attempts"):
        main(**options(coco, tmp_path / "images"))
    assert not list((tmp_path / "images").rglob("*.tar*"))


def test_pictures_deleted_after_the_plan_are_left_out_by_rule_and_counted(coco, tmp_path):
    pictures, out = shutil.copytree(coco / "images", tmp_path / "pictures"), tmp_path / "images"
    main(**options(coco, out, images=pictures, step="plan"))
    plan = load_plan(out)
    record = plan.records(plan.shards[0])[1]
    (pictures / record.file_name).unlink()
    with pytest.raises(ValueError, match=r"1 pictures had to be left out \(1 file gone since the plan\)"):
        main(out, step="shards", num_workers=1)
    main(out, step="shards", num_workers=1, max_bad_fraction=0.1)
    main(out, step="finalize", max_bad_fraction=0.1)
    manifest = load_manifest(out)
    assert manifest.left_out == {"file gone since the plan": 1} and sum(manifest.splits.values()) == 16
    assert record.file_name in (out / "left_out.jsonl").read_text() and not verify(out).faults


def test_of_a_damaged_manifest_no_table_is_called_foreign(images):
    flip_bit(images / "manifest.json", 400)
    report = verify(images)
    assert not report.foreign and {fault.file for fault in report.faults} == {"manifest.json"}
