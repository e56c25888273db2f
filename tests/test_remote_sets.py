"""Remote sets larger than the cache, and remote errors: what crosses the network, and what the user is told."""

import errno
import http.server
import os
import re
import sys
import threading
from collections import Counter
from pathlib import Path

import pytest
import torch
from fsspec.implementations.local import LocalFileSystem
from fsspec.registry import _registry
from helpers_shards import loader_arguments, make_feature_dataset, self_describing_captions

from preprocessing.build_vocab import captions_of
from sat.config import config_to_dict, flatten, load_config, save_config
from sat.credentials import masked, shown
from sat.data import reader as reader_module
from sat.data.loader import training_batches
from sat.data.plan import Cursor
from sat.shards import download, retry
from sat.shards import store as store_module
from sat.shards.manifest import load_manifest
from sat.shards.store import RemoteStore
from sat.text import build_tokenizer

SAMPLES = 60


class Server(http.server.ThreadingHTTPServer):
    """Serves a folder with byte ranges; counts the bytes of every shard that it sent. `answers`: path -> status."""

    def __init__(self, folder):
        super().__init__(("127.0.0.1", 0), Handler)
        self.folder, self.sent, self.gets, self.flip = folder, Counter(), Counter(), set()
        self.answers, self.instead, self.ranges = {}, {}, True
        self.url = f"http://127.0.0.1:{self.server_port}"


class Handler(http.server.BaseHTTPRequestHandler):
    def log_message(self, *arguments):
        pass

    def do_HEAD(self):
        self.do_GET(body=False)

    def do_GET(self, body=True):
        name = self.path.partition("?")[0].lstrip("/")
        path = self.server.folder / name
        status = self.server.answers.get(name) or (200 if path.exists() else 404)
        blob = path.read_bytes() if status == 200 else b""
        if body and name in self.server.instead:
            blob = self.server.instead[name]
        wanted = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
        if wanted and status == 200 and self.server.ranges:
            begin, end = int(wanted[1]), int(wanted[2]) + 1
            status, blob = 206, blob[begin:end]
        if body:
            self.server.gets[name] += 1
            self.server.sent[name] += len(blob)
            if name in self.server.flip:
                self.server.flip.remove(name)
                blob = blob[:700] + bytes([blob[700] ^ 1]) + blob[701:]
        self.send_response(status)
        self.send_header("Content-Length", str(len(blob)))
        self.end_headers()
        if body:
            self.wfile.write(blob)


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    folder = tmp_path_factory.mktemp("remote") / "features"
    make_feature_dataset(folder, {"train": SAMPLES}, shard_size=10)
    return folder


@pytest.fixture(scope="module")
def tokenizer():
    return build_tokenizer([c for i in range(SAMPLES) for c in self_describing_captions("train", i)], 1)


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch):
    monkeypatch.setattr(retry, "FIRST_PAUSE_S", 0.001)


@pytest.fixture
def server(root):
    one = Server(root)
    threading.Thread(target=one.serve_forever, daemon=True).start()
    yield one
    one.shutdown()
    one.server_close()


@pytest.fixture
def epochs(tokenizer):
    def read(url, folder="", limit=10**9, **settings):
        sources = [(load_manifest(str(url)), 1.0)]
        settings = {
            "splits": ["train"],
            "global_batch": 8,
            "cache_dir": str(folder),
            "cache_gb": limit / 1e9,
        } | settings
        return list(training_batches(sources, tokenizer, cursor=Cursor.start(sources, 1), **loader_arguments(settings)))

    return read


def assert_same(ours, theirs):
    assert [b.sample_keys for b in ours] == [b.sample_keys for b in theirs]
    assert all(torch.equal(a.grid, b.grid) and torch.equal(a.captions, b.captions) for a, b in zip(ours, theirs))


def of_shards(counts):
    return sum(count for name, count in counts.items() if name.endswith(".tar"))


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("share", [0.9, 0.5, 0.1])
def test_an_epoch_crosses_the_network_once_at_most_for_a_cache_of_any_size(
    root, server, epochs, tmp_path, share, num_workers
):
    size = sum(shard.bytes for shard in load_manifest(str(root)).shards)
    found = epochs(server.url, tmp_path, limit=int(share * size), epochs=3, num_workers=num_workers)
    assert_same(found, epochs(root, epochs=3))
    kept = sum(path.stat().st_size for path in tmp_path.glob("*.tar"))
    # a process may read by ranges, while it finds no room, what another one then keeps
    twice = max(shard.bytes for shard in load_manifest(str(root)).shards) if num_workers else 0
    assert kept <= share * size and of_shards(server.sent) <= kept + 3 * (size - kept) + twice
    if share > 0.2:
        assert kept >= (share - 0.2) * size, "what fits is kept, and fetched once in all epochs"


