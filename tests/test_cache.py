"""Remote shards through the bounded cache, over a real HTTP server on loopback and fsspec's memory."""

import fcntl
import functools
import hashlib
import http.server
import multiprocessing
import os
import shutil
import threading
import time
from collections import Counter
from pathlib import Path

import fsspec
import pytest
import torch
from helpers_shards import loader_arguments, make_feature_dataset, self_describing_captions

from sat.data.loader import Reading, evaluation_batches, read_references, training_batches
from sat.data.options import LoaderOptions
from sat.data.plan import Cursor
from sat.data.reader import BadSample, SampleReader
from sat.shards import retry, schema
from sat.shards import store as store_module
from sat.shards.manifest import load_manifest, load_statistics
from sat.shards.store import FolderStore, RemoteStore, make_store
from sat.shards.tables import forget_footers
from sat.text import build_tokenizer


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    folder = tmp_path_factory.mktemp("remote") / "features"
    make_feature_dataset(folder, {"train": 30, "val": 3}, shard_size=5)
    return folder


@pytest.fixture(scope="module")
def tokenizer():
    return build_tokenizer([c for i in range(30) for c in self_describing_captions("train", i)], 1)


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch):
    monkeypatch.setattr(retry, "FIRST_PAUSE_S", 0.01)


class Server(http.server.ThreadingHTTPServer):
    """Serves a folder, without ranges; `trouble(path, times asked for)`: None, "slow", "cut", "down" or a status."""

    def __init__(self, folder, trouble):
        super().__init__(("127.0.0.1", 0), functools.partial(Handler, directory=str(folder)))
        self.trouble, self.gets, self.heads = trouble, Counter(), Counter()
        self.url = f"http://127.0.0.1:{self.server_port}"


