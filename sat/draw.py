"""Draw where a model looked at the pictures of a split, from the attention it kept: `sat draw RUN --pictures FOLDER`.

Needs no model, so region features from elsewhere are drawn too, with their boxes. A picture belongs to an image if its
name, with or without suffix, or the number at the end of its name is the image's id.
"""

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated

import typer

from sat.cli import run_program
from sat.evaluation.attention_file import read_attention
from sat.evaluation.attention_plot import Drawing, plot_attention, read_references
from sat.shards.pictures import decode


def main(
    run: Annotated[Path, typer.Argument(help="run folder, evaluated with --attention")],
    pictures: Annotated[Path, typer.Option(help="folder of the split's pictures")],
    split: Annotated[str, typer.Option(help="split that was captioned")] = "test",
    limit: Annotated[int, typer.Option(min=1, help="draw the first so many that have a picture")] = 8,
    format: Annotated[str, typer.Option(help="png, svg or pdf")] = "png",
    all_words: Annotated[bool, typer.Option("--all-words", help="draw a, of, the ... too")] = False,
    references: Annotated[Path | None, typer.Option(help="JSON {image id: [captions]}, shown with them")] = None,
) -> None:
    """Draw the attention of a split's captions into RUN/attention-SPLIT/."""
    drawing, known = Drawing(format, all_words), read_references(references)
    if not (run / f"attention-{split}.npz").is_file():
        raise ValueError(
            f"{run} has no attention-{split}.npz; run `sat evaluate {run} --split {split} --attention` first"
        )
    kept = read_attention(run / f"attention-{split}.npz")
    found = find_pictures(pictures, [each.image_id for each in kept.predictions])
    chosen = [each for each in kept.predictions if each.image_id in found][:limit]
    if not chosen:
        raise ValueError(f"{pictures} holds no picture whose name is an image id of split {split!r}")
    for number, each in enumerate(chosen):
        picture = decode(found[each.image_id].read_bytes())
        name = re.sub(r"[^\w.-]+", "_", each.image_id)
        path = run / f"attention-{split}" / f"{number:03d}-{name}.{format}"
        plot_attention(picture, each, kept.where(each, *picture.size), path, drawing, known.get(each.image_id, ()))
        print(f"{path}: {each.caption}", flush=True)


def find_pictures(folder: Path, image_ids: Iterable[str]) -> dict[str, Path]:
    """The pictures below `folder` by image id. ValueError where there is no such folder."""
    if not folder.is_dir():
        raise ValueError(f"no folder {folder}")
    names: dict[str, Path] = {}
    for path in sorted(each for each in folder.rglob("*") if each.is_file()):
        number = re.search(r"(\d+)$", path.stem)
        for name in (path.name, path.stem, str(int(number[1])) if number else path.stem):
            names.setdefault(name, path)
    return {image_id: names[image_id] for image_id in image_ids if image_id in names}


if __name__ == "__main__":
    run_program(main)