@pytest.mark.parametrize("window", [2, 4])
def test_by_windows_a_server_without_ranges_is_asked_once_an_epoch_for_each_shard(
    server, epochs, tmp_path, window, caplog
):
    server.ranges, server.folder = False, tmp_path / "features"
    make_feature_dataset(server.folder, {"train": 200}, shard_size=25)
    shards = list(load_manifest(str(server.folder)).shards)
    limit = window * max(shard.bytes for shard in shards)
    settings = {"window_shards": window, "epochs": 2, "global_batch": 4}
    assert_same(epochs(server.url, tmp_path / "cache", limit, **settings), epochs(server.folder, **settings))
    assert sum(server.gets[shard.name] for shard in shards) <= 1.2 * 2 * len(shards)
    assert "again and again" not in caplog.text
    epochs(server.url, tmp_path / "cache", limit)
    assert "the server gives no byte ranges, so shards are fetched again and again" in caplog.text
    assert f"data.window_shards={window} " in caplog.text


@pytest.mark.parametrize("world", [1, 4, 8])
def test_ranks_ask_for_whole_runs(server, epochs, tmp_path, world):
    before = server.gets.copy()
    for rank in range(world):
        epochs(server.url, tmp_path, limit=1, rank=rank, world_size=world, global_batch=4 * world)
    runs = of_shards(server.gets) - of_shards(before)
    assert runs <= 1.4 * SAMPLES / 4, "6 shards of 10 samples are 12 runs of 4 and 6 pairs, that runs of 4 may tear"


def test_samples_whose_rows_are_not_kept_are_read_by_the_same_ranges(root, server, epochs, tmp_path, monkeypatch):
    expected = epochs(root, epochs=3)
    epochs(server.url, tmp_path, limit=1, epochs=3)
    asked = server.gets.copy()
    monkeypatch.setattr(reader_module, "CACHED_ROWS", 1)
    assert_same(epochs(server.url, tmp_path, limit=1, epochs=3), expected)
    assert of_shards(server.gets) == 2 * of_shards(asked)


@pytest.fixture
def google(monkeypatch):
    """Google's protocol by fsspec's registry, as its package registers it; a bucket is a folder here."""

    class Google(LocalFileSystem):
        protocol = ("gs", "gcs")
        local_file = False

        @classmethod
        def _strip_protocol(cls, path):
            return super()._strip_protocol(path.removeprefix("gs://"))

    for name in Google.protocol:
        monkeypatch.setitem(_registry, name, Google)


@pytest.mark.parametrize("share", [2.0, 0.3])
def test_a_set_behind_any_protocol_of_the_registry_is_read_as_the_folder_is(root, google, epochs, tmp_path, share):
    size = sum(shard.bytes for shard in load_manifest(str(root)).shards)
    assert_same(epochs(f"gs://{root}", tmp_path, limit=int(share * size), epochs=2), epochs(root, epochs=2))
    assert 0 < sum(path.stat().st_size for path in tmp_path.glob("*.tar")) <= share * size


@pytest.mark.faults
def test_a_protocol_whose_package_is_missing_is_named_with_the_package(monkeypatch):
    monkeypatch.setitem(sys.modules, "gcsfs", None)
    monkeypatch.delitem(_registry, "gs", raising=False)
    with pytest.raises(ValueError, match=r"gs://bucket/set: .*gcsfs.*; give a folder or a URL that fsspec opens here"):
        load_manifest("gs://bucket/set")


@pytest.mark.faults
def test_a_range_that_arrives_damaged_is_asked_for_again(root, server, epochs, tmp_path):
    server.flip = {"train-000002.tar", "train-000004.tar"}
    found = epochs(server.url, tmp_path, limit=1)
    assert not server.flip
    assert_same(found, epochs(root))
    assert sum(b.retries for b in found) >= 2


@pytest.mark.faults
def test_only_files_that_the_cache_made_make_room(server, root, tmp_path):
    theirs = dict.fromkeys(("holiday.tar", "video.part", "0a1b.tar", f"{'0' * 63}.tar"), b"mine" * 1000)
    for name, blob in theirs.items():
        (tmp_path / name).write_bytes(blob)
        os.utime(tmp_path / name, (1, 1))
    shards = list(load_manifest(str(root)).shards)
    store = RemoteStore(server.url, str(tmp_path), max(shard.bytes for shard in shards) + 10)
    store._serves_ranges = False  # then each shard takes the place of the last one
    for shard in shards:
        os.close(store.open(shard))
    assert {name: (tmp_path / name).read_bytes() for name in theirs} == theirs
    assert len(list(tmp_path.glob("*.tar"))) == 3 + 1


