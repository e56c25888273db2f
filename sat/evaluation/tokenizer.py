"""Captions as words, exactly as pycocoevalcap splits them: by Stanford's PTB tokenizer, references and captions apart.

Apart, and in the order in which they are given, because that tokenizer looks at the next line: whether the "D." at a
caption's end stays whole depends on what follows. What would break it is changed, and counted: characters that end a
line for Java move every later caption to another image, and half a surrogate pair has no UTF-8.
"""

import re
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from pathlib import Path

from sat.evaluation.java import Java, package_folder

JAR = "stanford-corenlp-3.4.1.jar"
NAME = "ptb-3.4.1"
"""As it stands in signatures."""
RULES = "rules"
"""In its place: the tokenizer used without Java."""
BREAKS = re.compile("[\r\v\f\u2028\u2029\ud800-\udfff]")
"""What cannot be given to the tokenizer."""
PTB_LIKE = re.compile(r"n't\b|'(?:s|re|ve|ll|d|m)\b|\w+?(?=n't\b)|\w+(?:[-./:]\w+)*|[$&#%]")
"""Without Java: the same words as the PTB tokenizer for 99.85 % of the captions of COCO val2017."""


@dataclass(frozen=True)
class Tokens:
    """Captions as words separated by spaces, and how they became so."""

    lines: tuple[str, ...]
    changed: int
    """Captions with characters that could not be given to the tokenizer."""
    without_java: str = ""
    """Why the rules were used in place of the tokenizer."""


def tokenize(*groups: Sequence[str], deadline: float) -> list[Tokens]:
    """Each group of captions by a tokenizer of its own, all at once, until `deadline` (time.monotonic).

    Where one fails all are split by the rules.
    """
    clean = [[BREAKS.sub(" ", text.replace("\n", " ")) for text in captions] for captions in groups]
    pairs = zip(groups, clean, strict=True)
    changed = [sum(a.replace("\n", " ") != b for a, b in zip(*pair, strict=True)) for pair in pairs]
    try:
        with ExitStack() as stack:
            running = [stack.enter_context(_ptb(captions)) for captions in clean]
            lines = [finish(deadline) for finish in running]
    except (OSError, RuntimeError) as error:
        return [by_rules(captions, str(error)) for captions in groups]
    return [Tokens(tuple(each), count) for each, count in zip(lines, changed, strict=True)]


def by_rules(captions: Sequence[str], why: str) -> Tokens:
    """The captions as words without Java, and `why`."""
    return Tokens(tuple(" ".join(PTB_LIKE.findall(text.lower())) for text in captions), 0, why)


@contextmanager
def _ptb(captions: Sequence[str]) -> Iterator[Callable[[float], list[str]]]:
    """Start the tokenizer; what it gives returns by a deadline what pycocoevalcap's PTBTokenizer returns.

    That raises RuntimeError where a line is lost or added.
    """
    with tempfile.TemporaryDirectory(prefix="sat-captions-", ignore_cleanup_errors=True) as folder:
        path = Path(folder) / "captions.txt"
        path.write_text("\n".join(captions), encoding="utf-8", newline="\n")
        program = ("-cp", package_folder() / "tokenizer" / JAR, "edu.stanford.nlp.process.PTBTokenizer")
        with closing(Java([*program, "-preserveLines", "-lowerCase", path])) as java:
            yield lambda deadline: _words(java.finish(deadline).decode("utf-8", "replace").split("\n"), len(captions))


def _words(lines: Sequence[str], expected: int) -> list[str]:
    from pycocoevalcap.tokenizer.ptbtokenizer import PUNCTUATIONS

    if len(lines) != expected:
        raise RuntimeError(
            f"the PTB tokenizer did not give back {expected} lines but {len(lines)} (is this the Java we expect?)"
        )
    dropped = frozenset(PUNCTUATIONS)
    return [" ".join(word for word in line.rstrip().split(" ") if word not in dropped) for line in lines]


def half_way(deadline: float) -> float:
    """Half of the time that is left until `deadline`."""
    now = time.monotonic()
    return now + max(0.0, deadline - now) / 2
