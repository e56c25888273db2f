"""Tiny real data sets for tests, written by the real writer, without an encoder or pictures of anybody."""

import io
import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from preprocessing.features.statistics import ChannelSums, merge_statistics, restore, store
from preprocessing.sharding.finalize import finalize
from preprocessing.sharding.ownership import publish_plan
from preprocessing.sharding.plan import FeatureSettings, ImageRecord, Plan, PlannedShard
from preprocessing.sharding.write import Sample, write_shard
from sat.data.batch import CaptionBatch
from sat.data.loader import Reading, training_batches
from sat.data.options import LoaderOptions
from sat.data.plan import Cursor, Share
from sat.shards.features import FeatureSpec
from sat.shards.manifest import Manifest

REPOSITORY = Path(__file__).parents[1]
WORDS = ["red", "blue", "green", "big", "small", "circle", "square", "star", "left", "right", "above", "below"]


def self_describing_captions(split: str, index: int) -> list[str]:
    """Five captions of three to seven words that differ between images: `split`, the index in letters, then words."""
    name = "".join("abcdefghij"[int(digit)] for digit in str(index))
    return [f"{split} {name} " + " ".join(WORDS[(index + k) % len(WORDS)] for k in range(1 + j)) for j in range(5)]


def grid_of(split: str, index: int, cells: int, dim: int) -> np.ndarray:
    """The float32 grid [L, D] of an image, a function of its identity alone."""
    return np.random.default_rng([index, *split.encode()]).standard_normal((cells, dim)).astype(np.float32)


def make_feature_dataset(
    root: Path,
    splits: Mapping[str, int] = {"train": 20, "val": 6},
    grid: tuple[int, int] = (2, 2),
    dim: int = 8,
    dtype: str = "fp16",
    captions: Callable[[str, int], list[str]] = self_describing_captions,
    shard_size: int = 7,
    name: str = "tiny",
) -> Manifest:
    """Write a finished feature data set into `root`.

    Image `index` of a split has image_id SPLIT-INDEX, the grid `grid_of(split, index, ...)` and `captions(split,
    index)`; `name` sets two otherwise equal data sets apart (another fingerprint and digest).
    """
    root, cells = Path(root), grid[0] * grid[1]
    scale = np.full(dim, 4 / 127 if dtype == "int8" else 1, np.float32)
    shards, members = [], []
    for split, count in sorted(splits.items()):
        for number, start in enumerate(range(0, count, shard_size)):
            indices = range(start, min(start + shard_size, count))
            shards.append(PlannedShard(f"{split}-{number:06d}.tar", split, len(indices), "0" * 64))
            members.append(indices)
    spec = FeatureSpec("grid", grid, dim, dtype, encoder=None, transform=None)
    fingerprint = {"name": name} | spec.to_fingerprint()
    plan = publish_plan(Plan(root, fingerprint, FeatureSettings("", ""), tuple(shards)))
    for shard, indices in zip(shards, members, strict=True):
        sums = ChannelSums(dim)
        samples = []
        for index in indices:
            stored = store(grid_of(shard.split, index, cells, dim), dtype, scale)
            sums.add(restore(stored, dtype, scale))
            key = f"{shard.split}-{index}"
            record = ImageRecord(key, f"{key}.jpg", shard.split, tuple(captions(shard.split, index)), key)
            samples.append(Sample(record, spec.npy_bytes(stored), "npy", 64, 48, about=spec.about_values))
        write_shard(root, shard, plan.digest, samples, extra=sums.to_json)
    return finalize(plan, lambda sidecars: merge_statistics(sidecars, ["train"], dim, scale))


def loader_arguments(settings: dict) -> dict:
    """Flat settings of a test -> the arguments `reading` and `share` of the loader, and the rest as it is."""
    settings, options = dict(settings), {"num_workers": 0}
    parts = {
        "options": {field.name for field in fields(LoaderOptions)},
        "share": {field.name for field in fields(Share)},
    }
    taken = {
        part: {name: settings.pop(name) for name in list(settings) if name in names} for part, names in parts.items()
    }
    pictures = settings.pop("pictures", None)
    reading = Reading(LoaderOptions(**options | taken["options"]), pictures)
    return settings | {"reading": reading} | ({"share": Share(**taken["share"])} if taken["share"] else {})


