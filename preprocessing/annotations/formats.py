"""The formats: one table, in the order in which a file is held against them, and what one was taken for and why."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from preprocessing.annotations.coco import (
    is_coco,
    is_image_info,
    is_karpathy,
    read_coco,
    read_image_info,
    read_karpathy,
)
from preprocessing.annotations.delimited import is_table, read_table
from preprocessing.annotations.entry import Entry, Source
from preprocessing.annotations.flickr import is_flickr, read_flickr
from preprocessing.annotations.folder import is_folder, read_folder
from preprocessing.annotations.json_rows import (
    is_captions_by_file,
    is_lines,
    is_list,
    is_textcaps,
    read_captions_by_file,
    read_lines,
    read_list,
    read_textcaps,
)
from preprocessing.annotations.parquet import is_parquet, read_parquet
from preprocessing.annotations.tars import is_tar, read_tar


@dataclass(frozen=True)
class Format:
    """A way to write down pictures and captions."""

    what: str
    """What is looked for."""
    recognise: Callable[[Source], str]
    """Why a file is taken for it; empty when it is not."""
    read: Callable[[Source], Iterator[Entry]]
    """The entries of a file; ValueError naming file and place for what cannot be read."""


BINARY: dict[str, Format] = {
    "folder": Format("a folder of pictures, with 1.txt beside 1.jpg or without captions", is_folder, read_folder),
    "webdataset": Format("a tar of KEY.jpg with KEY.txt or KEY.json (img2dataset)", is_tar, read_tar),
    "parquet": Format("Parquet with a column of pictures or paths and one of captions", is_parquet, read_parquet),
}
TEXT: dict[str, Format] = {
    "karpathy": Format("Karpathy's JSON: `images` with `sentences`", is_karpathy, read_karpathy),
    "coco": Format("COCO's, NoCaps's or VizWiz's JSON: `images`, `annotations` with `caption`", is_coco, read_coco),
    "image_info": Format("JSON with `images` and no captions", is_image_info, read_image_info),
    "textcaps": Format("TextCaps's JSON: `data` with `image_id` and `caption_str`", is_textcaps, read_textcaps),
    "jsonl": Format("JSON lines of objects with file name and caption", is_lines, read_lines),
    "list": Format("a JSON list of objects with `image` and `caption` (LAVIS)", is_list, read_list),
    "dict": Format("a JSON object {file name: captions}", is_captions_by_file, read_captions_by_file),
    "flickr": Format("Flickr's token file: lines NAME#NUMBER<tab>CAPTION", is_flickr, read_flickr),
    "table": Format("CSV or TSV with a header that names picture and caption", is_table, read_table),
}
FORMATS = BINARY | TEXT
AUTO = "auto"


def recognise(source: Source) -> tuple[str, str]:
    """The name of a source's format, and why; ValueError, listing what was looked for, for one that has none."""
    if source.path.is_dir() and not is_folder(source):
        raise ValueError(f"{source.path}: a folder without pictures")
    for name, format_ in BINARY.items():
        if reason := format_.recognise(source):
            return name, reason
    _refuse_binary(source)
    for name, format_ in TEXT.items():
        if reason := format_.recognise(source):
            return name, reason
    known = "; ".join(f"{name}: {format_.what}" for name, format_ in FORMATS.items())
    raise ValueError(f"{source.path}: begins with {source.text[:60]!r}, which is none of the known layouts ({known})")


def _refuse_binary(source: Source) -> None:
    with open(source.path, "rb") as file:
        head = file.read(1024)
    if b"\x00" in head or head.startswith((b"\xff\xd8", b"\x89PNG", b"PK", b"\x1f\x8b", b"PAR1")):
        known = "; ".join(f"{name}: {format_.what}" for name, format_ in BINARY.items())
        raise ValueError(f"{source.path}: no text, and none of the known layouts of other files ({known})")


def read_source(source: Source, format: str = AUTO) -> Iterator[Entry]:
    """The entries of a source in the named format, or in the one it is recognised as.

    Raises ValueError naming the file for what is missing, unknown or not in that format.
    """
    if format != AUTO and format not in FORMATS:
        raise ValueError(f"annotation format {format!r} is unknown; choose one of {', '.join([AUTO, *FORMATS])}")
    if not source.path.exists():
        raise ValueError(f"{source.path}: no such annotation file")
    name = recognise(source)[0] if format == AUTO else format
    try:
        yield from FORMATS[name].read(source)
    except KeyError as error:
        raise ValueError(f"{source.path}: not in {name} format (an entry has no {error})") from error
    except (TypeError, AttributeError, IsADirectoryError) as error:
        raise ValueError(f"{source.path}: not in {name} format ({type(error).__name__}: {error})") from error
