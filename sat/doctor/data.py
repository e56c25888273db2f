"""The data sets of a run: whole, the same on every rank, enough for the ranks, and in words that the vocabulary has."""

import hashlib
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np

from sat.config import Config
from sat.doctor.rows import Row, attempted, counted, failed, ok, refused, sized, warning
from sat.doctor.together import Agreed, agreed
from sat.engine.processes import Processes
from sat.shards.location import REPAIR, open_file, read_recorded
from sat.shards.manifest import Manifest, check_files, load_manifest, load_statistics
from sat.shards.store import make_store
from sat.text import CaptionTokenizer, count_words
from sat.training_data import TrainingData, open_data

READ_SHARDS = 64
"""Shards of a split whose captions are read, spread over it: 64 of 1,000 pictures are enough for a share of words."""
COVERED, COVERED_ENOUGH = 0.5, 0.9
"""Shares of words in the vocabulary: below the first it is another data set's, below the second much is <unk>."""
CUT = 0.01
"""Share of captions that may be cut to `data.max_caption_length`."""
GB = 1e9


def roots(config: Config) -> list[str]:
    """The folders or URLs that a training reads."""
    return [config.data.features, *(extra.features for extra in config.data.extra)]


# ------------------------------------------------------------------ whole


def check_shards(config: Config, processes: Processes, full: bool) -> Iterator[Row]:
    """Each data set: the manifest and every size by rank 0, the same manifest on all ranks, all bytes with `full`.

    All ranks enter.
    """
    for root in roots(config):
        digests = processes.gather(_digest(root))
        if digests[0].startswith("-"):
            yield refused("shards", ValueError(digests[0][1:]))
            continue
        if others := _apart(digests):
            mend = "copy or mount the same data set on every machine, then run sat doctor on the same ranks again"
            yield failed("shards", f"{root} is not the same on all ranks: {others}", mend)
        if processes.is_main:
            yield from attempted("shards", partial(_sizes, root))
        if full and not others:
            yield from every_byte(load_manifest(root), processes)


def _digest(root: str) -> str:
    """Of the data set as this rank sees it; behind a dash why it cannot."""
    try:
        return load_manifest(root).digest
    except (ValueError, OSError) as error:
        return f"-{error}"


def _apart(digests: Sequence[str]) -> str:
    """Which ranks see another data set than rank 0; "" where none does."""
    different = [rank for rank, digest in enumerate(digests) if digest != digests[0]]
    if not different:
        return ""
    other = digests[different[0]]
    said = other[1:] if other.startswith("-") else f"its digest is {other[:12]}, that of rank 0 {digests[0][:12]}"
    return f"rank {', '.join(map(str, different[:8]))}: {said}"


def _sizes(root: str) -> Iterator[Row]:
    manifest = load_manifest(root)
    check_files(manifest)
    if manifest.kind == "features":
        load_statistics(manifest)
    size = sum(shard.bytes for shard in manifest.shards)
    splits = ", ".join(f"{name} {count:,}" for name, count in manifest.splits.items())
    said = f"{manifest.root}: {counted(len(manifest.shards), 'shard')}, {sized(size)}, every size as written; {splits}"
    yield ok("shards", said, gigabytes=size / GB)


def every_byte(manifest: Manifest, processes: Processes) -> Iterator[Row]:
    """Hash all shards again, shared by the ranks. All ranks enter."""
    mine = range(processes.rank, len(manifest.shards), processes.world_size)
    faults: list[str] = []
    for index in mine:
        shard = manifest.shards[index]
        try:
            with open_file(manifest.root, shard.name) as file:
                whole = hashlib.file_digest(file, "sha256").hexdigest() == shard.sha256
            manifest.rows(index)
        except (OSError, ValueError) as error:
            faults.append(f"{shard.name}: {error}")
            continue
        if not whole:
            faults.append(f"{shard.name}: not the bytes that were written")
    tables = sorted(manifest.files.items()) if processes.is_main else []
    for name, record in tables:
        try:
            read_recorded(manifest.root, name, record["sha256"], keep=False)
        except (OSError, ValueError) as error:
            faults.append(str(error))
    found = sorted(fault for part in processes.gather(faults) for fault in part)
    if found:
        more = f" and {len(found) - 5} more" if len(found) > 5 else ""
        yield failed("bytes", f"{manifest.root}: {'; '.join(found[:5])}{more}", REPAIR)
    else:
        yield ok(
            "bytes", f"{manifest.root}: all bytes of {counted(len(manifest.shards), 'shard')} are as they were written"
        )


# ------------------------------------------------------------------ enough


