"""What would make scores better than the model: `sat lint DATA`, a table of leaks between splits.

    sat lint data/mine                                    # what sat prepare made: pictures, captions, vocabulary
    sat lint data/coco/features data/own/features --vocabulary data/coco/tokenizer.json

DATA is a folder that `sat prepare` made, or a finished data set of image or feature shards; of features the image
shards they were made from are looked at too, where they still are. Exit status 1 when a check has failed.
"""

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import typer

from preprocessing.console import progress_line, run
from preprocessing.linting.captions import repeated_captions, words_beside
from preprocessing.linting.pictures import Looks, Named, Pair, look, same_pictures
from preprocessing.sharding.plan import FeatureSettings, standing_plan
from sat import files
from sat.doctor.rows import FAILED, Row, attempted, failed, ok, summary, verdict, warning
from sat.machine import available_cores
from sat.shards.location import is_url
from sat.shards.manifest import Manifest, load_manifest
from sat.shards.store import make_store
from sat.text import CaptionTokenizer

PREPARED = ("images", "features")
"""Data sets in a folder that `sat prepare` made."""
TRAIN = ("train", "restval")
SHOWN = 3
MUCH = 0.5
"""Share of captions verbatim in train from which on a copy of the nearest training caption scores well."""


@dataclass(frozen=True)
class Data:
    """What is looked at."""

    sets: tuple[Manifest, ...]
    """Each picture once: feature sets, and image sets that none of them was made from."""
    images: tuple[Manifest, ...]
    """The image sets of all."""
    train: tuple[str, ...]
    held_out: tuple[str, ...]
    vocabulary: Path | None


def main(
    data: Annotated[list[str], typer.Argument(help="folders that sat prepare made, or finished data sets")],
    train: Annotated[list[str] | None, typer.Option(help="split that is trained on; default: train, restval")] = None,
    vocabulary: Annotated[Path | None, typer.Option(help="tokenizer file; default: DATA/tokenizer.json")] = None,
    pictures: Annotated[bool, typer.Option(help="decode every picture and compare their pixels")] = True,
    json_file: Annotated[Path | None, typer.Option("--json", help="write the table and all that was found")] = None,
) -> None:
    """Look for what held-out splits share with training ones: pictures, captions, vocabulary, statistics."""
    given = gather(data, train or [], vocabulary)
    rows: list[Row] = []
    pairs: list[Pair] = []
    for row in lint(given, pictures, pairs.append):
        print(row.text(), flush=True)
        rows.append(row)
    print(summary_of(rows))
    if json_file:
        found = [{"first": asdict(pair.first), "second": asdict(pair.second)} for pair in pairs]
        document = {"verdict": verdict(rows), "rows": [asdict(row) for row in rows], "same_pictures": found}
        files.write_json(json_file, document)
    if verdict(rows) == FAILED:
        raise typer.Exit(1)


def summary_of(rows: Sequence[Row]) -> str:
    """The line below the table."""
    return f"{summary(rows).partition(':')[0]}: " + (
        "scores of the held-out splits are too good" if verdict(rows) == FAILED else "no leak found that would flatter"
    )


def gather(roots: Sequence[str], train: Sequence[str], vocabulary: Path | None) -> Data:
    """Find the data sets, their pictures, splits and vocabulary. ValueError for what is none."""
    found: list[Manifest] = []
    for root in roots:
        inside = [f"{root}/{name}" for name in PREPARED if not is_url(root) and (Path(root) / name).is_dir()]
        found += [load_manifest(each) for each in inside or [root]]
        own = Path(root) / "tokenizer.json"
        vocabulary = vocabulary or (own if inside and own.is_file() else None)
    images = {each.digest: each for each in found if each.kind == "images"}
    for each in found:
        source = source_of(each)
        if source is not None:
            images.setdefault(source.digest, source)
    made_from = {each.fingerprint.get("source") for each in found}
    sets = tuple({each.digest: each for each in found if each.digest not in made_from}.values())
    splits = sorted({name for each in sets for name in each.splits})
    unknown = sorted(set(train) - set(splits))
    if unknown:
        raise ValueError(f"--train {unknown[0]}: there is no such split, only {', '.join(splits)}")
    learnt = tuple(name for name in splits if name in (train or TRAIN))
    if not learnt:
        raise ValueError(f"no split is named train, there are {', '.join(splits)}; name those trained on with --train")
    held_out = tuple(name for name in splits if name not in learnt)
    return Data(sets, tuple(images.values()), learnt, held_out, vocabulary)


