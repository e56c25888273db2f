"""Every format of the field gives the records it says; values that are none are named with file and picture."""

import io
import json
import tarfile

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from preprocessing.annotations.entry import MISSING
from preprocessing.annotations.formats import FORMATS
from preprocessing.annotations.read import explain, read_annotations
from tests.helpers_shards import encoded, picture

PICTURES = {"a.jpg": ["A dog.", "One dog, brown"], "b.jpg": ["Two cats."]}


def records_of(path, content=None, **options):
    """file -> (split, captions) of a file of this content."""
    if content is not None:
        path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    return {r.file_name: (r.split, list(r.captions)) for r in read_annotations([str(path)], **options).images}


def rows(image="image", caption="caption"):
    return [{image: name, caption: text} for name, texts in PICTURES.items() for text in texts]


EXPECTED = {name: ("train", texts) for name, texts in PICTURES.items()}
KAGGLE = 'image,caption\na.jpg,A dog.\na.jpg,"One dog, brown"\nb.jpg,Two cats.\n'
FLICKR30K = "image_name| comment_number| comment\na.jpg| 0| A dog.\na.jpg| 1| One dog, brown\nb.jpg| 0| Two cats.\n"
TEXTCAPS = [
    {"image_id": name[0], "image_path": name, "set_name": "train", "caption_str": text, "reference_strs": texts}
    for name, texts in PICTURES.items()
    for text in texts
]
NUMBERED = 'file_name,caption_0,caption_1\na.jpg,A dog.,"One dog, brown"\nb.jpg,Two cats.,\n'


@pytest.mark.parametrize(
    ("name", "content", "format"),
    [
        ("captions.txt", KAGGLE, "table"),
        ("results.csv", FLICKR30K, "table"),
        ("captions.tsv", KAGGLE.replace('"', "").replace(",", "\t", 2).replace("jpg,", "jpg\t"), "table"),
        ("excel.csv", KAGGLE.replace(",", ";"), "table"),
        ("numbered.csv", NUMBERED, "table"),
        ("windows.csv", "\ufeff" + KAGGLE.replace("\n", "\r\n"), "table"),
        ("metadata.jsonl", "\n".join(map(json.dumps, rows("file_name", "text"))), "jsonl"),
        ("one.jsonl", "\n".join(json.dumps({"image": n, "captions": t}) for n, t in PICTURES.items()) + "\n", "jsonl"),
        ("lavis.json", rows(), "list"),
        ("lavis_val.json", [{"image": name, "caption": texts} for name, texts in PICTURES.items()], "list"),
        ("objects.json", [{"file_name": n, "captions": [{"raw": x} for x in t]} for n, t in PICTURES.items()], "list"),
        ("by_file.json", PICTURES, "dict"),
        ("TextCaps_0.1_train.json", {"dataset_name": "textcaps", "data": TEXTCAPS}, "textcaps"),
    ],
)
def test_every_layout_gives_the_same_captions_of_the_same_files(tmp_path, name, content, format):
    if name == "excel.csv":
        content = content.replace("dog;", "dog,")
    assert records_of(tmp_path / name, content) == EXPECTED
    said = explain(str(tmp_path / name))
    assert f"taken for {format} " in said and "'A dog.'" in said and said.count("image ") >= 2
    assert records_of(tmp_path / name, format=format) == EXPECTED


def test_ids_of_lavis_are_kept_and_row_numbers_are_not_taken_for_ids(tmp_path):
    lavis = [row | {"image_id": f"coco_{row['image'][0]}"} for row in rows()]
    (tmp_path / "l.json").write_text(json.dumps(lavis))
    assert [r.image_id for r in read_annotations([str(tmp_path / "l.json")]).images] == ["coco_a", "coco_b"]
    (tmp_path / "n.json").write_text(json.dumps([row | {"image_id": k} for k, row in enumerate(rows())]))
    records = read_annotations([str(tmp_path / "n.json")])
    assert [r.image_id for r in records.images] == ["a", "b"] and any("one to one" in note for note in records.notes)


