"""Caption picture files and draw where the model looked: `sat caption PICTURES...`."""

import json
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Annotated

import typer

from sat import files
from sat.captioning import Captioning
from sat.cli import run_program
from sat.evaluation.attention_plot import plot_attention
from sat.shards.pictures import BadPicture

CAPTIONS = "captions.json"


def main(
    pictures: Annotated[list[Path], typer.Argument(help="picture files, or folders of them")],
    model: Annotated[Path, typer.Option(help="run folder or folder with model.safetensors")] = Path("runs/demo"),
    weights: Annotated[Path, typer.Option(help="encoder weights, or a folder that holds them")] = Path("weights"),
    out: Annotated[Path, typer.Option(help="where captions.json and the attention pictures go")] = Path("captions"),
    beam_size: Annotated[int, typer.Option(help="beams per picture; default: the run's setting")] = 0,
    limit: Annotated[int, typer.Option(help="caption at most so many pictures; 0: all")] = 0,
) -> None:
    """Caption picture files; one PNG each shows the attention of every word."""
    ours = {out / CAPTIONS, *earlier_plots(out)}
    paths = expand(pictures, leave_out=ours)[: limit or None]
    captioning = Captioning.from_pretrained(model, weights)
    captioning = captioning.with_options(beam_size=beam_size or captioning.options.beam_size, keep_attention=True)
    plots = plot_names(paths, out, taken={path for path in out.glob("*") if path not in ours} | set(paths))
    written, unreadable = [], []
    for path, plot, found in zip(paths, plots, captioning.stream(paths), strict=True):
        if isinstance(found, BadPicture):
            unreadable.append(str(found))
            continue
        print(f"{path}: {found.caption}", flush=True)
        written.append({"file": str(path), "caption": found.caption, "score": found.score, "plot": plot.name})
        assert found.picture is not None and found.attention is not None
        plot_attention(found.picture, found.words, found.attention, plot)
    files.write_json(out / CAPTIONS, written)
    if unreadable:
        raise ValueError("not captioned: " + "; ".join(unreadable))


def expand(pictures: Sequence[Path], leave_out: Iterable[Path] = ()) -> list[Path]:
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
        inside = [each for each in sorted(path.iterdir()) if each.is_file() and each.resolve() not in ours]
        below = [each.name for each in sorted(path.iterdir()) if each.is_dir()]
        if below:
            print(f"{path}: its sub-folders are not captioned: {', '.join(below[:5])}", file=sys.stderr)
        if not inside:
            raise ValueError(f"no pictures in the folder {path}")
        found += inside
    return found


def plot_names(pictures: Sequence[Path], out: Path, taken: set[Path]) -> list[Path]:
    """`out`/STEM.png for every picture, numbered where that is taken by a file of the user's or by another picture."""
    used = {path.resolve() for path in taken}
    names = []
    for picture in pictures:
        number, name = 1, out / f"{picture.stem}.png"
        while name.resolve() in used:
            number, name = number + 1, out / f"{picture.stem}-{number + 1}.png"
        used.add(name.resolve())
        names.append(name)
    return names


def earlier_plots(out: Path) -> set[Path]:
    """The attention pictures that an earlier call has put there, as its captions say."""
    try:
        return {out / Path(row["plot"]).name for row in json.loads((out / CAPTIONS).read_text())}
    except (OSError, ValueError, TypeError, KeyError):
        return set()


if __name__ == "__main__":
    run_program(main)
