"""Hold a model's captions of scenes against what the scenes show: the shares that are true.

    python -m preprocessing.check_scenes runs/demo --scenes data/demo/scenes

reads RUN/captions-SPLIT.json, those of the blind baseline beside it (`sat evaluate --baselines` writes both) and the
scenes' truth; prints the shares and writes RUN/truth-SPLIT.json, which `sat summary` and `sat report` show beside the
scores. The row `reference` checks one of each scene's own captions in the same way: what falls short of 1 there is the
checker's. Where `sat evaluate --attention` has kept the attention, it is held against the objects too.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from preprocessing.console import run
from preprocessing.scenes.attention import Looking, measure_looking, read_attention
from preprocessing.scenes.captions import Claim, check_claims
from preprocessing.scenes.scenes import Scene
from preprocessing.scenes.truth import Truth, measure
from preprocessing.synthetic import load_truth
from sat import files

TRUTH_FILE = "truth.jsonl"


def read_captions(path: Path) -> dict[str, str]:
    """Captions by image id, from COCO's results format: a list of {image_id, caption}. ValueError for another."""
    if not path.is_file():
        raise ValueError(f"{path} is missing; run `sat evaluate RUN --split SPLIT --baselines` first")
    try:
        return {str(row["image_id"]): str(row["caption"]) for row in json.loads(path.read_text())}
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is no list of image_id and caption: {error!r}") from None


def read_references(scenes: Path, split: str) -> dict[str, list[str]]:
    """The captions of every scene of the split by image id. ValueError where the folder holds no such annotations."""
    path = scenes / "annotations" / f"captions_{split}.json"
    if not path.is_file():
        raise ValueError(f"{path} is missing; --scenes takes the folder that preprocessing.synthetic has written")
    references: dict[str, list[str]] = {}
    for row in json.loads(path.read_text())["annotations"]:
        references.setdefault(str(row["image_id"]), []).append(row["caption"])
    return references


def read_scenes(scenes: Path) -> dict[str, Scene]:
    """The scenes of all splits by image id. ValueError where the folder holds no truth."""
    path = scenes / TRUTH_FILE
    if not path.is_file():
        raise ValueError(f"{path} is missing; --scenes takes the folder that preprocessing.synthetic has written")
    return {str(image_id): scene for image_id, scene in load_truth(path).items()}


def check(captions: Mapping[str, Mapping[str, str]], scenes: Mapping[str, Scene]) -> dict[str, Truth]:
    """The shares of each set of captions. ValueError for one that is empty or names an image that is no such scene."""
    for name, each in captions.items():
        strangers = sorted(each.keys() - scenes.keys())
        if strangers or not each:
            wrong = f"name image {strangers[0]}, which is none of these scenes" if strangers else "are none"
            raise ValueError(f"the captions of {name!r} {wrong}; give the --scenes that the run was evaluated on")
    return {name: measure(each, scenes) for name, each in captions.items()}


def check_attention(run_folder: Path, split: str, captions: Mapping[str, str], scenes: Path) -> Looking | None:
    """Where the model looked at its shape words; None where the attention was not kept or no object is named.

    ValueError where it is the attention of other captions.
    """
    path = run_folder / f"attention-{split}.npz"
    if not path.is_file():
        return None
    found = read_attention(path)
    if {image: " ".join(seen.words) for image, seen in found.captions.items()} != captions:
        raise ValueError(
            f"{path} is of another evaluation than the captions; "
            f"run `sat evaluate {run_folder} --split {split} --baselines --attention` again, or remove it"
        )
    return measure_looking(found, read_scenes(scenes))


def write_claim(claim: Claim) -> dict[str, object]:
    """A claim as `sat.report` reads it: its words, whether it holds, and which words of an object are wrong."""
    words, wrong = claim.text.replace("_", " ").split(), list[int]()
    if claim.kind == "object" and not claim.holds:
        judged = [right for right in (claim.size, claim.colour, claim.shape) if right is not None]  # as the words stand
        wrong = [place for place, (_, right) in enumerate(zip(words, judged, strict=True)) if not right]
    return {"words": words, "holds": claim.holds, "wrong": wrong}


def main(
    run_folder: Annotated[Path, typer.Argument(help="run folder, evaluated with --baselines")],
    scenes: Annotated[Path, typer.Option(help="folder of the scene set")],
    split: Annotated[str, typer.Option(help="split that was captioned")] = "test",
) -> None:
    """Print which shares of a run's captions are true of the scenes; writes RUN/truth-SPLIT.json."""
    path = run_folder / f"captions-{split}.json"
    captions = {"model": read_captions(path), "blind": read_captions(run_folder / f"captions-{split}-blind.json")}
    if sorted(captions["blind"].values()) != sorted(captions["model"].values()):
        raise ValueError(
            f"{run_folder}: the blind baseline's captions are of another evaluation than the model's; "
            f"run `sat evaluate {run_folder} --split {split} --baselines` again"
        )
    references = read_references(scenes, split)
    captions["reference"] = {image: references[image][0] for image in captions["model"] if image in references}
    known = read_scenes(scenes)
    truth = {name: asdict(each) for name, each in check(captions, known).items()}
    claims = {
        image: [write_claim(claim) for claim in check_claims(caption, known[image])]
        for image, caption in captions["model"].items()
    }
    document = {"captions_sha256": files.sha256(path), "truth": truth, "claims": claims}
    looking = check_attention(run_folder, split, captions["model"], scenes)
    if looking:
        document["attention"] = asdict(looking)
    files.write_json(run_folder / f"truth-{split}.json", document)
    print(f"{'share true of':12}" + "".join(f"{column:>11}" for column in truth["model"]))
    for name, shares in truth.items():
        print(f"{name:13}" + "".join(f"{value:11.3f}" for value in shares.values()))
    if looking:
        print(
            f"attention at {looking.words} shape words: {looking.mass:.2f} on the object's cells, "
            f"{looking.times_area:.1f} times its share of the picture, {looking.times_cells:.1f} times its cells' share"
        )


if __name__ == "__main__":
    run(main)
