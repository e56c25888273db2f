"""Rows, sidecars and samples in a tar: what is written is what is read."""

import hashlib
import io
import json
import struct
import tarfile
from dataclasses import fields

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sat.shards.schema import (
    SAMPLES_SCHEMA,
    LeftOut,
    SampleRow,
    Sidecar,
    place_of_rows,
    sample_rows,
    sample_table,
)
from sat.shards.sealed import seal, unseal
from sat.shards.tables import rows_digest
from sat.shards.tar import END_OF_TAR, TAR_BLOCK, read_members, sample_bytes

TEXT = st.text(st.characters(exclude_categories=("Cs",)), max_size=12)
ROW = st.builds(
    SampleRow,
    key=TEXT,
    image_id=TEXT,
    file_name=TEXT,
    split=TEXT,
    shard=TEXT,
    offset=st.integers(0, 2**62),
    nbytes=st.integers(0, 2**62),
    xxh3=st.integers(0, 2**64 - 1),
    captions=st.lists(TEXT, max_size=3).map(tuple),
    width=st.integers(0, 2**31 - 1),
    height=st.integers(0, 2**31 - 1),
    id_is_number=st.booleans(),
)
SIDECAR = st.builds(
    Sidecar,
    shard=TEXT,
    split=TEXT,
    fingerprint=TEXT,
    samples=st.integers(0, 9),
    bytes=st.integers(0, 2**62),
    sha256=TEXT,
    rows=st.lists(ROW, max_size=3).map(tuple),
    left_out=st.lists(st.builds(LeftOut, TEXT, TEXT, TEXT, TEXT), max_size=2).map(tuple),
    extra=st.dictionaries(TEXT, st.integers() | TEXT, max_size=2),
)


@given(SIDECAR)
@settings(deadline=None)
def test_a_sidecar_survives_its_file(sidecar):
    assert Sidecar.from_document(unseal(seal(sidecar.to_document()))) == sidecar


def test_the_document_of_a_sidecar_is_the_one_on_disk():
    row = SampleRow("k", "i", "f.jpg", "train", "train-000000.tar", 0, 1536, 7, ("a b",), 3, 4, True)
    sidecar = Sidecar("train-000000.tar", "train", "p", 1, 2560, "s", (row,), (LeftOut("j", "g.jpg", "empty file"),))
    assert sidecar.to_document() == {
        "shard": "train-000000.tar",
        "split": "train",
        "fingerprint": "p",
        "samples": 1,
        "bytes": 2560,
        "sha256": "s",
        "rows": [
            {"key": "k", "image_id": "i", "file_name": "f.jpg", "split": "train", "shard": "train-000000.tar"}
            | {
                "offset": 0,
                "nbytes": 1536,
                "xxh3": 7,
                "captions": ["a b"],
                "width": 3,
                "height": 4,
                "id_is_number": True,
            }
        ],
        "left_out": [{"image_id": "j", "file_name": "g.jpg", "reason": "empty file", "detail": ""}],
        "extra": {},
    }


@given(st.lists(ROW, max_size=3))
@settings(deadline=None)
def test_rows_survive_their_table_and_its_digest_is_that_of_the_plain_table(rows):
    table = sample_table(rows)
    assert table.schema == SAMPLES_SCHEMA and sample_rows(table) == rows
    plain = pa.Table.from_pylist([{**vars(row), "captions": list(row.captions)} for row in rows], SAMPLES_SCHEMA)
    assert rows_digest(table) == rows_digest(plain)


def digest_value_by_value(rows):
    digest = hashlib.sha256()
    for column in SAMPLES_SCHEMA:
        values = [getattr(row, column.name) for row in rows]
        if column.name == "captions":
            digest.update(struct.pack(f"<{len(values)}q", *map(len, values)))
            values = [text for texts in values for text in texts]
        if column.name == "captions" or column.type == pa.string():
            blobs = [text.encode() for text in values]
            digest.update(struct.pack(f"<{len(blobs)}q", *map(len, blobs)) + b"".join(blobs))
        else:
            code = {pa.int32(): "i", pa.int64(): "q", pa.uint64(): "Q", pa.bool_(): "?"}[column.type]
            digest.update(struct.pack(f"<{len(values)}{code}", *values))
    return digest.digest()


@given(st.lists(ROW, max_size=5), st.integers(0, 5), st.integers(0, 5))
@settings(deadline=None)
def test_the_digest_of_rows_is_that_of_their_values_however_the_table_lies_in_memory(rows, first, last):
    table, expected = sample_table(rows), digest_value_by_value(rows[first:last])
    part = table.slice(first, max(last - first, 0))
    assert rows_digest(part) == expected
    chunks = pa.concat_tables([part.slice(0, 2), part.slice(2)])
    assert rows_digest(chunks) == expected
    file = io.BytesIO()
    pq.write_table(part, file)
    assert rows_digest(pq.read_table(file)) == expected


def test_a_row_without_a_value_has_no_digest():
    row = dict.fromkeys(SAMPLES_SCHEMA.names)
    with pytest.raises(ValueError, match="column key has no value in 1 places"):
        rows_digest(pa.Table.from_pylist([row], SAMPLES_SCHEMA))


def test_a_row_has_the_columns_of_the_table():
    assert [field.name for field in fields(SampleRow)] == SAMPLES_SCHEMA.names


def test_rows_of_a_shard_stand_where_the_contract_says():
    places = [place_of_rows(index) for index in (0, 255, 256, 10**6)]
    assert places == [
        ("samples.parquet", 0),
        ("samples.parquet", 255),
        ("samples-000001.parquet", 0),
        ("samples-003906.parquet", 64),
    ]


@given(data=st.binary(max_size=2000), captions=st.lists(TEXT, max_size=3))
@settings(deadline=None)
def test_a_sample_is_a_plain_tar_of_its_two_members(data, captions):
    about = {"image_id": "ü", "file_name": "f.jpg", "captions": captions, "width": 3, "height": 4}
    blob = sample_bytes("key", {"npy": data}, **about)
    assert len(blob) % TAR_BLOCK == 0
    members = read_members(blob, "here")
    assert members["npy"] == data and json.loads(members["json"]) == about
    with tarfile.open(fileobj=io.BytesIO(blob + END_OF_TAR)) as tar:
        assert [(member.name, member.mtime) for member in tar] == [("key.npy", 0), ("key.json", 0)]


def test_bytes_that_are_no_sample_are_refused_by_name():
    blob = sample_bytes("key", {"npy": b"data"}, image_id="i", file_name="f", captions=(), width=1, height=1)
    for damaged in (blob[:-TAR_BLOCK], b"\1" + blob[1:], blob.replace(b"ustar", b"USTAR", 1)):
        with pytest.raises(ValueError, match="here: "):
            read_members(damaged, "here")
