"""Read anybody's captions: whatever the format, the same records, with a report of what was left out or changed.

    SPLIT=FILE   or FILE, which then says its splits itself or is all `train`

The formats are in `formats.py`, each in a file of its own; the rules that hold for all of them are applied here, in
this order: splits by lists, files found below the image root, one entry per image id, pictures held out, no picture in
two splits, captions cleaned.
"""

import os
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path, PurePosixPath

from preprocessing.annotations.clean import clean_caption
from preprocessing.annotations.entry import Entry, Source
from preprocessing.annotations.formats import AUTO, FORMATS, read_source, recognise
from preprocessing.annotations.locate import find_files
from preprocessing.annotations.splits import (
    HoldOut,
    by_lists,
    divide,
    in_one_split,
    read_split_lists,
    same_pictures,
)
from preprocessing.sharding.plan import ImageRecord
from sat import files
from sat.shards.schema import LeftOut

NO_CAPTION = "no usable caption"
_KEY = re.compile(r"[A-Za-z0-9_-]{1,64}")
_SPLIT = re.compile(r"[A-Za-z0-9_]{1,32}")
_HALF_PAIR = re.compile("[\ud800-\udfff]")


@dataclass(frozen=True)
class Records:
    """All usable records, sorted by (split, image_id), and what was left out or changed."""

    images: tuple[ImageRecord, ...]
    left_out: tuple[LeftOut, ...]
    notes: dict[str, int]
    root: Path | None = None
    """The folder that the file names are relative to, where files were looked for."""


def read_annotations(
    paths: Sequence[str],
    format: str = AUTO,
    *,
    image_root: str | os.PathLike[str] | None = None,
    split_lists: Sequence[str] = (),
    val_fraction: float = 0.0,
    hold_out: HoldOut | None = None,
    unpack_to: Path | None = None,
    keep_rejected: bool = False,
) -> Records:
    """Read annotation files, given as `FILE` or `SPLIT=FILE`, into one set of records.

    `split_lists` are `SPLIT=FILE` lists of file names. `val_fraction` moves that share of a lone `train` set, chosen by
    a hash of the image id, to `val`; `hold_out` says it in pictures, for val and test. With `image_root`, file names
    are completed by the folder that has the file, and pictures without a file are left out; pictures in containers are
    unpacked below `unpack_to` and found there. `keep_rejected`: see `Source`. Raises ValueError naming the file for
    what cannot be read, an id that stands for two pictures or lies in two splits, and names that point outside.
    """
    notes: Counter[str] = Counter()
    lists = read_split_lists(_split_and_list(item) for item in split_lists)
    root = None if image_root is None else Path(image_root)
    found: list[Entry] = []
    for path in paths:
        split, file = split_and_file(path)
        source = Source(file, split, unpack_to, keep_rejected, notes)
        read = list(by_lists(list(read_source(source, format)), lists, file))
        found += [_beside(entry, source.folder, root) for entry in read]
    if unpack_to is not None and any(entry.embedded for entry in found):
        root = _root_of_embedded(found, unpack_to)
    usable, left_out = _with_files(found, root, notes)
    entries = _merge(_with_ids(usable), notes)
    entries, more = _in_splits(entries, root, hold_out or _share(val_fraction, entries))
    usable, without = _clean(entries, notes)
    left_out = sorted(left_out + more + without, key=lambda item: item.image_id)
    keys = _keys([entry.image_id for entry in usable])
    images = [
        ImageRecord(
            *(e.image_id, e.file_name, e.split, e.captions, keys[e.image_id], e.file_bytes, *e.size),
            id_is_number=e.id_is_number,
        )
        for e in usable
    ]
    images.sort(key=lambda record: (record.split, record.image_id))
    return Records(tuple(images), tuple(left_out), dict(sorted(notes.items())), root)


def explain(path: str, format: str = AUTO) -> str:
    """What a file or folder is taken for and why, and its first three pictures. ValueError as `read_annotations`."""
    split, file = split_and_file(path)
    source = Source(file, split)
    if not file.exists():
        raise ValueError(f"{file}: no such annotation file")
    name, reason = recognise(source) if format == AUTO else (format, "you say so")
    lines = []
    for entry in islice(read_source(source, name), 3):
        image_id = entry.image_id or PurePosixPath(entry.file_name).stem
        lines.append(f"  image {image_id}, file {entry.file_name}, split {entry.split}")
        lines += [f"    {text!r}" for text in entry.captions] or ["    (no caption)"]
    notes = [f"  noted: {count} {note}" for note, count in sorted(source.notes.items())]
    head = [f"{file}: taken for {name} ({FORMATS[name].what})", f"  because {reason}", "the first pictures:"]
    return "\n".join(head + lines + notes)


def split_and_file(path: str) -> tuple[str, Path]:
    """`SPLIT=FILE` -> (SPLIT, FILE), `FILE` -> ("", FILE); ValueError for a split that cannot name a shard."""
    split, equals, file = str(path).partition("=")
    if not equals or not _SPLIT.fullmatch(split):
        if equals and not Path(path).exists():
            raise ValueError(f"{path}: the split {split!r} may have letters, digits and _ only")
        return "", Path(path)
    return split, Path(file)


def _split_and_list(item: str) -> tuple[str, Path]:
    split, file = split_and_file(item)
    if not split or not file.is_file():
        raise ValueError(f"split list {item!r}: expected SPLIT=FILE with an existing file")
    return split, file


