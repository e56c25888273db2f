"""Three annotation formats, one set of records; what cannot be used is left out by rule and told."""

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest

from preprocessing.annotations.clean import MAX_CHARACTERS, clean_caption
from preprocessing.annotations.read import read_annotations
from preprocessing.sharding.plan import ImageRecord
from tests.helpers_shards import real_data

CAPTIONS = {
    "101": ["A red circle.", "One circle, red."],
    "102": ["Two squares .", "A pair of squares."],
    "103": ["A star above a square.", "There is a star."],
    "9": ["Nothing but blue."],
}
SPLITS = {"101": "train", "102": "train", "103": "val", "9": "test"}


def write_coco(folder, split, captions, **extra):
    images = [{"id": int(i), "file_name": f"{i}.jpg", "width": 4, "height": 4} for i in captions]
    texts = [{"image_id": int(i), "caption": text} for i in captions for text in captions[i]]
    annotations = [{"id": 500 - number, **text} for number, text in enumerate(reversed(texts))]
    path = folder / f"captions_{split}.json"
    path.write_text(json.dumps({"info": {}, "images": images, "annotations": annotations} | extra))
    return f"{split}={path}"


def karpathy(**changes):
    images = []
    for image_id, texts in CAPTIONS.items():
        sentences = [{"raw": text, "tokens": text.split(), "sentid": k} for k, text in enumerate(texts)]
        images.append(
            {"cocoid": int(image_id), "filename": f"{image_id}.jpg", "split": SPLITS[image_id], "sentences": sentences}
        )
        images[-1] |= changes
    return {"dataset": "coco", "images": images}


@pytest.fixture
def coco(tmp_path):
    return [
        write_coco(tmp_path, s, {i: c for i, c in CAPTIONS.items() if SPLITS[i] == s}) for s in ("train", "val", "test")
    ]


def test_all_formats_give_the_same_records(tmp_path, coco):
    (tmp_path / "dataset.json").write_text(json.dumps(karpathy()))
    lines = [f"{i}.jpg#{k}\t{text}" for i, texts in CAPTIONS.items() for k, text in reversed(list(enumerate(texts)))]
    (tmp_path / "token.txt").write_text("\n".join(lines) + "\n")
    for split in ("train", "val", "test"):
        names = [f"{i}.jpg\n" for i in CAPTIONS if SPLITS[i] == split]
        (tmp_path / f"{split}.txt").write_text("".join(names))
    lists = [f"{split}={tmp_path}/{split}.txt" for split in ("train", "val", "test")]

    expected = tuple(
        ImageRecord(i, f"{i}.jpg", SPLITS[i], tuple(CAPTIONS[i]), i, id_is_number=True)
        for i in sorted(CAPTIONS, key=lambda image_id: (SPLITS[image_id], image_id))
    )
    sized = tuple(replace(record, width=4, height=4) for record in expected)  # COCO's alone says how large a picture is
    assert read_annotations(coco).images == sized
    assert read_annotations([str(tmp_path / "dataset.json")]).images == expected
    named = tuple(replace(record, id_is_number=False) for record in expected)  # a file's name is text
    assert read_annotations([str(tmp_path / "token.txt")], split_lists=lists).images == named


def test_karpathy_keeps_restval_and_the_folder_of_each_picture(tmp_path):
    (tmp_path / "dataset.json").write_text(json.dumps(karpathy(split="restval", filepath="val2014")))
    records = read_annotations([str(tmp_path / "dataset.json")]).images
    assert {r.split for r in records} == {"restval"} and records[0].file_name == "val2014/101.jpg"


def test_flickr_karpathy_and_token_file_agree_on_image_ids(tmp_path):
    document = karpathy()
    for image in document["images"]:
        del image["cocoid"]
        image["filename"] = f"{image['filename'][:-4]}_ab12.jpg"
    (tmp_path / "dataset.json").write_text(json.dumps(document))
    (tmp_path / "token.txt").write_text("".join(f"{i}_ab12.jpg#0\t{texts[0]}\n" for i, texts in CAPTIONS.items()))
    ids = {r.image_id for r in read_annotations([str(tmp_path / "dataset.json")]).images}
    assert ids == {r.image_id for r in read_annotations([str(tmp_path / "token.txt")]).images}
    assert "101_ab12" in ids


