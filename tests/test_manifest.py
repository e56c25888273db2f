"""The contract on disk: what is opened is what was written, or an error that names the file."""

import errno
import hashlib
import os
import pickle
import random

import fsspec
import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sat.data.loader import read_references
from sat.shards import location, retry, schema, tables
from sat.shards.features import NPY_HEADER
from sat.shards.manifest import check_files, load_manifest, load_statistics
from sat.shards.schema import MANIFEST, SAMPLES, SAMPLES_SCHEMA, SHARDS, STATISTICS
from sat.shards.sealed import canonical, seal, unseal
from sat.shards.tables import rows_digest
from sat.shards.tar import TAR_BLOCK
from tests.helpers_shards import grid_of, make_feature_dataset, self_describing_captions

VALUES = st.recursive(
    st.none() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["a", "checksum", "ü"]), inner),
    max_leaves=6,
)


@pytest.fixture
def root(tmp_path):
    make_feature_dataset(tmp_path / "set")
    return tmp_path / "set"


def test_every_sample_is_listed_once_and_its_payload_lies_where_the_contract_says(root):
    manifest = load_manifest(root)
    seen = []
    for index, shard in enumerate(manifest.shards):
        blob = (root / shard.name).read_bytes()
        assert hashlib.sha256(blob).hexdigest() == shard.sha256 and len(blob) == shard.bytes
        for row in manifest.rows(index).to_pylist():
            split, number = row["image_id"].split("-")
            start = row["offset"] + TAR_BLOCK + NPY_HEADER
            grid = np.frombuffer(blob[start : start + 4 * 8 * 2], np.float16).reshape(4, 8)
            assert np.array_equal(grid, grid_of(split, int(number), 4, 8).astype(np.float16))
            assert row["captions"] == self_describing_captions(split, int(number))
            assert (row["split"], row["shard"], row["width"], row["height"]) == (split, shard.name, 64, 48)
            seen.append(row["image_id"])
    assert sorted(seen) == sorted([f"train-{i}" for i in range(20)] + [f"val-{i}" for i in range(6)])
    assert manifest.splits == {"train": 20, "val": 6}
    assert [list(manifest.shards.of_split(split)) for split in ("train", "val", "none")] == [[0, 1, 2], [3], []]
    assert manifest.shards.samples.tolist() == [7, 7, 6, 6]


def test_statistics_are_mean_and_std_over_the_training_split(root):
    statistics = load_statistics(load_manifest(root))
    grids = np.stack([grid_of("train", i, 4, 8).astype(np.float16).astype(np.float64) for i in range(20)])
    assert np.allclose(statistics["mean"], grids.mean((0, 1)), atol=1e-6)
    assert np.allclose(statistics["std"], grids.std((0, 1)), atol=1e-6)
    assert np.array_equal(statistics["scale"], np.ones(8, np.float32))


def test_equal_inputs_give_equal_bytes_and_another_fingerprint_another_digest(tmp_path, root):
    make_feature_dataset(tmp_path / "again")
    files = sorted(p.relative_to(root) for p in root.rglob("*") if p.is_file())
    assert files == sorted(p.relative_to(tmp_path / "again") for p in (tmp_path / "again").rglob("*") if p.is_file())
    assert all((root / f).read_bytes() == (tmp_path / "again" / f).read_bytes() for f in files)
    other = make_feature_dataset(tmp_path / "other", name="other")
    assert other.digest != load_manifest(root).digest


def test_a_manifest_can_be_opened_by_url_and_sent_to_another_process(root):
    local, copy = load_manifest(root), pickle.loads(pickle.dumps(load_manifest(root)))
    memory = fsspec.filesystem("memory")
    for path in root.glob("*"):
        if path.is_file():
            memory.pipe(f"/set-{root.parent.name}/{path.name}", path.read_bytes())
    for remote in (load_manifest(f"file://{root}"), load_manifest(f"memory://set-{root.parent.name}"), copy):
        check_files(remote)
        assert remote.digest == local.digest
        assert all(remote.rows(i).equals(local.rows(i)) for i in range(4))
        assert load_statistics(remote).keys() == {"mean", "std", "scale"}


def test_a_folder_without_manifest_is_not_a_data_set(tmp_path):
    with pytest.raises(ValueError, match="not a finished data set"):
        load_manifest(tmp_path)