def test_equal_names_in_different_folders_have_ids_of_their_own(tmp_path):
    for folder in ("x", "y"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "1.jpg").write_bytes(folder.encode())
        (tmp_path / folder / "metadata.csv").write_text(f"file_name,text\n1.jpg,a dog of {folder}\n")
    paths = [f"{split}={tmp_path}/{folder}/metadata.csv" for split, folder in (("train", "x"), ("val", "y"))]
    records = read_annotations(paths, image_root=tmp_path).images
    assert [(r.image_id, r.file_name, r.split) for r in records] == [
        ("x/1.jpg", "x/1.jpg", "train"),
        ("y/1.jpg", "y/1.jpg", "val"),
    ]


def test_tables_name_their_splits_and_other_words_for_them(tmp_path):
    content = "file,sentence,split\n1.jpg,a,train\n2.jpg,b,validation\n3.jpg,c,dev\n4.jpg,d,TEST\n5.jpg,e,extra\n"
    found = records_of(tmp_path / "t.csv", content)
    assert [found[f"{n}.jpg"][0] for n in range(1, 6)] == ["train", "val", "val", "test", "extra"]
    with pytest.raises(ValueError, match="t.csv, line 3: 1.jpg is in the splits train and val"):
        records_of(tmp_path / "t.csv", "file,text,split\n1.jpg,a,train\n1.jpg,b,val\n")


def test_the_broken_line_of_flickr30k_is_counted_and_quotes_and_commas_of_a_caption_are_kept(tmp_path):
    path = tmp_path / "results.csv"
    path.write_text(FLICKR30K + 'b.jpg| 4   A cat runs .\nb.jpg| 5| A "cat" | here\n')
    records = read_annotations([str(path)])
    assert records.images[1].captions == ("Two cats.", 'A "cat" | here') and records.notes[MISSING] == 1
    path.write_text('image,caption\na.jpg,A dog, a cat\nb.jpg,a 5" disc, "so" they say\n')
    assert records_of(path) == {"a.jpg": ("train", ["A dog, a cat"]), "b.jpg": ("train", ['a 5" disc, "so" they say'])}
    with pytest.raises(ValueError, match="results.csv, line 2: 3 fields under a header of 2"):
        records_of(path, "caption,image\nA dog, a cat,a.jpg\n")


def coco(images, annotations):
    return {
        "images": [{"id": i, "file_name": name} for i, name in images],
        "annotations": [{"image_id": i, **each} for i, each in annotations],
    }


def test_annotation_ids_that_are_all_0_lose_no_caption_and_a_repeated_one_counts_once(tmp_path):
    texts = ["c", "a", "b", "a"]
    content = coco([(1, "a.jpg")], [(1, {"id": 0, "caption": text}) for text in texts])
    assert records_of(tmp_path / "c.json", content)["a.jpg"][1] == ["c", "a", "b"]
    for annotation in content["annotations"]:
        del annotation["id"]
    assert records_of(tmp_path / "c.json", content)["a.jpg"][1] == texts


def test_captions_that_vizwiz_rejected_or_wrote_beforehand_are_left_out_by_setting(tmp_path):
    marks = [(False, False, "a bottle"), (True, False, "spam"), (False, True, "Quality issues"), (True, True, "x y")]
    annotations = [
        (0, {"id": n, "caption": text, "is_rejected": rejected, "is_precanned": canned, "text_detected": False})
        for n, (rejected, canned, text) in enumerate(marks)
    ]
    path = tmp_path / "train.json"
    content = coco([(0, "VizWiz_train_00000000.jpg"), (1, "VizWiz_train_00000001.jpg")], annotations)
    assert records_of(path, content) == {"VizWiz_train_00000000.jpg": ("train", ["a bottle"])}
    records = read_annotations([str(path)])
    assert records.notes["captions rejected by the data set's makers, left out"] == 2
    assert records.notes["pre-canned captions, left out"] == 1 and "VizWiz" in explain(str(path))
    assert len(records_of(path, keep_rejected=True)["VizWiz_train_00000000.jpg"][1]) == 4