def check_opening(config: Config, processes: Processes) -> tuple[TrainingData | None, list[Row]]:
    """What a training opens before it begins, and the row that says whether it could. All ranks enter."""
    try:
        data = agreed(processes, lambda: open_data(config))
    except Agreed as error:  # whatever it is, it is what would end the training too
        return None, [refused("data", error)]
    said = (
        f"{data.steps_per_epoch:,} steps an epoch, {data.total_steps:,} in all; a vocabulary of "
        f"{data.tokenizer.vocab_size:,}; scored and saved every {data.eval_every:,} and {data.save_every:,} steps"
    )
    return data, [ok("data", said, steps=data.total_steps)]


def check_samples(config: Config, data: TrainingData, ranks: int) -> Iterator[Row]:
    """Whether the pictures are enough for the ranks."""
    splits = data.main.splits
    images = sum(splits[name] for name in config.data.train_splits)
    passes, scored = ranks * config.train.accumulation_steps, splits[config.data.eval_split]
    said = f"{images:,} pictures to learn from, {scored:,} to score on, {counted(ranks, 'rank')}"
    if images < passes:
        mend = f"use at most {counted(max(1, images // config.train.accumulation_steps), 'rank')}, or more data"
        yield failed("samples", f"{said}: some never have a picture", mend)
    elif scored < ranks:
        yield warning(
            "samples",
            f"{said}: some have nothing to score",
            f"use at most {counted(scored, 'rank')}, or another data.eval_split",
        )
    elif images < config.train.global_batch:
        mend = f"set train.global_batch to {max(passes, images // 10)} or so: it decides how often the weights move"
        yield warning("samples", f"{said}: an epoch is less than one batch of {config.train.global_batch}", mend)
    else:
        yield ok("samples", said)


# ------------------------------------------------------------------ words


@dataclass(frozen=True)
class Coverage:
    """How much of some captions a vocabulary has."""

    captions: int
    cut: int
    """Captions longer than are learnt."""
    words: int
    known: int
    unknown: Counter[str]

    @property
    def share(self) -> float:
        return self.known / max(self.words, 1)


def check_words(config: Config, data: TrainingData) -> Iterator[Row]:
    """The share of the words of training and evaluation captions that the vocabulary has."""
    for split in [*config.data.train_splits, config.data.eval_split]:
        captions = [text for texts in captions_of(config, data.main, split) for text in texts]
        yield _row_of_words(config, split, coverage(captions, data.tokenizer, config.data.max_caption_length))


def coverage(captions: Sequence[str], tokenizer: CaptionTokenizer, longest: int) -> Coverage:
    """Count the words of these captions."""
    counts = count_words(captions, tokenizer.word_rule)
    known = set(tokenizer.words)
    unknown = Counter({word: count for word, count in counts.items() if word not in known})
    cut = sum(len(tokenizer.encode(caption, longest + 1)) > longest for caption in captions)
    words = counts.total()
    return Coverage(len(captions), cut, words, words - unknown.total(), unknown)


def captions_of(config: Config, manifest: Manifest, split: str) -> Iterable[list[str]]:
    """The captions of a split's pictures, of at most `READ_SHARDS` shards spread over it."""
    store = make_store(manifest.root, config.data.cache_dir, config.data.cache_gb)
    shards = manifest.shards.of_split(split)
    chosen = np.unique(np.linspace(shards.start, shards.stop - 1, min(READ_SHARDS, len(shards))).round().astype(int))
    for shard in chosen.tolist():
        yield from store.rows(manifest, shard)["captions"].to_pylist()


def _row_of_words(config: Config, split: str, found: Coverage) -> Row:
    name = config.data.tokenizer
    unknown = ", ".join(word for word, _ in found.unknown.most_common(5))
    said = f"{split}: {found.share:.1%} of {found.words:,} words are in {name}"
    said += f"; the most frequent that are not: {unknown}" * bool(unknown)
    build = (
        f"build it from this data (python -m preprocessing.build_vocab --features {config.data.features} --out {name})"
    )
    learnt = split in config.data.train_splits
    more = ", with a lower --min-count" if learnt else "; what the training captions do not say cannot be learnt"
    if not found.words:
        return failed("words", f"{split}: its captions have no words", "look at the captions of this split")
    if found.share < COVERED:
        return failed("words", said, f"{build}, or name the one that belongs to it by data.tokenizer")
    if found.share < COVERED_ENOUGH:
        return warning("words", said, f"{build}{more}")
    if found.cut > CUT * found.captions:
        longer = f"{split}: {found.cut / found.captions:.1%} of the captions have more than "
        mend = "raise data.max_caption_length and eval.max_length"
        return warning("words", f"{longer}data.max_caption_length {config.data.max_caption_length} words", mend)
    return ok("words", said, share=found.share)
