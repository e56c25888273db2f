"""What lies in somebody's folder: which files are captions, which lists of splits, and what was passed over and why."""

import os
import re
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from preprocessing.annotations.entry import PICTURES, Source, split_named
from preprocessing.annotations.folder import walk
from preprocessing.annotations.formats import AUTO, FORMATS, recognise
from sat import files

SUFFIXES = (".json", ".jsonl", ".ndjson", ".csv", ".tsv", ".txt", ".token", ".parquet", ".tar", ".tar.gz", ".tgz")
"""Of files that may be annotations."""
CHOICE = (
    *("karpathy", "coco", "textcaps", "list", "jsonl", "dict", "flickr", "table", "webdataset", "parquet"),
    *("image_info", "folder"),
)
"""Of several formats in a folder the first is taken: those that name their splits before those that do not."""
_SAID = 8
"""Files named of those that are used, and of those that are not."""


@dataclass(frozen=True)
class Found:
    """What is read, and what is told of it."""

    annotations: tuple[str, ...]
    """`FILE` or `SPLIT=FILE`."""
    split_lists: tuple[str, ...]
    """`SPLIT=FILE`."""
    format: str
    said: tuple[str, ...]
    """A line for everything found."""


def discover(data: Path, format: str = AUTO) -> Found:
    """The annotations of a folder, or the one file that `data` is.

    Where several formats are found, one is taken and the others are said; without any the folder's pictures are.
    Raises ValueError, naming what was looked for, where there is nothing to read.
    """
    if not data.exists():
        raise ValueError(f"{data}: no such file or folder")
    if data.is_file():
        name, reason = recognise(Source(data)) if format == AUTO else (format, "you say so")
        return Found((str(data),), (), name, (f"{data}: taken for {name}, because {reason}",))
    by_format: dict[str, list[Path]] = defaultdict(list)
    lists: list[Path] = []
    passed: list[str] = []
    for path in _candidates(data):
        try:
            by_format[recognise(Source(path))[0] if format == AUTO else format].append(path)
        except ValueError as error:
            if _is_split_list(path):
                lists.append(path)
            else:
                passed.append(f"{path} ({_short(str(error).removeprefix(f'{path}: '))})")
    name = next((name for name in CHOICE if name in by_format and name != "folder"), "")
    if name == "":
        said = [f"not used: {each}" for each in passed[:_SAID]]
        reason = recognise(Source(data))[1] if format in (AUTO, "folder") else ""
        return Found((str(data),), (), "folder", (*said, f"{data}: taken for a folder, because {reason}"))
    taken = _without_copies(by_format.pop(name))
    passed += [f"{path} ({other})" for other, paths in by_format.items() for path in paths]
    named = [(path, _split_of(path, data) if len(taken) > 1 else "") for path in taken]
    said = [
        f"{path}: taken for {name} ({FORMATS[name].what}){f', split {s}' if s else ''}" for path, s in named[:_SAID]
    ]
    said += [f"and {len(named) - _SAID} further files of that format"] * (len(named) > _SAID)
    said += [f"{path}: a list of the split {_split_of(path, data)}" for path in lists]
    said += [f"not used: {each}; name it with --annotations if it should be" for each in passed[:_SAID]]
    said += [f"not used: {len(passed) - _SAID} further files"] * (len(passed) > _SAID)
    return Found(
        tuple(f"{split}={path}" if split else str(path) for path, split in named),
        tuple(f"{_split_of(path, data)}={path}" for path in lists),
        name,
        tuple(said),
    )


def _candidates(data: Path) -> list[Path]:
    """Files that may be annotations, in order; a text beside a picture of its name belongs to that."""
    found = []
    for folder, names in walk(data):
        stems = {os.path.splitext(name)[0] for name in names if os.path.splitext(name)[1].lower() in PICTURES}
        for name in names:
            beside = name.lower().endswith((".txt", ".json")) and os.path.splitext(name)[0] in stems
            if name.lower().endswith(SUFFIXES) and not beside and "lemma" not in name.lower():
                found.append(data / folder / name)
    return found


def _split_of(path: Path, data: Path) -> str:
    """The split that a file's name stands for, or that of a folder it is in; empty where none or several do."""
    for part in reversed(PurePosixPath(os.path.relpath(path, data)).parts):
        words = re.findall(r"[A-Z]?[a-z]+", part.split(".json")[0])
        splits = {split for split in map(split_named, words) if split}
        if splits:
            return splits.pop() if len(splits) == 1 else ""
    return ""


def _is_split_list(path: Path) -> bool:
    """A text with a picture's name on every line, whose own name stands for a split."""
    if path.suffix.lower() != ".txt" or not _split_of(path, path.parent):
        return False
    try:
        lines = [line.strip() for line in Source(path).text.splitlines() if line.strip()]
    except ValueError:
        return False
    return bool(lines) and all(PurePosixPath(line).suffix.lower() in PICTURES for line in lines)


def _without_copies(paths: list[Path]) -> list[Path]:
    """Of files of one content the first."""
    sizes: dict[int, list[Path]] = defaultdict(list)
    for path in paths:
        sizes[path.stat().st_size].append(path)
    kept: set[Path] = set()
    for group in sizes.values():
        firsts: dict[str, Path] = {}
        for path in group:
            firsts.setdefault(files.sha256(path) if len(group) > 1 else "", path)
        kept |= set(firsts.values())
    return [path for path in paths if path in kept]


def _short(text: str) -> str:
    return text if len(text) <= 80 else text[:77] + "..."
