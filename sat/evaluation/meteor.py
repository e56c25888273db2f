"""METEOR 1.5 as pycocoevalcap asks it, by one Java that lives as long as it is wanted.

Reading its 61 MB of paraphrases takes longer than scoring 5,000 captions; so a training keeps it, and pictures are fed
without waiting for the answer to each.
"""

import threading
import time
from collections.abc import Sequence

from sat.evaluation.java import Java, package_folder

JAR = "meteor-1.5.jar"


class Meteor:
    """METEOR's Java: started by `start` or the first `score`, again after a failure, ended by `close`."""

    def __init__(self) -> None:
        self._java: Java | None = None
        self._lock = threading.Lock()
        self._closed = False

    def start(self) -> None:
        """Let Java start, without waiting for it. Raises OSError where it cannot."""
        if self._lock.acquire(blocking=False):  # else it is at work
            try:
                self._running()
            finally:
                self._lock.release()

    def score(
        self, references: Sequence[Sequence[str]], captions: Sequence[str], deadline: float
    ) -> tuple[float, list[float]]:
        """METEOR of all and of each tokenised caption, until `deadline` (time.monotonic).

        Raises TimeoutError then, RuntimeError or OSError where Java fails; it is ended in either case.
        """
        if not self._lock.acquire(timeout=max(0.0, deadline - time.monotonic())):
            raise TimeoutError("ran out of time")
        try:
            java = self._running()
            questions = [_line(texts, text) for texts, text in zip(references, captions, strict=True)]
            statistics = [line.strip() for line in java.ask(questions, len(questions), deadline)]
            for line in statistics:
                if not all(map(_is_number, line.split())):
                    raise RuntimeError(f"it answered {line[:100]!r}")
            scores = java.ask([" ||| ".join(["EVAL", *statistics])], len(questions) + 1, deadline)
            *each, whole = map(float, scores)
        except (RuntimeError, ValueError) as error:
            self._end()
            raise RuntimeError(f"METEOR's Java ended: {error}") from error
        except BaseException:
            self._end()
            raise
        finally:
            self._lock.release()
        return whole, each

    def close(self) -> None:
        """End Java for good, also in the middle of a score."""
        self._closed = True
        self._end()

    def _running(self) -> Java:
        if self._closed:
            raise RuntimeError("it was closed")
        if self._java is not None and not self._java.is_running:
            self._end()
        if self._java is None:
            jar = package_folder() / "meteor" / JAR
            self._java = Java(["-jar", "-Xmx2G", jar, "-", "-", "-stdio", "-l", "en", "-norm"])
        return self._java

    def _end(self) -> None:
        java, self._java = self._java, None
        if java is not None:
            java.close()


def _is_number(word: str) -> bool:
    return word.replace(".", "", 1).replace("E", "", 1).replace("-", "", 1).isdecimal()


def _line(references: Sequence[str], caption: str) -> str:
    """The question as pycocoevalcap puts it."""
    return " ||| ".join(("SCORE", " ||| ".join(references), caption.replace("|||", "").replace("  ", " ")))
