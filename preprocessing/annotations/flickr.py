"""Flickr8k's and 30k's token file: lines `NAME.jpg#NUMBER<tab>CAPTION`."""

import re
from collections.abc import Iterator

from preprocessing.annotations.entry import Entry, Source

_LINE = re.compile(r"([^\t#]+)#(\d+)\t(.*)")


def is_flickr(source: Source) -> str:
    """Why a file is taken for a token file; empty when it is not."""
    first = next((line for line in source.text.split("\n") if line.strip()), "")
    return "its lines are NAME#NUMBER<tab>CAPTION" if _LINE.fullmatch(first.removesuffix("\r")) else ""


def read_flickr(source: Source) -> Iterator[Entry]:
    """The captions of each picture in the order of their numbers."""
    captions: dict[str, dict[int, str]] = {}
    for number, line in enumerate(source.text.split("\n"), start=1):
        match = _LINE.fullmatch(line.removesuffix("\r"))
        if match:
            captions.setdefault(match[1], {}).setdefault(int(match[2]), match[3])
        elif line.strip():
            raise ValueError(f"{source.path}, line {number}: expected NAME#NUMBER<tab>CAPTION, found {line[:60]!r}")
    for name, texts in captions.items():
        yield Entry("", name, source.split or "train", tuple(caption for _, caption in sorted(texts.items())))
