"""Damage on the reader's side: what is not the bytes that were written is named, never skipped, never half a sample."""

import errno
import io
import os
import pickle
import random
import shutil
import subprocess
import sys
import tarfile
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pytest
import torch
import xxhash
from helpers_shards import loader_arguments, make_feature_dataset, self_describing_captions

from sat.data.loader import training_batches
from sat.data.plan import Cursor
from sat.data.reader import BadSample, SampleReader
from sat.shards import retry
from sat.shards.features import NPY_HEADER
from sat.shards.manifest import Manifest, load_manifest
from sat.shards.schema import SAMPLES_SCHEMA
from sat.shards.store import make_store
from sat.shards.tables import ShardTable
from sat.shards.tar import TAR_BLOCK
from sat.text import build_tokenizer

pytestmark = pytest.mark.faults
GRID_BYTES = 4 * 8 * 2


@pytest.fixture(scope="module")
def pristine(tmp_path_factory):
    root = tmp_path_factory.mktemp("pristine")
    make_feature_dataset(root, {"train": 12, "val": 3})
    return root


@pytest.fixture
def root(pristine, tmp_path):
    """A copy that a test may damage."""
    return Path(shutil.copytree(pristine, tmp_path / "features"))


@pytest.fixture(scope="module")
def tokenizer():
    return build_tokenizer([c for i in range(12) for c in self_describing_captions("train", i)], 1)


@pytest.fixture
def read_epoch(tokenizer):
    def read(root, **settings):
        sources = [(load_manifest(root), 1.0)]
        settings = {"splits": ["train"], "global_batch": 4, "cursor": Cursor.start(sources, 1)} | settings
        return list(training_batches(sources, tokenizer, **loader_arguments(settings)))

    return read


def reader_of(root):
    manifest = load_manifest(root)
    return SampleReader(manifest, make_store(manifest.root))


def read_one(reader, shard, sample):
    """Bytes of one grid."""
    out = bytearray(GRID_BYTES)
    reader.read_grid(shard, sample, memoryview(out))
    return out


def read_all(reader, shard):
    return [read_one(reader, shard, sample) for sample in range(len(reader.rows(shard).keys))]


def test_a_cut_shard_is_refused_at_the_start_and_on_every_later_read(root, read_epoch):
    shard = root / "train-000001.tar"
    whole = shard.read_bytes()
    cuts = {*range(0, len(whole), TAR_BLOCK), *random.Random(1).sample(range(len(whole)), 40)}
    for cut in sorted(cuts):
        shard.write_bytes(whole[:cut])
        with pytest.raises(ValueError, match=rf"train-000001.tar: {cut} bytes, {len(whole)} bytes were written"):
            read_epoch(root)
        with pytest.raises(BadSample, match=f"train-000001.tar has {cut} bytes, {len(whole)} were written"):
            read_epoch(root, rank=1, world_size=2)  # only rank 0 looks at all sizes before it starts


def test_a_shard_that_shrinks_while_it_is_open_never_gives_half_a_sample(root):
    reader = reader_of(root)
    expected = read_all(reader, 0)
    rows, path = reader.rows(0), root / "train-000000.tar"
    for cut in sorted(random.Random(2).sample(range(path.stat().st_size), 30), reverse=True):
        os.truncate(path, cut)
        for sample, key in enumerate(rows.keys):
            if rows.offsets[sample] + rows.nbytes[sample] <= cut:
                assert read_one(reader, 0, sample) == expected[sample]
            else:
                with pytest.raises(BadSample, match=f"train-000000.tar: key {key}: the shard ends"):
                    read_one(reader, 0, sample)


@pytest.mark.parametrize("part", ["header", "array", "json"])
def test_every_flipped_bit_of_a_sample_is_detected_with_shard_and_key(root, part):
    path, draw = root / "train-000000.tar", random.Random(part)
    whole = path.read_bytes()
    reader = reader_of(root)
    rows = reader.rows(0)
    for _ in range(300):
        sample = draw.randrange(len(rows.keys))
        begin, length = rows.offsets[sample], rows.nbytes[sample]
        at = begin + draw.randrange(
            *{"header": (0, TAR_BLOCK), "array": (TAR_BLOCK, 2 * TAR_BLOCK), "json": (2 * TAR_BLOCK, length)}[part]
        )
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 1 << draw.randrange(8)]) + whole[at + 1 :])
        fresh = reader_of(root)
        with pytest.raises(BadSample, match=rf"train-000000.tar: key {rows.keys[sample]}: .*checksum"):
            read_one(fresh, 0, sample)


