"""Where features from elsewhere lie, and what is found there of a picture.

    DIR/NAME.npy                [L, D] or [H, W, D]
    DIR/NAME.npz                `feat` [L, D] and `bbox` [L, 4], or one of the other names that releases use
    FILE.h5                     a dataset NAME, or NAME_features beside NAME_boxes, or a group NAME of such arrays

NAME is the picture's file name without suffix (with its folders, or without), or its image id: the bottom-up releases
name files by COCO's ids.
"""

import math
import os
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path, PurePosixPath
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from preprocessing.importing.arrays import MAX_BYTES, NUMBERS, BadFeatures, Npz, read_npy
from preprocessing.sharding.plan import ImageRecord
from sat.shards.location import read_retrying
from sat.shards.retry import Result, io_error

FEATURES = ("feat", "features", "x", "feature", "feats", "att")
"""Names of the features in an npz file or an HDF5 group: of the bottom-up releases, of the 36-fixed ones, of others."""
BOXES = ("bbox", "boxes", "bboxes", "box")
COUNTS = ("num_bbox", "num_boxes")
"""How many of the rows are real, where a release pads them."""
SIDES = (("image_w", "image_h"), ("img_w", "img_h"), ("width", "height"))
HDF5 = (".h5", ".hdf5")
SUFFIXES = ("", "_features", "_grids")
"""What may follow the name in an HDF5 file of many pictures."""
_ERRNO = re.compile(r"errno = (\d+)")


@dataclass(frozen=True)
class Found:
    """What is found of one picture; nothing is checked yet."""

    features: npt.NDArray[Any]
    boxes: npt.NDArray[Any] | None = None
    count: int | None = None
    """Rows that are real."""
    size: tuple[int, int] = (0, 0)
    """Width and height of the picture that the boxes are of; (0, 0) where it is not said."""


@dataclass(frozen=True)
class Place:
    """Where a picture's features are, and how many bytes they are."""

    name: str
    """A file's path, or a name in the HDF5 file."""
    bytes: int


class Source(Protocol):
    """Files in a folder, or one HDF5 file."""

    def find(self, record: ImageRecord) -> Place | None:
        """Where the features of a picture are; None where there are none."""

    def read(self, place: Place) -> Found:
        """Raises BadFeatures for what cannot be read, OSError where storage fails."""

    def files_of(self, place: Place) -> tuple[Path, ...]:
        """The files that `read` reads."""


@lru_cache(maxsize=4)
def open_source(features: str, boxes: str = "") -> Source:
    """The folder or HDF5 file, with a folder of boxes beside it. Raises ValueError where it is not there."""
    if boxes and not Path(boxes).is_dir():
        raise ValueError(f"{boxes}: no such folder of boxes")
    if Path(features).is_dir():
        return Folder(Path(features), Path(boxes) if boxes else None)
    if not Path(features).is_file():
        raise ValueError(f"{features}: no such folder of features, nor HDF5 file")
    if Path(features).suffix not in HDF5:
        raise ValueError(f"{features}: expected a folder of npy or npz files, or a file {' or '.join(HDF5)}")
    return HierarchicalFile(Path(features), Path(boxes) if boxes else None)


def names_of(record: ImageRecord) -> list[str]:
    """The names that a picture's features may have, the most exact first."""
    path = PurePosixPath(record.file_name)
    ids = [record.image_id] if "/" not in record.image_id and record.image_id not in ("", ".", "..") else []
    return list(dict.fromkeys([str(path.with_suffix("")), path.stem, *ids]))


def _first_file(folder: Path, record: ImageRecord, suffixes: tuple[str, ...]) -> Place | None:
    for name in names_of(record):
        for suffix in suffixes:
            path = folder / f"{name}{suffix}"
            try:
                about = path.stat()
            except (FileNotFoundError, NotADirectoryError):  # another error may pass, so it ends the job
                continue
            return Place(str(path), about.st_size)
    return None


def _read_file(place: Place) -> bytes:
    if place.bytes > MAX_BYTES:
        raise BadFeatures("file too large", f"{place.bytes} bytes")
    try:
        path = Path(place.name)
        blob = read_retrying(str(path.parent), path.name, path.read_bytes)
    except IsADirectoryError:
        raise BadFeatures("not a file", place.name) from None
    if len(blob) != place.bytes:
        raise ValueError(f"{place.name} is not {place.bytes} bytes long as it was; let nobody write to it meanwhile")
    return blob


def _with_boxes(found: Found, folder: Path | None, features: str) -> Found:
    """`found` with the boxes of the folder, under the name that its `features` have, where it has none of its own."""
    if folder is None or found.boxes is not None:
        return found
    for path in _boxes_of(folder, features):
        blob = read_retrying(str(path.parent), path.name, path.read_bytes)
        return Found(found.features, read_npy(blob), found.count, found.size)
    return found


def _boxes_of(folder: Path | None, features: str) -> tuple[Path, ...]:
    """The file of boxes of that name; none where there is none."""
    names = dict.fromkeys([features, PurePosixPath(features).name]) if folder is not None else ()
    paths = (folder / f"{name}.npy" for name in names if folder is not None)
    return tuple(path for path in paths if path.is_file())[:1]


