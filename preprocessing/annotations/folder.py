"""A plain folder of pictures and its sub-folders; `1.txt` beside `1.jpg` has its captions, a line each, if it is there.

Without any such text the pictures are there to be captioned.
"""

import os
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

from preprocessing.annotations.entry import PICTURES, Entry, Source, captions_of, split_named

MARKS = ("prepare.json", "manifest.json", "unpacked.json")
"""A folder with one of these is made by us, and nobody's pictures."""


def is_folder(source: Source) -> str:
    """Why a path is taken for a folder of pictures; empty when it is not."""
    if not source.path.is_dir():
        return ""
    first = next(pictures_below(source.path), None)
    return f"it is a folder of pictures, e.g. {first}" if first else ""


def read_folder(source: Source) -> Iterator[Entry]:
    """Every picture below the folder; a sub-folder called train, val or test names its split."""
    names = sorted(pictures_below(source.path))
    texts = {name: source.path / PurePosixPath(name).with_suffix(".txt") for name in names}
    captioned = {name for name in names if texts[name].is_file()}
    for name in names:
        split = source.split or next(filter(None, map(split_named, PurePosixPath(name).parts[:-1])), "")
        captions = _captions(texts[name], source) if name in captioned else ()
        yield Entry("", name, split or ("train" if captioned else "test"), captions, captioned=bool(captioned))


def _captions(path: Path, source: Source) -> tuple[str, ...]:
    text = Source(path).text
    lines: list[str | None] = [line for line in text.split("\n") if line.strip()] or [None]
    return tuple(caption for line in lines for caption in captions_of(line, str(path), source.notes))


def pictures_below(root: Path) -> Iterator[str]:
    """Names, relative to `root`, of all files with a picture's suffix, in order; hidden folders and our own left out.

    Links to folders are followed, each folder once. Raises OSError for a folder that cannot be looked into.
    """
    for folder, names in walk(root):
        for name in names:
            if PurePosixPath(name).suffix.lower() in PICTURES and not name.startswith("."):
                yield str(PurePosixPath(folder) / name)


def walk(root: Path) -> Iterator[tuple[str, list[str]]]:
    """(folder relative to `root`, names of its files in order) of all folders, without hidden ones and our own."""

    def refuse(error: OSError) -> None:
        raise error

    seen = set()
    for folder, below, names in os.walk(root, followlinks=True, onerror=refuse):
        about = os.stat(folder)
        if (about.st_dev, about.st_ino) in seen or (folder != str(root) and any(mark in names for mark in MARKS)):
            below.clear()
            continue
        seen.add((about.st_dev, about.st_ino))
        below[:] = sorted(name for name in below if not name.startswith((".", "__MACOSX")))
        yield os.path.relpath(folder, root).replace("\\", "/") if folder != str(root) else "", sorted(names)
