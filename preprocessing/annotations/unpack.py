"""Pictures inside a container (Parquet, tar) become files, once, so that the same program shards them as any others.

Below the folder for it, each container has one of its own, with `unpacked.json`, written last: a folder without it, or
of a container that has changed since, is filled again. Names come from strangers and are checked before they are used.
"""

import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath

from preprocessing.annotations.entry import Entry, Source
from sat import files

INDEX = "unpacked.json"


@dataclass(frozen=True)
class Embedded:
    """A picture in a container: an entry, and its bytes."""

    entry: Entry
    data: bytes


def unpacked(source: Source, content: Iterable[Embedded]) -> Iterator[Entry]:
    """The entries of a container; their pictures lie below `source.unpack_to` afterwards, where that is given.

    Raises ValueError for a name that points outside the folder or stands for two pictures.
    """
    place = f"{source.path.stem}-{files.sha256_of(os.path.abspath(source.path))[:8]}"
    if source.unpack_to is None:
        for each in content:
            yield _placed(each.entry, place, len(each.data))
        return
    folder, about = source.unpack_to / place, source.path.stat()
    stamp = {"bytes": about.st_size, "mtime_ns": about.st_mtime_ns}
    standing = files.read_json(folder / INDEX)
    if {name: standing.get(name) for name in stamp} == stamp and (found := _standing(folder, standing)):
        source.notes.update(standing["notes"])
        yield from found
        return
    before, entries = source.notes.copy(), []
    for each in content:
        _write(folder, each, str(source.path))
        entries.append(_placed(each.entry, place, len(each.data)))
    os.sync()  # the pictures before the index, at once: one by one they would take minutes
    rows = [vars(entry) for entry in entries]
    files.write_json(folder / INDEX, stamp | {"notes": dict(source.notes - before), "entries": rows})
    yield from entries


def _placed(entry: Entry, place: str, size: int) -> Entry:
    return replace(entry, file_name=f"{place}/{entry.file_name}", file_bytes=size, embedded=True)


def _standing(folder: Path, index: dict[str, object]) -> list[Entry]:
    """The entries of an index whose pictures are all there, by their size; empty otherwise."""
    rows = index.get("entries")
    assert isinstance(rows, list)
    entries = [
        Entry(
            **{**row, "captions": tuple(row["captions"]), "folders": tuple(row["folders"]), "size": tuple(row["size"])}
        )
        for row in rows
    ]
    for entry in entries:
        path = folder.parent / entry.file_name
        if not path.is_file() or path.stat().st_size != entry.file_bytes:
            return []
    return entries


def _write(folder: Path, each: Embedded, container: str) -> None:
    name = PurePosixPath(each.entry.file_name)
    if name.is_absolute() or ".." in name.parts or "\x00" in each.entry.file_name or name.name == INDEX:
        raise ValueError(f"{container}: the picture {each.entry.file_name!r} points outside its folder")
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(each.data)