def _beside(entry: Entry, folder: Path, root: Path | None) -> Entry:
    """Check the names of an entry; its file may also lie beside the annotations, where these are below the root."""
    _refuse_names(entry, root)
    if root is None:
        return entry
    name = PurePosixPath(entry.file_name)
    if name.is_absolute():
        return replace(entry, file_name=str(name.relative_to(os.path.abspath(root))))
    beside = os.path.relpath(os.path.abspath(folder), os.path.abspath(root)).replace(os.sep, "/")
    if beside == "." or beside.startswith("..") or beside in entry.folders:
        return entry
    return replace(entry, folders=(beside, *entry.folders))


def _refuse_names(entry: Entry, root: Path | None) -> None:
    name, who = entry.file_name, f"image {entry.image_id or entry.file_name!a}"
    if not _SPLIT.fullmatch(entry.split):
        raise ValueError(f"{who}: the split {entry.split!r} may have letters, digits and _ only")
    if _HALF_PAIR.search(entry.image_id + name):
        raise ValueError(f"image {entry.image_id!a}: id and file name {name!a} must be Unicode text")
    path = PurePosixPath(name)
    outside = path.is_absolute() and not (root is not None and path.is_relative_to(os.path.abspath(root)))
    if outside or ".." in path.parts or ".." in name.replace("\\", "/").split("/") or "\x00" in name or not name:
        raise ValueError(f"{who}: file name {name!r} points outside the image root")


def _root_of_embedded(entries: Sequence[Entry], unpack_to: Path) -> Path:
    other = next((entry for entry in entries if not entry.embedded), None)
    if other is not None:
        raise ValueError(
            f"{other.file_name} is a file and other pictures are inside containers; prepare them as two data sets"
        )
    return unpack_to


def _with_files(entries: list[Entry], root: Path | None, notes: Counter[str]) -> tuple[list[Entry], list[LeftOut]]:
    if root is None:
        return entries, []
    found = list(zip(entries, find_files(entries, root, notes), strict=True))
    missing = {_named(e): replace(item, image_id=_named(e)) for e, item in found if isinstance(item, LeftOut)}
    return [item for _, item in found if isinstance(item, Entry)], list(missing.values())


def _named(entry: Entry) -> str:
    return entry.image_id or PurePosixPath(entry.file_name).stem


def _with_ids(entries: Sequence[Entry]) -> list[Entry]:
    """Entries without an id get their file's name without suffix, or all of it where two files share that."""
    owners: dict[str, set[str]] = defaultdict(set)
    for entry in entries:
        if not entry.image_id:
            owners[PurePosixPath(entry.file_name).stem].add(entry.file_name)
    return [
        entry if entry.image_id else replace(entry, image_id=stem if len(owners[stem]) == 1 else entry.file_name)
        for entry in entries
        for stem in [PurePosixPath(entry.file_name).stem]
    ]


def _merge(entries: Iterable[Entry], notes: Counter[str]) -> list[Entry]:
    """One entry per image id: equal ones are merged; ValueError for an id with two pictures or two splits."""
    merged: dict[str, Entry] = {}
    for entry in entries:
        first = merged.setdefault(entry.image_id, entry)
        if first is entry:
            continue
        if (first.file_name, first.split) != (entry.file_name, entry.split):
            raise ValueError(
                f"image id {entry.image_id} stands for {first.file_name} in {first.split} "
                f"and {entry.file_name} in {entry.split}"
            )
        notes["images listed twice"] += 1
        new = tuple(text for text in entry.captions if text not in first.captions)
        either = {name: getattr(first, name) or getattr(entry, name) for name in ("captioned", "id_is_number")}
        merged[entry.image_id] = replace(first, captions=first.captions + new, **either)
    return list(merged.values())


def _share(fraction: float, entries: Sequence[Entry]) -> HoldOut | None:
    """`val_fraction` as a rule of how many pictures are held out."""
    if not fraction:
        return None
    if not 0 < fraction < 1 or {entry.split for entry in entries} != {"train"}:
        raise ValueError("--val-fraction needs a share between 0 and 1 and annotations of the split train alone")
    return lambda pictures, splits: (round(fraction * pictures), 0)


def _in_splits(entries: list[Entry], root: Path | None, hold_out: HoldOut | None) -> tuple[list[Entry], list[LeftOut]]:
    """Hold pictures out, then leave out those that lie in two splits."""
    if hold_out is None and len({entry.split for entry in entries}) < 2:
        return entries, []
    same = same_pictures(entries, root)
    if hold_out is not None:
        entries = divide(entries, same, hold_out)
    return in_one_split(entries, same)


def _clean(entries: Sequence[Entry], notes: Counter[str]) -> tuple[list[Entry], list[LeftOut]]:
    """Captions cleaned; an entry of a format with captions that has none is left out."""
    usable, left_out = [], []
    for entry in entries:
        captions = tuple(text for text in (clean_caption(raw, notes) for raw in entry.captions) if text)
        if captions or not entry.captioned:
            usable.append(entry if captions == entry.captions else replace(entry, captions=captions))
        else:
            left_out.append(LeftOut(entry.image_id, entry.file_name, NO_CAPTION))
    return usable, left_out


def _keys(image_ids: list[str]) -> dict[str, str]:
    """A key for every image id; ids that are no keys get a readable part and a hash. ValueError if two collide."""
    keys = {}
    for image_id in image_ids:
        readable = re.sub(r"[^A-Za-z0-9_-]", "_", image_id)[:40]
        digest = files.sha256_of(image_id)[:16]
        keys[image_id] = image_id if _KEY.fullmatch(image_id) else f"{readable}-{digest}"
    owners: dict[str, str] = {}
    for image_id, key in keys.items():
        if owners.setdefault(key, image_id) != image_id:
            raise ValueError(f"image ids {owners[key]!r} and {image_id!r} both get the key {key!r}; rename one of them")
    return keys
