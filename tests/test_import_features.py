"""Features from elsewhere, in any of their layouts, become the same verified shards, or are refused by rule."""

import json

import h5py
import numpy as np
import pytest
import webdataset

from preprocessing.features.statistics import restore, store
from preprocessing.importing.arrays import BadFeatures, Npz, read_npy
from preprocessing.sharding.plan import load_plan
from preprocessing.sharding.write import sidecar_path
from preprocessing.verify_shards import main as verify_shards
from sat.data.loader import Reading, evaluation_batches
from sat.data.options import LoaderOptions
from sat.shards.manifest import load_statistics
from tests.helpers_import import (
    HEIGHT,
    WIDTH,
    D,
    boxes_of,
    ids_of,
    make_region_dataset,
    regions_of,
    run_import,
    values_of,
    write_annotations,
)
from tests.helpers_shards import flip_bit, run_program, snapshot

ALONE = Reading(LoaderOptions(num_workers=0))


@pytest.fixture
def files(tmp_path):
    return write_annotations(tmp_path)


def save(path, values):
    path.parent.mkdir(parents=True, exist_ok=True)
    np.save(path, values)


def as_npy(root, number, name):
    save(root / f"{name}.npy", values_of(number))


def as_flat_npy_of_doubles(root, number, name):
    save(root / f"{name.split('/')[1]}.npy", values_of(number).astype(np.float64))


def as_cells(root, number, name):
    save(root / f"{name}.npy", values_of(number).reshape(2, 2, D))


def as_fortran(root, number, name):
    save(root / f"{name}.npy", np.asfortranarray(values_of(number)))


def as_npz_by_id(root, number, name):
    root.mkdir(exist_ok=True)
    np.savez_compressed(root / f"{number}.npz", feat=values_of(number))


LAYOUTS = [as_npy, as_flat_npy_of_doubles, as_cells, as_fortran, as_npz_by_id]


def tars(root):
    return {path.name: path.read_bytes() for path in sorted(root.glob("*.tar"))}


def test_every_layout_of_a_grid_gives_the_same_shards(tmp_path, files):
    found = []
    for layout in LAYOUTS:
        for number, name in ids_of(files):
            layout(tmp_path / layout.__name__, number, name)
        manifest = run_import(files, tmp_path / layout.__name__, tmp_path / f"out-{layout.__name__}", shard_size=5)
        assert manifest.spec.cells == (2, 2) and manifest.spec.kind == "grid" and not manifest.left_out
        found.append(tars(tmp_path / f"out-{layout.__name__}"))
    for index, write in enumerate([write_datasets, write_groups]):
        with h5py.File(tmp_path / f"all-{index}.h5", "w") as file:
            for number, name in ids_of(files):
                write(file, number, name)
        run_import(files, tmp_path / f"all-{index}.h5", tmp_path / f"out-{index}", shard_size=5)
        found.append(tars(tmp_path / f"out-{index}"))
    assert len(found[0]) == 4 and all(each == found[0] for each in found)


def write_datasets(file, number, name):
    file[f"{number}_features"] = values_of(number)


def write_groups(file, number, name):
    file.create_group(name)["features"] = values_of(number)


@pytest.mark.parametrize("dtype", ["bf16", "fp16", "fp32", "int8"])
def test_a_reader_gets_the_rounded_values_and_their_statistics(tmp_path, files, dtype):
    for number, name in ids_of(files):
        as_npy(tmp_path / "npy", number, name)
    manifest = run_import(files, tmp_path / "npy", tmp_path / "out", dtype=dtype)
    statistics, training = load_statistics(manifest), []
    for split in ("train", "val"):
        for batch in evaluation_batches(manifest, split, ALONE, batch_size=5):
            for image_id, grid in zip(batch.image_ids, batch.grid, strict=True):
                expected = store(values_of(int(image_id)), dtype, statistics["scale"])
                expected = restore(expected, dtype, statistics["scale"])
                assert np.array_equal(grid.float().numpy() * statistics["scale"], expected)
                if split == "train":  # int8's scales are those of training: others may be clipped
                    assert np.abs(expected - values_of(int(image_id))).max() < 0.05
                training += [expected] if split == "train" else []
    every = np.concatenate(training).astype(np.float64)
    assert np.allclose(statistics["mean"], every.mean(0), atol=1e-6)
    assert np.allclose(statistics["std"], every.std(0), atol=1e-6)