def test_a_flipped_bit_stops_training_from_a_worker_too(root, read_epoch):
    flip(root / "train-000001.tar", 2 * TAR_BLOCK + 3)
    for workers in (0, 2):
        with pytest.raises(BadSample, match="train-000001.tar: key train-7: its bytes do not have the checksum"):
            read_epoch(root, num_workers=workers)


def test_quarantine_gives_counted_zero_weight_rows_and_changes_nothing_else(root, pristine, read_epoch, caplog):
    flip(root / "train-000001.tar", 2 * TAR_BLOCK + 3)
    expected = read_epoch(pristine)
    for workers in (0, 2):
        found = read_epoch(root, on_bad_sample="quarantine", num_workers=workers)
        assert [b.bad for b in found] == [sum(i == "train-7" for i in b.image_ids) for b in expected]
        for ours, theirs in zip(found, expected, strict=True):
            for row, image_id in enumerate(theirs.image_ids):
                if image_id == "train-7":
                    assert not ours.grid[row].any() and not ours.lengths[row].any() and not ours.captions[row].any()
                else:
                    assert torch.equal(ours.grid[row], theirs.grid[row]) and ours.image_ids[row] == image_id
    assert "quarantined: " in caplog.text and "train-000001.tar: key train-7" in caplog.text


def test_quarantine_is_bounded(root, read_epoch):
    for sample in range(3):
        flip(root / "train-000000.tar", load_manifest(root).rows(0)["offset"][sample].as_py())
    assert sum(b.bad for b in read_epoch(root, on_bad_sample="quarantine", max_bad_samples=3)) == 3
    message = "3 bad samples, data.max_bad_samples allows 2; the last: .*train-000000.tar: key"
    with pytest.raises(ValueError, match=message):
        read_epoch(root, on_bad_sample="quarantine", max_bad_samples=2)


def test_a_missing_shard_is_refused_at_the_start(root, read_epoch):
    (root / "train-000001.tar").unlink()
    with pytest.raises(ValueError, match="train-000001.tar: missing"):
        read_epoch(root)
    with pytest.raises(ValueError, match="train-000001.tar is missing"):
        read_epoch(root, rank=1, world_size=2)


def test_a_foreign_tar_beside_the_shards_is_ignored(root, pristine, read_epoch):
    shutil.copy(root / "train-000000.tar", root / "train-000009.tar")
    ids = [[b.image_ids for b in read_epoch(each)] for each in (root, pristine)]
    assert ids[0] == ids[1]


def test_swapped_shards_are_refused_even_with_equal_sizes(tmp_path, read_epoch):
    make_feature_dataset(tmp_path, {"train": 14})
    first, second, spare = (tmp_path / f"{name}.tar" for name in ("train-000000", "train-000001", "spare"))
    assert first.stat().st_size == second.stat().st_size, "shards of different sizes are caught before any read"
    first.rename(spare)
    second.rename(first)
    spare.rename(second)
    with pytest.raises(BadSample, match=r"train-00000[01].tar: key train-\d+: its bytes do not have the checksum"):
        read_epoch(tmp_path)


class Exploit:
    def __reduce__(self):
        return os.system, ("touch executed",)


def tar_sample(name, data, typeflag=tarfile.REGTYPE, size=None, linkname=""):
    """Bytes of one sample whose first member is crafted."""
    member = tarfile.TarInfo(name)
    member.size, member.type, member.linkname = len(data) if size is None else size, typeflag, linkname
    about = tarfile.TarInfo("k.json")
    about.size = 2
    body = data + bytes(-len(data) % TAR_BLOCK)
    return member.tobuf(tarfile.GNU_FORMAT) + body + about.tobuf(tarfile.USTAR_FORMAT) + b"{}" + bytes(TAR_BLOCK - 2)


def object_npy():
    """An npy file that runs a command in any reader that unpickles, as long as a harmless sample."""
    blob = b"\x93NUMPY\x01\x00" + (NPY_HEADER - 10).to_bytes(2, "little")
    blob += b"{'descr': '|O', 'fortran_order': False, 'shape': (4, 8), }".ljust(NPY_HEADER - 11) + b"\n"
    return blob + pickle.dumps(Exploit()).ljust(GRID_BYTES, b"\0")[:GRID_BYTES]


