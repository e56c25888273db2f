"""What a data set says of itself: ids as the annotations have them, what its numbers mean, which version wrote it."""

import contextlib
import io
import json
import tarfile
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from preprocessing.annotations.entry import is_number
from preprocessing.annotations.read import read_annotations
from preprocessing.extract_features import main as extract
from preprocessing.import_features import main as import_features
from preprocessing.shard_images import main as shard_images
from preprocessing.sharding.plan import WORK, WRITER, load_plan, plan_bytes, read_plan
from preprocessing.sharding.verify import verify
from sat import files
from sat.data.loader import read_number_ids
from sat.evaluation.report import write_captions
from sat.shards.features import STORAGE
from sat.shards.manifest import load_manifest, load_statistics
from sat.shards.schema import SCHEMA
from sat.shards.sealed import seal, unseal
from tests.helpers_shards import encoded, make_feature_dataset, picture, snapshot

NUMBERS, TEXTS = (42, -7, 9_007_199_254_740_993), ("42", "007", "9007199254740993")


def coco_file(path, ids, folder):
    """COCO captions of pictures of these ids, JSON numbers or texts; the pictures lie in `folder`."""
    folder.mkdir(parents=True)
    for number in range(len(ids)):
        (folder / f"p{number}{folder.name}.jpg").write_bytes(encoded(picture(number, (16, 16))))
    images = [{"id": image_id, "file_name": f"p{number}{folder.name}.jpg"} for number, image_id in enumerate(ids)]
    annotations = [{"id": n, "image_id": image_id, "caption": "a red dog"} for n, image_id in enumerate(ids)]
    path.write_text(json.dumps({"info": {}, "images": images, "annotations": annotations}))
    return path


def ids_in_tars(root):
    """The image id in every .json of the shards."""
    found = []
    for path in sorted(root.glob("*.tar")):
        with tarfile.open(path) as tar:
            found += [json.load(tar.extractfile(each))["image_id"] for each in tar if each.name.endswith(".json")]
    return found


@pytest.mark.parametrize("ids", [NUMBERS, TEXTS], ids=["numbers", "texts"])
def test_ids_come_out_as_the_annotations_have_them(tmp_path, ids):
    from pycocotools.coco import COCO

    truth = coco_file(tmp_path / "captions.json", ids, tmp_path / "pictures" / "val")
    shard_images(tmp_path / "images", [f"val={truth}"], images=tmp_path / "pictures" / "val", num_workers=1)
    folder = tmp_path / "vectors"
    folder.mkdir()
    for number in range(len(ids)):
        np.save(folder / f"p{number}val.npy", np.full((4, 3), number, np.float32))
    import_features(tmp_path / "features", [f"val={truth}"], features=folder, num_workers=1)
    for root in (tmp_path / "images", tmp_path / "features"):
        assert sorted(map(str, ids_in_tars(root))) == sorted(map(str, ids))
        assert {type(each) for each in ids_in_tars(root)} == {type(ids[0])}
    manifest = load_manifest(tmp_path / "features")
    captions = {str(image_id): f"dog {image_id}" for image_id in ids}
    write_captions(tmp_path / "results.json", captions, read_number_ids(manifest, "val"))
    with contextlib.redirect_stdout(io.StringIO()):
        results = COCO(str(truth)).loadRes(str(tmp_path / "results.json"))
    assert {each["image_id"]: each["caption"] for each in results.anns.values()} == {i: f"dog {i}" for i in ids}


def test_two_files_may_have_ids_of_two_kinds(tmp_path):
    numbers = coco_file(tmp_path / "a.json", NUMBERS[:2], tmp_path / "pictures" / "train")
    texts = coco_file(tmp_path / "b.json", TEXTS[1:], tmp_path / "pictures" / "val")
    records = read_annotations([f"train={numbers}", f"val={texts}"]).images
    assert {each.image_id: each.id_is_number for each in records} == {
        **dict.fromkeys(map(str, NUMBERS[:2]), True),
        **dict.fromkeys(TEXTS[1:], False),
    }


def test_an_id_that_is_a_number_here_and_text_there_is_refused_by_name(tmp_path):
    path = tmp_path / "captions.json"
    document = {"images": [{"id": 1, "file_name": "a.jpg"}], "annotations": [{"image_id": "1", "caption": "a dog"}]}
    path.write_text(json.dumps(document))
    with pytest.raises(ValueError, match="an image: the image id is 1, a whole number, and elsewhere it is text"):
        read_annotations([str(path)])
    rows = [{"image": "a.jpg", "image_id": 1, "caption": "x"}, {"image": "a.jpg", "image_id": "1", "caption": "y"}]
    path.write_text(json.dumps(rows))
    with pytest.raises(ValueError, match="row 1: the image id is '1', text, and elsewhere it is a whole number"):
        read_annotations([str(path)])


@pytest.mark.parametrize("value", [None, float("nan")])
def test_no_picture_is_called_null(tmp_path, value):
    path = tmp_path / "captions.json"
    path.write_text(json.dumps({"images": [{"id": value, "file_name": "a.jpg"}], "annotations": [{"caption": "x"}]}))
    with pytest.raises(ValueError, match=r"captions\.json: a.*: the image id is|captions\.json.*image_id"):
        read_annotations([str(path)])
    path.write_text(json.dumps([{"image": "a.jpg", "image_id": value, "caption": "x"}]))
    (record,) = read_annotations([str(path)]).images
    assert (record.image_id, record.id_is_number) == ("a", False), "named by its file"