def read_batches(sources, tokenizer, *, done: int = 0, epoch: int = 0, **settings) -> list[CaptionBatch]:
    """All batches of `training_batches` from a cursor on, of the split `train` and 8 samples unless told otherwise."""
    cursor = replace(Cursor.start(sources, 7), samples_done=done, epoch=epoch)
    settings = {"splits": ["train"], "global_batch": 8} | settings
    return list(training_batches(sources, tokenizer, cursor=cursor, **loader_arguments(settings)))


def picture(index: int, size: tuple[int, int] = (64, 48)) -> Image.Image:
    """A smooth RGB picture [H, W] that differs for every index."""
    x, y = np.meshgrid(np.linspace(0, 1, size[0]), np.linspace(0, 1, size[1]))
    phase = 0.7 * index
    channels = [127.5 + 127.5 * np.sin(phase + f * x + g * y) for f, g in ((3, 1), (1, 4), (2, 2))]
    return Image.fromarray(np.stack(channels, axis=-1).round().astype(np.uint8))


def encoded(image: Image.Image, format: str = "JPEG", **options) -> bytes:
    """A picture as the bytes of a file."""
    buffer = io.BytesIO()
    image.save(buffer, format, **({"quality": 95} if format == "JPEG" else {}) | options)
    return buffer.getvalue()


def make_coco(
    root: Path, splits: Mapping[str, int] = {"train": 12, "val": 5}, size: tuple[int, int] = (64, 48)
) -> dict:
    """Write ROOT/images/SPLIT/*.jpg and ROOT/annotations/captions_SPLIT.json; returns the file of each split."""
    files, first = {}, 1
    for split, count in splits.items():
        folder = root / "images" / split
        folder.mkdir(parents=True)
        images, annotations = [], []
        for index in range(count):
            image_id = first + index
            (folder / f"{image_id:06d}.jpg").write_bytes(encoded(picture(image_id, size)))
            images.append({"id": image_id, "file_name": f"{image_id:06d}.jpg", "width": size[0], "height": size[1]})
            for text in self_describing_captions(split, index):
                annotations.append({"id": len(annotations) + 10_000 * image_id, "image_id": image_id, "caption": text})
        first += count
        files[split] = root / "annotations" / f"captions_{split}.json"
        files[split].parent.mkdir(exist_ok=True)
        files[split].write_text(json.dumps({"images": images, "annotations": annotations}))
    return files


def run_program(name: str, *arguments: object, code: int | None = 0, **environment: str) -> subprocess.CompletedProcess:
    """Run `python -m preprocessing.NAME` as a user would; `code` is the exit status expected, None for any."""
    command = [sys.executable, "-m", f"preprocessing.{name}", *map(str, arguments)]
    variables = os.environ | {"PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"} | environment
    done = subprocess.run(command, cwd=REPOSITORY, env=variables, capture_output=True, text=True, timeout=300)
    assert code is None or done.returncode == code, (
        f"{' '.join(command)}: {done.returncode}\n{done.stdout}\n{done.stderr}"
    )
    return done


def snapshot(root: Path) -> dict[str, bytes]:
    """Every file below a folder by its relative name."""
    return {str(path.relative_to(root)): path.read_bytes() for path in sorted(root.rglob("*")) if path.is_file()}


def flip_bit(path: Path, place: int) -> None:
    """Invert bit `place` of a file."""
    blob = bytearray(path.read_bytes())
    blob[place // 8] ^= 1 << place % 8
    path.write_bytes(blob)


def real_data() -> Path:
    """The folder of real data; skips the test, saying so, where there is none."""
    folder = Path(os.environ.get("SAT_REAL_DATA", REPOSITORY.parent / "shared" / "data"))
    if not folder.is_dir():
        pytest.skip(f"no real data at {folder}; name its folder with SAT_REAL_DATA")
    return folder
