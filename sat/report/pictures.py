"""A split's picture files by image id: from image shards, from a folder of files, and what the encoder saw of one."""

from collections.abc import Callable, Collection
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from PIL import Image

from sat.data.reader import SampleReader
from sat.draw import find_pictures
from sat.shards.features import FeatureSpec
from sat.shards.manifest import Manifest, load_manifest
from sat.shards.pictures import fit
from sat.shards.schema import MANIFEST
from sat.shards.store import make_store


@dataclass(frozen=True)
class Source:
    """Where one picture is."""

    name: str
    read: Callable[[], bytes]
    """The file's bytes."""


def find_sources(pictures: str, data: str, split: str, image_ids: Collection[str]) -> dict[str, Source]:
    """The pictures by image id, of those that are found.

    `pictures`: a folder of picture files, or image shards; empty: the shards that the data set `data` was made of, if
    they lie beside it. Raises ValueError, saying what to give, where there are none.
    """
    if not pictures:
        return _of_shards(_shards_of(data), split, image_ids)
    if (Path(pictures) / MANIFEST).is_file() or "://" in pictures:
        manifest = load_manifest(pictures)
        if manifest.kind != "images":
            raise ValueError(f"{pictures} holds {manifest.kind}; --pictures takes image shards or picture files")
        found = _of_shards(manifest, split, image_ids)
    else:
        files = find_pictures(Path(pictures), image_ids)
        found = {image: Source(path.name, path.read_bytes) for image, path in files.items()}
    if image_ids and not found:
        raise ValueError(f"{pictures} holds no picture whose name is an image id of split {split!r}")
    return found


def seen_by_encoder(picture: Image.Image, features: FeatureSpec | None) -> Image.Image:
    """What the encoder saw of it; where that is not known, or regions came from elsewhere, the whole picture."""
    transform = features.transform if features else None
    if transform is None or (features and features.kind != "grid"):
        return picture
    return Image.fromarray(fit(picture, transform.size, transform.geometry, transform.interpolation))


def _shards_of(data: str) -> Manifest:
    """The image shards that a data set is or was made of."""
    if not data:
        raise ValueError("the run does not say which pictures it saw; give --pictures FOLDER")
    manifest = load_manifest(data)
    if manifest.kind == "images":
        return manifest
    for path in sorted(Path(data).resolve().parent.glob(f"*/{MANIFEST}")):
        other = load_manifest(path.parent)
        if other.kind == "images" and other.digest == manifest.fingerprint.get("source"):
            return other
    raise ValueError(f"the image shards that {data} was made of do not lie beside it; give --pictures FOLDER")


def _picture_of(reader: SampleReader, shard: int, row: int) -> bytes:
    return reader.read_picture(shard, row)[1]


def _of_shards(manifest: Manifest, split: str, image_ids: Collection[str]) -> dict[str, Source]:
    reader = SampleReader(manifest, make_store(manifest.root))
    shards = manifest.shards.of_split(split) if split in manifest.splits else range(len(manifest.shards))
    wanted, found = set(image_ids), dict[str, Source]()
    for shard in shards:
        for row, image in enumerate(reader.rows(shard).image_ids):
            if image in wanted:
                found[image] = Source(image, partial(_picture_of, reader, shard, row))
    return found