def test_image_info_and_plain_folders_list_pictures_to_be_captioned(tmp_path):
    content = {"images": [{"id": 7, "file_name": "a.jpg"}], "categories": []}
    assert records_of(tmp_path / "image_info_test2017.json", content) == {"a.jpg": ("test", [])}
    (tmp_path / "pictures" / "sub").mkdir(parents=True)
    for name in ("1.jpg", "sub/2.PNG", "readme.txt", ".3.jpg"):
        (tmp_path / "pictures" / name).write_bytes(name.encode())
    folder = tmp_path / "pictures"
    assert records_of(folder, image_root=folder) == {"1.jpg": ("test", []), "sub/2.PNG": ("test", [])}
    (folder / "1.txt").write_text("a dog\n\na brown dog\n")
    records = read_annotations([str(folder)], image_root=folder)
    assert [(r.file_name, r.captions) for r in records.images] == [("1.jpg", ("a dog", "a brown dog"))]
    assert [(item.file_name, item.reason) for item in records.left_out] == [("sub/2.PNG", "no usable caption")]
    (folder / "1.jpg").unlink(), (folder / "sub" / "2.PNG").unlink()
    with pytest.raises(ValueError, match="a folder without pictures"):
        read_annotations([str(folder)])


# ------------------------------------------------------------------ values that are none


BAD = [
    (5, "a caption is 5, expected text"),
    ({"a": 1}, "a caption is {'a': 1}, expected text"),
    (True, "a caption is True, expected text"),
]


@pytest.mark.faults
@pytest.mark.parametrize(("value", "message"), [*BAD, (["a"], r"a caption is \['a'\], expected text")])
def test_a_caption_of_coco_that_is_no_text_names_file_and_image(tmp_path, value, message):
    content = coco([(1, "a.jpg"), (2, "b.jpg")], [(1, {"id": 0, "caption": "x"}), (2, {"id": 1, "caption": value})])
    with pytest.raises(ValueError, match=f"c.json: image 2: {message}"):
        records_of(tmp_path / "c.json", content)


@pytest.mark.faults
@pytest.mark.parametrize(("value", "message"), BAD)
def test_a_caption_of_other_json_that_is_no_text_names_file_and_image(tmp_path, value, message):
    for name, content, where in (
        ("l.json", [*rows(), {"image": "c.jpg", "caption": value}], "l.json, row 3: image c.jpg"),
        ("l.jsonl", json.dumps({"file_name": "c.jpg", "text": [value]}), "l.jsonl, line 1: image c.jpg"),
        ("d.json", PICTURES | {"c.jpg": [value]}, "d.json: image c.jpg"),
        ("t.json", {"data": [*TEXTCAPS, {"image_id": "c", "caption_str": value}]}, "t.json: image c"),
    ):
        if not (name == "d.json" and isinstance(value, dict)):
            with pytest.raises(ValueError, match=f"{where}: {message}"):
                records_of(tmp_path / name, content)


@pytest.mark.faults
def test_null_and_nan_are_no_caption_and_counted(tmp_path):
    missing = [(1, {"id": 0, "caption": None}), (1, {"id": 1, "caption": float("nan")}), (1, {"id": 2, "caption": "x"})]
    (tmp_path / "c.json").write_text(json.dumps(coco([(1, "a.jpg"), (2, "b.jpg")], missing)))
    records = read_annotations([str(tmp_path / "c.json")])
    assert [r.captions for r in records.images] == [("x",)] and records.notes == {MISSING: 2}
    assert [(item.image_id, item.reason) for item in records.left_out] == [("2", "no usable caption")]
    (tmp_path / "l.json").write_text(json.dumps([{"image": "a.jpg", "caption": [None, "x", float("nan")]}]))
    records = read_annotations([str(tmp_path / "l.json")])
    assert records.images[0].captions == ("x",) and records.notes == {MISSING: 2}


@pytest.mark.faults
@pytest.mark.parametrize("value", [None, 5.5, float("nan"), ["a.jpg"], "", {"x": 1}])
def test_a_file_name_that_is_no_text_names_file_and_image(tmp_path, value):
    content = coco([(1, "a.jpg"), (2, value)], [(1, {"id": 0, "caption": "x"})])
    with pytest.raises(ValueError, match=r"c.json: image 2: the file name is .*, expected text"):
        records_of(tmp_path / "c.json", content)
    with pytest.raises(ValueError, match=r"l.json, row 1: the file name is .*, expected text"):
        records_of(tmp_path / "l.json", [{"image": "a.jpg", "caption": "x"}, {"image": value, "caption": "x"}])


