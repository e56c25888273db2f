"""JSON that lists pictures: one object per line, a list of objects (LAVIS), TextCaps, and {file: captions}."""

from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from pathlib import PurePosixPath
from typing import Any

from preprocessing.annotations.entry import (
    PICTURES,
    Entry,
    Source,
    captions_of,
    file_name_of,
    id_of,
    parse,
    shown,
    split_named,
)
from preprocessing.annotations.rows import columns_of, entries_of

_LISTS = ("data", "annotations", "images", "items", "samples", "examples")
"""Where an object may keep its list of rows."""


def is_lines(source: Source) -> str:
    """Why a file is taken for JSON lines; empty when it is not."""
    if not source.lines_of_objects or (source.document is not None and columns_of(tuple(source.document)) is None):
        return ""
    columns = columns_of(tuple(parse(source.text.lstrip().split("\n", 1)[0], str(source.path))))
    return f"every line is a JSON object: {columns}" if columns else ""


def read_lines(source: Source) -> Iterator[Entry]:
    """An object per line, with file name and caption or captions."""
    yield from entries_of(_lines(source), source, "line")


def _lines(source: Source) -> Iterator[tuple[int, Mapping[str, object]]]:
    for number, line in enumerate(source.text.split("\n"), start=1):
        if line.strip():
            where = f"{source.path}, line {number}"
            row = parse(line, where)
            if not isinstance(row, dict):
                raise ValueError(f"{where}: {shown(row)}, expected a JSON object")
            yield number, row


def is_list(source: Source) -> str:
    """Why a file is taken for a list of objects; empty when it is not."""
    rows = _rows_of(source)
    columns = columns_of(tuple(rows[0])) if rows and isinstance(rows[0], dict) else None
    return f"it is a JSON list of objects: {columns}" if columns else ""


def read_list(source: Source) -> Iterator[Entry]:
    """Objects with `image` and `caption` (text or list), as LAVIS has them, or of other names for these."""
    yield from entries_of(_numbered(source), source, "row")


def _numbered(source: Source) -> Iterator[tuple[int, Mapping[str, object]]]:
    for number, row in enumerate(_rows_of(source)):
        if not isinstance(row, dict):
            raise ValueError(f"{source.path}, row {number}: {shown(row)}, expected a JSON object")
        yield number, row


def _rows_of(source: Source) -> Sequence[Any]:
    document = source.document
    if isinstance(document, dict):
        document = next((document[key] for key in _LISTS if isinstance(document.get(key), list)), None)
    return document if isinstance(document, list) else []


def is_textcaps(source: Source) -> str:
    """Why a file is taken for TextCaps; empty when it is not."""
    rows = source.document.get("data") if isinstance(source.document, dict) else None
    first = rows[0] if isinstance(rows, list) and rows and isinstance(rows[0], dict) else {}
    fits = "image_id" in first and ("image_path" in first or "caption_str" in first or "reference_strs" in first)
    return "it is TextCaps's JSON: `data` with `image_id`, `image_path` and `caption_str`" if fits else ""


def read_textcaps(source: Source) -> Iterator[Entry]:
    """A row per caption; `reference_strs`, all captions again in each row, counts where that is all there is."""
    found: dict[str, tuple[str, str, dict[str, None]]] = {}
    captioned = False
    for row in source.document["data"]:
        image_id = id_of(row["image_id"], f"{source.path}: a caption", source.number_ids)
        where = f"{source.path}: image {image_id}"
        name = file_name_of(row.get("image_path") or f"{image_id}.jpg", where)
        split = source.split or split_named(str(row.get("set_name", ""))) or "train"
        captions = found.setdefault(image_id, (name, split, {}))[2]
        value = row["caption_str"] if "caption_str" in row else row.get("reference_strs", [])
        captioned = captioned or "caption_str" in row or "reference_strs" in row
        captions.update(dict.fromkeys(captions_of(value, where, source.notes)))
    for image_id, (name, split, captions) in found.items():
        is_number = source.number_ids[image_id]
        yield Entry(image_id, name, split, tuple(captions), captioned=captioned, id_is_number=is_number)


def is_captions_by_file(source: Source) -> str:
    """Why a file is taken for {file: captions}; empty when it is not."""
    document = source.document
    if not isinstance(document, dict) or not document:
        return ""
    first = dict(islice(document.items(), 100))
    lists = all(isinstance(each, list) and each and isinstance(each[0], str) for each in first.values())
    named = any(PurePosixPath(name).suffix.lower() in PICTURES for name in first)
    fits = lists or (named and not any(isinstance(each, dict) for each in first.values()))
    return "it is a JSON object from file names to captions" if fits else ""


def read_captions_by_file(source: Source) -> Iterator[Entry]:
    """A list of captions, or one, for each file name."""
    for name, value in source.document.items():
        captions = tuple(captions_of(value, f"{source.path}: image {name}", source.notes))
        yield Entry("", file_name_of(name, f"{source.path}: a picture"), source.split or "train", captions)
