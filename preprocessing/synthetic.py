"""Render the default data set: captioned scenes of coloured shapes, in COCO's format, without a download.

    python -m preprocessing.synthetic --out data/demo/scenes --train 2600 --val 100 --test 300

writes images/SPLIT/NUMBER.jpg, annotations/captions_SPLIT.json and truth.jsonl, the side file that says what each
picture really shows. The surprising decision: a picture is seeded by its own split and number, not by its turn. So it
is the same whatever the worker count, an interrupted run goes on with what is missing, and a larger set extends a
smaller one.
"""

import json
import os
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from io import BytesIO
from multiprocessing import get_context
from pathlib import Path
from random import Random
from typing import Annotated, Any

import typer

from preprocessing.console import progress_line, refuse_urls, run
from preprocessing.scenes.captions import describe
from preprocessing.scenes.scenes import SIZE, Scene, SceneObject, render, sample_scene
from sat import files

VERSION = 1
"""Raised by every change that alters a picture or a caption."""
SPLITS = ("train", "val", "test")
JPEG_QUALITY = 92
CHUNK = 16
"""Pictures rendered by one process in a turn."""


@dataclass(frozen=True)
class Recipe:
    """What a folder of scenes was made by; its pictures differ in nothing else than split and number."""

    writer: str = "preprocessing.synthetic"
    version: int = VERSION
    seed: int = 1
    size: int = SIZE


@dataclass(frozen=True)
class Picture:
    """One picture to be: everything about it follows from these."""

    seed: int
    split: str
    number: int
    size: int = SIZE

    @property
    def image_id(self) -> int:
        """Unique over the splits, as in COCO."""
        return (SPLITS.index(self.split) + 1) * 1_000_000 + self.number

    @property
    def file_name(self) -> str:
        """Relative to the folder of all images."""
        return f"{self.split}/{self.number:06d}.jpg"

    def scene(self) -> Scene:
        """What it shows."""
        return sample_scene(self._random("scene"))

    def captions(self) -> list[str]:
        """Five captions of it."""
        return describe(self.scene(), self._random("captions"))

    def _random(self, purpose: str) -> Random:
        return Random(f"{purpose}/{self.seed}/{self.split}/{self.number}")

    def jpeg(self) -> bytes:
        """The encoded picture."""
        buffer = BytesIO()
        render(self.scene(), self.size).save(buffer, "JPEG", quality=JPEG_QUALITY)
        return buffer.getvalue()


def make_scenes(out: Path, counts: Mapping[str, int], seed: int, size: int = SIZE, num_workers: int = 1) -> int:
    """Bring the scene set in `out` to `counts` pictures per split; returns how many had to be rendered.

    Files that are there stay untouched. ValueError where `out` holds a set of another recipe.
    """
    for split in SPLITS:
        (out / "images" / split).mkdir(parents=True, exist_ok=True)
    _claim(out, Recipe(seed=seed, size=size))
    pictures = [Picture(seed, split, number, size) for split in SPLITS for number in range(counts.get(split, 0))]
    missing = [picture for picture in pictures if not (out / "images" / picture.file_name).exists()]
    chunks = [missing[start : start + CHUNK] for start in range(0, len(missing), CHUNK)]
    if chunks:
        with progress_line(len(missing), "rendering scenes") as advance:
            for rendered in _render_all(out / "images", chunks, num_workers):
                advance(rendered)
    _write_tables(out, pictures)
    return len(missing)


def _claim(out: Path, recipe: Recipe) -> None:
    """Mark `out` as the home of `recipe` and sweep what an interrupted run left."""
    path, wanted = out / "recipe.json", asdict(recipe)
    if not path.exists():
        files.write_text(path, json.dumps(wanted, indent=1))
    found = files.read_json(path)
    if found != wanted:
        raise ValueError(f"{out} holds scenes of the recipe {found}, not {wanted}; choose another --out or remove it")
    for folder in (out, out / "annotations", *((out / "images" / split) for split in SPLITS)):
        files.sweep(folder)


def _render_all(folder: Path, chunks: list[list[Picture]], num_workers: int) -> Iterator[int]:
    render_here = partial(_render, folder)
    if num_workers <= 1 or len(chunks) < 2:
        yield from map(render_here, chunks)
        return
    with get_context("spawn").Pool(num_workers) as pool:
        yield from pool.imap_unordered(render_here, chunks)


def _render(folder: Path, pictures: list[Picture]) -> int:
    """Render and write pictures, returns how many; to sync a file takes half as long as to render it."""
    with ThreadPoolExecutor(4) as pool:
        writes = [pool.submit(files.write_bytes, folder / each.file_name, each.jpeg()) for each in pictures]
    for write in writes:
        write.result()
    return len(pictures)


def _write_tables(out: Path, pictures: list[Picture]) -> None:
    """Annotations per split and the truth of all; a file that says the same already is not touched."""
    texts = {out / "truth.jsonl": "".join(json.dumps(_truth(picture)) + "\n" for picture in pictures)}
    for split in SPLITS:
        chosen = [picture for picture in pictures if picture.split == split]
        if chosen:
            texts[out / "annotations" / f"captions_{split}.json"] = json.dumps(_coco(chosen))
    for path, text in texts.items():
        if not path.exists() or path.read_text() != text:
            files.write_text(path, text)


def _coco(pictures: list[Picture]) -> dict[str, Any]:
    """COCO's captions format: https://cocodataset.org/#format-data."""
    images = [
        {"id": picture.image_id, "file_name": picture.file_name, "width": picture.size, "height": picture.size}
        for picture in pictures
    ]
    annotations = [
        {"id": picture.image_id * 10 + index, "image_id": picture.image_id, "caption": caption}
        for picture in pictures
        for index, caption in enumerate(picture.captions())
    ]
    info = {"description": "synthetic scenes of coloured shapes"}
    return {"info": info, "images": images, "annotations": annotations}


def _truth(picture: Picture) -> dict[str, Any]:
    return {"image_id": picture.image_id, "file_name": picture.file_name, "scene": asdict(picture.scene())}


def load_truth(path: Path) -> dict[int, Scene]:
    """The scene behind each image id, from truth.jsonl; what `scenes.captions.check_claims` needs."""
    truth = {}
    for line in Path(path).read_text().splitlines():
        row = json.loads(line)
        things = tuple(SceneObject(**{**thing, "rgb": tuple(thing["rgb"])}) for thing in row["scene"]["objects"])
        truth[row["image_id"]] = Scene(**{**row["scene"], "objects": things, "tint": tuple(row["scene"]["tint"])})
    return truth


def main(
    out: Annotated[Path, typer.Option(help="folder of the scene set")],
    train: Annotated[int, typer.Option(min=0, help="training pictures")] = 2600,
    val: Annotated[int, typer.Option(min=0, help="validation pictures")] = 100,
    test: Annotated[int, typer.Option(min=0, help="held-out pictures")] = 300,
    seed: Annotated[int, typer.Option(help="another seed is another set")] = 1,
    size: Annotated[int, typer.Option(min=32, help="side of a picture in pixels")] = SIZE,
    num_workers: Annotated[int, typer.Option(min=1, help="rendering processes")] = os.cpu_count() or 1,
) -> None:
    """Render captioned scenes in COCO's format; a second run makes only what is missing."""
    refuse_urls(out)
    rendered = make_scenes(out, {"train": train, "val": val, "test": test}, seed, size, num_workers)
    print(f"{out}: {train} + {val} + {test} scenes, {rendered} rendered now")


if __name__ == "__main__":
    run(main)
