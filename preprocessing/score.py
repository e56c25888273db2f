"""Score anybody's captions, without a model: `sat score --references FILE --results FILE`.

The references may be in any format that `sat prepare` reads, which is why this program stands here; they are scored as
they are written, not cleaned as for training.
"""

import json
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path, PurePosixPath
from typing import Annotated, Any

import typer

from preprocessing.annotations.entry import Entry, Source
from preprocessing.annotations.formats import AUTO, read_source
from preprocessing.annotations.read import split_and_file
from preprocessing.console import run
from sat import files
from sat.evaluation.caption_statistics import CaptionStatistics, statistics_of
from sat.evaluation.metrics import NAMES, Scores, score
from sat.evaluation.options import REPORTED_METRICS


def main(
    references: Annotated[
        str, typer.Option(help="captions by people: COCO, Karpathy, Flickr, CSV, ... (see sat prepare)")
    ],
    results: Annotated[Path, typer.Option(help="COCO results JSON: [{image_id, caption}, ...]")],
    split: Annotated[str, typer.Option(help="only this split of the references")] = "",
    annotation_format: Annotated[str, typer.Option("--format", help="of the references; auto recognises it")] = AUTO,
    subset: Annotated[bool, typer.Option("--subset", help="only the images that have a result")] = False,
    metrics: Annotated[
        list[str] | None, typer.Option(help=f"any of {', '.join(NAMES)}; default: all but SPICE")
    ] = None,
    training: Annotated[str, typer.Option(help="training captions, to say how many captions are new")] = "",
    frequencies: Annotated[str, typer.Option(help="captions that give CIDEr-D its document frequencies")] = "",
    timeout: Annotated[float, typer.Option(help="seconds for all; what is not ready then is missing")] = 3600.0,
    json_file: Annotated[Path | None, typer.Option("--json", help="write scores, also of each image")] = None,
) -> None:
    """Score captions as pycocoevalcap does, to the last bit, over all images and of each."""
    entries = list(read_source(_source(references), annotation_format))
    human = captions_by_image(entries, split, references)
    found = read_results(results, known_names(entries))
    if subset:
        human = {image: texts for image, texts in human.items() if image in found}
    documents = list(captions_by_image(_entries(frequencies), "", frequencies).values()) if frequencies else []
    wanted = tuple(metrics or REPORTED_METRICS)
    try:
        scores = score(human, found, wanted, timeout, [texts for texts in documents if texts])
    except ValueError as error:
        way_out = " (--subset scores only images that have a result)" * ("have no hypothesis" in str(error))
        raise ValueError(f"{results} against {references}: {error}{way_out}") from error
    known = [text for entry in _entries(training) for text in entry.captions] if training else None
    statistics = statistics_of(list(found.values()), known)
    if json_file:
        files.write_json(json_file, to_document(scores, statistics))
    for line in lines_of(scores, statistics):
        print(line)


def captions_by_image(entries: Iterator[Entry] | list[Entry], split: str, file: str) -> dict[str, list[str]]:
    """Image -> its captions as they are written, of one split or of all. Raises ValueError where there is none."""
    found: dict[str, list[str]] = {}
    splits: Counter[str] = Counter()
    for entry in entries:
        splits[entry.split] += 1
        if split in ("", entry.split):
            found.setdefault(_name(entry), []).extend(entry.captions)
    if not found:
        raise ValueError(f"{file} has no image of split {split!r}, but {dict(splits)}" if split else f"{file} is empty")
    return found


def known_names(entries: list[Entry]) -> dict[str, str]:
    """What results may call an image -> its id: the id itself, or its file's name."""
    names = {entry.file_name: _name(entry) for entry in entries}
    return (
        names
        | {PurePosixPath(name).name: image for name, image in names.items()}
        | {_name(e): _name(e) for e in entries}
    )


def read_results(path: Path, names: Mapping[str, str]) -> dict[str, str]:
    """Image id -> caption of a file in COCO's results format. Raises ValueError naming the file and the entry."""
    try:
        rows = json.loads(path.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path}: not JSON ({error})") from error
    if not isinstance(rows, list):
        raise ValueError(f"{path}: expected a list of {{image_id, caption}}, COCO's results format, not {_kind(rows)}")
    found: dict[str, str] = {}
    for place, row in enumerate(rows):
        image, caption = _result(row, f"{path}: entry {place}")
        image = names.get(image, image)
        if image in found:
            raise ValueError(f"{path}: entry {place}: image {image} has two captions; each image takes one")
        found[image] = caption
    if not found:
        raise ValueError(f"{path}: no results")
    return found


def _result(row: Any, where: str) -> tuple[str, str]:
    if not isinstance(row, dict) or not {"image_id", "caption"} <= row.keys():
        raise ValueError(f"{where}: expected {{image_id, caption}}, found {json.dumps(row)[:100]}")
    image, caption = row["image_id"], row["caption"]
    if isinstance(image, bool) or not isinstance(image, int | str):
        raise ValueError(f"{where}: image_id is {json.dumps(image)[:100]}; it must be a whole number or a text")
    if not isinstance(caption, str):
        raise ValueError(f"{where}: the caption of image {image} is {_kind(caption)}, not a text")
    return str(image), caption


def to_document(scores: Scores, statistics: CaptionStatistics) -> dict[str, Any]:
    """The scores as JSON; a missing one is null and has its reason."""
    columns = {name: each.tolist() for name, each in scores.per_image.items()}
    per_image = {image: {name: each[i] for name, each in columns.items()} for i, image in enumerate(scores.image_ids)}
    return {
        "scores": scores.values,
        "per_image": per_image,
        "signature": dict(scores.signature),
        "references_digest": scores.references_digest,
        "images": scores.images,
        "reasons": scores.reasons,
        "statistics": asdict(statistics),
    }


def lines_of(scores: Scores, statistics: CaptionStatistics) -> Iterator[str]:
    """For the reader."""
    for name, value in scores.values.items():
        yield f"{name:12} {'missing' if value is None else format(value, '.4f')}"
    for name, reason in scores.reasons.items():
        yield f"note: {name}: {reason}"
    yield "captions: " + ", ".join(
        f"{name.replace('_', ' ')} {format(value, '.4g')}"
        for name, value in asdict(statistics).items()
        if value is not None
    )
    yield from scores.signature.values()


def _entries(path: str) -> Iterator[Entry]:
    return read_source(_source(path), AUTO)


def _source(path: str) -> Source:
    split, file = split_and_file(path)
    return Source(file, split)


def _name(entry: Entry) -> str:
    return entry.image_id or PurePosixPath(entry.file_name).stem


def _kind(value: object) -> str:
    return {dict: "an object", list: "a list", str: "a text", type(None): "null"}.get(type(value), "a number")


if __name__ == "__main__":
    run(main)
