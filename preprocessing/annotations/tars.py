"""WebDataset tars of `KEY.jpg` with `KEY.txt` or `KEY.json`, as img2dataset makes them, read by `webdataset` itself.

The library ends without an error where a tar is cut at a member, and drops the rest behind a damaged header. So the
members it gives are counted against an index made by reading the tar's own headers, to its end mark.
"""

import re
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from preprocessing.annotations.entry import PICTURES, Entry, Source, captions_of, parse, split_named
from preprocessing.annotations.rows import columns_of
from preprocessing.annotations.unpack import Embedded, unpacked
from sat.shards.tar import TAR_BLOCK

_CAPTIONS = ("captions", "caption", "text", "sentences")
"""Keys of a .json member that hold the captions where there is no .txt."""
_META = re.compile(r"__[^/]*__($|/)")
"""Names that the library skips."""
_OURS = ("__key__", "__url__", "__local_path__")
"""What the library adds to a sample."""


def is_tar(source: Source) -> str:
    """Why a file is taken for a WebDataset tar; empty when it is not."""
    if not source.path.name.lower().endswith((".tar", ".tar.gz", ".tgz")):
        return ""
    try:
        with tarfile.open(source.path) as tar:
            names = [member.name for member, _ in zip(tar, range(20), strict=False) if member.isreg()]
    except (tarfile.TarError, EOFError, OSError) as error:
        raise ValueError(f"{source.path}: not readable as a tar ({error})") from None
    pictures = [name for name in names if Path(name).suffix.lower() in PICTURES]
    return f"it is a tar of pictures, the first is {pictures[0]}" if pictures else ""


def read_tar(source: Source) -> Iterator[Entry]:
    """A picture per sample; without .txt and .json it is there to be captioned. ValueError naming a damaged tar."""
    yield from unpacked(source, _pictures(source))


def members(path: Path) -> int:
    """Plain files in a tar that a WebDataset reader should give, counted by its headers to the end mark.

    Raises ValueError, naming tar and place, where it is cut off or a header is damaged.
    """
    count = 0
    try:
        with tarfile.open(path) as tar:
            for member in tar:
                count += member.isreg() and _is_of_a_sample(member.name)
            assert tar.fileobj is not None
            tar.fileobj.seek(tar.offset)
            rest = tar.fileobj.read(TAR_BLOCK)
    except (tarfile.TarError, EOFError, OSError) as error:
        raise ValueError(f"{path}: a damaged tar ({error}); bring it again") from None
    if len(rest) < TAR_BLOCK:
        raise ValueError(f"{path}: the tar is cut off after {count} files, its end mark is missing; bring it again")
    if any(rest):
        raise ValueError(f"{path}: the tar is damaged at byte {tar.offset}, after {count} files; bring it again")
    return count


def _is_of_a_sample(name: str) -> bool:
    from webdataset.tariterators import base_plus_ext

    is_meta = _META.match(name) or ("/" not in name and name.startswith("__") and name.endswith("__"))
    return not is_meta and base_plus_ext(name)[0] is not None


def _pictures(source: Source) -> Iterator[Embedded]:
    expected, seen = members(source.path), 0
    for sample in _samples(source.path):
        key = str(sample["__key__"])
        where = f"{source.path}, sample {key}"
        content = {name: data for name, data in sample.items() if name not in _OURS}
        seen += len(content)
        suffix = next((name for name in content if f".{name.rpartition('.')[2]}" in PICTURES), None)
        if suffix is None:
            source.notes["samples of tars without a picture"] += 1
            continue
        captions = _captions(content, where, source)
        about = _about(content, where)
        split = source.split or split_named(str(about.get("split", ""))) or "train"
        entry = Entry("", f"{key}.{suffix}", split, tuple(captions or ()), captioned=captions is not None)
        yield Embedded(entry, content[suffix])
    if seen != expected:
        raise ValueError(
            f"{source.path}: {seen} of its {expected} files can be read; the tar is damaged, bring it again"
        )


def _samples(path: Path) -> Iterator[dict[str, Any]]:
    """By the library, from an open file: it takes names for commands and patterns."""
    from webdataset.tariterators import group_by_keys, tar_file_expander

    with open(path, "rb") as stream:
        try:
            yield from group_by_keys(tar_file_expander([{"url": str(path), "stream": stream}]))
        except (tarfile.TarError, EOFError, ValueError) as error:
            raise ValueError(f"{path}: a damaged tar ({error.args[0]}); bring it again") from None


def _captions(content: dict[str, bytes], where: str, source: Source) -> list[str] | None:
    """Of the .txt, else of the .json; None where the sample has neither."""
    if "txt" in content:
        text = _text(content["txt"], where)
        return list(captions_of(text.strip() or None, where, source.notes))
    about = _about(content, where)
    key = next((key for key in _CAPTIONS if key in about), None)
    if key is None:
        columns = columns_of(("image", *about))
        key = columns.captions[0] if columns else None
    return None if key is None else list(captions_of(about[key], where, source.notes))


def _about(content: dict[str, bytes], where: str) -> dict[str, Any]:
    value = parse(_text(content["json"], where), where) if "json" in content else {}
    return value if isinstance(value, dict) else {}


def _text(data: bytes, where: str) -> str:
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{where}: its text is not UTF-8 ({error})") from None
