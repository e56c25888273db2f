"""Training captions -> the tokenizer file, and the statistics of words and lengths that the choice of settings needs.

    python -m preprocessing.build_vocab --features data/coco/features --out data/coco/tokenizer.json

The surprising decision: only the splits trained on are read. A vocabulary that has seen the test captions hides its
unknown words.
"""

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import numpy as np
import typer

from preprocessing.annotations.read import read_annotations
from preprocessing.console import refuse_urls, run
from sat import files
from sat.shards.manifest import load_manifest
from sat.shards.store import make_store
from sat.text import SPECIALS, WORD_RULES, CaptionTokenizer, build_tokenizer, count_words, looks_unsegmented, normalise


def captions_of(root: str, splits: list[str]) -> Iterator[str]:
    """Captions of the given splits of a finished data set. Raises ValueError when it has none of a split."""
    manifest, store = load_manifest(root), make_store(root)
    for split in splits:
        shards = manifest.shards.of_split(split)
        if not shards:
            raise ValueError(f"{root} has no split {split!r}; it has {', '.join(manifest.splits)}")
        for index in shards:
            for captions in store.rows(manifest, index)["captions"].to_pylist():
                yield from captions


def caption_statistics(captions: list[str], tokenizer: CaptionTokenizer) -> dict[str, float]:
    """Counts of captions, words and the vocabulary, the share of words it covers, and caption lengths in words."""
    rule = tokenizer.word_rule
    lengths = np.array([len(normalise(caption, rule).split()) for caption in captions])
    counts = count_words(captions, rule)
    known = set(tokenizer.words[len(SPECIALS) :])
    covered = sum(count for word, count in counts.items() if word in known)
    return {
        "captions": len(captions),
        "words": int(lengths.sum()),
        "distinct_words": len(counts),
        "vocabulary": len(known),
        "coverage": covered / max(int(lengths.sum()), 1),
        "length_mean": float(lengths.mean()),
        "length_std": float(lengths.std()),
        "length_min": int(lengths.min()),
        "length_median": float(np.median(lengths)),
        "length_95_percent": float(np.percentile(lengths, 95)),
        "length_max": int(lengths.max()),
    }


def warn_of_sentences(captions: list[str], words: str) -> bool:
    """Say on standard error that the "words" are sentences, and which setting splits them; whether they are."""
    counts = count_words(captions, words)
    if not looks_unsegmented(counts):
        return False
    longest = max(counts, key=lambda word: (len(word), word))[:40]
    way_out = "split them and use --words none" if words == "characters" else "use --words characters, or split them"
    print(
        f"warning: the words look like sentences, e.g. {longest!r}: this script is written without spaces? {way_out}",
        file=sys.stderr,
    )
    return True


def main(
    out: Annotated[Path | None, typer.Option(help="tokenizer file; without it only the statistics are printed")] = None,
    features: Annotated[list[str] | None, typer.Option(help="folder or URL of feature shards")] = None,
    images: Annotated[list[str] | None, typer.Option(help="folder or URL of image shards")] = None,
    annotations: Annotated[list[str] | None, typer.Option(help="annotation file, as for shard_images")] = None,
    min_count: Annotated[int, typer.Option(min=1, help="words seen less often become <unk>")] = 5,
    words: Annotated[str, typer.Option(help=f"what a word is: {', '.join(WORD_RULES)}")] = "basic",
    splits: Annotated[list[str] | None, typer.Option(help="split to read; default: train")] = None,
    statistics: Annotated[Path | None, typer.Option(help="write the statistics to this JSON file as well")] = None,
) -> None:
    """Build the vocabulary of the training captions; equal captions give an equal file."""
    refuse_urls(out, statistics)
    if not (features or images or annotations):
        raise ValueError("name the captions with --features, --images or --annotations")
    splits = splits or ["train"]
    captions = [caption for root in (features or []) + (images or []) for caption in captions_of(root, splits)]
    if annotations:
        records = read_annotations(annotations).images
        captions += [caption for record in records if record.split in splits for caption in record.captions]
    if not captions:
        raise ValueError(f"there is no caption in the splits {', '.join(splits)}")
    tokenizer = build_tokenizer(captions, min_count, words)
    if tokenizer.vocab_size == len(SPECIALS):
        raise ValueError(f"no word occurs {min_count} times in {len(captions)} captions; lower --min-count")
    warn_of_sentences(captions, words)
    found = caption_statistics(captions, tokenizer)
    for name, value in found.items():
        print(f"{name:18} {value:,.3f}" if isinstance(value, float) else f"{name:18} {value:,}")
    if statistics is not None:
        files.write_json(statistics, found)
    if out is not None:
        tokenizer.save(out)
        about = f"{tokenizer.vocab_size} ids ({len(SPECIALS)} special), words {words}, digest {tokenizer.digest[:12]}"
        print(f"{out}: {about}")


if __name__ == "__main__":
    run(main)
