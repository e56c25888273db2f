"""Shards are plain tars of plain npy and JSON: programs that know nothing of this one read the arrays it reads."""

import io
import json
import subprocess
import tarfile
from pathlib import Path

import numpy as np
import pytest

from preprocessing.features.statistics import restore
from sat.shards.manifest import load_manifest, load_statistics
from tests.helpers_import import boxes_of, make_region_dataset, regions_of, values_of
from tests.helpers_shards import grid_of, make_feature_dataset, self_describing_captions

SPLITS = {"train": 9, "val": 4}


@pytest.fixture(scope="module", params=["bf16", "int8", "fp32"])
def grids(request, tmp_path_factory):
    return make_feature_dataset(tmp_path_factory.mktemp("grids") / "set", splits=SPLITS, dtype=request.param)


def tars(manifest) -> list[str]:
    return [str(Path(manifest.root, shard.name)) for shard in manifest.shards]


def check(manifest, found: dict[str, tuple[np.ndarray, dict]]) -> None:
    """Every sample is there, with the array of its picture as it was rounded, and its captions."""
    assert found.keys() == {f"{split}-{index}" for split, count in SPLITS.items() for index in range(count)}
    scale, tolerance = load_statistics(manifest)["scale"], {"bf16": 2**-8, "int8": 0.51 * 4 / 127, "fp32": 0}
    for key, (stored, about) in found.items():
        split, _, index = key.partition("-")
        grid = grid_of(split, int(index), 4, 8)
        assert (about["image_id"], about["captions"]) == (key, self_describing_captions(split, int(index)))
        values = restore(stored, manifest.spec.dtype, scale)
        allowed = tolerance[manifest.spec.dtype] * (np.abs(grid) if manifest.spec.dtype == "bf16" else 1)
        clipped = np.clip(grid, -4, 4) if manifest.spec.dtype == "int8" else grid
        assert values.shape == grid.shape and (np.abs(values - clipped) <= allowed).all()


def test_pythons_tarfile_and_gnu_tar_read_every_member(grids, tmp_path):
    found: dict[str, tuple[np.ndarray, dict]] = {}
    for path in tars(grids):
        subprocess.run(["tar", "-xf", path, "-C", tmp_path], check=True)
        with tarfile.open(path) as tar:
            for member in tar:
                assert (tmp_path / member.name).read_bytes() == tar.extractfile(member).read()
    for path in tmp_path.glob("*.npy"):
        found[path.stem] = np.load(path, allow_pickle=False), json.loads(path.with_suffix(".json").read_bytes())
    check(grids, found)


def test_stock_webdataset_reads_the_arrays(grids):
    import webdataset

    samples = webdataset.WebDataset(tars(grids), shardshuffle=False).decode()
    check(grids, {sample["__key__"]: (sample["npy"], sample["json"]) for sample in samples})


def test_hugging_face_datasets_reads_the_arrays(grids, tmp_path):
    import datasets

    files = {split: [path for path in tars(grids) if f"/{split}-" in path] for split in SPLITS}
    read = datasets.load_dataset("webdataset", data_files=files, cache_dir=tmp_path, streaming=True)
    samples = [sample for split in SPLITS for sample in read[split]]
    arrays = {sample["__key__"]: np.asarray(sample["npy"]) for sample in samples}
    check(
        grids,
        {s["__key__"]: (arrays[s["__key__"]].astype(grids.spec.stored), s["json"]) for s in samples},
    )


def test_regions_and_their_boxes_are_members_of_their_own(tmp_path):
    manifest = make_region_dataset(tmp_path, {"train": 5})
    for path in tars(manifest):
        with tarfile.open(path) as tar:
            members = {member.name: tar.extractfile(member).read() for member in tar}
    keys = sorted({name.partition(".")[0] for name in members})
    assert len(keys) == 5 and {name.partition(".")[2] for name in members} == {"npy", "boxes.npy", "json"}
    for key in keys:
        number = int(json.loads(members[f"{key}.json"])["image_id"])
        features, boxes = (np.load(io.BytesIO(members[f"{key}.{each}"])) for each in ("npy", "boxes.npy"))
        assert np.array_equal(features, values_of(number, regions_of(number)))
        assert np.allclose(boxes, boxes_of(number, regions_of(number)), atol=1e-6)


def test_the_manifest_lists_what_the_tars_hold(grids):
    manifest = load_manifest(grids.root)
    listed = [row["key"] for index in range(len(manifest.shards)) for row in manifest.rows(index).to_pylist()]
    names = []
    for path in tars(manifest):
        with tarfile.open(path) as tar:
            names += [member.name.partition(".")[0] for member in tar if member.name.endswith(".npy")]
    assert listed == names
