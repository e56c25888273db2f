"""Anybody's pictures and captions -> all that a training needs, in one command: `sat prepare DATA --out DIR`.

    DIR/prepare.json      says that the folder is ours, and what of it was written by us
    DIR/unpacked          pictures of containers (Parquet, tar); may be deleted when all is done
    DIR/images            image shards
    DIR/features          feature shards
    DIR/tokenizer.json    the vocabulary of the training captions
    DIR/config.yaml       settings fit for the size of the data; DIR/run is where the training goes

Each part is reused where it is whole, so the command can be interrupted and repeated. The surprising decision: a folder
that holds anything else is refused as DIR, and a file that was edited since is kept: what is a user's stays.
"""

import os
import shlex
from collections import Counter
from pathlib import Path
from typing import Annotated

import numpy as np
import typer

from preprocessing.annotations.formats import AUTO, FORMATS
from preprocessing.annotations.read import Records, explain, read_annotations
from preprocessing.build_vocab import caption_statistics, captions_of, warn_of_sentences
from preprocessing.console import refuse_urls, run
from preprocessing.extract_features import main as extract_features
from preprocessing.lint import gather, lint
from preprocessing.preparing.discover import Found, discover
from preprocessing.preparing.settings import FEW, Prepared, configuration, held_out, min_count
from preprocessing.shard_images import UNPACKED, plan_images, shard_stripe
from preprocessing.sharding.finalize import finalize
from sat import files
from sat.doctor.rows import OK
from sat.machine import available_cores
from sat.shards.manifest import Manifest, load_manifest
from sat.text import SPECIALS, WORD_RULES, build_tokenizer, normalise

MARK, CONFIG, TOKENIZER = "prepare.json", "config.yaml", "tokenizer.json"
IMAGES, FEATURES = "images", "features"
SHARD_SIZE = 1000
SHOWN = 4
"""Files of which --explain shows pictures."""
FEW_SCORED = 50
"""Pictures of val below which scores mean nothing."""


def claim(out: Path, data: Path) -> None:
    """Make `out` ours; ValueError where it is the data itself or holds what we did not write."""
    if out.exists() and not out.is_dir():
        raise ValueError(f"--out {out} is a file; name a folder of its own")
    if data.exists() and out.exists() and out.samefile(data):
        raise ValueError(f"--out {out} is the folder of the data; name one of its own, e.g. {data / 'prepared'}")
    if not (out / MARK).exists():
        if out.exists() and any(out.iterdir()):
            raise ValueError(f"--out {out} holds other things already; name a folder that is new or empty")
        files.write_json(out / MARK, {"made_by": "sat prepare", "written": {}})


def write_ours(out: Path, name: str, text: str) -> None:
    """Write a file unless it has been edited since we wrote it, which is said."""
    mark, path = files.read_json(out / MARK), out / name
    written = mark.get("written") or {}
    if path.exists() and files.sha256(path) != written.get(name):
        if path.read_text() != text:
            print(f"{path}: kept, as it was edited; delete it to have it made anew")
        return
    # The mark first: after a kill between the two the next run writes the file again.
    files.write_json(out / MARK, mark | {"written": written | {name: files.sha256_of(text)}})
    files.write_text(path, text)


def read_data(found: Found, root: Path, out: Path, split_lists: list[str], keep_rejected: bool) -> Records:
    """The records of what was found, a part held out by rule. Raises ValueError where nobody could learn from them."""
    records = read_annotations(
        found.annotations,
        found.format,
        image_root=root,
        split_lists=[*found.split_lists, *split_lists],
        hold_out=held_out,
        unpack_to=out / UNPACKED,
        keep_rejected=keep_rejected,
    )
    splits = Counter(record.split for record in records.images)
    for note, count in records.notes.items():
        print(f"noted: {count} {note}")
    captioned = any(record.captions for record in records.images)
    if captioned and not (splits["train"] and splits["val"]):
        raise ValueError(
            f"the pictures are {dict(splits)}: a training needs at least one of train and one of val; add pictures, "
            "or name the splits with --annotations train=FILE --annotations val=FILE"
        )
    if captioned and splits["val"] < FEW_SCORED:
        print(f"{splits['val']} pictures to score on: this shows that everything works, the scores mean nothing")
    if captioned and splits["train"] < FEW:
        print(f"{splits['train']} training pictures are few: start from a trained model (train.start_from=RUN)")
    return records


def make_images(records: Records, out: Path, max_bad_fraction: float, overwrite: bool) -> Manifest:
    """Image shards of the records."""
    assert records.root is not None, "files were looked for"
    plan = plan_images(
        records,
        records.root,
        out / IMAGES,
        shard_size=SHARD_SIZE,
        seed=1,
        max_bad_fraction=max_bad_fraction,
        overwrite=overwrite,
    )
    print(f"{out / IMAGES}: {plan.samples} pictures planned, {len(plan.left_out)} left out")
    cores = available_cores() if plan.samples > SHARD_SIZE else 1
    summary = shard_stripe(plan, num_workers=cores, max_bad_fraction=max_bad_fraction)
    print(f"{out / IMAGES}: {summary.line()}")
    manifest = finalize(plan, max_bad_fraction=max_bad_fraction)
    for reason, count in manifest.left_out.items():
        print(f"left out: {count} {reason} (named in {out / IMAGES / 'left_out.jsonl'})")
    return manifest


