"""Read captions in the three formats of the field; all give the same records, with a report of what was left out.

    COCO captions JSON (2014, 2017)      SPLIT=FILE
    Karpathy's dataset_*.json            FILE: knows its splits (train, restval, val, test)
    Flickr8k/30k token file              FILE, and a list of pictures per split

The surprising decision: captions are cleaned here, once, because characters that look harmless (U+2028, \\r, NUL, half
a surrogate pair) later shift or break the tools that score captions. What is cleaned, cut or dropped is counted in the
notes.
"""

import json
import os
import re
import stat
import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import Any

import xxhash

from preprocessing.sharding.plan import ImageRecord
from sat import files
from sat.shards.schema import LeftOut
from sat.text import normalise

MAX_WORDS = 200
"""Words kept of a caption."""
MAX_CHARACTERS = 2000
"""Characters kept of a caption, at the end of a word where there is one."""
RULES = 1
"""Version of the rules of this file; part of the fingerprint."""
FORMATS = ("auto", "coco", "karpathy", "flickr")
_KEY = re.compile(r"[A-Za-z0-9_-]{1,64}")
_SPLIT = re.compile(r"[A-Za-z0-9_]{1,32}")
_HALF_PAIR = re.compile("[\ud800-\udfff]")
_DROPPED = frozenset(("Cc", "Cs", "Zl", "Zp"))
"""Unicode categories that become a space: controls, lone surrogates, line and paragraph separators."""


@dataclass(frozen=True)
class Records:
    """All usable records, sorted by (split, image_id), and what was left out or changed."""

    images: tuple[ImageRecord, ...]
    left_out: tuple[LeftOut, ...]
    notes: dict[str, int]


@dataclass(frozen=True)
class _Entry:
    """A picture as an annotation file lists it; `folders` are where its file may lie below the image root."""

    image_id: str
    file_name: str
    split: str
    captions: tuple[str, ...]
    folders: tuple[str, ...] = ("",)
    file_bytes: int = 0
    size: tuple[int, int] = (0, 0)
    """Width and height in pixels, where the file says them."""


def read_annotations(
    paths: Sequence[str],
    format: str = "auto",
    *,
    image_root: str | os.PathLike[str] | None = None,
    split_lists: Sequence[str] = (),
    val_fraction: float = 0.0,
) -> Records:
    """Read annotation files, given as `FILE` or `SPLIT=FILE`, into one set of records.

    `split_lists` are `SPLIT=FILE` lists of file names (Flickr). `val_fraction` moves that share of a lone `train` set,
    chosen by a hash of the image id, to `val`. With `image_root`, file names are completed by the folder that has the
    file, and pictures without a file are left out. Raises ValueError naming the file for what cannot be read, an id
    that stands for two pictures or lies in two splits, and file names that point outside the image root.
    """
    lists = _read_split_lists(split_lists)
    notes: Counter[str] = Counter()
    entries = [entry for path in paths for entry in _read_file(path, format, lists)]
    merged = _merge(entries, notes)
    if val_fraction:
        merged = _split_by_hash(merged, val_fraction)
    usable, left_out = [], []
    for entry in merged:
        captions = tuple(text for text in (clean_caption(raw, notes) for raw in entry.captions) if text)
        if captions:
            usable.append(replace(entry, captions=captions))
        else:
            left_out.append(LeftOut(entry.image_id, entry.file_name, "no usable caption"))
    if image_root is not None:
        usable, missing = _find_files(usable, Path(image_root))
        left_out += missing
    keys = _keys([entry.image_id for entry in usable])
    images = [
        ImageRecord(e.image_id, e.file_name, e.split, e.captions, keys[e.image_id], e.file_bytes, *e.size)
        for e in usable
    ]
    images.sort(key=lambda record: (record.split, record.image_id))
    return Records(tuple(images), tuple(sorted(left_out, key=lambda item: item.image_id)), dict(sorted(notes.items())))


