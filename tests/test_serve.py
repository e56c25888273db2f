"""`sat serve` as a real process: the captions of `sat caption`, a sentence for everything else, and a graceful end."""

import base64
import hashlib
import http.client
import io
import json
import os
import re
import signal
import socket
import struct
import subprocess
import sys
import zlib
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from sat import caption
from sat.captioning import Captioning
from sat.serve import _listen_at
from sat.serving import Seen, fragment
from tests.test_captioning import pretrained  # noqa: F401  a fixture

ROOT = Path(__file__).parents[1]
NASTY = "<script>alert('x')</script>"


def jpeg(seed: int, width: int = 60, height: int = 40) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (5, 7, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).resize((width, height)).save(buffer, "JPEG")
    return buffer.getvalue()


def bomb(side: int) -> bytes:
    """A PNG of side x side pixels in some kilobytes."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    pixels = zlib.compress(bytes((side // 8 + 1) * side), 9)
    head = struct.pack(">IIBBBBB", side, side, 1, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")


@pytest.fixture(scope="module")
def server(pretrained):  # noqa: F811  the fixture above
    """The program, ready: its process and port."""
    options = ["--weights", pretrained, "--port", 0, "--n-best", 2, "--max-megabytes", 0.5, "--max-waiting", 3]
    command = [sys.executable, "-m", "sat.cli", "serve", pretrained, *options, "--max-megapixels", 1]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        list(map(str, command)), cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    try:
        line = process.stdout.readline()
        assert line.startswith("http://127.0.0.1:"), line + process.stderr.read()
        yield SimpleNamespace(process=process, port=int(re.search(r":(\d+)/", line)[1]), errors=process.stderr)
    finally:
        process.kill()
        process.communicate()


def ask(server, body: bytes | None = None, path: str = "/caption", **headers: str) -> tuple[int, str]:
    """Status and text of a POST of `body`, or of a GET without."""
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=60)
    try:
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        connection.request("GET" if body is None else "POST", path, body, named)
        reply = connection.getresponse()
        return reply.status, reply.read().decode()
    finally:
        connection.close()


def test_the_caption_is_that_of_sat_caption_with_the_n_best_and_each_words_attention(
    server,
    pretrained,  # noqa: F811  the fixture above
    tmp_path,
):
    (tmp_path / "photo.jpg").write_bytes(jpeg(1, 90, 30))
    caption.main([tmp_path / "photo.jpg"], model=pretrained, weights=pretrained, out=tmp_path / "out")
    (expected,) = json.loads((tmp_path / "out/captions.json").read_text())

    status, text = ask(server, jpeg(1, 90, 30))
    found = json.loads(text)
    assert status == 200 and found["caption"] == expected["caption"]
    assert (found["width"], found["height"], found["cells"], found["geometry"]) == (90, 30, [8, 8], "squash")
    best, second = found["n_best"]
    assert best["caption"] == found["caption"] != second["caption"] and best["score"] >= second["score"]
    assert best["score"] == pytest.approx(expected["score"], rel=1e-5)
    assert " ".join(word["word"] for word in found["words"]) == found["caption"]
    for word in found["words"]:
        assert len(word["attention"]) == 64 and sum(word["attention"]) == pytest.approx(1, abs=1e-4)
        assert 0 < word["probability"] <= 1 and 0 <= word["gate"] <= 1
    assert np.array(found["centres"]).shape == (64, 2)


class Elements(HTMLParser):
    def __init__(self, text: str):
        super().__init__()
        self.found: list[tuple[str, dict]] = []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.found.append((tag, dict(attrs)))


def test_the_page_loads_nothing_and_its_answer_shows_the_attention_of_every_word(server):
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=60)
    connection.request("GET", "/")
    reply = connection.getresponse()
    page, policy = reply.read().decode(), reply.headers["Content-Security-Policy"]
    connection.close()
    (script,) = re.findall(r"<script>(.*?)</script>", page, re.S)
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert reply.status == 200 and f"script-src 'sha256-{digest}'" in policy and "default-src 'none'" in policy
    assert "http" not in re.sub(r"curl.*?</p>", "", page, flags=re.S).replace("http-equiv", "")

    words = [each["word"] for each in json.loads(ask(server, jpeg(2))[1])["words"]]
    status, answer = ask(server, jpeg(2), Accept="text/html")
    images = [attributes["src"] for tag, attributes in Elements(answer).found if tag == "img"]
    assert status == 200 and len(images) == len(words) > 0
    for image in images:
        assert image.startswith("data:image/png;base64,")
        assert np.asarray(Image.open(io.BytesIO(base64.b64decode(image.split(",")[1])))).shape == (10, 10, 4)
    assert "http" not in answer and answer.count("gate ") == len(words)


def test_words_of_a_caption_are_no_html(pretrained):  # noqa: F811  the fixture above
    captioning = Captioning.from_pretrained(pretrained, pretrained).with_options(keep_attention=True)
    (found,) = captioning([jpeg(3)])
    nasty = replace(found, caption=NASTY, words=(NASTY,) * len(found.words))
    text = fragment(Seen(replace(nasty, others=(nasty,)), 60, 40), captioning)
    assert "script" not in [tag for tag, _ in Elements(text).found] and text.count("&lt;script&gt;") > 2


BAD = {
    "not a picture": (b"<html>no</html>", {}, 415, "not a picture: an HTML page"),
    "broken": (jpeg(4)[:-300], {}, 422, "truncated"),
    "empty": (b"", {}, 400, "empty file; send the picture's bytes alone"),
    "many pixels": (bomb(9_000), {}, 413, "too many pixels: 9000 x 9000 (1 million are allowed)"),
    "bomb": (bomb(20_000), {}, 413, "too many pixels: "),
    "too large": (bytes(600_000), {}, 413, "the file has more than 0.5 MB"),
    "a form": (b"--x\r\n", {"Content_Type": "multipart/form-data; boundary=x"}, 415, "this is a form"),
}


@pytest.mark.parametrize("case", BAD)
def test_what_is_no_sound_picture_is_refused_in_a_sentence(server, case):
    body, headers, status, sentence = BAD[case]
    found, text = ask(server, body, **headers)
    assert found == status and json.loads(text)["error"].startswith(sentence), text
    assert ask(server, path="/health")[0] == 200


def test_other_addresses_and_methods_are_told_what_there_is(server):
    for path, body, status in (("/nope", None, 404), ("/caption", None, 405), ("/", b"x", 405)):
        found, text = ask(server, body, path)
        assert found == status and "POST /caption" in json.loads(text)["error"]


def begin(server, body: bytes) -> socket.socket:
    """A request whose last byte is still to come."""
    connection = socket.create_connection(("127.0.0.1", server.port), timeout=60)
    head = f"POST /caption HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Length: {len(body)}\r\n\r\n"
    connection.sendall(head.encode() + body[:-1])
    return connection


def finish(connection: socket.socket, body: bytes) -> tuple[int, dict]:
    connection.sendall(body[-1:])
    reply = http.client.HTTPResponse(connection)
    reply.begin()
    with connection:
        return reply.status, json.loads(reply.read())


def test_pictures_at_once_get_their_own_captions_and_too_many_are_sent_away(server):
    pictures = [jpeg(seed) for seed in (5, 6, 7)]
    alone = [json.loads(ask(server, each)[1])["caption"] for each in pictures]
    assert len(set(alone)) > 1
    with ThreadPoolExecutor(3) as pool:
        together = list(pool.map(lambda each: ask(server, each), pictures))
    assert [json.loads(text)["caption"] for _, text in together] == alone

    slow = [begin(server, each) for each in pictures]
    assert ask(server, path="/health")[0] == 200  # behind them: all three have been accepted
    status, text = ask(server, pictures[0])
    assert status == 503 and json.loads(text)["error"].startswith("3 pictures are waiting already")
    slow.pop().close()
    left = [finish(connection, each) for connection, each in zip(slow, pictures)]
    assert [(status, found["caption"]) for status, found in left] == [(200, each) for each in alone[:2]]
    assert ask(server, pictures[2])[0] == 200


def test_an_address_that_is_taken_or_unknown_is_named():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        with pytest.raises(ValueError, match=r"cannot listen at 127\.0\.0\.1 port \d+: Address already in use"):
            _listen_at("127.0.0.1", taken.getsockname()[1])
        with pytest.raises(ValueError, match=r"cannot listen at 192\.0\.2\.1"):
            _listen_at("192.0.2.1", 0)


def test_a_stop_answers_what_was_accepted_and_is_exit_status_0(server):
    connection = begin(server, jpeg(8))
    assert ask(server, path="/health")[0] == 200
    server.process.send_signal(signal.SIGTERM)
    while True:  # it takes no new ones
        try:
            socket.create_connection(("127.0.0.1", server.port), timeout=60).close()
        except ConnectionError:  # refused, or reset where the listener closed meanwhile
            break
    assert finish(connection, jpeg(8))[0] == 200
    out, errors = server.process.communicate(timeout=60)
    assert server.process.returncode == 0, errors
    assert (out, errors) == ("", "")