@dataclass(frozen=True)
class Folder:
    """A file for each picture."""

    root: Path
    boxes: Path | None

    def find(self, record: ImageRecord) -> Place | None:
        return _first_file(self.root, record, (".npy", ".npz"))

    def read(self, place: Place) -> Found:
        blob = _read_file(place)
        zipped = place.name.endswith(".npz")
        found = _from_names(Npz(blob), Npz.__getitem__) if zipped else Found(read_npy(blob))
        return _with_boxes(found, self.boxes, self._name(place))

    def files_of(self, place: Place) -> tuple[Path, ...]:
        return Path(place.name), *_boxes_of(self.boxes, self._name(place))

    def _name(self, place: Place) -> str:
        return os.path.relpath(place.name, self.root).rpartition(".")[0]


class HierarchicalFile:
    """One HDF5 file for all pictures, read through h5py; opened in the process that reads it."""

    def __init__(self, path: Path, boxes: Path | None):
        """Raises ValueError where it is no HDF5 file, or h5py is not installed."""
        try:
            import h5py
        except ImportError:
            raise ValueError(f"{path}: reading HDF5 files needs the package h5py; pip install h5py") from None
        try:
            self._file = h5py.File(path, "r")
        except OSError as error:
            raise ValueError(f"{path}: no whole HDF5 file ({error})") from None
        self.path, self.boxes = path, boxes

    def find(self, record: ImageRecord) -> Place | None:
        return self._retrying(partial(self._find, record))

    def _retrying(self, operation: Callable[[], Result]) -> Result:
        """The result; where HDF5 looks for a name, only its words say that storage failed."""

        def attempt() -> Result:
            try:
                return operation()
            except (KeyError, RuntimeError) as error:
                number = _ERRNO.search(str(error))
                if number is None:
                    raise
                raise OSError(int(number[1]), os.strerror(int(number[1])), str(self.path)) from None

        return read_retrying(str(self.path.parent), self.path.name, attempt)

    def _find(self, record: ImageRecord) -> Place | None:
        names = (f"{name}{suffix}" for name in names_of(record) for suffix in SUFFIXES)
        for name in names:
            if name in self._file:
                here = self._file[name]
                parts = here.values() if hasattr(here, "values") else [here]
                return Place(name, sum(int(part.nbytes) for part in parts if hasattr(part, "nbytes")))
        return None

    def read(self, place: Place) -> Found:
        return self._retrying(partial(self._read, place))

    def _read(self, place: Place) -> Found:
        here, name = self._file[place.name], self._name(place)
        if hasattr(here, "keys"):
            found = _from_names(here, lambda group, part: _dataset(group[part], f"{place.name}/{part}"))
        else:
            beside = next((f"{name}_{each}" for each in BOXES if f"{name}_{each}" in self._file), None)
            boxes = None if beside is None else _dataset(self._file[beside], beside)
            found = Found(_dataset(here, place.name), boxes)
        return _with_boxes(found, self.boxes, name)

    def files_of(self, place: Place) -> tuple[Path, ...]:
        return self.path, *_boxes_of(self.boxes, self._name(place))

    def _name(self, place: Place) -> str:
        return next(place.name.removesuffix(suffix) for suffix in (*SUFFIXES[1:], "") if place.name.endswith(suffix))


def _dataset(dataset: Any, name: str) -> npt.NDArray[Any]:
    """The array. Raises BadFeatures for another one, and for a damaged one; OSError where storage failed."""
    if not hasattr(dataset, "dtype") or dataset.dtype.kind not in NUMBERS:
        raise BadFeatures("not numbers", f"{name} in the HDF5 file")
    if dataset.nbytes > MAX_BYTES:
        raise BadFeatures("file too large", f"{name}: {dataset.nbytes} bytes")
    try:
        return np.asarray(dataset[()])
    except OSError as error:
        if io_error(error):
            raise
        # a filter or checksum of HDF5's own
        raise BadFeatures("damaged", f"{name}: {error}") from None


def _from_names(arrays: Any, get: Callable[[Any, str], npt.NDArray[Any]]) -> Found:
    """What an npz file or a group holds, by the names that releases use."""

    def first(names: tuple[str, ...]) -> npt.NDArray[Any] | None:
        return next((get(arrays, name) for name in names if name in arrays), None)

    features = first(FEATURES)
    if features is None:
        raise BadFeatures("no features in it", f"none of the arrays {', '.join(FEATURES)}")
    sides = next((pair for pair in SIDES if all(side in arrays for side in pair)), None)
    size = (0, 0) if sides is None else tuple(_whole(get(arrays, side)) or 0 for side in sides)
    return Found(features, first(BOXES), _whole(first(COUNTS)), (size[0], size[1]))


def _whole(array: npt.NDArray[Any] | None) -> int | None:
    """A whole number that was stored as an array, None where it is none."""
    if array is None or array.size != 1:
        return None
    number = float(array.reshape(()))
    return int(number) if math.isfinite(number) and number >= 0 else None


def places_of(source: Source, records: tuple[ImageRecord, ...]) -> Iterator[Place | None]:
    """Where the features of each record are; of a folder with many look-ups under way, for network file systems."""
    if not isinstance(source, Folder):
        yield from map(source.find, records)
        return
    from concurrent.futures import ThreadPoolExecutor

    with ThreadPoolExecutor(16) as pool:
        yield from pool.map(source.find, records, chunksize=256)