@pytest.mark.faults
@pytest.mark.parametrize("value", [None, [1], {}, True, 1.5])
def test_an_id_that_is_none_names_the_file(tmp_path, value):
    with pytest.raises(ValueError, match=r"c.json: an image: the image id is .*, expected text or a whole number"):
        records_of(tmp_path / "c.json", coco([(value, "a.jpg")], [(1, {"id": 0, "caption": "x"})]))


@pytest.mark.faults
@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("deep.json", "[" * 200_000, "deep.json: its JSON is nested too deeply"),
        ("deep.jsonl", '{"file_name": "a.jpg", "text": "x"}\n' + "[" * 200_000, "deep.jsonl, line 2: .*too deeply"),
        ("cut.json", '{"images": [{"id": 1, ', "cut.json: not readable as JSON"),
        ("cut.jsonl", '{"file_name": "a.jpg", "text": "x"}\n{"file_', "cut.jsonl, line 2: not readable as JSON"),
        ("mixed.jsonl", '{"file_name": "a.jpg", "text": "x"}\n[1]\n', "mixed.jsonl, line 2: .1., expected a JSON obj"),
        ("other.jsonl", '{"file_name": "a.jpg", "text": "x"}\n{"x": 1}\n', "line 2: no picture and caption among x"),
        ("results.json", {"bleu": 1.0, "cider": 2.0}, "none of the known layouts .*karpathy: .*list: .*table: "),
        ("instances.json", coco([(1, "a.jpg")], [(1, {"id": 1, "bbox": [1]})]), "none of the known layouts"),
        ("notes.txt", "a diary\nof mine\n", "notes.txt: begins with 'a diary.*none of the known layouts"),
        ("empty.json", "", "none of the known layouts"),
    ],
)
def test_what_cannot_be_read_is_one_line_that_names_the_file(tmp_path, name, content, message):
    with pytest.raises(ValueError, match=message):
        records_of(tmp_path / name, content)


def test_an_unknown_format_is_refused_with_the_choices(tmp_path):
    with pytest.raises(ValueError, match=f"'cooc' is unknown; choose one of auto, {', '.join(FORMATS)}"):
        records_of(tmp_path / "x.csv", KAGGLE, format="cooc")


# ------------------------------------------------------------------ containers


def write_parquet(path, image, caption, **columns):
    pq.write_table(pa.table({"image": image, "caption": caption, **columns}), path)
    return path


DATA = {name: encoded(picture(index)) for index, name in enumerate(PICTURES)}


def test_parquet_of_paths_and_of_embedded_pictures_as_hugging_face_makes_them(tmp_path):
    names = list(PICTURES)
    path = write_parquet(tmp_path / "paths.parquet", names, list(PICTURES.values()))
    assert records_of(path) == EXPECTED
    structs = [{"bytes": DATA[name], "path": name} for name in names]
    path = write_parquet(tmp_path / "train-00000-of-00001.parquet", structs, list(PICTURES.values()))
    records = read_annotations([str(path)], unpack_to=tmp_path / "unpacked")
    assert [(r.image_id, list(r.captions)) for r in records.images] == [("a", PICTURES["a.jpg"]), ("b", ["Two cats."])]
    for record, name in zip(records.images, names):
        assert (records.root / record.file_name).read_bytes() == DATA[name] and record.file_bytes == len(DATA[name])
    stamps = {p: p.stat().st_mtime_ns for p in (tmp_path / "unpacked").rglob("*.jpg")}
    assert read_annotations([str(path)], unpack_to=tmp_path / "unpacked") == records
    assert {p: p.stat().st_mtime_ns for p in (tmp_path / "unpacked").rglob("*.jpg")} == stamps, "a second time reuses"


def test_rows_of_parquet_with_one_picture_are_one_record_and_equal_paths_lose_none(tmp_path):
    a, b = DATA.values()
    structs = [{"bytes": data, "path": None} for data in (a, a, b)]
    path = write_parquet(tmp_path / "p.parquet", structs, ["x", "y", "z"], split=["validation", "validation", "train"])
    found = read_annotations([str(path)], unpack_to=tmp_path / "u").images
    assert [(r.image_id, r.split, r.captions) for r in found] == [
        ("000000002", "train", ("z",)),
        ("000000000", "val", ("x", "y")),
    ]
    structs = [{"bytes": data, "path": "image.jpg"} for data in (a, b)]
    found = read_annotations([str(write_parquet(path, structs, ["x", "y"]))], unpack_to=tmp_path / "u").images
    assert [(r.image_id, r.captions) for r in found] == [("000000001-image", ("y",)), ("image", ("x",))]


