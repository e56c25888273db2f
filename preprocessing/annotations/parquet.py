"""Parquet: a picture's path, or its bytes in a struct as Hugging Face's data sets have it, and captions in any column.

Read in small pieces: a file of a gigabyte takes some hundred megabytes of memory at most.
"""

from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import PurePosixPath
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import xxhash

from preprocessing.annotations.entry import Entry, Source, captions_of
from preprocessing.annotations.rows import Columns, columns_of, entries_of, id_in, split_in
from preprocessing.annotations.unpack import Embedded, unpacked

ROWS_AT_ONCE = 64
_MAGIC = b"PAR1"
_SUFFIXES = {b"\xff\xd8\xff": ".jpg", b"\x89PNG": ".png", b"GIF8": ".gif", b"RIFF": ".webp", b"BM": ".bmp"}


def is_parquet(source: Source) -> str:
    """Why a file is taken for Parquet; empty when it is not, or has no picture and caption."""
    with open(source.path, "rb") as file:
        if file.read(len(_MAGIC)) != _MAGIC:
            return ""
    columns = columns_of(tuple(_open(source).schema_arrow.names))
    return f"it is a Parquet table: {columns}" if columns else ""


def read_parquet(source: Source) -> Iterator[Entry]:
    """A row per picture or caption; raises ValueError naming a file that is damaged."""
    table = _open(source)
    names = tuple(table.schema_arrow.names)
    columns = columns_of(names)
    if columns is None:
        raise ValueError(f"{source.path}: no column of pictures and of captions among {', '.join(names)}")
    if _holds_bytes(table.schema_arrow.field(columns.image).type):
        yield from unpacked(source, _pictures(source, table, columns))
    else:
        yield from entries_of(_rows(source, table, columns), source, "row")


def _open(source: Source) -> pq.ParquetFile:
    try:
        return pq.ParquetFile(source.path)
    except (pa.ArrowException, OSError) as error:
        raise ValueError(f"{source.path}: a damaged Parquet file ({error})") from None


def _holds_bytes(type_: pa.DataType) -> bool:
    if pa.types.is_struct(type_):
        return any(type_.field(index).name == "bytes" for index in range(type_.num_fields))
    return bool(pa.types.is_binary(type_) or pa.types.is_large_binary(type_))


def _rows(source: Source, table: pq.ParquetFile, columns: Columns) -> Iterator[tuple[int, dict[str, Any]]]:
    wanted = list(dict.fromkeys(filter(None, [columns.image, *columns.captions, columns.image_id, columns.split])))
    number = 0
    try:
        for batch in table.iter_batches(batch_size=ROWS_AT_ONCE, columns=wanted):
            for row in batch.to_pylist():
                yield number, row
                number += 1
    except (pa.ArrowException, OSError) as error:
        raise ValueError(f"{source.path}: damaged at row {number} ({error})") from None


def _pictures(source: Source, table: pq.ParquetFile, columns: Columns) -> Iterator[Embedded]:
    """Pictures in the order of their first rows; rows of the same bytes in a row are one picture of several captions.

    A row's name is that of its path, else its number; where two pictures have one name, the later has its number too.
    """
    taken: set[str] = set()
    last: tuple[int, Embedded] | None = None
    for number, row in _rows(source, table, columns):
        where = f"{source.path}, row {number}"
        path, data = _picture_of(row[columns.image], where)
        captions = [text for name in columns.captions for text in captions_of(row[name], where, source.notes)]
        digest = xxhash.xxh3_128_intdigest(data)
        if last is not None and last[0] == digest:
            entry = last[1].entry
            last = (digest, Embedded(replace(entry, captions=(*entry.captions, *captions)), data))
            continue
        if last is not None:
            yield last[1]
        name = PurePosixPath(path.replace("\\", "/")).name if path else ""
        name = name or f"{number:09d}{_suffix(data)}"
        name = f"{number:09d}-{name}" if name in taken else name
        taken.add(name)
        image_id = id_in(row, columns, where, source)
        is_number = source.number_ids.get(image_id, False)
        about = (image_id, name, split_in(row, columns, source), tuple(captions))
        entry = Entry(*about, id_is_number=is_number)
        last = (digest, Embedded(entry, data))
    if last is not None:
        yield last[1]


def _picture_of(value: Any, where: str) -> tuple[str, bytes]:
    path, data = (value.get("path") or "", value.get("bytes")) if isinstance(value, Mapping) else ("", value)
    if not isinstance(data, bytes) or not isinstance(path, str):
        more = f"; its path is {path!r}: bring the files beside it and give a table of paths" if path else ""
        raise ValueError(f"{where}: there are no bytes of a picture{more}")
    return path, data


def _suffix(data: bytes) -> str:
    return next((suffix for magic, suffix in _SUFFIXES.items() if data.startswith(magic)), ".img")