HARMLESS = bytes(NPY_HEADER + GRID_BYTES)
MALICIOUS = {
    "pickle": (tar_sample("k.npy", object_npy()), "its array is not a"),
    "other name": (tar_sample("../../k.npy", HARMLESS), "its place in the shard holds b'../../"),
    "absolute": (tar_sample("/etc/k.npy", HARMLESS), "its place in the shard holds b'/etc/"),
    "symlink": (tar_sample("k.npy", HARMLESS, tarfile.SYMTYPE, linkname="/etc/passwd"), "not a regular file"),
    "10 GB": (tar_sample("k.npy", HARMLESS, size=10 << 30), "not a regular file of"),
    "huge": (tar_sample("k.npy", HARMLESS, size=10 << 40), "not a regular file of"),
    "python": (tar_sample("k.pyd", HARMLESS), "its place in the shard holds b'k.pyd"),
}


@pytest.mark.parametrize(
    # A picture's bytes are only decoded, whatever they are called: two of the tricks do not exist there.
    "name, kind",
    [(name, "features") for name in MALICIOUS]
    + [(name, "images") for name in MALICIOUS if name not in ("pickle", "python")],
)
def test_a_hostile_tar_with_fitting_checksums_is_refused_and_nothing_runs(tmp_path, monkeypatch, pristine, name, kind):
    blob, message = MALICIOUS[name]
    manifest = hostile_manifest(tmp_path, monkeypatch, pristine, blob, kind)
    reader = SampleReader(manifest, make_store(manifest.root))
    monkeypatch.chdir(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(BadSample, match=f"train-000000.tar: key k: .*{message if kind == 'features' else ''}"):
        if kind == "features":
            read_one(reader, 0, 0)
        else:
            reader.read_picture(0, 0)
    assert sorted(tmp_path.rglob("*")) == before


def hostile_manifest(folder, monkeypatch, pristine, blob, kind):
    """A manifest that vouches for a shard of these bytes: its author is the attacker."""
    (folder / "train-000000.tar").write_bytes(blob)
    row = {"key": "k", "image_id": "k", "file_name": "k", "split": "train", "shard": "train-000000.tar", "offset": 0}
    row |= {"nbytes": len(blob), "xxh3": xxhash.xxh3_64_intdigest(blob), "captions": [], "width": 1, "height": 1}
    monkeypatch.setattr(Manifest, "rows", lambda self, shard: pa.Table.from_pylist([row], SAMPLES_SCHEMA))
    manifest = load_manifest(pristine)
    return replace(manifest, root=str(folder), kind=kind, shards=claiming(manifest.shards, len(blob)))


def claiming(shards, size):
    """A table that says this size of every shard."""

    class Claiming(ShardTable):
        def __getitem__(self, index):
            return replace(super().__getitem__(index), bytes=size)

    return Claiming(shards.root)


def test_rows_that_point_outside_their_shard_are_refused(tmp_path, monkeypatch, pristine):
    blob = tar_sample("k.npy", HARMLESS)
    manifest = hostile_manifest(tmp_path, monkeypatch, pristine, blob, "features")
    manifest = replace(manifest, shards=claiming(manifest.shards, len(blob) - 1))
    reader = SampleReader(manifest, make_store(manifest.root))
    with pytest.raises(ValueError, match="train-000000.tar: the manifest places samples outside the shard"):
        reader.rows(0)


def test_pipe_urls_are_refused_by_name(pristine, tokenizer, tmp_path):
    root = f"pipe:touch {tmp_path}/executed; cat {pristine}"
    for call in (make_store, load_manifest):
        with pytest.raises(ValueError, match="pipe: URLs run a shell command and are refused"):
            call(root)
    assert not (tmp_path / "executed").exists()


@pytest.fixture
def failing_reads(monkeypatch):
    """Make os.preadv fail with an error number, `fail(code, how_often)` of every three times; returns the failures."""
    monkeypatch.setattr(retry, "FIRST_PAUSE_S", 0.001)
    genuine, calls, failures = os.preadv, [0], []

    def fail(code, times):
        def preadv(descriptor, buffers, offset, flags=0):
            if flags:  # only asks what is in memory
                return genuine(descriptor, buffers, offset, flags)
            calls[0] += 1
            if calls[0] % 3 < times:
                failures.append(calls[0])
                raise OSError(code, os.strerror(code))
            return genuine(descriptor, buffers, offset)

        monkeypatch.setattr(os, "preadv", preadv)
        return failures

    return fail


@pytest.mark.parametrize("code", [errno.EIO, errno.ESTALE])
def test_reads_that_fail_two_of_three_times_give_the_same_bytes_and_are_counted(
    pristine, read_epoch, failing_reads, code, caplog
):
    expected = read_epoch(pristine)
    failures = failing_reads(code, 2)
    found = read_epoch(pristine)
    for a, b in zip(found, expected, strict=True):
        assert torch.equal(a.grid, b.grid) and a.sample_keys == b.sample_keys
    assert sum(b.retries for b in found) == len(failures) >= 6
    assert f"{len(failures)} reads failed and were repeated with success" in caplog.text


def test_a_stale_handle_is_opened_anew(pristine, monkeypatch):
    monkeypatch.setattr(retry, "FIRST_PAUSE_S", 0.001)
    reader = reader_of(pristine)
    expected = read_all(reader, 0)
    genuine, stale = os.preadv, set(reader._files.values())
    opened = []

    def preadv(descriptor, *rest):
        if descriptor in stale and not opened:
            raise OSError(errno.ESTALE, "stale")
        return genuine(descriptor, *rest)

    genuine_open = reader.store.open
    monkeypatch.setattr(os, "preadv", preadv)
    monkeypatch.setattr(reader.store, "open", lambda info: opened.append(info.name) or genuine_open(info))
    assert read_all(reader, 0) == expected
    assert opened == ["train-000000.tar"]


@pytest.mark.parametrize("policy", ["fail", "quarantine"])
def test_a_permanent_error_fails_and_names_shard_and_key(pristine, read_epoch, failing_reads, policy):
    failing_reads(errno.EIO, 3)
    with pytest.raises(OSError, match=r"train-00000\d.tar: key train-\d+: Input/output error \(after 5 attempts\)"):
        read_epoch(pristine, on_bad_sample=policy)


def test_other_errors_are_not_repeated(pristine, read_epoch, failing_reads):
    failures = failing_reads(errno.EACCES, 3)
    with pytest.raises(PermissionError):
        read_epoch(pristine)
    assert failures == [1]


def test_short_reads_are_completed(pristine, read_epoch, monkeypatch):
    expected = read_epoch(pristine)
    genuine = os.preadv
    monkeypatch.setattr(os, "preadv", lambda fd, buffers, at, flags=0: genuine(fd, [buffers[0][:100]], at, flags))
    found = read_epoch(pristine)
    assert all(torch.equal(a.grid, b.grid) for a, b in zip(found, expected, strict=True))


EPOCH = """
import hashlib, sys
from sat.data.loader import Reading, training_batches
from sat.data.options import LoaderOptions
from sat.shards.manifest import load_manifest
from sat.data.plan import Cursor
from sat.text import CaptionTokenizer
reading = Reading(LoaderOptions(num_workers=0, captions_per_image=2))
sources = [(load_manifest(sys.argv[1]), 1.0)]
digest = hashlib.sha256()
for batch in training_batches(sources, CaptionTokenizer.load(sys.argv[2]), reading, splits=["train"], global_batch=5,
                              cursor=Cursor.start(sources, 1)):
    digest.update(batch.grid.numpy().tobytes() + batch.captions.numpy().tobytes() + repr(batch.sample_keys).encode())
print(digest.hexdigest())
"""


def test_batches_do_not_depend_on_hash_seed_locale_folder_time_zone_or_umask(pristine, tokenizer, tmp_path):
    tokenizer.save(tmp_path / "tokenizer.json")
    repository = str(Path(__file__).parents[1])
    worlds = [
        (repository, {"PYTHONHASHSEED": "0", "LC_ALL": "C", "TZ": "UTC"}, 0o022),
        (str(tmp_path), {"PYTHONHASHSEED": "99", "LC_ALL": "de_DE.UTF-8", "TZ": "Asia/Kathmandu"}, 0o077),
    ]
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", EPOCH, str(pristine), str(tmp_path / "tokenizer.json")],
            cwd=folder,
            env=os.environ | extra | {"PYTHONPATH": repository},
            umask=umask,
            stdout=subprocess.PIPE,
        )
        for folder, extra, umask in worlds
    ]
    outputs = [process.communicate()[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0]
    assert outputs[0] == outputs[1] and len(outputs[0].strip()) == 64


def test_shards_are_plain_tars_whose_samples_are_tars_themselves(pristine):
    manifest = load_manifest(pristine)
    blob = (pristine / "train-000000.tar").read_bytes()
    rows = manifest.rows(0)
    for key, offset, nbytes in zip(*(rows[name].to_pylist() for name in ("key", "offset", "nbytes"))):
        with tarfile.open(fileobj=io.BytesIO(blob[offset : offset + nbytes])) as tar:
            assert tar.getnames() == [f"{key}.npy", f"{key}.json"]


def flip(path, at):
    blob = bytearray(path.read_bytes())
    blob[at] ^= 1
    path.write_bytes(blob)