def make_vocabulary(out: Path, splits: list[str], words: str) -> None:
    """The vocabulary of the training captions, unless somebody has put another there."""
    captions = list(captions_of(str(out / FEATURES), splits))
    warn_of_sentences(captions, words)
    tokenizer = build_tokenizer(captions, min_count(len(captions)), words)
    if tokenizer.vocab_size == len(SPECIALS):
        raise ValueError(f"no word occurs {min_count(len(captions))} times in {len(captions)} captions; check them")
    new = files.temporary_name(out / TOKENIZER, out)
    try:
        tokenizer.save(new)
        write_ours(out, TOKENIZER, new.read_text())
    finally:
        new.unlink(missing_ok=True)
    found = caption_statistics(captions, tokenizer)
    seen = f"{found['coverage']:.1%} of {found['words']:,} words; {words}, at least {min_count(len(captions))} times"
    print(f"{out / TOKENIZER}: {found['vocabulary']:,} words, {seen}")


def make_configuration(out: Path, records: Records, splits: list[str], words: str) -> None:
    """Settings fit for the size of the data."""
    learnt = [record for record in records.images if record.split in splits]
    lengths = [len(normalise(text, words).split()) for record in learnt for text in record.captions]
    text = configuration(
        Prepared(
            out=Path(os.path.abspath(out)),
            train_splits=tuple(splits),
            pictures=len(learnt),
            captions=len(lengths),
            captions_per_image=max(len(record.captions) for record in learnt),
            longest=int(np.percentile(lengths, 95)),
        )
    )
    write_ours(out, CONFIG, text)


def warn_of_leaks(out: Path) -> None:
    """Say what the splits share that would flatter a model, once for each set of pictures: see `sat lint`."""
    mark, digest = files.read_json(out / MARK), load_manifest(out / IMAGES).digest
    if mark.get("linted") == digest:
        return
    for row in lint(gather([str(out)], [], None)):
        if row.state != OK:
            print(row.text())
    files.write_json(out / MARK, mark | {"linted": digest})


def say_next(out: Path, captioned: bool, splits: dict[str, int], picture: Path) -> None:
    """The commands to type now."""
    place = shlex.quote(str(out))
    if not captioned:
        print("\nThere are no captions to learn from. Caption the pictures with a trained model:")
        print(f"  sat caption {shlex.quote(str(picture.parent))} --model RUN --out captions")
        return
    score = "test" if splits.get("test") else "val"
    print(f"\n{dict(splits)} are ready. Now type:\n  sat train {place}/{CONFIG}")
    print(f"then\n  sat evaluate {place}/run --split {score} --baselines")
    print(f"  sat caption {shlex.quote(str(picture))} --model {place}/run --out captions")


def main(
    data: Annotated[Path, typer.Argument(help="folder of pictures and captions, or a file of captions")],
    out: Annotated[Path | None, typer.Option(help="folder for everything that is made")] = None,
    explained: Annotated[
        bool, typer.Option("--explain", help="only say what DATA is taken for and why, and show three pictures")
    ] = False,
    annotations: Annotated[
        list[str] | None, typer.Option(help="FILE or SPLIT=FILE, instead of what is found in DATA")
    ] = None,
    images: Annotated[Path | None, typer.Option(help="folder of the pictures; default: DATA, or DATA's folder")] = None,
    split: Annotated[list[str] | None, typer.Option(help="SPLIT=FILE, a list of file names")] = None,
    format: Annotated[str, typer.Option(help=f"{AUTO}, or one of {', '.join(FORMATS)}")] = AUTO,
    weights: Annotated[str, typer.Option(help="encoder: lite0, lite2, imagenet or a safetensors file")] = "lite0",
    size: Annotated[int, typer.Option(help="side of the encoder's input")] = 224,
    words: Annotated[str, typer.Option(help=f"what a word is: {', '.join(WORD_RULES)}")] = "basic",
    keep_rejected: Annotated[bool, typer.Option(help="keep VizWiz's rejected and pre-canned captions")] = False,
    max_bad_fraction: Annotated[float, typer.Option(min=0, max=1, help="share that may be left out")] = 0.25,
    overwrite: Annotated[bool, typer.Option(help="make shards anew that were made of other data")] = False,
) -> None:
    """Pictures and captions of any layout -> shards, features, vocabulary, splits, settings; says what to type next."""
    refuse_urls(out, data, images)
    normalise("", words)  # an unknown rule is refused before any work
    if explained:
        found = discover(data, format) if data.is_dir() else Found((str(data),), (), format, ())
        shown = [explain(path, format) for path in found.annotations[:SHOWN]]
        more = [f"and {len(found.annotations) - SHOWN} further files"] * (len(found.annotations) > SHOWN)
        print("\n".join([*(line for line in found.said if ": taken for " not in line), *shown, *more]))
        return
    if out is None:
        raise ValueError("name the folder for what is made with --out DIR")
    found = Found(tuple(annotations), (), format, ()) if annotations else discover(data, format)
    print("\n".join(found.said))
    claim(out, data)
    root = images or (data if data.is_dir() else data.parent)
    records = read_data(found, root, out, split or [], keep_rejected)
    manifest = make_images(records, out, max_bad_fraction, overwrite)
    extract_features(out=out / FEATURES, images=out / IMAGES, weights=weights, size=size, overwrite=overwrite)
    captioned = any(record.captions for record in records.images)
    assert records.root is not None, "files were looked for"
    if captioned:
        splits = [name for name in ("train", "restval") if manifest.splits.get(name)]
        make_vocabulary(out, splits, words)
        make_configuration(out, records, splits, words)
        warn_of_leaks(out)
    say_next(out, captioned, manifest.splits, records.root / records.images[-1].file_name)


if __name__ == "__main__":
    run(main)
