"""Try again what a network file system or server refuses once.

The surprising decision: an error that was wrapped in another exception still counts by its cause, because the libraries
between us and the file (Parquet, HTTP) each wrap in their own way.
"""

import errno
import os
import time
from collections.abc import Callable
from typing import TypeVar

Result = TypeVar("Result")

TRANSIENT = {errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.EAGAIN, errno.ECONNRESET}
"""Errors that network file systems report and that a second try often does not meet."""
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
    if isinstance(error, FileNotFoundError):  # over HTTP fsspec says so whatever went wrong, and keeps the reason
        cause = error.__cause__
        server = type(cause).__module__.startswith("aiohttp") and getattr(cause, "status", 500) not in (403, 404, 410)
        return server or isinstance(cause, TimeoutError)
    return not isinstance(error, (PermissionError, ValueError, ImportError, StillFailing))


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
                detail = os.strerror(code) if cause else f"{type(error).__name__}: {error}"
                raise StillFailing(code, f"{what}: {detail} (after {ATTEMPTS} attempts)") from error
        before_retry()
        time.sleep(FIRST_PAUSE_S * 2**attempt)
    raise AssertionError("the last attempt returns or raises")
