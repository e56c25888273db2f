"""Features of other people's making, in the layouts they come in, and annotations without a single picture."""

import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from preprocessing.annotations.read import read_annotations
from preprocessing.import_features import finalize_import, import_stripe
from preprocessing.importing.plan import ImportOptions, import_settings, plan_import
from sat.shards.manifest import Manifest
from tests.helpers_shards import self_describing_captions

WIDTH, HEIGHT, D = 64, 48, 8


def write_annotations(root: Path, splits: Mapping[str, int] = {"train": 12, "val": 5}) -> dict[str, Path]:
    """COCO's files of pictures that are nowhere: picture I of split S has id 100 S + I and the name SPLIT/000ID.jpg."""
    files = {}
    for place, (split, count) in enumerate(splits.items(), start=1):
        images, annotations = [], []
        for index in range(count):
            number = 100 * place + index
            about = {"id": number, "file_name": f"{split}/{number:06d}.jpg", "width": WIDTH, "height": HEIGHT}
            images.append(about)
            for text in self_describing_captions(split, index):
                annotations.append({"id": len(annotations), "image_id": number, "caption": text})
        files[split] = root / f"captions_{split}.json"
        files[split].write_text(json.dumps({"images": images, "annotations": annotations}))
    return files


def ids_of(files: dict[str, Path]) -> list[tuple[int, str]]:
    """(id, file name without suffix) of every picture."""
    found = [image for path in files.values() for image in json.loads(path.read_text())["images"]]
    return [(image["id"], image["file_name"].removesuffix(".jpg")) for image in found]


def values_of(number: int, rows: int = 4) -> np.ndarray:
    """The float32 features [rows, D] of a picture."""
    return np.random.default_rng(number).standard_normal((rows, D)).astype(np.float32)


def boxes_of(number: int, rows: int) -> np.ndarray:
    """Boxes float32 [rows, 4] of a picture, in 0..1."""
    corners = np.random.default_rng([number, 1]).random((rows, 2, 2))
    return np.concatenate([corners.min(1), corners.max(1)], 1).astype(np.float32)


def regions_of(number: int) -> int:
    """How many regions a picture has: 1 to 5."""
    return 1 + number % 5


def run_import(
    files: dict[str, Path],
    features: Path,
    out: Path,
    max_bad_fraction: float = 0.0,
    boxes: Path | None = None,
    **options,
) -> Manifest:
    """The whole job in this process."""
    records = read_annotations([f"{split}={path}" for split, path in files.items()])
    settings, chosen = import_settings(features, boxes), ImportOptions(**{"dtype": "fp32"} | options)
    plan = plan_import(records, settings, out, chosen, max_bad_fraction=max_bad_fraction)
    import_stripe(plan, max_bad_fraction=max_bad_fraction)
    return finalize_import(plan, max_bad_fraction)


def make_region_dataset(root: Path, splits: Mapping[str, int] = {"train": 12, "val": 5}, **options) -> Manifest:
    """A finished data set of regions with boxes in ROOT/data, imported from ROOT/npz."""
    root.mkdir(parents=True, exist_ok=True)
    files = write_annotations(root, splits)
    folder = root / "npz"
    folder.mkdir()
    for number, _ in ids_of(files):
        rows = regions_of(number)
        pixels = boxes_of(number, rows) * [WIDTH, HEIGHT, WIDTH, HEIGHT]
        np.savez(folder / f"{number}.npz", feat=values_of(number, rows), bbox=pixels.astype(np.float32))
    return run_import(files, folder, root / "data", **{"max_regions": 5, "shard_size": 5} | options)
