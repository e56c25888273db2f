"""Caption picture files and draw where the model looked: `sat caption PICTURES...`."""

import json
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated

import typer

from sat import files
from sat.captioning import Captioning
from sat.cli import run_program
from sat.evaluation.attention_file import is_attention, write_attention
from sat.evaluation.attention_map import cells_over
from sat.evaluation.attention_plot import Drawing, plot_attention, read_references
from sat.evaluation.prediction import Prediction
from sat.evaluation.search_options import (
    Asked,
    BeamSize,
    BlockNgram,
    BlockUnk,
    LengthPenalty,
    MaxLength,
    Method,
    NBest,
    Seed,
    Temperature,
    TopK,
    TopP,
)
from sat.shards.pictures import BadPicture, decode

CAPTIONS, ATTENTION = "captions.json", "attention.npz"


def main(
    pictures: Annotated[list[Path], typer.Argument(help="picture files, or folders of them")],
    model: Annotated[Path, typer.Option(help="run folder or folder with model.safetensors")] = Path("runs/demo"),
    weights: Annotated[Path, typer.Option(help="encoder weights, or a folder that holds them")] = Path("weights"),
    out: Annotated[Path, typer.Option(help="where captions.json and the attention pictures go")] = Path("captions"),
    limit: Annotated[int, typer.Option(help="caption at most so many pictures; 0: all")] = 0,
    recursive: Annotated[bool, typer.Option("--recursive", help="caption the pictures in sub-folders too")] = False,
    format: Annotated[str, typer.Option(help="of the attention pictures: png, svg or pdf")] = "png",
    all_words: Annotated[bool, typer.Option("--all-words", help="draw a, of, the ... too")] = False,
    references: Annotated[Path | None, typer.Option(help="JSON {file: [captions]}, shown with the pictures")] = None,
    attention: Annotated[
        bool, typer.Option("--attention", help="write the attention to OUT/attention.npz too")
    ] = False,
    method: Method = None,
    beam_size: BeamSize = None,
    max_length: MaxLength = None,
    length_penalty: LengthPenalty = None,
    n_best: NBest = None,
    block_unk: BlockUnk = True,
    block_ngram: BlockNgram = None,
    temperature: Temperature = None,
    top_k: TopK = None,
    top_p: TopP = None,
    seed: Seed = None,
) -> None:
    """Caption picture files, never with `<unk>`; a picture of each shows the attention of every word.

    Writes into OUT alone: nothing of it goes into the model's run folder or to MLflow.
    """
    drawn = (temperature, top_k, top_p, seed)
    asked = Asked(method, beam_size, max_length, length_penalty, n_best, block_unk, block_ngram, *drawn)
    plots = Plots(out, Drawing(format, all_words), read_references(references))
    ours = {out / CAPTIONS, *earlier_plots(out)}
    paths = expand(pictures, ours, recursive)[: limit or None]
    captioning = Captioning.from_pretrained(model, weights)
    captioning = replace(captioning, options=replace(asked.over(captioning.options), keep_attention=True))
    taken = {path for path in out.glob("*") if path not in ours} | set(paths)
    caption_files(captioning, paths, plots, taken, attention)


@dataclass(frozen=True)
class Plots:
    """The pictures of the attention."""

    folder: Path
    drawing: Drawing
    references: Mapping[str, Sequence[str]]
    """Captions by file, shown beside the model's."""


def caption_files(
    captioning: Captioning, paths: Sequence[Path], plots: Plots, taken: set[Path], keep_attention: bool
) -> None:
    """Caption, print and draw; `taken` are files that no plot may replace.

    Raises ValueError, after all others are done, naming the files that could not be read.
    """
    written: list[dict[str, object]] = []
    captioned, unreadable = [], []
    names = plot_names(paths, plots.folder, taken, plots.drawing.format)
    for path, plot, found in zip(paths, names, captioning.stream(paths), strict=True):
        if isinstance(found, BadPicture):
            unreadable.append(str(found))
            continue
        print("\n".join([f"{path}: {found.caption}", *(f"    {each.caption}" for each in found.others)]), flush=True)
        written.append({"file": str(path), **about(found), "plot": plot.name})
        captioned.append(replace(found, picture=None))
        picture = decode(path.read_bytes())
        where = cells_over(captioning.trained.features, *picture.size)
        known = plots.references.get(str(path), plots.references.get(path.name, ()))
        plot_attention(picture, found, where, plot, plots.drawing, known)
    files.write_json(plots.folder / CAPTIONS, written)
    if keep_attention:
        write_attention(plots.folder / ATTENTION, captioned, captioning.trained.features)
    if unreadable:
        raise ValueError("not captioned: " + "; ".join(unreadable))


def about(found: Prediction) -> dict[str, object]:
    """A caption in captions.json; with the further ones of an n-best search under `others`, best first."""
    said: dict[str, object] = {
        "caption": found.caption,
        "score": found.score,
        "log_probability": found.log_probability,
        "finished": found.finished,
    }
    return said | ({"others": [about(each) for each in found.others]} if found.others else {})


def expand(pictures: Sequence[Path], leave_out: Iterable[Path] = (), recursive: bool = False) -> list[Path]:
    """Files as given; folders as the files in them, by name, but for what we put there ourselves.

    Raises ValueError for what does not exist and for a folder without files.
    """
    found, ours = [], {path.resolve() for path in leave_out}
    for path in pictures:
        if not path.exists():
            raise ValueError(f"no picture {path}")
        if not path.is_dir():
            found.append(path)
            continue
        entries = sorted(path.rglob("*") if recursive else path.iterdir())
        inside = [each for each in entries if each.is_file() and each.resolve() not in ours]
        below = [] if recursive else [each.name for each in entries if each.is_dir()]
        if not inside:
            hint = f"; its sub-folders are captioned with --recursive: {', '.join(below[:5])}" if below else ""
            raise ValueError(f"no pictures in the folder {path}{hint}")
        if below:
            print(f"{path}: not captioned without --recursive: its sub-folders {', '.join(below[:5])}", file=sys.stderr)
        found += inside
    return found


def plot_names(pictures: Sequence[Path], out: Path, taken: set[Path], suffix: str) -> list[Path]:
    """`out`/STEM.SUFFIX for every picture, numbered where that is taken by a user's file or by another picture."""
    used = {path.resolve() for path in taken}
    names = []
    for picture in pictures:
        number, name = 1, out / f"{picture.stem}.{suffix}"
        while name.resolve() in used:
            number, name = number + 1, out / f"{picture.stem}-{number + 1}.{suffix}"
        used.add(name.resolve())
        names.append(name)
    return names


def earlier_plots(out: Path) -> set[Path]:
    """The attention pictures that an earlier call has put there, as its captions say.

    Raises ValueError where a file of the user's has the name of one that this call would write.
    """
    path = out / CAPTIONS
    try:
        plots = {out / Path(row["plot"]).name for row in json.loads(path.read_text())} if path.exists() else set()
    except (ValueError, TypeError, KeyError):
        raise ValueError(f"{path} is not of an earlier `sat caption`; choose another --out, it would be lost") from None
    if (out / ATTENTION).exists() and not is_attention(out / ATTENTION):
        raise ValueError(
            f"{out / ATTENTION} is not of an earlier `sat caption`; choose another --out, it would be lost"
        )
    return plots | {out / ATTENTION}


if __name__ == "__main__":
    run_program(main)
