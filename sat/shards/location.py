"""Read ROOT/NAME, where ROOT is a folder or any fsspec URL; what fails once is tried again."""

import hashlib
import logging
import os
from collections.abc import Callable
from contextlib import nullcontext
from io import BufferedIOBase
from typing import cast

import fsspec

from sat.credentials import shown
from sat.shards.retry import Result, StillFailing, io_error, naming, remote_error, retrying
from sat.shards.sealed import Damaged

logger = logging.getLogger(__name__)

REPAIR = "run preprocessing.verify_shards with --repair"
"""The way out of damage, for error messages."""


def is_url(root: str) -> bool:
    """Whether this is a URL and no folder."""
    return "://" in root


def check_root(root: str) -> None:
    """ValueError for a URL that fsspec cannot open, and for one that some readers of shards would hand to a shell."""
    if root.startswith("pipe:"):
        raise ValueError(f"{root!r}: pipe: URLs run a shell command and are refused; give a folder or an fsspec URL")
    for protocol in root.partition("://")[0].split("::") if is_url(root) else ():
        try:
            fsspec.get_filesystem_class(protocol)
        except (ValueError, ImportError) as error:
            raise ValueError(f"{root}: {error}; give a folder or a URL that fsspec opens here") from None


def open_file(root: str, name: str) -> BufferedIOBase:
    """Open ROOT/NAME for reading in binary."""
    if is_url(root):
        return cast(BufferedIOBase, fsspec.open(f"{root}/{name}", "rb").open())
    return open(os.path.join(root, name), "rb")


def read_file(root: str, name: str) -> bytes:
    """All bytes of ROOT/NAME."""
    with open_file(root, name) as file:
        return file.read()


def read_recorded(root: str, name: str, sha256: str, keep: bool = True) -> bytes:
    """A file of this sha256 (no bytes of it unless `keep`). ValueError if it is missing, Damaged if it is another."""

    def read() -> bytes:
        with open_file(root, name) as file:
            blob = file.read() if keep else b""
            digest = hashlib.sha256(blob) if keep else hashlib.file_digest(file, "sha256")
        if digest.hexdigest() != sha256:
            raise Damaged(f"{root}/{name}: not the bytes that were written; {REPAIR}")
        return blob

    try:
        return read_retrying(root, name, read)
    except FileNotFoundError:
        raise ValueError(f"{root}/{name} is missing; {REPAIR}") from None


def file_size(root: str, name: str) -> int | None:
    """Size of ROOT/NAME in bytes, None when it does not exist."""

    def size() -> int | None:
        if is_url(root):
            filesystem, path = fsspec.core.url_to_fs(f"{root}/{name}")
            return cast("int | None", filesystem.size(path))
        return os.stat(os.path.join(root, name)).st_size

    try:
        return read_retrying(root, name, size)
    except FileNotFoundError:
        return None


def read_retrying(root: str, name: str, operation: Callable[[], Result]) -> Result:
    """Result of reading ROOT/NAME. Damage over a network is tried again too; in the end it is still Damaged."""

    def is_transient(error: Exception) -> object:
        return (isinstance(error, Damaged) or remote_error(error)) if is_url(root) else io_error(error)

    def report() -> None:
        logger.warning("%s: reading failed and is tried again", shown(f"{root}/{name}"))

    try:
        with naming(shown(f"{root}/{name}")) if is_url(root) else nullcontext():
            return retrying(operation, shown(f"{root}/{name}"), report, is_transient)
    except StillFailing as error:
        if isinstance(error.__cause__, Damaged):
            raise error.__cause__ from None
        raise
