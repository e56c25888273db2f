"""int8 scales belong to a data set or are taken from another one, so that both mix; what is cut off is said."""

import json

import numpy as np
import pytest

from sat.shards.manifest import load_statistics
from tests.helpers_import import ids_of, run_import, values_of, write_annotations
from tests.helpers_shards import make_coco
from tests.test_extract_features import extract, grids_of, make_images, random_weights


def test_int8_scales_are_shared_by_name_and_what_they_cut_off_is_counted_and_limited(tmp_path):
    files = write_annotations(tmp_path)
    for name, factor in (("one", 1.0), ("two", 0.5), ("wide", 20.0)):
        (tmp_path / name).mkdir()
        for number, _ in ids_of(files):
            np.save(tmp_path / name / f"{number}.npy", factor * values_of(number))
    beyond = ids_of(files)[3][0]
    odd = 0.5 * values_of(beyond)
    odd[1, 2] = 50
    np.save(tmp_path / "two" / f"{beyond}.npy", odd)
    one = run_import(files, tmp_path / "one", tmp_path / "set-one", dtype="int8")
    with pytest.raises(ValueError, match="its scale_sha256 is"):
        one.spec.refuse(run_import(files, tmp_path / "two", tmp_path / "own", dtype="int8").spec, "own")
    shared = {"dtype": "int8", "scale_from": str(tmp_path / "set-one")}
    two = run_import(files, tmp_path / "two", tmp_path / "set-two", **shared)
    one.spec.refuse(two.spec, "two")
    assert np.array_equal(load_statistics(one)["scale"], load_statistics(two)["scale"])
    sidecars = [json.loads(path.read_bytes()) for path in (tmp_path / "set-two" / "work").glob("*-*.json")]
    assert [s["extra"]["notes"] for s in sidecars if "notes" in s["extra"]] == [{"values beyond the int8 scale": 1}]
    with pytest.raises(
        ValueError,
        match=r"train-000000.tar: int8 would cut off .*% of the values, 5% may be; .*plan without --scale-from",
    ):
        run_import(files, tmp_path / "wide", tmp_path / "set-wide", **shared)
    run_import(files, tmp_path / "two", tmp_path / "floats", dtype="fp16")
    with pytest.raises(ValueError, match="it holds fp16 features of width 8, expected int8 features of width 8"):
        run_import(files, tmp_path / "two", tmp_path / "x", **shared | {"scale_from": str(tmp_path / "floats")})
    with pytest.raises(ValueError, match="--scale-from is for --dtype int8; fp16 has no scales"):
        run_import(files, tmp_path / "two", tmp_path / "x", **shared | {"dtype": "fp16"})


def test_int8_sets_that_share_scales_can_be_mixed(tmp_path):
    made = tmp_path
    make_coco(made / "coco")
    make_images(made / "coco", made / "images")
    random_weights(made / "weights.safetensors")
    one = extract(made, tmp_path / "one", dtype="int8")
    calibrated_otherwise = {"dtype": "int8", "statistics_splits": ("val",)}
    two = extract(made, tmp_path / "two", **calibrated_otherwise, scale_from=str(tmp_path / "one"))
    one.spec.refuse(two.spec, "two")
    grids = grids_of(two)
    assert all(np.array_equal(grid, grids[key]) for key, grid in grids_of(one).items())
    assert extract(made, tmp_path / "two", **calibrated_otherwise).digest == two.digest  # as the plan that stands says
    with pytest.raises(ValueError, match="its scale_sha256 is"):
        one.spec.refuse(extract(made, tmp_path / "own", **calibrated_otherwise).spec, "own")
