"""What `sat serve` answers: a page to drop a picture on, and the same as JSON.

Pictures wait for each other, as a model captions one at a time as fast as several; who would wait behind too many is
told so. Nothing of a picture is kept.
"""

import asyncio
import functools
from collections.abc import AsyncIterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image

from sat.captioning import Captioning
from sat.evaluation.attention_map import cells_at, unit_centres
from sat.evaluation.prediction import Prediction
from sat.report.page import render, script_policy
from sat.report.panels import panels
from sat.shards.pictures import BadPicture, decode

SCRIPT = "serve.js"
READ_S = 30.0
"""A picture that takes longer to arrive is refused."""
DISCARDED_BYTES = 256 << 20
"""Of a body that is too large so many are still read, so that the answer reaches who is sending."""
STATUS = {"empty file": 400, "not a picture": 415, "too many pixels": 413}
"""HTTP status by the reason of BadPicture; 422 for a picture that is damaged."""
BYTES_ALONE = "send the picture's bytes alone as the body, as `curl --data-binary @photo.jpg` does"


@dataclass(frozen=True)
class Limits:
    """What a request may ask for."""

    megabytes: float
    """Of a picture file, 2**20 bytes each."""
    megapixels: float
    """Of a picture, 10**6 pixels each."""
    waiting: int
    """Pictures that are sent, wait or are being captioned at once."""

    @property
    def bytes(self) -> int:
        """Of a picture file."""
        return int(self.megabytes * 2**20)


class Refused(Exception):
    """A request that gets no caption: the HTTP status and a sentence."""

    def __init__(self, status: int, sentence: str):
        super().__init__(sentence)
        self.status, self.sentence = status, sentence


@dataclass(frozen=True)
class Seen:
    """A captioned picture."""

    prediction: Prediction
    width: int
    """Of the picture as it was sent, upright."""
    height: int


class Answers:
    """The answers to each kind of request."""

    def __init__(self, captioning: Captioning, limits: Limits, name: str):
        """`captioning` keeps the attention; `name` is what the model is called on the page."""
        self._captioning, self._limits, self._name = captioning, limits, name
        self._worker = ThreadPoolExecutor(max_workers=1)
        self._answering = 0

    async def page(self, _: Any) -> Any:
        """GET /: drop a picture here."""
        from starlette.responses import HTMLResponse

        policy = {"Content-Security-Policy": script_policy(SCRIPT), "X-Content-Type-Options": "nosniff"}
        return HTMLResponse(render("serve.html", name=self._name, limits=self._limits), headers=policy)

    async def health(self, _: Any) -> Any:
        """GET /health: ready, and which model."""
        from starlette.responses import JSONResponse

        trained = self._captioning.trained
        return JSONResponse({"state": "ready", "model": self._name, "step": trained.step})

    async def caption(self, request: Any) -> Any:
        """POST /caption: the body is a picture file. JSON, or a piece of the page for who accepts HTML."""
        from starlette.responses import HTMLResponse, JSONResponse

        if self._answering >= self._limits.waiting:
            raise Refused(503, f"{self._limits.waiting} pictures are waiting already; send this one again in a moment")
        self._answering += 1
        try:
            data = await read_body(request.headers, request.stream(), self._limits)
            work = functools.partial(caption_bytes, self._captioning, data, self._limits)
            seen = await asyncio.get_running_loop().run_in_executor(self._worker, work)
        finally:
            self._answering -= 1
        if "text/html" in request.headers.get("accept", ""):
            return HTMLResponse(fragment(seen, self._captioning))
        return JSONResponse(document(seen, self._captioning))

    @asynccontextmanager
    async def lifespan(self, _: Any) -> AsyncIterator[None]:
        """While the server runs."""
        yield
        self._worker.shutdown()