def source_of(manifest: Manifest) -> Manifest | None:
    """The image set that features were made from, where it still is where it was."""
    if manifest.kind == "images" or is_url(manifest.root):
        return None
    try:
        plan = standing_plan(Path(manifest.root))
        if plan is None or not isinstance(plan.settings, FeatureSettings):
            return None
        source = load_manifest(plan.settings.images)
    except (ValueError, OSError):
        return None
    return source if source.digest == manifest.fingerprint.get("source") else None


def lint(data: Data, pictures: bool = True, keep: Callable[[Pair], object] = lambda pair: None) -> Iterator[Row]:
    """All rows; `keep` is told every picture that is in two splits."""
    counts = ", ".join(f"{name} {sum(each.splits.get(name, 0) for each in data.sets):,}" for name in data.train)
    rest = ", ".join(f"{name} {sum(each.splits.get(name, 0) for each in data.sets):,}" for name in data.held_out)
    yield ok("splits", f"trained on: {counts}; held out: {rest or 'none'}")
    yield from attempted("ids", lambda: check_ids(data, keep))
    if pictures:
        yield from attempted("pictures", lambda: check_pictures(data, keep))
    yield from attempted("captions", lambda: check_captions(data))
    yield from attempted("vocabulary", lambda: check_vocabulary(data))
    yield from attempted("statistics", lambda: check_statistics(data))


# ------------------------------------------------------------------ the checks


def check_ids(data: Data, keep: Callable[[Pair], object]) -> Iterator[Row]:
    """The same id with the same file in two splits."""
    places: dict[tuple[str, str], set[str]] = defaultdict(set)
    for manifest in data.sets:
        store = make_store(manifest.root)
        for index in range(len(manifest.shards)):
            rows, split = store.rows(manifest, index), manifest.shards[index].split
            for who in zip(rows["image_id"].to_pylist(), rows["file_name"].to_pylist(), strict=True):
                places[who].add(split)
    twice = [
        Pair(*(Named(split, *who) for split in sorted(splits)[:2])) for who, splits in places.items() if len(splits) > 1
    ]
    for pair in twice:
        keep(pair)
    yield pictures_row("ids", twice, f"{len(places):,} pictures, each in one split", len(places))


def check_pictures(data: Data, keep: Callable[[Pair], object]) -> Iterator[Row]:
    """The same pixels in two splits."""
    if not data.images:
        mend = "give the image shards too: sat lint DATA IMAGES"
        yield warning("pictures", "the image shards are not here, so no pixels were compared", mend)
        return
    total = sum(sum(each.splits.values()) for each in data.images)
    with progress_line(total, "looking at pictures") as progress:
        parts = [look(each, available_cores(), progress) for each in data.images]
    names = tuple(name for part in parts for name in part.names)
    found = same_pictures(Looks(names, np.concatenate([part.thumbnails for part in parts])))
    pairs = sorted(found, key=lambda pair: (pair.first.image_id, pair.second.image_id))
    for pair in pairs:
        keep(pair)
    read = f"{len(names):,} pictures compared by their pixels, none is in two splits"
    yield pictures_row(
        "pictures", pairs, read if len(names) == total else f"{read}; {total - len(names)} cannot be read", len(names)
    )


