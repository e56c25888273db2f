"""Which split a picture belongs to: by lists of file names, by a hash of its id; and no picture lies in two.

The surprising decision: what counts as the same picture is the content of its file, not its name or id. A picture of
the test split that is also learnt from under another name would raise the scores and nobody would see it.
"""

import os
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path, PurePosixPath

import xxhash

from preprocessing.annotations.entry import Entry, Source
from sat.shards.schema import LeftOut

SAME_PICTURE = "the same picture is in another split"
HoldOut = Callable[[int, frozenset[str]], tuple[int, int]]
"""(pictures of the split train, the splits there are) -> how many of them become val and test."""
_GLANCE = 4096
"""Bytes from the middle of a file by which most different files of one size are told apart."""


def read_split_lists(lists: Iterable[tuple[str, Path]]) -> dict[str, str]:
    """File name -> split, from lists with one file name a line. ValueError for a name in two, or as `Source.text`."""
    found: dict[str, str] = {}
    for split, path in lists:
        for name in filter(None, map(str.strip, Source(path).text.splitlines())):
            if found.setdefault(name, split) != split:
                raise ValueError(f"{path}: {name} is in the splits {found[name]} and {split}")
    return found


def by_lists(entries: Sequence[Entry], lists: dict[str, str], path: Path) -> list[Entry]:
    """The entries that a list names, in its split; one in no list is not part of the data set.

    A list names files, with or without their folder or suffix. ValueError for a name that `path` has no captions of.
    """
    if not lists:
        return list(entries)
    used, kept = set(), []
    for entry in entries:
        file = PurePosixPath(entry.file_name)
        name = next((name for name in (entry.file_name, file.name, file.stem) if name in lists), None)
        if name is not None:
            used.add(name)
            kept.append(replace(entry, split=lists[name]))
    if absent := sorted(lists.keys() - used):
        raise ValueError(f"{path}: no captions of {absent[0]}, which a split list names ({len(absent)} such pictures)")
    return kept


def divide(entries: Sequence[Entry], same: Sequence[Sequence[int]], hold_out: HoldOut) -> list[Entry]:
    """Move pictures of `train` to `val` and `test`, as many as `hold_out` says, by a hash of their ids.

    `same`: places of equal pictures, which move together. The same ids give the same splits whatever their order.
    """
    places = [place for place, entry in enumerate(entries) if entry.split == "train"]
    val, test = hold_out(len(places), frozenset(entry.split for entry in entries))
    group_of = {place: tuple(group) for group in same for place in group}
    groups = {tuple(p for p in group_of.get(place, (place,)) if entries[p].split == "train") for place in places}

    def rank(group: tuple[int, ...]) -> tuple[int, str]:
        image_id = min(entries[place].image_id for place in group)
        return xxhash.xxh3_64_intdigest(f"val/{image_id}".encode()), image_id

    divided, wanted = list(entries), {"val": val, "test": test}
    for group in sorted(groups, key=rank):
        split = next((split for split, count in wanted.items() if count >= len(group)), None)
        if split is not None:
            wanted[split] -= len(group)
            for place in group:
                divided[place] = replace(entries[place], split=split)
    return divided


def same_pictures(entries: Sequence[Entry], root: Path | None) -> list[list[int]]:
    """Places of entries that have one file, or below `root` files of the same content; groups of two and more."""
    places: dict[str, list[int]] = defaultdict(list)
    for place, entry in enumerate(entries):
        places[entry.file_name].append(place)
    if root is None:
        return [group for group in places.values() if len(group) > 1]
    sizes: dict[int, list[str]] = defaultdict(list)
    for name, group in places.items():
        sizes[entries[group[0]].file_bytes].append(name)
    doubtful = [(str(size), names) for size, names in sizes.items() if len(names) > 1 and size > 0]
    for look in (_glance, _digest):
        doubtful = _divided_by(look, doubtful, root)
    equal = {name: names for _, names in doubtful for name in names}
    groups = {tuple(sorted(p for n in equal.get(name, [name]) for p in places[n])) for name in places}
    return [list(group) for group in sorted(groups) if len(group) > 1]


def _divided_by(
    look: Callable[[Path], str], doubtful: Sequence[tuple[str, list[str]]], root: Path
) -> list[tuple[str, list[str]]]:
    """Groups of file names, divided by what a look into the files gives; lone ones are dropped."""
    names = [(about, name) for about, group in doubtful for name in group]
    with ThreadPoolExecutor(16) as pool:
        seen = list(pool.map(lambda each: look(root / each[1]), names, chunksize=64))
    found: dict[str, list[str]] = defaultdict(list)
    for (about, name), digest in zip(names, seen, strict=True):
        found[f"{about}/{digest}"].append(name)
    return [(about, group) for about, group in found.items() if len(group) > 1]


def _glance(path: Path) -> str:
    with open(path, "rb") as file:
        file.seek(os.fstat(file.fileno()).st_size // 2)
        return xxhash.xxh3_128_hexdigest(file.read(_GLANCE))


def _digest(path: Path) -> str:
    digest = xxhash.xxh3_128()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def in_one_split(entries: Sequence[Entry], same: Sequence[Sequence[int]]) -> tuple[list[Entry], list[LeftOut]]:
    """Leave out every picture that is also in a split nearer to the test: test, val, others, restval, train."""
    left_out: dict[int, LeftOut] = {}
    for group in same:
        keeper = min(group, key=lambda place: (_rank(entries[place].split), place))
        for place in group:
            entry, kept = entries[place], entries[keeper]
            if entry.split != kept.split:
                detail = f"{kept.file_name} of image {kept.image_id} is in {kept.split}"
                left_out[place] = LeftOut(entry.image_id, entry.file_name, SAME_PICTURE, detail)
    kept_entries = [entry for place, entry in enumerate(entries) if place not in left_out]
    return kept_entries, list(left_out.values())


def _rank(split: str) -> tuple[int, str]:
    order = {"test": 0, "val": 1, "dev": 1, "restval": 3, "train": 4}
    return order.get(split, 2), split