class Trap:
    """What a pickle runs when it is loaded."""

    def __reduce__(self):
        return open, ("trap-was-sprung", "w")


def cut(path, values):
    np.save(path, values)
    path.write_bytes(path.read_bytes()[:-5])


def objects(path, values):
    np.save(path, np.array([Trap()], dtype=object), allow_pickle=True)


def infinite(path, values):
    values[1, 1] = np.inf
    np.save(path, values)


def lying_header(path, values):
    np.save(path, values)
    path.write_bytes(path.read_bytes().replace(b"(4, 8)", b"(9999999, 9999)"[:6]))


BAD = {
    "no regions": lambda path, values: np.save(path, values[:0]),
    "another grid": lambda path, values: np.save(path, values[:3]),
    "another width": lambda path, values: np.save(path, values[:, :5]),
    "transposed": lambda path, values: np.save(path, values.reshape(2, 2, D).transpose(2, 0, 1)),
    "wrong rank": lambda path, values: np.save(path, values[0]),
    "not finite": infinite,
    "truncated": cut,
    "pickled": objects,
    "not numbers": lambda path, values: np.save(path, values.astype(str)),
    "not an npy file": lambda path, values: path.write_bytes(b"<html>"),
    "empty file": lambda path, values: path.write_bytes(b""),
    "no such file": lambda path, values: path.unlink(missing_ok=True),
}


@pytest.mark.faults
@pytest.mark.parametrize("reason", list(BAD))
def test_what_cannot_be_used_is_left_out_by_rule_and_counted_or_refused(tmp_path, files, reason, monkeypatch):
    monkeypatch.chdir(tmp_path)
    numbers = ids_of(files)
    for number, name in numbers:
        as_npy(tmp_path / "npy", number, name)
    for number, name in numbers[3:5]:
        BAD[reason](tmp_path / "npy" / f"{name}.npy", values_of(number))
    manifest = run_import(files, tmp_path / "npy", tmp_path / "out", max_bad_fraction=0.2, shard_size=5)
    assert manifest.left_out == {reason: 2} and sum(manifest.splits.values()) == len(numbers) - 2
    lines = [json.loads(line) for line in (tmp_path / "out" / "left_out.jsonl").read_text().splitlines()]
    assert {line["file_name"] for line in lines} == {f"{name}.jpg" for _, name in numbers[3:5]}
    with pytest.raises(ValueError, match=rf"2 .*{reason}.*max-bad-fraction 0.1") as refusal:
        run_import(files, tmp_path / "npy", tmp_path / "other", max_bad_fraction=0.1)
    assert "\n" not in str(refusal.value)
    assert not (tmp_path / "trap-was-sprung").exists()


