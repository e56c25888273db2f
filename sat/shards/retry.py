"""Try again what a network file system or server refuses once.

The surprising decision: an error that was wrapped in another exception still counts by its cause, because the libraries
between us and the file (Parquet, HTTP) each wrap in their own way.
"""

import errno
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

Result = TypeVar("Result")

TRANSIENT = {errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.EAGAIN, errno.ECONNRESET}
"""Errors that network file systems report and that a second try often does not meet."""
ASK_AGAIN = (408, 425, 429)
"""Answers of an HTTP server that mean later, not no."""
ATTEMPTS, FIRST_PAUSE_S = 5, 0.05


class StillFailing(OSError):
    """Every attempt failed. Not tried again by a caller that retries too."""


def io_error(error: BaseException) -> OSError | None:
    """The transient I/O error that `error` is or was raised from."""
    seen: BaseException | None = error
    while seen is not None and not isinstance(seen, StillFailing):
        if isinstance(seen, OSError) and seen.errno in TRANSIENT:
            return seen
        seen = seen.__cause__
    return None


def remote_error(error: BaseException) -> bool:
    """Whether a remote file may be read another time: after all but plain answers, such as that it is not there."""
    answer = answer_of(error)
    if answer is not None:
        return answer >= 500 or answer in ASK_AGAIN
    if isinstance(error, FileNotFoundError):  # over HTTP fsspec says so whatever went wrong, and keeps the reason
        cause = error.__cause__
        return type(cause).__module__.startswith("aiohttp") or isinstance(cause, TimeoutError)
    if type(error).__name__ == "NoCredentialsError":
        return False
    return not isinstance(error, (PermissionError, ValueError, ImportError, StillFailing))


def answer_of(error: BaseException) -> int | None:
    """The status with which an HTTP server refused, where that is what `error` is or was raised from."""
    seen: BaseException | None = error
    while seen is not None:
        status = getattr(seen, "status", None)
        if isinstance(status, int) and type(seen).__module__.startswith("aiohttp"):
            return status
        seen = seen.__cause__
    return None


def cause_of(error: BaseException) -> str:
    """What went wrong at the bottom of `error`, in words, without the URL (which its caller shows)."""
    seen = error
    while seen.__cause__ is not None and not isinstance(error, StillFailing):
        seen = seen.__cause__
    status, said = answer_of(seen), getattr(seen, "message", "")
    told = getattr(seen, "response", None)
    if isinstance(told, dict) and "Error" in told:  # of botocore
        status = told.get("ResponseMetadata", {}).get("HTTPStatusCode")
        said = f"{told['Error'].get('Code')}: {told['Error'].get('Message')}"
    if status is not None:
        what = f"the server answers {status} {said}".rstrip()
        return f"{what}; does the URL need credentials?" if status in (401, 403) else what
    if isinstance(seen, TimeoutError):
        return "no answer in time"
    if isinstance(seen, OSError) and seen.errno and type(seen).__module__ == "builtins":
        return os.strerror(seen.errno)
    return f"{type(seen).__name__}: {' '.join(str(seen).split())}"


@contextmanager
def naming(url: str) -> Iterator[None]:
    """Errors of the network in the block name the URL and their cause; that a file is missing passes as it is."""
    try:
        yield
    except StillFailing:
        raise
    except Exception as error:
        of_network = isinstance(error, OSError) or type(error).__module__.startswith(("aiohttp", "botocore"))
        missing = isinstance(error, FileNotFoundError) and answer_of(error) in (None, 404, 410)
        if missing or not of_network:
            raise
        raise StillFailing(errno.EIO, f"{url}: {cause_of(error)}") from error


def retrying(
    operation: Callable[[], Result],
    what: str,
    before_retry: Callable[[], None],
    is_transient: Callable[[Exception], object] = io_error,
) -> Result:
    """Result of `operation`, after up to 5 attempts with doubling pauses; `before_retry` is called between them.

    Errors that are not transient pass unchanged; after the last attempt StillFailing (an OSError) names `what`.
    """
    for attempt in range(ATTEMPTS):
        try:
            return operation()
        except Exception as error:
            if not is_transient(error):
                raise
            if attempt == ATTEMPTS - 1:
                cause = io_error(error)
                code = (cause.errno if cause else None) or errno.EIO
                raise StillFailing(code, f"{what}: {cause_of(error)} (after {ATTEMPTS} attempts)") from error
        before_retry()
        time.sleep(FIRST_PAUSE_S * 2**attempt)
    raise AssertionError("the last attempt returns or raises")
