"""What every annotation format is read into, and how a value of a file becomes a name, an id or captions.

A file's own values are checked here, once: what is null or NaN is no caption, and counted; what is neither that nor
text is an error that names the file and the picture.
"""

import json
import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

MISSING = "captions missing (null, NaN or empty)"
"""Note of captions that are not there."""
PICTURES = frozenset((".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".gif", ".webp", ".bmp", ".tif", ".tiff", ".ppm"))
"""Suffixes of picture files, in lower case."""
_TEXT_KEYS = ("raw", "caption", "text")
"""Where the text is when a caption is an object."""
_SPLITS = {
    **dict.fromkeys(("validation", "valid", "val", "dev", "devel", "eval"), "val"),
    **dict.fromkeys(("training", "train", "trn"), "train"),
    **dict.fromkeys(("testing", "test", "tst"), "test"),
    "restval": "restval",
}


@dataclass(frozen=True)
class Entry:
    """A picture as an annotation file lists it."""

    image_id: str
    """Empty: the file names none, so that of the picture's file is used."""
    file_name: str
    split: str
    captions: tuple[str, ...]
    folders: tuple[str, ...] = ("",)
    """Where the file may lie below the image root."""
    file_bytes: int = 0
    captioned: bool = True
    """False: the format has no captions, the picture is there to be captioned."""
    embedded: bool = False
    """Its bytes are in the annotation file, which is a container of pictures; unpacked, it lies below `unpack_to`."""
    size: tuple[int, int] = (0, 0)
    """Width and height in pixels, where the file says them."""
    id_is_number: bool = False
    """The file has the image id as a whole number, not as text."""


@dataclass(frozen=True)
class Source:
    """An annotation file or folder; its content is read when it is first asked for."""

    path: Path
    split: str = ""
    """Named by the user; empty: what the file says, else train."""
    unpack_to: Path | None = None
    """Where pictures inside containers are unpacked; None: they are not."""
    keep_rejected: bool = False
    """Keep the captions that the makers of VizWiz rejected or wrote beforehand."""
    notes: Counter[str] = field(default_factory=Counter)
    """Counts worth telling, of what was left out or changed."""
    number_ids: dict[str, bool] = field(default_factory=dict)
    """Whether an image id that was met is a whole number in its file, else text."""

    @cached_property
    def text(self) -> str:
        """Raises ValueError naming the file unless it is UTF-8 (a byte order mark is no part of it)."""
        try:
            return self.path.read_text(encoding="utf-8-sig")
        except UnicodeDecodeError as error:
            raise ValueError(f"{self.path}: not readable as UTF-8 text ({error}); save it as UTF-8") from None

    @cached_property
    def document(self) -> Any:
        """The JSON value; None where the text is no JSON or one value per line. ValueError for broken JSON."""
        if self.text.lstrip()[:1] not in ("{", "["):
            return None
        try:
            return parse(self.text, str(self.path))
        except ValueError:
            if self.lines_of_objects:
                return None
            raise

    @cached_property
    def lines_of_objects(self) -> bool:
        """Whether the first line is a JSON object of its own."""
        first = self.text.lstrip().split("\n", 1)[0].strip()
        try:
            return first[:1] == "{" and isinstance(parse(first, str(self.path)), dict)
        except ValueError:
            return False

    @property
    def folder(self) -> Path:
        """Where the files lie that it names, if it lies beside them."""
        return self.path if self.path.is_dir() else self.path.parent


def parse(text: str, where: str) -> Any:
    """A JSON value; ValueError, naming `where`, for what is none or nested too deeply."""
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError(f"{where}: its JSON is nested too deeply to be annotations") from None
    except ValueError as error:
        raise ValueError(f"{where}: not readable as JSON ({error})") from None


def is_missing(value: object) -> bool:
    """Null or NaN, as Python and pandas write them."""
    return value is None or (isinstance(value, float) and math.isnan(value))


def file_name_of(value: object, where: str) -> str:
    """A file name; ValueError where it is no text or empty."""
    if not isinstance(value, str) or not value.strip():
        raise ValueError(f"{where}: the file name is {shown(value)}, expected text")
    return value.strip()


def id_of(value: object, where: str, number_ids: dict[str, bool]) -> str:
    """An image id, text or a whole number, which `number_ids` is told.

    ValueError for anything else, and for a number that was text before, or the other way round.
    """
    if isinstance(value, float) and value.is_integer():  # a table with one missing id has made them all floats
        value = int(value)
    if isinstance(value, bool) or not isinstance(value, int | str) or value == "":
        raise ValueError(f"{where}: the image id is {shown(value)}, expected text or a whole number")
    image_id, is_number = str(value), isinstance(value, int)
    if number_ids.setdefault(image_id, is_number) != is_number:
        kinds = ("a whole number", "text") if is_number else ("text", "a whole number")
        raise ValueError(
            f"{where}: the image id is {shown(value)}, {kinds[0]}, and elsewhere it is {kinds[1]}; write it in one way"
        )
    return image_id


def is_number(image_id: str) -> bool:
    """Whether an id is a whole number of 64 bits, written as one would write it."""
    digits = image_id.removeprefix("-")
    return digits.isascii() and digits.isdecimal() and len(digits) < 19 and str(int(image_id)) == image_id


def caption_of(value: object, where: str, notes: Counter[str]) -> tuple[str, ...]:
    """One caption, none where it is missing; ValueError where it is no text."""
    if isinstance(value, str):
        return (value,)
    if is_missing(value):
        notes[MISSING] += 1
        return ()
    raise ValueError(f"{where}: a caption is {shown(value)}, expected text")


def captions_of(value: object, where: str, notes: Counter[str]) -> Iterator[str]:
    """The captions of a text, of a list of texts or of objects that hold them."""
    for item in value if isinstance(value, list | tuple) else (value,):
        if isinstance(item, dict):
            key = next((key for key in _TEXT_KEYS if key in item), None)
            if key is None:
                raise ValueError(f"{where}: a caption is {shown(item)}, expected text")
            yield from captions_of(item[key], where, notes)
        else:
            yield from caption_of(item, where, notes)


def split_named(word: str) -> str:
    """The split that a word stands for (validation, dev: val); empty where it stands for none."""
    return _SPLITS.get(word.strip().lower(), "")


def shown(value: object) -> str:
    """A value in an error, not too long."""
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