@pytest.mark.faults
@pytest.mark.parametrize(
    "status, said, asked",
    [
        (401, "the server answers 401 Unauthorized; does the URL need credentials", 1),
        (403, "the server answers 403 Forbidden; does the URL need credentials", 1),
        (429, "the server answers 429 Too Many Requests .after 5 attempts", 5),
        (500, "the server answers 500 Internal Server Error .after 5 attempts", 5),
    ],
)
def test_a_refused_shard_is_one_line_with_the_servers_answer_and_no_secret(root, server, tmp_path, status, said, asked):
    shard = load_manifest(str(root)).shards[0]
    server.answers[shard.name] = status
    host = server.url.removeprefix("http://")
    store = RemoteStore(f"http://ada:lovelace@{host}", str(tmp_path), 10**9)
    with pytest.raises(OSError, match=said) as caught:
        store.open(shard)
    assert "lovelace" not in str(caught.value) and f"http://***@{host}/{shard.name}" in str(caught.value)
    assert store.retries == asked - 1


@pytest.mark.faults
def test_a_proxys_page_in_the_place_of_a_shard_is_asked_for_a_few_times_only(root, server, tmp_path):
    shard = load_manifest(str(root)).shards[0]
    server.instead[shard.name] = b"<h1>Blocked</h1>"
    with pytest.raises(OSError, match=r"train-000000.tar: ConnectionError: 16 bytes arrived, \d+ were written"):
        RemoteStore(server.url, str(tmp_path), 10**9).open(shard)
    assert server.gets[shard.name] <= 2 * retry.ATTEMPTS


@pytest.mark.faults
def test_a_full_disk_is_the_caches_and_not_the_servers(root, server, tmp_path, monkeypatch):
    def full(*arguments):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(download.os, "pwrite", full)
    store = RemoteStore(server.url, str(tmp_path), 10**9)
    message = rf"the cache .* cannot be written: {tmp_path}: No space left on device; name another .* data.cache_dir or"
    with pytest.raises(ValueError, match=message):
        store.open(load_manifest(str(root)).shards[0])
    assert store.retries == 0 and not list(tmp_path.glob("*.part"))


@pytest.mark.faults
def test_a_cache_of_somebody_else_is_named(root, server, tmp_path):
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(ValueError, match=rf"the cache .* cannot be written: {tmp_path}/file.*; name another folder"):
        RemoteStore(server.url, str(tmp_path / "file"), 10**9).open(load_manifest(str(root)).shards[0])


@pytest.mark.faults
def test_a_cache_without_file_locks_is_used_all_the_same(root, server, epochs, tmp_path, monkeypatch, caplog):
    genuine = download.fcntl.flock

    def flock(file, operation):
        if operation != download.fcntl.LOCK_UN:
            raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))
        genuine(file, operation)

    monkeypatch.setattr(download.fcntl, "flock", flock)
    assert_same(epochs(server.url, tmp_path), epochs(root))
    assert "no file locks (No locks available)" in caplog.text
    assert not list(Path(tmp_path).glob("*.part"))


def test_a_cache_makes_room_of_what_nobody_has_used_since_this_process_began(root, server, tmp_path, monkeypatch):
    shards = list(load_manifest(str(root)).shards)
    store = RemoteStore(server.url, str(tmp_path), 2 * max(shard.bytes for shard in shards))
    for shard in shards[:2]:
        os.close(store.open(shard))
    assert store.open(shards[2]) is None, "both are in use: it is read by ranges"
    os.utime(tmp_path / f"{shards[0].sha256}.tar", (1, 1))  # of a training of last week
    monkeypatch.setattr(store_module, "FULL_FOR_S", 0.0)
    store._full_until = 0.0
    os.close(store.open(shards[2]))
    assert {path.stem for path in tmp_path.glob("*.tar")} == {shards[1].sha256, shards[2].sha256}


@pytest.mark.parametrize(
    "text, expected",
    [
        ("s3://bucket/x", "s3://bucket/x"),
        ("http://user:pw@host/x: gone", "http://***@host/x: gone"),
        ("https://a.b/c?sig=a%2Fb&exp=3, https://token@d/", "https://a.b/c?sig=***&exp=***, https://***@d/"),
        ("is this right? a=b, mail me@home", "is this right? a=b, mail me@home"),
    ],
)
def test_credentials_in_urls_are_masked(text, expected):
    assert shown(text) == expected


def test_no_credential_reaches_mlflow_the_exported_model_or_a_file_that_others_read(tmp_path):
    config = load_config(None, ["data.features=https://ada:lovelace@host/coco?sig=secret", "data.extra=[]"])
    for found in (masked(flatten(config)), masked(config_to_dict(config))):
        assert "lovelace" not in repr(found) and "secret" not in repr(found) and "https://***@host/coco" in repr(found)
    save_config(config, tmp_path / "config.yaml")
    assert load_config(tmp_path / "config.yaml") == config
    assert (tmp_path / "config.yaml").stat().st_mode & 0o077 == 0


def test_the_vocabulary_is_read_from_a_server_without_ranges_as_from_a_folder(root, server, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    server.ranges = False
    assert list(captions_of(server.url, ["train"])) == list(captions_of(str(root), ["train"]))