def clean_caption(raw: str, notes: Counter[str] | None = None) -> str:
    """The caption in NFC on one line with single spaces, at most MAX_WORDS words; empty when it has no letter or digit.

    `|||`, which separates captions in the METEOR protocol, becomes a space.
    """
    notes = Counter() if notes is None else notes
    plain = "".join(" " if unicodedata.category(char) in _DROPPED else char for char in raw.replace("|||", " "))
    words = unicodedata.normalize("NFC", plain).split()
    text = " ".join(words[:MAX_WORDS])
    if len(text) > MAX_CHARACTERS:
        text = text[:MAX_CHARACTERS].rpartition(" ")[0] or text[:MAX_CHARACTERS]
    if not normalise(text):
        notes["captions dropped: no letter or digit"] += 1
        return ""
    if len(text) < len(" ".join(words)):
        notes["captions cut"] += 1
    elif text != raw.strip():
        notes["captions cleaned"] += 1
    return text


def _read_file(path: str, format: str, lists: Mapping[str, str]) -> Iterator[_Entry]:
    """Entries of one `FILE` or `SPLIT=FILE`."""
    if format not in FORMATS:
        raise ValueError(f"annotation format {format!r} is unknown; choose one of {', '.join(FORMATS)}")
    split, file = _split_and_file(path)
    if not file.is_file():
        raise ValueError(f"{file}: no such annotation file")
    try:
        text = file.read_text(encoding="utf-8-sig")
        document: Any = json.loads(text) if text.lstrip()[:1] in ("{", "[") else None
    except ValueError as error:
        raise ValueError(f"{file}: not readable as UTF-8 text or JSON ({error})") from None
    if format == "auto":
        format = _recognise(file, document)
    try:
        if format == "coco":
            yield from _coco(document, split or "train", file)
        elif format == "karpathy":
            yield from _karpathy(document)
        else:
            yield from _flickr(text, file, split, lists)
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{file}: not in {format} format ({type(error).__name__}: {error})") from error


def _split_and_file(path: str) -> tuple[str, Path]:
    """`SPLIT=FILE` -> (SPLIT, FILE), `FILE` -> ("", FILE); ValueError for a split that cannot name a shard."""
    split, equals, file = str(path).partition("=")
    if not equals or not _SPLIT.fullmatch(split):
        if equals and not Path(path).exists():
            raise ValueError(f"{path}: the split {split!r} may have letters, digits and _ only")
        return "", Path(path)
    return split, Path(file)


def _recognise(file: Path, document: object) -> str:
    if document is None:
        return "flickr"
    if isinstance(document, dict) and isinstance(document.get("images"), list):
        if isinstance(document.get("annotations"), list):
            return "coco"
        if all("sentences" in image for image in document["images"][:1]):
            return "karpathy"
    raise ValueError(
        f"{file}: neither COCO captions JSON (images, annotations) nor Karpathy JSON (images with sentences)"
    )


def _coco(document: dict[str, Any], split: str, file: Path) -> Iterator[_Entry]:
    """COCO: captions in the order of their annotation ids; a repeated annotation id counts once."""
    captions: dict[object, dict[object, str]] = {}
    for annotation in document["annotations"]:
        captions.setdefault(annotation["image_id"], {}).setdefault(annotation["id"], annotation["caption"])
    unknown = captions.keys() - {image["id"] for image in document["images"]}
    if unknown:
        raise ValueError(f"{file}: captions of image {sorted(map(str, unknown))[0]}, which is not among its images")
    folder = re.sub(r"^captions_", "", file.stem)
    for image in document["images"]:
        texts = tuple(text for _, text in sorted(captions.get(image["id"], {}).items()))
        about = (str(image["id"]), image["file_name"], split, texts, ("", split, folder))
        yield _Entry(*about, size=_size_of(image))


def _size_of(image: Mapping[str, Any]) -> tuple[int, int]:
    """Width and height of a picture of COCO's; (0, 0) where they are not said."""
    width, height = (image.get(side) for side in ("width", "height"))
    if isinstance(width, int) and isinstance(height, int) and 0 < min(width, height) <= max(width, height) < 1 << 31:
        return width, height
    return 0, 0


def _karpathy(document: dict[str, Any]) -> Iterator[_Entry]:
    """Karpathy: COCO pictures by their COCO id, others (Flickr) by file name without suffix."""
    for image in document["images"]:
        image_id = str(image["cocoid"]) if "cocoid" in image else PurePosixPath(image["filename"]).stem
        file_name = str(PurePosixPath(image.get("filepath", "")) / image["filename"])
        yield _Entry(image_id, file_name, image["split"], tuple(sentence["raw"] for sentence in image["sentences"]))