@pytest.mark.faults
def test_damaged_parquet_and_captions_that_are_none_are_named(tmp_path):
    path = write_parquet(tmp_path / "p.parquet", ["a.jpg"], [5])
    with pytest.raises(ValueError, match="p.parquet, row 0: image a.jpg: a caption is 5, expected text"):
        records_of(path)
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(ValueError, match="p.parquet: a damaged Parquet file"):
        records_of(path)
    path = write_parquet(tmp_path / "q.parquet", [{"bytes": None, "path": "a.jpg"}], ["x"])
    with pytest.raises(ValueError, match="q.parquet, row 0: there are no bytes of a picture; its path is 'a.jpg'"):
        records_of(path)


def write_tar(path, members):
    with tarfile.open(path, "w") as tar:
        for name, data in members.items():
            about = tarfile.TarInfo(name)
            about.size = len(data)
            tar.addfile(about, io.BytesIO(data))
    return path


def img2dataset(count=3):
    """Members as img2dataset writes them: jpg, txt and json of each key."""
    members = {}
    for index in range(count):
        key, text = f"{index:09d}", f"picture {index}"
        about = {"caption": text, "url": "http://x/1", "key": key, "status": "success", "width": 64, "height": 48}
        members |= {f"{key}.jpg": encoded(picture(index)), f"{key}.json": json.dumps(about).encode()}
        members[f"{key}.txt"] = text.encode()
    return members


def test_tars_of_img2dataset_are_read_by_webdataset(tmp_path):
    path = write_tar(tmp_path / "00000.tar", img2dataset())
    records = read_annotations([f"train={path}"], unpack_to=tmp_path / "u")
    assert [(r.image_id, r.captions) for r in records.images] == [(f"{n:09d}", (f"picture {n}",)) for n in range(3)]
    assert (records.root / records.images[2].file_name).read_bytes() == encoded(picture(2))
    only_json = {name: data for name, data in img2dataset().items() if not name.endswith("txt")}
    path = write_tar(tmp_path / "json.tar", only_json)
    assert [r.captions for r in read_annotations([str(path)]).images] == [(f"picture {n}",) for n in range(3)]
    path = write_tar(tmp_path / "bare.tar", {"a.jpg": DATA["a.jpg"], "b.jpg": DATA["b.jpg"]})
    assert [r.captions for r in read_annotations([str(path)]).images] == [(), ()]


@pytest.mark.faults
@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda blob: blob[: 512 * 9], "00000.tar"),
        (lambda blob: blob[: blob.index(b"000000001.txt")], "cut off after 5 files, its end mark is missing"),
        (lambda blob: blob.replace(b"000000001.jpg", b"000000001.jpX", 1), "damaged at byte"),
        (lambda blob: blob[:-10240] + b"", "00000.tar"),
    ],
    ids=["inside a member", "between members", "header", "end"],
)
def test_a_tar_that_webdataset_would_cut_silently_is_named(tmp_path, damage, message):
    path = write_tar(tmp_path / "00000.tar", img2dataset())
    blob = damage(path.read_bytes())
    path.write_bytes(blob)
    with pytest.raises(ValueError, match=f"00000.tar.*{message}|{message}"):
        read_annotations([str(path)], unpack_to=tmp_path / "u")
    assert not list(tmp_path.glob("u/*/unpacked.json"))


@pytest.mark.faults
def test_a_member_that_points_outside_is_refused(tmp_path):
    path = write_tar(tmp_path / "evil.tar", {"../../x.jpg": DATA["a.jpg"], "../../x.txt": b"a dog"})
    with pytest.raises(ValueError, match="points outside"):
        read_annotations([str(path)], unpack_to=tmp_path / "u")
    assert not list(tmp_path.parent.glob("x.jpg")) and not list(tmp_path.glob("**/x.jpg"))