class Handler(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *arguments):
        pass

    def do_HEAD(self):
        self.server.heads[self.path] += 1
        if self.server.trouble(self.path, self.server.heads[self.path]) == "down":
            self.send_error(503)
        else:
            super().do_HEAD()

    def do_GET(self):
        self.server.gets[self.path] += 1
        self.what = self.server.trouble(self.path, self.server.gets[self.path])
        if isinstance(self.what, int) or self.what == "down":
            self.send_error(503 if self.what == "down" else self.what)
        else:
            super().do_GET()

    def copyfile(self, source, outputfile):
        blob = source.read()
        if self.what == "cut":
            outputfile.write(blob[: len(blob) // 2])
            self.close_connection = True
        elif self.what == "slow":
            for start in range(0, len(blob), 2048):
                outputfile.write(blob[start : start + 2048])
                outputfile.flush()
                time.sleep(0.01)
        else:
            outputfile.write(blob)


@pytest.fixture
def serve(root):
    servers = []

    def start(trouble=lambda path, count: None, folder=root):
        servers.append(Server(folder, trouble))
        threading.Thread(target=servers[-1].serve_forever, daemon=True).start()
        return servers[-1]

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


@pytest.fixture
def epoch(tokenizer):
    def read(url, folder="", limit=10**9, **settings):
        sources = [(load_manifest(str(url)), 1.0)]
        settings = {
            "splits": ["train"],
            "global_batch": 8,
            "cache_dir": str(folder),
            "cache_gb": limit / 1e9,
        } | settings
        arguments = loader_arguments(settings)
        return list(training_batches(sources, tokenizer, cursor=Cursor.start(sources, 1), **arguments))

    return read


def assert_same(ours, theirs):
    assert [b.sample_keys for b in ours] == [b.sample_keys for b in theirs]
    assert all(torch.equal(a.grid, b.grid) and torch.equal(a.captions, b.captions) for a, b in zip(ours, theirs))


def cached(folder):
    return sorted(path.name for path in Path(folder).iterdir() if path.suffix in (".tar", ".part"))


def shards_of(root, split="train"):
    return [shard for shard in load_manifest(str(root)).shards if shard.split == split]


def only_shards(what, times):
    """Trouble with the first `times` requests of every shard."""
    return lambda path, count: what if path.endswith(".tar") and count <= times else None


@pytest.mark.parametrize("what, times", [(None, 0), ("slow", 99), (503, 2), ("cut", 2), ("down", 2)])
def test_training_over_a_bad_http_server_gives_the_same_batches(root, serve, epoch, tmp_path, what, times):
    expected = epoch(root)
    server = serve(lambda path, count: what if count <= times else None)
    found = epoch(server.url, tmp_path)
    assert_same(found, expected)
    assert len(load_statistics(load_manifest(server.url))) == 3
    tries = 1 + (0 if what in (None, "slow") else times)
    once = [shard.name for shard in shards_of(root)] + ["samples.parquet", "statistics.safetensors"]
    assert {server.gets[f"/{name}"] for name in once} == {tries}
    for path in tmp_path.glob("*.tar"):
        assert hashlib.sha256(path.read_bytes()).hexdigest() == path.stem
    assert len(cached(tmp_path)) == len(shards_of(root)) and not list(tmp_path.glob("*.part"))


@pytest.mark.parametrize("name", ["manifest.json", "shards.parquet"])
def test_a_server_that_stays_down_is_not_taken_for_damage(serve, name):
    server = serve(lambda path, count: "down" if path == f"/{name}" else None)
    with pytest.raises(retry.StillFailing, match=rf"{name}: .*\(after 5 attempts\)"):
        load_manifest(server.url)
    assert server.gets[f"/{name}"] == retry.ATTEMPTS


def test_a_file_that_is_not_there_is_asked_for_once(serve, tmp_path):
    server = serve(folder=tmp_path)
    with pytest.raises(ValueError, match="not a finished data set"):
        load_manifest(server.url)
    assert server.gets["/manifest.json"] <= 2, "the size is asked for, and the file"


def test_a_second_epoch_asks_the_server_for_no_shard_again(root, serve, epoch, tmp_path):
    server = serve()
    for _ in range(2):
        epoch(server.url, tmp_path)
    assert {count for path, count in server.gets.items() if path.endswith((".tar", "samples.parquet"))} == {1}


def test_workers_and_ranks_share_one_download_of_each_shard(root, serve, epoch, tmp_path):
    server = serve(only_shards("slow", 99))
    parts = [epoch(server.url, tmp_path, rank=rank, world_size=2, num_workers=2) for rank in range(2)]
    assert {server.gets[f"/{shard.name}"] for shard in shards_of(root)} == {1}
    for rank, part in enumerate(parts):
        assert_same(part, epoch(root, rank=rank, world_size=2))


def test_references_and_evaluation_read_through_the_cache_too(root, serve, tmp_path):
    server = serve()
    manifest = load_manifest(server.url)
    options = LoaderOptions(cache_dir=str(tmp_path))
    assert read_references(manifest, "val", options) == read_references(load_manifest(str(root)), "val")
    batches = list(evaluation_batches(manifest, "val", Reading(options)))
    assert [i for b in batches for i in b.image_ids] == ["val-0", "val-1", "val-2"]


def test_memory_and_file_urls_give_the_same_batches(root, epoch, tmp_path):
    expected = epoch(root)
    memory = fsspec.filesystem("memory")
    memory.put(f"{root}/", "/cache-test/features/", recursive=True)
    assert_same(epoch("memory://cache-test/features", tmp_path), expected)
    assert_same(epoch(f"file://{root}"), expected)
    assert isinstance(make_store(f"file://{root}"), FolderStore)
    memory.rm("/cache-test", recursive=True)


def test_the_cache_never_holds_more_than_its_bound(root, serve, epoch, tmp_path):
    limit = int(2.5 * max(shard.bytes for shard in shards_of(root)))
    server = serve(only_shards("slow", 99))
    sizes, stop = [], threading.Event()

    def watch():
        while not stop.is_set():
            total = 0
            with open(tmp_path / ".lock", "a") as lock:  # a sum over files that come and go means nothing without it
                fcntl.flock(lock, fcntl.LOCK_EX)
                for path in tmp_path.glob("*.*"):
                    try:
                        total += path.stat().st_size if path.suffix in (".tar", ".part") else 0
                    except FileNotFoundError:  # a download that failed takes its part file away by itself
                        continue
                fcntl.flock(lock, fcntl.LOCK_UN)  # workers forked meanwhile have the file open too
            sizes.append(total)
            time.sleep(0.001)

    watcher = threading.Thread(target=watch)
    watcher.start()
    found = epoch(server.url, tmp_path, limit=limit, num_workers=2)
    stop.set()
    watcher.join()
    assert_same(found, epoch(root))
    assert max(sizes) <= limit and len(cached(tmp_path)) <= 2


def test_the_least_recently_used_shard_is_evicted(root, serve, tmp_path):
    shards = shards_of(root)[:4]
    store = RemoteStore(serve().url, str(tmp_path), 3 * max(shard.bytes for shard in shards))
    for shard in (shards[0], shards[1], shards[2], shards[0], shards[3]):
        os.close(store.open(shard))
        time.sleep(0.02)  # the file system's clock ticks every few milliseconds
    assert cached(tmp_path) == sorted(f"{shards[i].sha256}.tar" for i in (0, 2, 3))


@pytest.mark.faults
@pytest.mark.parametrize("damage", ["flip", "cut", "table"])
@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_copy_that_the_disk_damaged_is_fetched_once_more(root, serve, epoch, tmp_path, damage, num_workers):
    expected, server = epoch(root), serve()
    epoch(server.url, tmp_path)
    (table,) = tmp_path.glob("tables/*/samples.parquet")
    path = table if damage == "table" else tmp_path / f"{shards_of(root)[2].sha256}.tar"
    name, whole = "samples.parquet" if damage == "table" else "train-000002.tar", path.read_bytes()
    before = server.gets.copy()
    # in place, as a disk does it: the first page of a table holds rows of the first shard
    flipped = bytes(byte ^ (place in (300, 777)) for place, byte in enumerate(whole))
    path.write_bytes(whole[:-512] if damage == "cut" else flipped)
    forget_footers()
    assert_same(epoch(server.url, tmp_path, num_workers=num_workers), expected)
    assert path.read_bytes() == whole
    assert server.gets[f"/{name}"] == before[f"/{name}"] + 1
    assert {server.gets[f"/{shard.name}"] for shard in shards_of(root) if shard.name != name} == {1}


def test_of_several_tables_of_samples_each_is_fetched_once_when_it_is_needed(serve, epoch, tmp_path, monkeypatch):
    monkeypatch.setattr(schema, "SHARDS_PER_TABLE", 2)
    folder = tmp_path / "features"
    make_feature_dataset(folder, {"train": 30, "val": 3}, shard_size=5)
    server = serve(folder=folder)
    assert_same(epoch(server.url, tmp_path / "cache"), epoch(folder))
    names = ["samples.parquet", "samples-000001.parquet", "samples-000002.parquet", "samples-000003.parquet"]
    assert [server.gets[f"/{name}"] for name in names] == [1, 1, 1, 0], "the last one is of the other split"


@pytest.mark.faults
def test_a_copy_cut_while_it_is_open_is_replaced_and_a_newer_one_is_kept(root, serve, tmp_path):
    server = serve()
    manifest = load_manifest(server.url)
    first, second = (SampleReader(manifest, RemoteStore(server.url, str(tmp_path), 10**9)) for _ in range(2))

    def read(reader, sample):
        return reader.read_grid(0, sample, memoryview(bytearray(64)))

    for reader in (first, second):
        read(reader, 0)
    (copy,) = tmp_path.glob("*.tar")
    os.truncate(copy, 600)
    for reader in (first, second):
        read(reader, 1)
        assert reader.retries == 1
    assert server.gets["/train-000000.tar"] == 2


@pytest.mark.faults
def test_damage_that_a_second_copy_has_too_names_the_copy(root, serve, tmp_path, monkeypatch):
    server = serve()
    reader = SampleReader(load_manifest(server.url), RemoteStore(server.url, str(tmp_path), 10**9))
    reader.rows(0).xxh3[1] ^= 1
    message = rf"train-000000.tar: key train-\d+: its bytes .* \(in {tmp_path}/\w+.tar, which was fetched a second time"
    with pytest.raises(BadSample, match=message):
        reader.read_grid(0, 1, memoryview(bytearray(64)))
    assert server.gets["/train-000000.tar"] == 2


def test_a_shard_larger_than_the_cache_is_refused_with_the_setting(root, serve, tmp_path):
    shard = shards_of(root)[0]
    store = RemoteStore(serve().url, str(tmp_path), shard.bytes - 1)
    with pytest.raises(ValueError, match="train-000000.tar has .* more than the cache; raise data.cache_gb"):
        store.open(shard)


def test_expected_shards_arrive_before_they_are_opened_and_fill_at_most_half_the_cache(root, serve, tmp_path):
    shards = shards_of(root)
    server = serve()
    store = RemoteStore(server.url, str(tmp_path), 4 * max(shard.bytes for shard in shards))
    for shard in shards:
        store.expect(shard)
    deadline = time.monotonic() + 20
    while len(list(tmp_path.glob("*.tar"))) < 2 and time.monotonic() < deadline:
        time.sleep(0.01)
    asked = sum(server.gets.values())
    assert asked == 2 and cached(tmp_path) == sorted(f"{shard.sha256}.tar" for shard in shards[:2])
    os.close(store.open(shards[0]))
    assert sum(server.gets.values()) == asked, "the expected shard is not fetched twice"


@pytest.mark.parametrize(
    "damage, message",
    [
        ("flip", "the sha256 of what arrived is"),
        ("cut", "bytes arrived"),
        ("longer", "bytes arrived"),
        ("gone", "is missing"),
    ],
)
def test_a_remote_shard_that_is_not_the_one_written_is_refused_by_name(root, serve, epoch, tmp_path, damage, message):
    folder = Path(shutil.copytree(root, tmp_path / "served"))
    path = folder / "train-000003.tar"
    blob = bytearray(path.read_bytes())
    if damage == "gone":
        path.unlink()
    else:
        blob[777] ^= 1
        path.write_bytes({"flip": blob, "cut": blob[:-512], "longer": blob + bytes(512)}[damage])
    with pytest.raises((OSError, ValueError), match=f"train-000003.tar.*{message}"):
        epoch(serve(folder=folder).url, tmp_path / "cache")
    bad = shards_of(root)[3].sha256

    def leftovers():
        return [*(tmp_path / "cache").glob(f"{bad}*"), *(tmp_path / "cache").glob("*.part")]

    until = time.monotonic() + 20
    while leftovers() and time.monotonic() < until:
        time.sleep(0.05)  # a fetch ahead of use may still be under way when the error is raised
    assert not leftovers()


def test_a_server_that_never_recovers_is_an_error_that_names_the_shard(root, serve, tmp_path):
    server = serve(only_shards(500, 10**6))
    store = RemoteStore(server.url, str(tmp_path), 10**9)
    with pytest.raises(OSError, match=r"train-000000.tar: the server answers 500.*\(after 5 attempts\)"):
        store.open(shards_of(root)[0])
    assert store.retries == 4 and server.gets["/train-000000.tar"] == retry.ATTEMPTS


def test_retried_downloads_are_counted_in_the_batches(root, serve, epoch, tmp_path):
    assert sum(b.retries for b in epoch(serve(only_shards(503, 1)).url, tmp_path)) > 0


def open_and_die(url, folder, shard):
    store = RemoteStore(url, folder, 10**9)
    store_module.download = lambda *arguments: os._exit(9)
    store.open(shard)


def test_a_download_whose_process_was_killed_is_taken_over(root, serve, tmp_path):
    shard, server = shards_of(root)[0], serve()
    process = multiprocessing.get_context("fork").Process(target=open_and_die, args=(server.url, str(tmp_path), shard))
    process.start()
    process.join()
    assert process.exitcode == 9 and cached(tmp_path) == [f"{shard.sha256}.part"]
    # The room it had reserved is free again too: the bound leaves no space for both.
    other = shards_of(root)[1]
    os.close(RemoteStore(server.url, str(tmp_path), other.bytes + shard.bytes // 2).open(other))
    assert cached(tmp_path) == [f"{other.sha256}.tar"]
    descriptor = RemoteStore(server.url, str(tmp_path), 10**9).open(shard)
    assert os.pread(descriptor, shard.bytes + 1, 0) == (root / shard.name).read_bytes()
    os.close(descriptor)


def test_a_damaged_remote_table_is_refused(root, serve, epoch, tmp_path):
    folder = Path(shutil.copytree(root, tmp_path / "served"))
    table = folder / "samples.parquet"
    blob = bytearray(table.read_bytes())
    blob[len(blob) // 2] ^= 1
    table.write_bytes(blob)
    with pytest.raises((OSError, ValueError), match="samples.parquet.*sha256"):
        epoch(serve(folder=folder).url, tmp_path / "cache")