def application(captioning: Captioning, limits: Limits, name: str) -> Any:
    """The ASGI application, see `Answers`. Whatever is refused is a JSON object with a sentence under `error`."""
    from starlette.applications import Starlette
    from starlette.exceptions import HTTPException
    from starlette.requests import ClientDisconnect
    from starlette.responses import JSONResponse
    from starlette.routing import Route

    async def refused(_: Any, error: Any) -> Any:
        after = {"Retry-After": "1"} if error.status == 503 else {}
        return JSONResponse({"error": error.sentence}, error.status, after)

    async def elsewhere(request: Any, error: Any) -> Any:
        said = f"{request.method} {request.url.path}: {error.detail}; there are GET /, GET /health and POST /caption"
        return JSONResponse({"error": said}, error.status_code, error.headers)

    async def gone(_: Any, error: Any) -> Any:
        return JSONResponse({"error": "the picture did not arrive whole"}, 400)

    answers = Answers(captioning, limits, name)
    return Starlette(
        routes=[
            Route("/", answers.page),
            Route("/health", answers.health),
            Route("/caption", answers.caption, methods=["POST"]),
        ],
        exception_handlers={Refused: refused, HTTPException: elsewhere, ClientDisconnect: gone},
        lifespan=answers.lifespan,
    )


async def read_body(headers: Mapping[str, str], chunks: AsyncIterator[bytes], limits: Limits) -> bytes:
    """The picture's bytes. Raises Refused for too many of them, too slow ones, and forms."""
    kind, length = headers.get("content-type", ""), headers.get("content-length", "")
    form = kind.startswith("multipart/")
    too_large = length.isdecimal() and int(length) > limits.bytes
    body, read = bytearray(), 0
    try:
        async with asyncio.timeout(READ_S):
            async for chunk in chunks:
                read += len(chunk)
                too_large |= read > limits.bytes
                if too_large or form:
                    body.clear()
                else:
                    body += chunk
                if read > DISCARDED_BYTES:
                    break
    except TimeoutError:
        raise Refused(408, f"the picture has not arrived within {READ_S:.0f} seconds") from None
    if form:
        raise Refused(415, f"this is a form ({kind.split(';')[0]}); {BYTES_ALONE}")
    if too_large:
        raise Refused(413, f"the file has more than {limits.megabytes:g} MB; make the picture smaller")
    return bytes(body)


def caption_bytes(captioning: Captioning, data: bytes, limits: Limits) -> Seen:
    """The caption of a picture file. Raises Refused for what is no sound picture within the limits."""
    try:
        picture = decode(data, int(limits.megapixels * 1e6))
        (found,) = captioning([np.array(picture)])
    except BadPicture as error:
        rule = f" ({limits.megapixels:g} million are allowed)" if error.reason == "too many pixels" else ""
        empty = f"; {BYTES_ALONE}" if error.reason == "empty file" else ""
        raise Refused(STATUS.get(error.reason, 422), f"{error}{rule}{empty}") from None
    return Seen(found, *picture.size)


def fragment(seen: Seen, captioning: Captioning) -> str:
    """The answer as a piece of the page."""
    found, spec = seen.prediction, captioning.trained.features
    assert found.picture is not None
    picture = Image.fromarray(found.picture)
    where = cells_at(unit_centres(spec), "", *picture.size)
    attended = panels(found, picture, where) if captioning.trained.attends else None
    return render("answer.html", found=found, panels=attended)


def document(seen: Seen, captioning: Captioning) -> dict[str, Any]:
    """The answer as JSON: the best caption, the n best, and of each word of the best its attention over the cells.

    `cells` are rows and columns of the grid, row-major as `attention`; `centres` says where each cell looks, x and y in
    0..1 of what the encoder saw: of the whole picture, or of the square in its middle (`geometry` center_crop).
    """
    found, spec = seen.prediction, captioning.trained.features
    attends = captioning.trained.attends and found.attention is not None
    words: list[dict[str, object]] = []
    for place, word in enumerate(found.words):
        row: dict[str, object] = {"word": word}
        if found.probabilities is not None:
            row["probability"] = round(float(found.probabilities[place]), 6)
        if attends and found.attention is not None:
            row["gate"] = None if found.gates is None else round(float(found.gates[place]), 6)
            row["attention"] = found.attention[place].astype(float).round(6).tolist()
        words.append(row)
    return {
        "caption": found.caption,
        "n_best": [_ranked(each) for each in (found, *found.others)],
        "words": words,
        "cells": list(spec.cells),
        "centres": unit_centres(spec).round(6).tolist(),
        "geometry": spec.transform.geometry if spec.transform else "",
        "width": seen.width,
        "height": seen.height,
    }


def _ranked(found: Prediction) -> dict[str, object]:
    return {
        "caption": found.caption,
        "score": found.score,
        "log_probability": found.log_probability,
        "finished": found.finished,
    }