@pytest.mark.parametrize("folder", ["", "train", "train2014"])
def test_a_picture_is_found_beside_or_below_the_image_root_by_split_or_coco_year(tmp_path, folder):
    (tmp_path / "images" / folder).mkdir(parents=True)
    (tmp_path / "images" / folder / "101.jpg").write_bytes(b"12345")
    path = write_coco(tmp_path, "train2014", {"101": CAPTIONS["101"]}).replace("train2014=", "train=", 1)
    (record,) = read_annotations([path], image_root=tmp_path / "images").images
    assert record.file_name == (f"{folder}/101.jpg" if folder else "101.jpg") and record.file_bytes == 5


def test_pictures_without_file_or_caption_are_left_out_with_the_reason(tmp_path):
    path = write_coco(tmp_path, "train", CAPTIONS | {"7": [], "8": ["...", ""]})
    for image_id in ("101", "102", "7", "8"):
        (tmp_path / f"{image_id}.jpg").write_bytes(b"x")
    records = read_annotations([path], image_root=tmp_path)
    assert [r.image_id for r in records.images] == ["101", "102"]
    reasons = {item.image_id: item.reason for item in records.left_out}
    assert reasons == {
        "103": "no such file",
        "9": "no such file",
        "7": "no usable caption",
        "8": "no usable caption",
    }
    assert records.notes == {"captions dropped: no letter or digit": 2}


@pytest.mark.faults
def test_a_picture_that_cannot_be_looked_at_ends_the_job_and_is_not_taken_for_missing(tmp_path, coco, monkeypatch):
    look = Path.stat

    def refused(path: Path, **options):
        if path.name == "102.jpg":
            raise PermissionError(13, "Permission denied", str(path))
        return look(path, **options)

    monkeypatch.setattr(Path, "stat", refused)
    with pytest.raises(PermissionError, match="102.jpg"):
        read_annotations(coco, image_root=tmp_path)


def test_a_picture_listed_twice_counts_once_and_is_noted(coco):
    records = read_annotations([coco[0], coco[0]])
    assert records.images == read_annotations(coco[:1]).images and records.notes == {"images listed twice": 2}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: d["images"].append({"id": 101, "file_name": "other.jpg"}), "image id 101 stands for 101.jpg"),
        (lambda d: d["annotations"].append({"id": 1, "image_id": 77, "caption": "x"}), "captions of image 77"),
        (lambda d: d["images"][0].update(file_name="../secret.jpg"), "outside the image root"),
        (lambda d: d["images"][0].update(file_name="/etc/passwd"), "outside the image root"),
        (lambda d: d["images"][0].update(file_name="a\ud800.jpg"), "Unicode"),
        (lambda d: d["images"][0].pop("file_name"), "not in coco format"),
        (lambda d: [d.pop("images"), d.pop("annotations")], "none of the known layouts"),
    ],
)
@pytest.mark.faults
def test_contradictions_and_dangerous_names_are_refused(tmp_path, coco, change, message):
    path = tmp_path / "captions_train.json"
    document = json.loads(path.read_text())
    change(document)
    path.write_text(json.dumps(document))
    with pytest.raises(ValueError, match=message):
        read_annotations([f"train={path}"])


def test_one_picture_in_two_splits_is_refused(coco):
    with pytest.raises(ValueError, match="image id 101 stands for 101.jpg in train and 101.jpg in val"):
        read_annotations([coco[0], coco[0].replace("train=", "val=", 1)])


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("none.json", "no such annotation file"),
        ("train=none.json", "no such annotation file"),
        ("bad-split=none.json", "letters, digits and _"),
    ],
)
def test_wrong_arguments_are_named(argument, message):
    with pytest.raises(ValueError, match=message):
        read_annotations([argument])


def test_unreadable_files_are_named(tmp_path):
    for content, message in (
        (b"{", "JSON"),
        (b"\xff\xfe", "UTF-8"),
        (b"name without number\n", "none of the known layouts .*coco: .*flickr: .*table: "),
        (b"[1]", "none of the known layouts"),
        (b"[" * 200_000, "nested too deeply"),
        (b"\x00\x01", "no text"),
    ):
        (tmp_path / "file").write_bytes(content)
        with pytest.raises(ValueError, match=f"file.*{message}"):
            read_annotations([str(tmp_path / "file")])