@pytest.mark.faults
@pytest.mark.parametrize("name", [MANIFEST, SHARDS, SAMPLES, STATISTICS])
def test_any_flipped_bit_of_the_tables_is_an_error_or_changes_no_value(root, name):
    blob = (root / name).read_bytes()
    rows = [load_manifest(root).rows(i) for i in range(4)]
    generator = random.Random(7)
    for _ in range(300):
        place = generator.randrange(len(blob) * 8)
        damaged = bytearray(blob)
        damaged[place // 8] ^= 1 << place % 8
        (root / name).write_bytes(damaged)
        try:
            manifest = load_manifest(root)
            load_statistics(manifest)
            unchanged = all(manifest.rows(i).equals(rows[i]) for i in range(4))
        except ValueError as error:
            assert name in str(error)
        else:
            assert name == SAMPLES and unchanged, f"bit {place} of {name} went unnoticed"


@pytest.mark.faults
def test_a_missing_or_cut_file_is_named(root):
    manifest = load_manifest(root)
    shard = root / "train-000001.tar"
    blob = shard.read_bytes()
    shard.write_bytes(blob[:-512])
    with pytest.raises(ValueError, match="train-000001.tar: 14848 bytes, 15360 bytes were written"):
        check_files(manifest)
    shard.unlink()
    with pytest.raises(ValueError, match="train-000001.tar: missing"):
        check_files(manifest)
    (root / SAMPLES).write_bytes((root / SAMPLES).read_bytes()[:-1])
    with pytest.raises(ValueError, match=f"{SAMPLES}: .* bytes were written"):
        check_files(load_manifest(root))


def test_a_protocol_that_nobody_knows_is_not_called_damage():
    with pytest.raises(ValueError, match="nosuch://set: Protocol not known: nosuch; give a folder or a URL") as caught:
        load_manifest("nosuch://set")
    assert "repair" not in str(caught.value)


@pytest.mark.faults
@pytest.mark.parametrize("code", [errno.EIO, errno.ESTALE])
def test_what_is_read_at_the_start_is_tried_again_too(root, monkeypatch, code, caplog):
    def read():
        manifest = load_manifest(root)
        check_files(manifest)
        return manifest.digest, load_statistics(manifest)["mean"].tolist(), read_references(manifest, "train")

    expected = read()
    monkeypatch.setattr(retry, "FIRST_PAUSE_S", 0.001)
    calls = {}

    def often_failing(function, at):
        def call(*arguments, **options):
            name = str(arguments[at]).rpartition("/")[2]
            calls[function, name] = calls.get((function, name), 0) + 1
            if calls[function, name] % 3:
                raise OSError(code, os.strerror(code))
            return function(*arguments, **options)

        return call

    with monkeypatch.context() as patch:
        often_failing_open = often_failing(location.open_file, 1)
        for module in (location, tables):
            patch.setattr(module, "open_file", often_failing_open)
        patch.setattr(os, "stat", often_failing(os.stat, 0))
        assert read() == expected
    assert {name for _, name in calls} >= {"manifest.json", "shards.parquet", "samples.parquet", "train-000001.tar"}
    assert "manifest.json: reading failed and is tried again" in caplog.text


def test_every_value_of_a_row_is_covered_by_the_digest():
    row = {"key": "a", "image_id": "b", "file_name": "c", "split": "d", "shard": "e", "offset": 0, "nbytes": 1}
    row |= {"xxh3": 2, "captions": ["f", "gh"], "width": 3, "height": 4, "id_is_number": False}
    variants = [row] + [
        {**row, name: row[name] + ("x" if isinstance(row[name], str) else 1)}
        for name in row
        if name not in ("captions", "id_is_number")
    ]
    variants.append({**row, "id_is_number": True})
    variants += [{**row, "captions": texts} for texts in ([], ["f"], ["fg", "h"], ["f", "gh", ""])]
    digests = {rows_digest(pa.Table.from_pylist([variant], SAMPLES_SCHEMA)) for variant in variants}
    assert len(digests) == len(variants)


def test_a_sealed_document_opens_only_unchanged():
    document = {"b": [1, 2.5, None], "a": "\u2028ü"}
    assert unseal(seal(document)) == document
    for blob in (seal(document).replace(b"2.5", b"2.6"), seal(document) + b" ", b"{}", b"[]", b"", b"{" * 9):
        with pytest.raises(ValueError):
            unseal(blob)


@settings(max_examples=60, deadline=None)
@given(st.dictionaries(st.text(max_size=9) | st.sampled_from(["a", "checksums", "checkout", "d"]), VALUES))
def test_a_sealed_document_is_canonical_json_with_the_digest_of_the_rest_in_it(document):
    document.pop("checksum", None)
    checksum = hashlib.sha256(canonical(document)).hexdigest()
    blob = seal(document)
    assert blob == canonical(document | {"checksum": checksum}) and unseal(blob) == document
    for place in range(0, 8 * len(blob), max(8 * len(blob) // 50, 1)):
        flipped = bytearray(blob)
        flipped[place // 8] ^= 1 << place % 8
        with pytest.raises(ValueError):
            unseal(bytes(flipped))


def test_many_shards_are_spread_over_tables_and_row_groups_and_read_the_same(tmp_path, root, monkeypatch):
    one = load_manifest(root)
    rows = [one.rows(i) for i in range(4)]
    monkeypatch.setattr(schema, "SHARDS_PER_TABLE", 3)
    monkeypatch.setattr(tables, "SHARDS_PER_GROUP", 2)
    monkeypatch.setattr(tables, "KEPT_GROUPS", 1)
    many = make_feature_dataset(tmp_path / "many")
    names = sorted(path.name for path in (tmp_path / "many").glob("*.parquet"))
    assert names == ["samples-000001.parquet", SAMPLES, SHARDS]
    assert (many.digest, many.splits, list(many.shards)) == (one.digest, one.splits, list(one.shards))
    assert many.shards.samples.tolist() == one.shards.samples.tolist() and many.shards[-1] == one.shards[3]
    assert all(many.rows(i).equals(rows[i]) for i in (3, 0, 2, 1))
    (tmp_path / "many" / "samples-000001.parquet").unlink()
    with pytest.raises(ValueError, match="samples-000001.parquet: missing"):
        check_files(many)
    with pytest.raises(ValueError, match="samples-000001.parquet: the rows of val-000000.tar cannot be read"):
        many.rows(3)
