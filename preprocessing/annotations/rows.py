"""Rows that name a picture and a caption, from whatever file: which column is what; rows of a picture are one entry.

A picture has as many captions as rows, or as a row's list or numbered columns have. Ids of the file are used where they
go with the pictures one to one, as some files number their rows in a column of that name.
"""

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache

from preprocessing.annotations.entry import (
    MISSING,
    Entry,
    Source,
    captions_of,
    file_name_of,
    id_of,
    is_missing,
    split_named,
)

IMAGE = (
    *("file_name", "filename", "image_name", "image_path", "image_file", "filepath", "file_path", "image", "img"),
    *("img_path", "img_name", "photo", "picture", "file", "path", "jpg"),
)
CAPTION = (
    *("caption", "captions", "text", "texts", "sentence", "sentences", "comment", "comments", "description"),
    *("descriptions", "raw", "caption_text", "caption_str", "reference_strs", "alt_text", "sentids_raw"),
)
ID = ("image_id", "img_id", "imgid", "imageid", "cocoid", "key")
SPLIT = ("split", "set_name", "subset", "partition")
"""Names of columns, in lower case with _ for spaces, the likeliest first."""
_NUMBERED = re.compile(r"(?:caption|text|sentence|comment|description)s?_?\d+")


@dataclass(frozen=True)
class Columns:
    """What is where in a row: the names as the file has them."""

    image: str
    captions: tuple[str, ...]
    image_id: str = ""
    split: str = ""

    def __str__(self) -> str:
        about = f"the picture is `{self.image}`, the captions are {', '.join(f'`{name}`' for name in self.captions)}"
        return about + (f", the id is `{self.image_id}`" if self.image_id else "")


@lru_cache(maxsize=1024)
def columns_of(names: tuple[str, ...]) -> Columns | None:
    """Which column is what; None where there is no picture or no caption."""
    by_name: dict[str, str] = {}
    for name in names:
        by_name.setdefault(re.sub(r"[ \-.]+", "_", name.strip().strip("\"'").lower()), name)

    def first(known: Sequence[str]) -> str:
        return next((by_name[name] for name in known if name in by_name), "")

    image_id, caption = first(ID), first(CAPTION)
    captions = (caption,) if caption else tuple(by_name[name] for name in by_name if _NUMBERED.fullmatch(name))
    image = first(IMAGE) or image_id
    return Columns(image, captions, image_id, first(SPLIT)) if image and captions else None


@dataclass
class _Picture:
    """What the rows say of a picture so far."""

    split: str
    ids: set[str] = field(default_factory=set)
    captions: list[str] = field(default_factory=list)


def entries_of(rows: Iterable[tuple[int, Mapping[str, object]]], source: Source, unit: str) -> Iterator[Entry]:
    """The entries of rows, each with its number, a `line` or `row` of the file.

    Raises ValueError, naming the place, for a row without picture or caption column, and for values that are no text.
    """
    pictures: dict[str, _Picture] = {}
    for number, row in rows:
        columns = columns_of(tuple(row))
        if columns is None:
            keys = ", ".join(map(str, row)) or "nothing"
            raise ValueError(f"{source.path}, {unit} {number}: no picture and caption among {keys}")
        name = row[columns.image]
        if not isinstance(name, str) or not name.strip():
            name = file_name_of(_text(name), f"{source.path}, {unit} {number}")
        split = split_in(row, columns, source)
        picture = pictures.get(name)
        if picture is None:
            picture = pictures[name] = _Picture(split)
        elif picture.split != split:
            place = f"{source.path}, {unit} {number}"
            raise ValueError(f"{place}: {name} is in the splits {picture.split} and {split}")
        if image_id := id_in(row, columns, f"{source.path}, {unit} {number}", source):
            picture.ids.add(image_id)
        for column in columns.captions:
            value = row.get(column)
            if isinstance(value, str) and value:
                picture.captions.append(value)
            else:
                picture.captions += _captions(value, f"{source.path}, {unit} {number}: image {name}", source)
    trusted = _are_one_to_one(pictures.values(), source)
    for name, picture in pictures.items():
        image_id = min(picture.ids) if trusted else ""
        is_number = source.number_ids.get(image_id, False)
        yield Entry(image_id, name.strip(), picture.split, tuple(picture.captions), id_is_number=is_number)


def _are_one_to_one(pictures: Iterable[_Picture], source: Source) -> bool:
    """Whether every picture has one id and no other has it; noted where the file has ids and they do not."""
    owners: Counter[str] = Counter()
    one_each = True
    for picture in pictures:
        owners.update(picture.ids)
        one_each = one_each and len(picture.ids) == 1
    trusted = one_each and set(owners.values()) == {1}
    if owners and not trusted:
        source.notes["files whose ids do not go with the pictures one to one; file names are used"] += 1
    return trusted


def _captions(value: object, where: str, source: Source) -> list[str]:
    if value == "":
        source.notes[MISSING] += 1
        return []
    return list(captions_of(value, where, source.notes))


def _text(value: object) -> object:
    """A picture's name where it is a whole number (`1` for 1.jpg), or the path of an object."""
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    return value.get("path") if isinstance(value, Mapping) else value


def id_in(row: Mapping[str, object], columns: Columns, where: str, source: Source) -> str:
    """The image id that a row says, empty where it says none; ValueError as `id_of`."""
    value = row.get(columns.image_id) if columns.image_id else None
    return "" if is_missing(value) or value == "" else id_of(value, where, source.number_ids)


def split_in(row: Mapping[str, object], columns: Columns, source: Source) -> str:
    """The split of a row: the user's, else what the row says, else train."""
    value = row.get(columns.split) if columns.split else None
    named = (split_named(value) or value.strip()) if isinstance(value, str) else ""
    return source.split or named or "train"
