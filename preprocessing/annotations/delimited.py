"""Text tables with a header: Kaggle's captions.txt (`image,caption`), Flickr30k's results.csv (`|`), any CSV, TSV."""

import csv
import io
from collections.abc import Iterator

from preprocessing.annotations.entry import Entry, Source, is_number, parse
from preprocessing.annotations.rows import Columns, columns_of, entries_of

DELIMITERS = {",": "commas", "\t": "tabs", "|": "|", ";": "semicolons"}


def is_table(source: Source) -> str:
    """Why a file is taken for a table; empty when it is not."""
    found = _header(source)
    return f"its first line is a header between {DELIMITERS[found[0]]}: {found[1]}" if found else ""


def read_table(source: Source) -> Iterator[Entry]:
    """A row per picture or per caption; a column of ids is one of whole numbers where all are. ValueError by line."""
    found = _header(source)
    if found is None:
        raise ValueError(f"{source.path}: its first line is no header that names a picture and a caption")
    delimiter, columns = found
    rows = list(_rows(source, delimiter, columns))
    if columns.image_id and all(is_number(str(row[columns.image_id])) for _, row in rows):
        rows = [(number, row | {columns.image_id: int(str(row[columns.image_id]))}) for number, row in rows]
    yield from entries_of(rows, source, "line")


def _header(source: Source) -> tuple[str, Columns] | None:
    """The delimiter and the columns of the first line."""
    first = source.text.lstrip("\r\n").split("\n", 1)[0].rstrip("\r")
    for delimiter in DELIMITERS:
        columns = columns_of(tuple(_names(first, delimiter)))
        if columns is not None:
            return delimiter, columns
    return None


def _names(line: str, delimiter: str) -> list[str]:
    """The names of a header, without the spaces and quotes around them."""
    return [name.strip().strip('"').strip() for name in line.split(delimiter)]


def _rows(source: Source, delimiter: str, columns: Columns) -> Iterator[tuple[int, dict[str, object]]]:
    header: list[str] = []
    for number, values in _lines(source, delimiter):
        if not header:
            header = [name.strip() for name in values]
            continue
        if not "".join(values).strip():
            continue
        extra = len(values) - len(header)
        if extra > 0 and header[-1] == columns.captions[-1]:  # an unquoted delimiter in the caption
            values = [*values[: len(header) - 1], delimiter.join(values[len(header) - 1 :])]
            source.notes["rows with an unquoted delimiter in the caption, kept"] += 1
        elif extra > 0:
            raise ValueError(f"{source.path}, line {number}: {len(values)} fields under a header of {len(header)}")
        elif extra < 0:
            values = values + [""] * -extra
        row: dict[str, object] = dict(zip(header, map(str.strip, values), strict=True))
        for name in columns.captions:
            if values[header.index(name)][:2] == '["':
                row[name] = _listed(values[header.index(name)], source)
        yield number, row


def _lines(source: Source, delimiter: str) -> Iterator[tuple[int, list[str]]]:
    """Numbered fields of each line; quotes are text where they do not stand around whole fields."""
    strict = delimiter != "|"
    if strict:
        try:
            for _ in csv.reader(io.StringIO(source.text, newline=""), delimiter=delimiter, strict=True):
                pass
        except csv.Error as error:
            source.notes[f"tables whose quotes are taken as text ({error})"] += 1
            strict = False
    text = io.StringIO(source.text, newline="")
    reader = csv.reader(text, delimiter=delimiter, quoting=csv.QUOTE_MINIMAL if strict else csv.QUOTE_NONE)
    try:
        for values in reader:
            yield reader.line_num, values
    except csv.Error as error:
        raise ValueError(f"{source.path}, line {reader.line_num}: {error}") from None


def _listed(value: str, source: Source) -> object:
    """A JSON list of captions as a list; other text as it is."""
    try:
        return parse(value.strip(), str(source.path))
    except ValueError:
        return value.strip()
