"""One HTML page of a model's captions of scenes: claims green or red, references, and where each word looked.

    python -m preprocessing.show_scenes runs/demo --scenes data/demo/scenes

reads what `sat evaluate --baselines --attention` and `preprocessing.check_scenes` have written into the run folder, and
writes RUN/page.html, which needs nothing else. Without kept attention it has no panels of words.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer

from preprocessing.check_scenes import read_captions, read_references, read_scenes
from preprocessing.console import run
from preprocessing.scenes.attention import CaptionAttention, read_attention
from preprocessing.scenes.captions import check_claims
from preprocessing.scenes.page import Shown, Table, page
from sat import files

METRICS = ("CIDEr", "BLEU-4", "METEOR")
ROWS = {
    "model": "model",
    "blind": "blind (shuffled features)",
    "most_frequent": "most frequent caption",
    "reference": "a reference left out",
}


def read_files(scenes: Path, split: str) -> dict[str, Path]:
    """The picture file of every scene of the split by image id."""
    document = json.loads((scenes / "annotations" / f"captions_{split}.json").read_text())
    return {str(row["id"]): scenes / "images" / row["file_name"] for row in document["images"]}


def figures(truth: Mapping[str, Any], scores: Mapping[str, Any]) -> Table:
    """Scores and shares of truth, a row each for the model and what it is held against; `-` for what is not known."""
    kinds = list(truth["truth"]["model"])
    rows = []
    for name, title in ROWS.items():
        known = [scores.get(name, {}).get(metric) for metric in METRICS]
        known += [truth["truth"].get(name, {}).get(kind) for kind in kinds]
        if any(value is not None for value in known):
            rows.append((title, ["-" if value is None else f"{value:.3f}" for value in known]))
    return Table("Scores, and which share of the captions and of what they say is true", (*METRICS, *kinds), rows)


def notes(truth: Mapping[str, Any]) -> list[str]:
    """What to say of the attention."""
    looking = truth.get("attention")
    if not looking:
        return []
    on = f"{looking['mass']:.2f} of the attention is on the object's cells"
    times = f"{looking['times_area']:.1f} times the object's share of the picture"
    even = f"even attention {looking['cells'] / looking['area']:.1f} times"
    return [f"At {looking['words']} shape words that name an object of the scene, {on}: {times} ({even})."]


def gather(
    scenes: Path, split: str, captions: Mapping[str, str], attention: CaptionAttention | None, panels: int
) -> list[Shown]:
    """Every captioned scene, by image id; the first `panels` of them with the attention of their words."""
    references, truth, pictures = read_references(scenes, split), read_scenes(scenes), read_files(scenes, split)
    strangers = sorted(captions.keys() - truth.keys() | captions.keys() - pictures.keys())
    if strangers:
        raise ValueError(f"image {strangers[0]} is none of these scenes; give the --scenes that were captioned")
    shown = []
    for number, (image, caption) in enumerate(sorted(captions.items())):
        seen = attention.captions.get(image) if attention and number < panels else None
        claims = check_claims(caption, truth[image])
        name = pictures[image].relative_to(scenes / "images")
        shown.append(Shown(str(name), pictures[image].read_bytes(), caption, claims, references[image], seen))
    return shown


def main(
    run_folder: Annotated[Path, typer.Argument(help="run folder, evaluated and checked")],
    scenes: Annotated[Path, typer.Option(help="folder of the scene set")],
    split: Annotated[str, typer.Option(help="split that was captioned")] = "test",
    panels: Annotated[int, typer.Option(min=0, help="scenes whose words' attention is shown, the first ones")] = 300,
    limit: Annotated[int, typer.Option(min=0, help="show at most so many scenes; 0: all")] = 0,
) -> None:
    """Write RUN/page.html: every scene with its caption, claims, references and attention."""
    captions = read_captions(run_folder / f"captions-{split}.json")
    truth = files.read_json(run_folder / f"truth-{split}.json")
    if truth.get("captions_sha256") != files.sha256(run_folder / f"captions-{split}.json"):
        raise ValueError(f"{run_folder}: the captions are not checked yet; run preprocessing.check_scenes first")
    scores = files.read_json(run_folder / f"evaluation-{split}.json").get("scores", {})
    kept = run_folder / f"attention-{split}.npz"
    attention = read_attention(kept) if kept.is_file() else None
    chosen = dict(sorted(captions.items())[: limit or None])
    shown = gather(scenes, split, chosen, attention, panels)
    centres = attention.centres if attention else np.zeros((0, 2))
    title = f"{len(captions)} scenes of split {split!r}, captioned by {run_folder.name}"
    text = page(title, [figures(truth, scores)], notes(truth), shown, centres)
    files.write_text(run_folder / "page.html", text)
    print(f"{run_folder / 'page.html'}: {len(shown)} scenes, {len(text.encode()) / 1e6:.1f} MB")


if __name__ == "__main__":
    run(main)
