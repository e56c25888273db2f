"""An S3 server (moto's, behind a proxy that spoils its answers) that fails, cuts, dawdles or refuses."""

import http.client
import http.server
import os
import threading
import time
from collections import Counter

import fsspec
import pytest
import s3fs
import torch

from sat.shards import retry
from sat.shards.manifest import load_manifest
from sat.shards.store import RemoteStore
from sat.text import build_tokenizer
from tests.helpers_s3 import in_bucket
from tests.helpers_shards import make_feature_dataset, read_batches, self_describing_captions

SLOW_DOWN = b"<Error><Code>SlowDown</Code><Message>Please reduce your request rate.</Message></Error>"
ERROR = b"<Error><Code>%s</Code><Message>said by the test</Message></Error>"
ANSWERS = {
    "500": (500, ERROR % b"InternalError"),
    "503": (503, SLOW_DOWN),
    "403": (403, ERROR % b"AccessDenied"),
    "429": (429, ERROR % b"TooManyRequests"),
}


class Proxy(http.server.ThreadingHTTPServer):
    """Hands requests on to a server. `faults` says how answers for objects are spoiled, one after the other."""

    def __init__(self, host, port):
        super().__init__(("127.0.0.1", 0), Handler)
        self.upstream, self.faults, self.asked, self.lock = (host, port), [], Counter(), threading.Lock()

    def fault_of(self, path):
        """The fault of this answer: every object meets each of them once, in turn; "" is none."""
        name = path.partition("?")[0]
        if not name.endswith((".tar", ".parquet", ".json")):
            return ""
        with self.lock:
            self.asked[name] += 1
            number = self.asked[name] - 1
        if callable(self.faults):
            return self.faults(name)
        return self.faults[number] if number < len(self.faults) else ""


class Handler(http.server.BaseHTTPRequestHandler):
    def log_message(self, *arguments):
        pass

    def do_GET(self):
        fault = self.server.fault_of(self.path) if self.command == "GET" else ""
        if fault in ANSWERS:
            status, body = ANSWERS[fault]
            self.answer(status, {"Content-Type": "application/xml"}, body)
        else:
            self.hand_on(fault)

    do_HEAD = do_GET

    def hand_on(self, fault):
        connection = http.client.HTTPConnection(*self.server.upstream)
        connection.request(self.command, self.path, headers=dict(self.headers))
        found = connection.getresponse()
        body = found.read()
        if fault == "slow":
            time.sleep(0.3)
        self.answer(found.status, dict(found.getheaders()), body, cut=fault == "cut")

    def answer(self, status, headers, body, cut=False):
        self.send_response_only(status)
        dropped = ("content-length", "transfer-encoding", "connection")
        length = headers.get("Content-Length", len(body)) if self.command == "HEAD" else len(body)
        for name, value in headers.items():
            if name.lower() not in dropped:
                self.send_header(name, value)
        self.send_header("Content-Length", str(length))
        self.send_header("Connection", "close")
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body[: len(body) // 2] if cut else body)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("s3") / "data"
    make_feature_dataset(root, {"train": 18}, shard_size=3)
    return root


@pytest.fixture(scope="module")
def bucket(folder):
    with in_bucket(folder) as url:
        yield url


@pytest.fixture
def proxy(bucket, monkeypatch):
    """The proxy; who asks for the bucket goes through it. The library's own patience is cut short."""
    host, _, port = os.environ["AWS_ENDPOINT_URL"].removeprefix("http://").partition(":")
    one = Proxy(host, int(port))
    threading.Thread(target=one.serve_forever, daemon=True).start()
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{one.server_port}")
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    monkeypatch.setattr(s3fs.S3FileSystem, "retries", 1)
    monkeypatch.setattr(retry, "FIRST_PAUSE_S", 0.001)
    fsspec.filesystem("s3").clear_instance_cache()
    yield one
    fsspec.filesystem("s3").clear_instance_cache()
    one.shutdown()
    one.server_close()


def read_epoch(root, **settings):
    tokenizer = build_tokenizer([text for i in range(18) for text in self_describing_captions("train", i)], 1)
    return read_batches([(load_manifest(root), 1.0)], tokenizer, **settings)


@pytest.mark.faults
@pytest.mark.parametrize("limit_gb", [1.0, 1e-9], ids=["whole", "by ranges"])
def test_a_server_that_fails_cuts_and_dawdles_gives_the_same_batches(folder, bucket, proxy, tmp_path, limit_gb):
    expected = read_epoch(folder)
    proxy.faults = ["500", "cut", "503", "slow"]
    found = read_epoch(bucket, cache_dir=str(tmp_path), cache_gb=limit_gb)
    assert [batch.sample_keys for batch in found] == [batch.sample_keys for batch in expected]
    for ours, theirs in zip(found, expected, strict=True):
        assert torch.equal(ours.grid, theirs.grid) and torch.equal(ours.captions, theirs.captions)
    shards = {name: asked for name, asked in proxy.asked.items() if name.endswith(".tar")}
    assert len(shards) == 6 and min(shards.values()) >= 4, "each met all faults"


@pytest.mark.faults
@pytest.mark.parametrize(
    "fault, said, asked",
    [
        ("403", "the server answers 403 AccessDenied: said by the test; does the URL need credentials", 1),
        ("500", r"the server answers 500 InternalError: said by the test .after 5 attempts", 5),
        ("503", r"the server answers 503 SlowDown: Please reduce your request rate. .after 5 attempts", 5),
        ("429", r"the server answers 429 TooManyRequests: said by the test .after 5 attempts", 5),
        ("cut", r"Not enough data .*received \d+ of \d+ bytes.* .after 5 attempts", 5),
    ],
)
def test_a_shard_that_is_never_given_is_one_sentence_with_its_url_and_cause(
    bucket,
    proxy,
    tmp_path,
    fault,
    said,
    asked,
):
    shard = load_manifest(bucket).shards[0]
    proxy.faults = lambda name: fault
    proxy.asked.clear()
    with pytest.raises(OSError, match=said) as caught:
        RemoteStore(bucket, str(tmp_path), 10**9).open(shard)
    message = str(caught.value)
    assert f"{bucket}/{shard.name}" in message and "lovelace" not in message and "\n" not in message
    assert sum(proxy.asked.values()) == asked
    assert not list(tmp_path.glob("*.part"))


@pytest.mark.faults
@pytest.mark.parametrize("name", ["manifest.json", "shards.parquet", "samples.parquet", ".tar"])
def test_a_refused_file_of_any_kind_is_named_with_the_servers_answer(bucket, proxy, tmp_path, name):
    proxy.faults = lambda path: "403" if path.endswith(name) else ""
    said = rf"{bucket}/\S*{name}: the server answers 403 AccessDenied: said by the test; does the URL need credentials"
    with pytest.raises(OSError, match=said):
        read_epoch(bucket, cache_dir=str(tmp_path), cache_gb=1e-9)
