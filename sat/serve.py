"""Answer pictures with captions over HTTP: `sat serve RUN`.

    sat serve runs/demo --weights weights
    curl --data-binary @photo.jpg http://127.0.0.1:8000/caption

A stop (Ctrl-C, SIGTERM) lets what has been accepted finish, and is exit status 0.
"""

import ipaddress
import socket
import threading
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer

from sat.captioning import Captioning
from sat.cli import run_program
from sat.evaluation.search_options import (
    Asked,
    BeamSize,
    BlockNgram,
    BlockUnk,
    LengthPenalty,
    MaxLength,
    Method,
)
from sat.serving import Limits, application
from sat.shards.pictures import MAX_PIXELS
from sat.stopping import listen

FINISH_S = 20
"""What has been accepted may take so long after a wish to stop."""
CONNECTIONS = 128
"""Open at once; more are answered with 503."""


def main(
    run: Annotated[Path, typer.Argument(help="run folder or folder with model.safetensors")],
    weights: Annotated[Path, typer.Option(help="encoder weights, or a folder that holds them")] = Path("weights"),
    host: Annotated[
        str, typer.Option(help="address to listen at; 0.0.0.0: whoever reaches this machine")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0: any that is free")] = 8000,
    method: Method = None,
    beam_size: BeamSize = None,
    max_length: MaxLength = None,
    length_penalty: LengthPenalty = None,
    n_best: Annotated[int | None, typer.Option(help="captions per picture; default: 3, or the beams if fewer")] = None,
    block_unk: BlockUnk = True,
    block_ngram: BlockNgram = None,
    max_megabytes: Annotated[float, typer.Option(min=0.001, help="of a picture file")] = 20.0,
    max_megapixels: Annotated[float, typer.Option(min=0.001, max=MAX_PIXELS / 1e6, help="of a picture")] = 50.0,
    max_waiting: Annotated[int, typer.Option(min=1, help="pictures sent, waiting or captioned at once")] = 8,
) -> None:
    """Serve captions until stopped: a page at /, JSON at POST /caption (the picture's bytes are the body).

    Nobody is asked for a password: beyond this machine put it behind a server that does.
    """
    captioning = Captioning.from_pretrained(run, weights)
    options = Asked(method, beam_size, max_length, length_penalty, n_best, block_unk, block_ngram).over(
        captioning.options
    )
    options = replace(options, n_best=n_best or min(3, options.width), keep_attention=True)
    captioning = replace(captioning, options=options)
    wish, listening = listen(), _listen_at(host, port)
    limits = Limits(max_megabytes, max_megapixels, max_waiting)
    server, thread = _serve(application(captioning, limits, str(run)), listening)
    shown = f"[{host}]" if ":" in host else host
    print(f"http://{shown}:{listening.getsockname()[1]}/ captions pictures by {run}; Ctrl-C stops it", flush=True)
    if not _is_loopback(host):
        print("whoever reaches this address may use it: there is no password", flush=True)
    while thread.is_alive():
        thread.join(0.1)
        server.should_exit |= wish.is_there()
    if not wish.is_there():
        raise OSError("the server has ended by itself")


def _listen_at(host: str, port: int) -> socket.socket:
    """A socket that listens. Raises ValueError, naming the address, where that cannot be."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listening = socket.socket(family, kind, protocol)
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind(address)
        listening.listen(CONNECTIONS)
    except OSError as error:
        raise ValueError(f"cannot listen at {host} port {port}: {error.strerror or error}; choose others") from None
    return listening


def _serve(app: Any, listening: socket.socket) -> tuple[Any, threading.Thread]:
    """The server and its thread: in the main one it would take the signals, and end by them."""
    import uvicorn

    settings = uvicorn.Config(
        app,
        log_level="warning",
        access_log=False,
        server_header=False,
        limit_concurrency=CONNECTIONS,
        timeout_graceful_shutdown=FINISH_S,
        lifespan="on",
        ws="none",
    )
    server = uvicorn.Server(settings)
    thread = threading.Thread(target=server.run, args=([listening],), name="server")
    thread.start()
    return server, thread


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


if __name__ == "__main__":
    run_program(main)