def _flickr(text: str, file: Path, split: str, lists: Mapping[str, str]) -> Iterator[_Entry]:
    """Token file: lines `NAME.jpg#NUMBER<tab>CAPTION`; a picture in no split list is not part of the data set."""
    captions: dict[str, dict[int, str]] = {}
    for number, line in enumerate(text.split("\n"), start=1):
        match = re.fullmatch(r"([^\t#]+)#(\d+)\t(.*)", line.removesuffix("\r"))
        if match:
            captions.setdefault(match[1], {}).setdefault(int(match[2]), match[3])
        elif line.strip():
            raise ValueError(f"{file}, line {number}: expected NAME#NUMBER<tab>CAPTION, found {line[:60]!r}")
    absent = sorted(lists.keys() - captions.keys())
    if absent:
        raise ValueError(f"{file}: no captions of {absent[0]}, which a split list names ({len(absent)} such pictures)")
    for name, texts in captions.items():
        if not lists or name in lists:
            ordered = tuple(caption for _, caption in sorted(texts.items()))
            yield _Entry(PurePosixPath(name).stem, name, lists.get(name, split or "train"), ordered)


def _read_split_lists(split_lists: Sequence[str]) -> dict[str, str]:
    """File name -> split, from `SPLIT=FILE` lists with one file name a line."""
    found: dict[str, str] = {}
    for item in split_lists:
        split, file = _split_and_file(item)
        if not split or not file.is_file():
            raise ValueError(f"split list {item!r}: expected SPLIT=FILE with an existing file")
        for name in filter(None, map(str.strip, file.read_text(encoding="utf-8").splitlines())):
            if found.setdefault(name, split) != split:
                raise ValueError(f"{file}: {name} is in the splits {found[name]} and {split}")
    return found


def _merge(entries: Iterable[_Entry], notes: Counter[str]) -> list[_Entry]:
    """One entry per image id: equal ones are merged; ValueError for an id with two pictures or two splits."""
    merged: dict[str, _Entry] = {}
    for entry in entries:
        if not _SPLIT.fullmatch(entry.split):
            raise ValueError(f"image {entry.image_id}: the split {entry.split!r} may have letters, digits and _ only")
        if _HALF_PAIR.search(entry.image_id + entry.file_name):
            raise ValueError(f"image {entry.image_id!a}: id and file name {entry.file_name!a} must be Unicode text")
        path = PurePosixPath(entry.file_name)
        if path.is_absolute() or ".." in path.parts or "\x00" in entry.file_name or not entry.file_name:
            raise ValueError(f"image {entry.image_id}: file name {entry.file_name!r} points outside the image root")
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
        merged[entry.image_id] = replace(first, captions=first.captions + new)
    return list(merged.values())


def _split_by_hash(entries: list[_Entry], fraction: float) -> list[_Entry]:
    """Move the share `fraction` of the pictures with the smallest hash of their id from train to val."""
    if not 0 < fraction < 1 or {entry.split for entry in entries} != {"train"}:
        raise ValueError("--val-fraction needs a share between 0 and 1 and annotations of the split train alone")
    ranked = sorted(
        entries, key=lambda entry: (xxhash.xxh3_64_intdigest(f"val/{entry.image_id}".encode()), entry.image_id)
    )
    count = round(fraction * len(entries))
    return [replace(entry, split="val") for entry in ranked[:count]] + ranked[count:]


def _find_files(entries: list[_Entry], root: Path) -> tuple[list[_Entry], list[LeftOut]]:
    """Complete file names by the first of their folders that has the file; pictures without a file are left out."""
    if not root.is_dir():
        raise ValueError(f"{root}: no such image folder")

    def find(entry: _Entry) -> _Entry | LeftOut:
        for folder in entry.folders:
            name = str(PurePosixPath(folder) / entry.file_name)
            try:
                about = (root / name).stat()
            except (FileNotFoundError, NotADirectoryError):  # another error may pass, so it ends the job
                continue
            if stat.S_ISREG(about.st_mode):
                return replace(entry, file_name=name, file_bytes=about.st_size)
        return LeftOut(entry.image_id, entry.file_name, "no such file")

    with ThreadPoolExecutor(16) as pool:  # a look-up is a round trip on a network file system
        found = list(pool.map(find, entries, chunksize=256))
    return [e for e in found if isinstance(e, _Entry)], [e for e in found if isinstance(e, LeftOut)]


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