@pytest.mark.parametrize(("column", "numbers"), [(["5", "6"], True), (["5", "x"], False), (["5", "06"], False)])
def test_a_column_of_a_text_table_has_numbers_where_all_of_it_are(tmp_path, column, numbers):
    rows = "".join(f"p{image_id}.jpg,{image_id},a dog\n" for image_id in column)
    (tmp_path / "captions.csv").write_text("image,image_id,caption\n" + rows)
    records = read_annotations([str(tmp_path / "captions.csv")]).images
    assert {each.image_id: each.id_is_number for each in records} == dict.fromkeys(column, numbers)


def test_a_parquet_column_says_itself_what_its_ids_are(tmp_path):
    for kind, values in (("int", [1, 2]), ("text", ["1", "2"])):
        table = {"image": ["a.jpg", "b.jpg"], "image_id": values, "caption": ["x", "y"]}
        pq.write_table(pa.table(table), tmp_path / f"{kind}.parquet")
        records = read_annotations([str(tmp_path / f"{kind}.parquet")]).images
        assert [(each.image_id, each.id_is_number) for each in records] == [("1", kind == "int"), ("2", kind == "int")]


def test_a_whole_number_is_written_as_one_would_write_it():
    assert is_number("-5") and is_number("0")
    assert not any(map(is_number, ["", "007", "1.0", "\u0661", "+1", " 1", "9" * 30, "-0", "a"]))


@pytest.mark.parametrize("dtype", STORAGE)
def test_a_sample_says_what_its_numbers_are(tmp_path, dtype):
    make_feature_dataset(tmp_path, {"train": 2}, dtype=dtype)
    with tarfile.open(tmp_path / "train-000000.tar") as tar:
        (about, *_) = (json.load(tar.extractfile(each)) for each in tar if each.name.endswith(".json"))
        (stored, *_) = (np.load(io.BytesIO(tar.extractfile(each).read())) for each in tar if each.name.endswith(".npy"))
    assert about["dtype"] == dtype and stored.dtype == STORAGE[dtype].numpy and "scale_sha256" not in about


def test_an_int8_sample_names_its_scales(tmp_path):
    truth = coco_file(tmp_path / "captions.json", (1, 2), tmp_path / "pictures")
    (tmp_path / "vectors").mkdir()
    for number in range(2):
        np.save(tmp_path / "vectors" / f"p{number}pictures.npy", np.random.default_rng(number).normal(size=(4, 3)))
    out = tmp_path / "out"
    import_features(out, [f"train={truth}"], features=tmp_path / "vectors", dtype="int8", num_workers=1)
    with tarfile.open(out / "train-000000.tar") as tar:
        about = json.load(tar.extractfile(next(each for each in tar if each.name.endswith(".json"))))
    scale = load_statistics(load_manifest(out))["scale"].astype("<f4")
    assert (about["dtype"], about["scale_sha256"]) == ("int8", files.sha256_of(scale.tobytes()))


def test_a_data_set_of_another_version_is_refused_in_one_sentence_and_made_again(tmp_path):
    truth, out = coco_file(tmp_path / "captions.json", (1, 2), tmp_path / "pictures"), tmp_path / "out"
    arguments = {"annotations": [f"train={truth}"], "images": tmp_path / "pictures", "num_workers": 1}
    shard_images(out, **arguments)
    now = snapshot(out)
    document = unseal((out / "manifest.json").read_bytes())
    files.write_bytes(out / "manifest.json", seal(document | {"schema": SCHEMA - 1}))
    with pytest.raises(ValueError, match=rf"another version .*format {SCHEMA - 1}, this one reads {SCHEMA}.*overwrite"):
        load_manifest(out)
    plan = load_plan(out)
    older = replace(plan, fingerprint={**plan.fingerprint, "writer": WRITER - 1})
    files.write_bytes(out / WORK / "plan.json", plan_bytes(older))
    assert read_plan(out).fingerprint["writer"] == WRITER - 1
    report = verify(out)
    assert [fault.file for fault in report.faults] == ["manifest.json", "work/plan.json"] and not report.foreign
    for step in ("shards", "finalize"):
        with pytest.raises(
            ValueError, match=rf"another version .*writer {WRITER - 1}, this one is {WRITER}.*overwrite"
        ):
            shard_images(out, step=step)
    with pytest.raises(ValueError, match=r"planned with other inputs or settings \(writer\)"):
        shard_images(out, **arguments)
    shard_images(out, **arguments, overwrite=True)
    assert snapshot(out) == now


def test_features_of_another_batch_size_are_another_data_set(tmp_path):
    from tests.test_extract_features import SMALL, random_weights

    truth = coco_file(tmp_path / "captions.json", (1, 2, 3), tmp_path / "pictures")
    shard_images(tmp_path / "images", [f"train={truth}"], images=tmp_path / "pictures", num_workers=1)
    weights, out = str(random_weights(tmp_path / "weights.safetensors")), tmp_path / "features"
    extract(out, tmp_path / "images", weights, **SMALL, step="plan")
    extract(out, tmp_path / "images", weights, **SMALL, step="plan")
    with pytest.raises(
        ValueError, match=r"other inputs or settings \(batch_size\); choose another --out, or .*overwri"
    ):
        extract(out, tmp_path / "images", weights, **SMALL | {"batch_size": 2}, step="plan")
    assert load_plan(out).fingerprint["batch_size"] == SMALL["batch_size"]
