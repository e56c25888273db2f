"""Storage that fails while features are imported from an HDF5 file is asked again; damage is left out, by name."""

import errno
import os

import h5py
import pytest

from preprocessing.importing import sources
from sat.shards import retry
from tests.helpers_import import ids_of, run_import, values_of, write_annotations
from tests.helpers_shards import snapshot

pytestmark = pytest.mark.faults


@pytest.fixture
def files(tmp_path, monkeypatch):
    """The annotations, beside an HDF5 file of groups, `all.h5`."""
    annotations = write_annotations(tmp_path, {"train": 4})
    with h5py.File(tmp_path / "all.h5", "w") as file:
        for number, _ in ids_of(annotations):
            file[f"{number}/feat"] = values_of(number)
    monkeypatch.setattr(retry, "FIRST_PAUSE_S", 0)
    monkeypatch.setattr(sources, "open_source", sources.open_source.__wrapped__)
    return annotations


def failing(function, error, fails):
    """The function, but where `fails(n)` for the n-th call."""
    calls = []

    def call(*arguments):
        calls.append(arguments)
        if fails(len(calls)):
            raise error
        return function(*arguments)

    return call


IN_WORDS = f"Unable to synchronously open object (file read failed: filename = 'a.h5', errno = {errno.EIO}, error)"
"""What h5py says where no name could be looked up."""
PLACES = [
    (h5py.Dataset, "__getitem__", OSError(errno.EIO, os.strerror(errno.EIO))),
    (h5py.Group, "__getitem__", KeyError(IN_WORDS)),
    (h5py.Group, "__contains__", RuntimeError(IN_WORDS)),
]


@pytest.mark.parametrize(("kind", "method", "error"), PLACES)
def test_what_fails_twice_running_ends_as_if_it_had_not(files, tmp_path, monkeypatch, kind, method, error):
    run_import(files, tmp_path / "all.h5", tmp_path / "quiet")
    monkeypatch.setattr(kind, method, failing(getattr(kind, method), error, lambda call: call % 40 in (3, 4)))
    run_import(files, tmp_path / "all.h5", tmp_path / "out")
    assert snapshot(tmp_path / "out") == snapshot(tmp_path / "quiet")


@pytest.mark.parametrize(("kind", "method", "error"), PLACES)
def test_what_fails_for_good_ends_the_job_and_names_the_file(files, tmp_path, monkeypatch, kind, method, error):
    monkeypatch.setattr(kind, method, failing(getattr(kind, method), error, lambda call: call > 5))
    with pytest.raises(OSError, match=r"all\.h5: Input/output error \(after 5 attempts\)"):
        run_import(files, tmp_path / "all.h5", tmp_path / "out", max_bad_fraction=1.0)
    assert not (tmp_path / "out" / "manifest.json").exists()


def test_an_array_that_fails_its_checksum_is_left_out_and_counted(tmp_path, files):
    number, _ = ids_of(files)[1]
    with h5py.File(tmp_path / "all.h5", "a") as file:
        del file[f"{number}/feat"]
        array = file.create_dataset(f"{number}/feat", data=values_of(number), chunks=(4, 8), fletcher32=True)
        place = array.id.get_chunk_info(0).byte_offset
    blob = bytearray((tmp_path / "all.h5").read_bytes())
    blob[place] ^= 1
    (tmp_path / "all.h5").write_bytes(blob)
    manifest = run_import(files, tmp_path / "all.h5", tmp_path / "out", max_bad_fraction=1.0)
    assert manifest.left_out == {"damaged": 1} and sum(manifest.splits.values()) == 3