@pytest.mark.faults
def test_a_file_cut_anywhere_or_with_any_bit_flipped_is_never_another_error(tmp_path):
    np.save(tmp_path / "one.npy", values_of(1, 2))
    np.savez_compressed(tmp_path / "one.npz", feat=values_of(1, 2))
    for name, read in (("one.npy", read_npy), ("one.npz", lambda blob: Npz(blob)["feat"])):
        blob = (tmp_path / name).read_bytes()
        for end in range(0, len(blob), 3):
            with pytest.raises(BadFeatures):
                read(blob[:end])
        generator = np.random.default_rng(0)
        for place in generator.integers(0, 8 * len(blob), 300):
            flipped = bytearray(blob)
            flipped[place // 8] ^= 1 << place % 8
            try:
                read(bytes(flipped))  # of a bare npy file a flipped number cannot be seen
            except BadFeatures:
                continue


@pytest.mark.parametrize("kind", ["not there", "no hdf5", "no files", "unreadable", "option", "width", "grid"])
def test_a_source_that_cannot_be_read_is_one_sentence(tmp_path, files, kind):
    (tmp_path / "npy").mkdir()
    (tmp_path / "all.h5").write_bytes(b"no")
    at, options, expected = tmp_path / "npy", {}, "17 of 17 pictures have to be left out .17 no such file."
    if kind in ("unreadable", "width", "grid"):
        for number, name in ids_of(files):
            (tmp_path / "npy" / name).parent.mkdir(exist_ok=True)
            rows = values_of(number, 1 + number % 3)
            (cut if kind == "unreadable" else np.save)(tmp_path / "npy" / f"{name}.npy", rows)
    if kind == "not there":
        at, expected = tmp_path / "absent", "no such folder of features, nor HDF5 file"
    elif kind == "no hdf5":
        at, expected = tmp_path / "all.h5", "no whole HDF5 file"
    elif kind == "unreadable":
        expected = "no features can be read, e.g. .*npy: truncated"
    elif kind == "option":
        options, expected = {"dtype": "fp8"}, "dtype.*bf16, fp16, fp32, int8"
    elif kind == "width":
        options, expected = {"dim": 9}, "--dim 9: the features are of width 8"
    elif kind == "grid":
        options, expected = {"kind": "grid"}, "1 to 3 rows of features, which is no grid"
    with pytest.raises(ValueError, match=expected) as refusal:
        run_import(files, at, tmp_path / "out", **options)
    assert "\n" not in str(refusal.value)


def test_the_program_needs_no_picture_goes_on_and_shares_its_work(tmp_path, files):
    for number, name in ids_of(files):
        as_npy(tmp_path / "npy", number, name)
    given = [f"--annotations={split}={path}" for split, path in files.items()]
    given += ["--features", tmp_path / "npy", "--shard-size", 5, "--num-workers", 1, "--dtype", "fp16"]
    given += ["--name", "a detector"]
    done = run_program("import_features", *given, "--out", tmp_path / "whole")
    assert "grid 2x2 of 8 channels, 0 left out" in done.stdout and "left out: none" in done.stdout
    for step in (["--step", "plan"], ["--step", "shards", "--stripe", "1/2"], ["--step", "shards", "--stripe", "0/2"]):
        run_program("import_features", *given, "--out", tmp_path / "parts", *step)
    run_program("import_features", "--out", tmp_path / "parts", "--step", "finalize")
    assert snapshot(tmp_path / "whole") == snapshot(tmp_path / "parts")
    before, plan = snapshot(tmp_path / "whole"), load_plan(tmp_path / "whole")
    assert plan.fingerprint["made_by"] == "a detector"
    (tmp_path / "whole" / "manifest.json").unlink()
    sidecar_path(tmp_path / "whole", plan.shards[1]).unlink()  # as if it had been killed there
    again = run_program("import_features", *given, "--out", tmp_path / "whole")
    assert "1 shards written, 3 reused" in again.stdout and snapshot(tmp_path / "whole") == before
    save(tmp_path / "npy" / "train/000103.npy", values_of(1, 9))
    refused = run_program("import_features", *given, "--out", tmp_path / "whole", code=1)
    assert "was planned with other inputs" in refused.stderr and "Traceback" not in refused.stderr


def test_features_of_one_shape_are_told_apart_by_the_name_of_what_made_them(tmp_path, files):
    for number, name in ids_of(files):
        as_npy(tmp_path / "npy", number, name)
    specs = [run_import(files, tmp_path / "npy", tmp_path / f"out{name}", name=name).spec for name in ("A", "B", "")]
    specs[0].refuse(specs[0], "data/set")
    for other, said in zip(specs[1:], ("'B'", "''"), strict=True):
        with pytest.raises(ValueError, match=f"data/set: its made_by is {said}, but 'A' is needed"):
            specs[0].refuse(other, "data/set")
    assert "made_by" not in specs[2].to_fingerprint()


def test_a_file_that_changes_after_the_plan_is_noticed(tmp_path, files):
    for number, name in ids_of(files):
        as_npy(tmp_path / "npy", number, name)
    given = [f"--annotations={split}={path}" for split, path in files.items()]
    given += ["--features", tmp_path / "npy", "--out", tmp_path / "out", "--num-workers", 1]
    run_program("import_features", *given, "--step", "plan")
    save(tmp_path / "npy" / "train/000103.npy", values_of(1, 9))
    refused = run_program("import_features", "--out", tmp_path / "out", "--step", "shards", "--num-workers", 1, code=1)
    assert "train/000103.jpg are not" in refused.stderr and "plan again with --overwrite" in refused.stderr


def test_a_broken_shard_is_found_and_rebuilt_from_the_files(tmp_path, files, capsys):
    for number, name in ids_of(files):
        as_npy(tmp_path / "npy", number, name)
    run_import(files, tmp_path / "npy", tmp_path / "out", shard_size=5)
    before = snapshot(tmp_path / "out")
    flip_bit(tmp_path / "out" / "train-000001.tar", 8 * 700)
    verify_shards([tmp_path / "out"], repair_faults=True, num_workers=1)
    assert "train-000001.tar" in capsys.readouterr().out and snapshot(tmp_path / "out") == before


# ------------------------------------------------------------------ regions


def test_regions_keep_their_number_and_their_boxes(tmp_path):
    manifest = make_region_dataset(tmp_path)
    spec = manifest.spec
    assert (spec.kind, spec.max_regions, spec.boxes, spec.shape) == ("regions", 5, True, (5, D))
    urls = [str(path) for path in sorted((tmp_path / "data").glob("train-*.tar"))]
    found = {}
    for sample in webdataset.WebDataset(urls, shardshuffle=False):
        about = json.loads(sample["json"])
        found[about["image_id"]] = (read_npy(sample["npy"]), read_npy(sample["boxes.npy"]), about)
    assert sorted(found) == sorted(number for number, name in ids_of({"train": tmp_path / "captions_train.json"}))
    for number, (values, boxes, about) in found.items():
        assert np.array_equal(values, values_of(number, regions_of(number)))
        assert boxes.dtype == np.float32 and np.allclose(boxes, boxes_of(number, regions_of(number)), atol=1e-6)
        assert (about["width"], about["height"]) == (WIDTH, HEIGHT)
    statistics = load_statistics(manifest)
    every = np.concatenate([values for values, _, _ in found.values()]).astype(np.float64)
    assert np.allclose(statistics["mean"], every.mean(0), atol=1e-6)
    assert np.allclose(statistics["std"], every.std(0), atol=1e-6)


def as_the_36_fixed(root, number, rows):
    """Features on their side, beside a pickled `info` that nobody needs."""
    pixels = boxes_of(number, rows) * [WIDTH, HEIGHT, WIDTH, HEIGHT]
    about = {"image_w": WIDTH, "image_h": HEIGHT, "num_bbox": rows, "info": np.array({"objects_id": Trap()}, object)}
    np.savez_compressed(root / f"{number}.npz", x=values_of(number, rows).T, bbox=pixels, **about)


def as_padded(root, number, rows):
    values, boxes = np.full((5, D), 7, np.float32), np.zeros((5, 4), np.float32)
    values[:rows], boxes[:rows] = values_of(number, rows), boxes_of(number, rows)
    np.savez(root / f"{number}.npz", features=values, boxes=boxes, num_boxes=rows)


def as_boxes_apart(root, number, rows):
    save(root / f"{number}.npy", values_of(number, rows))
    save(root.parent / "boxes" / f"{number}.npy", boxes_of(number, rows) * [WIDTH, HEIGHT, WIDTH, HEIGHT])


def test_every_layout_of_regions_gives_the_same_shards(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    make_region_dataset(tmp_path / "reference")
    expected = tars(tmp_path / "reference" / "data")
    files = write_annotations(tmp_path)
    for layout in (as_the_36_fixed, as_padded, as_boxes_apart):
        (tmp_path / layout.__name__).mkdir()
        for number, _ in ids_of(files):
            layout(tmp_path / layout.__name__, number, regions_of(number))
        boxes = tmp_path / "boxes" if layout is as_boxes_apart else None
        out = tmp_path / f"out-{layout.__name__}"
        manifest = run_import(files, tmp_path / layout.__name__, out, boxes=boxes, max_regions=5, shard_size=5)
        assert manifest.spec.boxes and not manifest.left_out
        assert_same_samples(tars(out), expected)
    with h5py.File(tmp_path / "all.hdf5", "w") as file:
        for number, _ in ids_of(files):
            rows = regions_of(number)
            file[f"{number}_features"], file[f"{number}_boxes"] = values_of(number, rows), boxes_of(number, rows)
    run_import(files, tmp_path / "all.hdf5", tmp_path / "out-h5", max_regions=5, shard_size=5)
    assert_same_samples(tars(tmp_path / "out-h5"), expected)
    assert not (tmp_path / "trap-was-sprung").exists()


def assert_same_samples(found, expected):
    """But for the last bit of the boxes, which were pixels in between."""
    assert found.keys() == expected.keys()
    for name, blob in found.items():
        assert len(blob) == len(expected[name])
        ours, theirs = (np.frombuffer(each, np.uint8).astype(int) for each in (blob, expected[name]))
        assert (np.abs(ours - theirs) > 1).sum() == 0


BAD_BOXES = {
    "no boxes": lambda boxes: None,
    "not one box per region": lambda boxes: boxes[:2],
    "boxes of another shape": lambda boxes: boxes[:, :3],
    "boxes not finite": lambda boxes: np.where(boxes == boxes[0, 0], np.nan, boxes),
    "boxes inside out": lambda boxes: boxes[:, [2, 3, 0, 1]],
    "boxes outside the picture": lambda boxes: boxes * 3 * WIDTH,
}


@pytest.mark.faults
@pytest.mark.parametrize("reason", list(BAD_BOXES))
def test_boxes_that_cannot_be_are_left_out_by_rule(tmp_path, reason):
    files, folder = write_annotations(tmp_path), tmp_path / "npz"
    folder.mkdir()
    for place, (number, _) in enumerate(ids_of(files)):
        boxes = boxes_of(number, 4)
        if place == 2:
            boxes = BAD_BOXES[reason](boxes)
        arrays = {"feat": values_of(number)} | ({} if boxes is None else {"bbox": boxes})
        np.savez(folder / f"{number}.npz", **arrays)
    assert run_import(files, folder, tmp_path / "out", max_bad_fraction=0.1).left_out == {reason: 1}


def test_pixels_without_the_size_of_their_picture_are_left_out_by_rule(tmp_path):
    files, folder = write_annotations(tmp_path, {"train": 3}), tmp_path / "npz"
    document = json.loads(files["train"].read_text())
    for image in document["images"]:
        del image["width"]
    files["train"].write_text(json.dumps(document))
    folder.mkdir()
    for number, _ in ids_of(files):
        about = {"image_w": WIDTH, "image_h": HEIGHT} if number != 101 else {}
        np.savez(folder / f"{number}.npz", feat=values_of(number), bbox=boxes_of(number, 4) * 40, **about)
    manifest = run_import(files, folder, tmp_path / "out", max_bad_fraction=0.5)
    assert manifest.left_out == {"boxes in pixels of a picture of unknown size": 1}


def test_more_regions_than_allowed_are_left_out_by_rule(tmp_path):
    manifest = make_region_dataset(tmp_path, max_regions=4, max_bad_fraction=0.5)
    assert manifest.left_out == {"too many regions": 3}
