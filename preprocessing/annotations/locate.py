"""Find each picture's file below the image root: as it is named, else by rule.

Lists travel further than pictures. What is found although the list says otherwise: another folder (Karpathy's
val2014/), COCO's names of 2014 (`COCO_val2014_000000000042.jpg`) and of 2017 (`000000000042.jpg`) for each other,
Windows separators, another case or composition of letters, another or no suffix. Never a guess between two files.
"""

import os
import re
import stat
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import cached_property
from itertools import takewhile
from pathlib import Path, PurePosixPath

from preprocessing.annotations.entry import PICTURES, Entry
from preprocessing.annotations.folder import pictures_below
from sat.shards.schema import LeftOut

FOUND_ELSEWHERE = "pictures found under another name or folder"
NO_FILE = "no such file"
_YEAR = re.compile(r"^coco_(?:train|val|test)20\d\d_")


def find_files(entries: Sequence[Entry], root: Path, notes: Counter[str]) -> list[Entry | LeftOut]:
    """Each entry with the name of its file below `root` and its size, or why there is none, in their order.

    Raises ValueError where `root` is no folder, OSError for what cannot be looked at.
    """
    if not root.is_dir():
        raise ValueError(f"{root}: no such image folder")
    with ThreadPoolExecutor(16) as pool:  # a look-up is a round trip on a network file system
        exact = list(pool.map(lambda entry: _as_named(entry, root), entries, chunksize=256))
    by_rule = ByRule(root)
    return [
        found if found is not None else by_rule.find(entry, notes) for entry, found in zip(entries, exact, strict=True)
    ]


def _as_named(entry: Entry, root: Path) -> Entry | None:
    for folder in entry.folders:
        name = str(PurePosixPath(folder) / entry.file_name)
        size = _size(root / name)
        if size is not None:
            return replace(entry, file_name=name, file_bytes=size)
    return None


def _size(path: Path) -> int | None:
    """Bytes of a plain file; None where there is none."""
    try:
        about = path.stat()
    except (FileNotFoundError, NotADirectoryError):  # another error may pass, so it ends the job
        return None
    except OSError as error:
        if error.errno == 36:  # a name too long for any file
            return None
        raise
    return about.st_size if stat.S_ISREG(about.st_mode) else None


class ByRule:
    """All pictures below a folder by what their names have in common with what others call them."""

    def __init__(self, root: Path):
        self.root = root

    def find(self, entry: Entry, notes: Counter[str]) -> Entry | LeftOut:
        """The entry with the one file that is meant, or why there is none."""
        wanted = PurePosixPath(entry.file_name.replace("\\", "/"))
        candidates = self._by_name.get(plain(wanted.name)) or self._by_stem.get(plain(_stem(wanted.name)), [])
        nearest = _nearest(candidates, wanted, entry.folders)
        if len(nearest) > 1:
            detail = f"{nearest[0]} or {nearest[1]}"
            return LeftOut(entry.image_id, entry.file_name, "several files could be meant", detail)
        size = _size(self.root / nearest[0]) if nearest else None
        if size is None:
            return LeftOut(entry.image_id, entry.file_name, NO_FILE)
        notes[FOUND_ELSEWHERE] += 1
        return replace(entry, file_name=nearest[0], file_bytes=size)

    @cached_property
    def _by_name(self) -> dict[str, list[str]]:
        found: defaultdict[str, list[str]] = defaultdict(list)
        for name in pictures_below(self.root):
            found[plain(PurePosixPath(name).name)].append(name)
        return dict(found)

    @cached_property
    def _by_stem(self) -> dict[str, list[str]]:
        found: defaultdict[str, list[str]] = defaultdict(list)
        for name, paths in self._by_name.items():
            found[_stem(name)] += paths
        return dict(found)


def plain(name: str) -> str:
    """What all spellings of a file's name have in common."""
    return _YEAR.sub("", unicodedata.normalize("NFC", name).casefold())


def _stem(name: str) -> str:
    """Without the suffix of a picture; other dots belong to the name."""
    stem, suffix = os.path.splitext(name)
    return stem if suffix.lower() in PICTURES else name


def _nearest(candidates: Sequence[str], wanted: PurePosixPath, folders: Sequence[str]) -> list[str]:
    """Of several files those with most folders in common with the wanted name, counted from its end."""
    if len(candidates) < 2:
        return list(candidates)
    wishes = [[plain(part) for part in (PurePosixPath(folder) / wanted).parent.parts] for folder in folders]

    def common(candidate: str) -> int:
        parts = [plain(part) for part in PurePosixPath(candidate).parent.parts]
        return max(
            sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(parts[::-1], wish[::-1], strict=False)))
            for wish in wishes
        )

    best = max(map(common, candidates))
    return [candidate for candidate in candidates if common(candidate) == best]