def test_a_split_list_must_name_pictures_that_have_captions(tmp_path):
    (tmp_path / "token.txt").write_text("1.jpg#0\ta dog\n")
    (tmp_path / "list.txt").write_text("1.jpg\n2.jpg\n")
    with pytest.raises(ValueError, match="no captions of 2.jpg"):
        read_annotations([str(tmp_path / "token.txt")], split_lists=[f"train={tmp_path}/list.txt"])
    (tmp_path / "list.txt").write_text("1.jpg\n")
    with pytest.raises(ValueError, match="1.jpg is in the splits train and val"):
        read_annotations(
            [str(tmp_path / "token.txt")], split_lists=[f"{s}={tmp_path}/list.txt" for s in ("train", "val")]
        )


def test_the_validation_share_is_exact_and_depends_on_the_ids_alone(tmp_path):
    captions = {str(i): ["a dog"] for i in range(80)}
    records = read_annotations([write_coco(tmp_path, "train", captions)], val_fraction=0.2).images
    assert Counter(r.split for r in records) == {"train": 64, "val": 16}
    backwards = dict(reversed(captions.items()))
    assert read_annotations([write_coco(tmp_path, "train", backwards)], val_fraction=0.2).images == records
    with pytest.raises(ValueError, match="--val-fraction"):
        read_annotations([write_coco(tmp_path, "test", captions)], val_fraction=0.2)


@pytest.mark.faults
@pytest.mark.parametrize(
    ("raw", "clean"),
    [
        ("  A  dog \n", "A dog"),
        ("a\rb\x0bc\x0cd\x85e\u2028f\u2029g\x00h", "a b c d e f g h"),
        ("a ||| b", "a b"),
        ("half \ud83d pair", "half pair"),
        ("cafe\u0301 😀", "café 😀"),
        ("כלב שחור", "כלב שחור"),
        ("", ""),
        (" ... !?", ""),
        ("😀🎉", ""),
        ("word " * 2_000, ("word " * 2_000).strip()),  # long, and a caption: it is scored whole
        ("w " * MAX_CHARACTERS, ("w " * (MAX_CHARACTERS // 2)).strip()),
        ("x" * 2 * MAX_CHARACTERS, "x" * MAX_CHARACTERS),
    ],
)
def test_odd_captions_are_cleaned_cut_or_dropped_by_rule(raw, clean):
    notes = Counter()
    assert clean_caption(raw, notes) == clean
    assert len(clean.splitlines()) <= 1
    assert sum(notes.values()) == (raw.strip() != clean or not clean)


@pytest.mark.faults
def test_odd_ids_become_keys_that_webdataset_cannot_split_and_never_collide(tmp_path):
    ids = ["plain-1_A", "with.dot", "with dot", "日本", "日木", "x" * 200, "x" * 199, "a/b"]
    document = {"images": [{"id": i, "file_name": f"{k}.jpg"} for k, i in enumerate(ids)]}
    document["annotations"] = [{"id": k, "image_id": i, "caption": "a dog"} for k, i in enumerate(ids)]
    (tmp_path / "c.json").write_text(json.dumps(document))
    records = read_annotations([str(tmp_path / "c.json")]).images
    keys = {r.image_id: r.key for r in records}
    assert sorted(keys) == sorted(ids) and len(set(keys.values())) == len(ids)
    assert keys["plain-1_A"] == "plain-1_A"
    assert all(
        set(key) <= set("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789_-") for key in keys.values()
    )
    assert max(map(len, keys.values())) <= 64

    document["images"].append({"id": keys["with.dot"], "file_name": "z.jpg"})
    document["annotations"].append({"id": 99, "image_id": keys["with.dot"], "caption": "a dog"})
    (tmp_path / "c.json").write_text(json.dumps(document))
    with pytest.raises(ValueError, match="both get the key"):
        read_annotations([str(tmp_path / "c.json")])


def test_real_coco_annotations_are_read_whole():
    data = real_data()
    mini = f"train={data}/coco_mini/annotations/captions_train2017.json"
    records = read_annotations([mini], image_root=data / "coco_mini")
    assert len(records.images) == 80 and sum(len(r.captions) for r in records.images) == 400 and not records.left_out
    val = read_annotations([f"val={data}/coco_val2017/captions_val2017.json"])
    assert len(val.images) == 5000 and sum(len(r.captions) for r in val.images) == 25014