def pictures_row(check: str, pairs: Sequence[Pair], fine: str, looked_at: int) -> Row:
    """Whether the same pictures are in two splits, with some of them."""
    if not pairs:
        return ok(check, fine, pictures=looked_at, in_two_splits=0)
    some = "; ".join(
        f"{pair.first.split}/{pair.first.file_name} is {pair.second.split}/{pair.second.file_name}"
        for pair in pairs[:SHOWN]
    )
    more = f" and {len(pairs) - SHOWN} more" if len(pairs) > SHOWN else ""
    mend = "take them out of one of the splits and prepare again; --json FILE names all"
    found = f"{len(pairs)} of {looked_at:,} pictures are in two splits: {some}{more}"
    return failed(check, found, mend, pictures=looked_at, in_two_splits=len(pairs))


def check_captions(data: Data) -> Iterator[Row]:
    """Held-out captions that stand in the training captions."""
    rule = CaptionTokenizer.load(data.vocabulary).word_rule if data.vocabulary else "basic"
    found = repeated_captions(data.sets, data.train, data.held_out, rule)
    share = found.repeated / max(found.captions, 1)
    said = f"{found.repeated:,} of {found.captions:,} held-out captions ({share:.1%}) stand word by word in training"
    values = {"captions": found.captions, "repeated": found.repeated, "wholly": len(found.wholly)}
    if found.wholly:
        some = ", ".join(f"{one} as {other}" for one, other in found.wholly[:SHOWN])
        said += f"; {len(found.wholly)} held-out images have all captions of a training image ({some})"
        yield warning("captions", said, "look whether these are the same pictures under two ids", **values)
    elif share > MUCH:
        mend = "tell it beside the scores: a copy of the nearest training caption scores well here"
        yield warning("captions", said, mend, **values)
    else:
        yield ok("captions", said, **values)


def check_vocabulary(data: Data) -> Iterator[Row]:
    """Words that can only come from held-out captions."""
    if data.vocabulary is None:
        yield warning("vocabulary", "none was given, so none was looked at", "name it: --vocabulary FILE")
        return
    found = words_beside(CaptionTokenizer.load(data.vocabulary), data.sets, data.train, data.held_out)
    said = f"{data.vocabulary}: {found.words:,} words"
    values = {"words": found.words, "only_held_out": len(found.only_held_out), "nowhere": found.nowhere}
    again = "make it of the training captions alone: preprocessing.build_vocab --split train"
    if found.only_held_out:
        some = ", ".join(found.only_held_out[:SHOWN])
        said += f", {len(found.only_held_out)} of which only held-out captions have ({some})"
        yield failed("vocabulary", said, again, **values)
    elif found.nowhere or found.missing:
        foreign = f", {found.nowhere} of which no caption has" * bool(found.nowhere)
        lacks = f"; it lacks {len(found.missing)} as frequent ones ({', '.join(found.missing[:SHOWN])})"
        said += foreign + lacks * bool(found.missing)
        yield warning("vocabulary", f"{said}: not made of these training captions by one count", again, **values)
    else:
        least = f"exactly those that occur at least {found.least} times in the training captions"
        yield ok("vocabulary", f"{said}, {least}", **values)


def check_statistics(data: Data) -> Iterator[Row]:
    """Mean and deviation of features, taken from training pictures alone."""
    for manifest in (each for each in data.sets if each.kind == "features"):
        named = manifest.fingerprint.get("statistics_splits")
        if named is None:
            yield ok("statistics", f"{manifest.root} does not say where they are from")
            continue
        used = [split for split in named if split in manifest.splits] or sorted(manifest.splits)
        foreign = [split for split in used if split in data.held_out]
        said = f"{manifest.root}: of {', '.join(used)}"
        if foreign and set(manifest.splits) & set(data.train):
            mend = "extract again with --statistics-split train: the features are standardised by held-out pictures"
            yield failed("statistics", said, mend)
        else:
            yield ok("statistics", said)


if __name__ == "__main__":
    run(main)
