"""Measure the loader against a raw sequential read of the same files and against stock webdataset, in one run.

Surprising: the loader's figure is that of whole training batches (a new order, every byte checked, captions as token
ids), the raw read only brings the files' bytes to memory: into as many buffers of a batch's size as the loader goes
through in turn, so that neither gains by what the CPU's cache still holds. "dropped" means dropped from this machine's
page cache; a host's may remain.
"""

import hashlib
import itertools
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import numpy.typing as npt
import typer
import xxhash

from sat import files
from sat.data.loader import SLOTS
from sat.shards.features import FeatureSpec
from sat.shards.manifest import write_manifest
from sat.shards.schema import SampleRow, Sidecar
from sat.shards.tables import write_sample_tables, write_shard_table
from sat.shards.tar import END_OF_TAR, sample_bytes

GRIDS = {"7x7": (7, 2048), "14x14": (14, 768)}
"""Side of the grid and the number of samples written, about 400 and 600 MB."""
DIM = 2048
BATCH = 64
WARM_UP = 4
"""Epochs before the measured ones: each worker encodes the captions of a sample when it first meets it."""


def run(
    folder: Annotated[
        Path | None, typer.Option(help="where to write 1 GB of shards; default: a temporary folder")
    ] = None,
    rounds: Annotated[int, typer.Option(help="runs of each contender; the median counts")] = 5,
    json_file: Annotated[Path | None, typer.Option("--json", help="write the rows to this file")] = None,
) -> list[dict[str, Any]]:
    """Samples/s of our loader, a raw read and stock webdataset: two grids, 0 and 2 workers, cache warm and dropped."""
    from sat.bench.harness import report

    rows = []
    with tempfile.TemporaryDirectory(dir=folder) as temporary:
        for name, (side, samples) in GRIDS.items():
            root = Path(temporary) / name
            write_shards(root, side, samples)
            for workers in (0, 2):
                for cache in ("warm", "dropped"):
                    rows.append(measure(root, workers, cache, rounds) | {"grid": name})
    rows = [{"grid": row.pop("grid")} | row for row in rows]
    report(rows, json_file)
    return rows


def write_shards(root: Path, side: int, samples: int, shard_size: int = 256, dim: int = DIM) -> None:
    """A finished feature data set of random fp16 grids."""
    spec = FeatureSpec("grid", (side, side), dim, "fp16", encoder=None, transform=None)
    random, fingerprint = np.random.default_rng(1), spec.to_fingerprint()
    numbers, captions = range(samples // shard_size), map(captions_of, itertools.cycle(range(shard_size)))
    sidecars = [write_shard(root, spec, number, shard_size, random, captions) for number in numbers]
    shards = write_sample_tables(root, sidecars)
    write_shard_table(root, shards)
    write_manifest(root, "features", fingerprint, shards)


def write_shard(
    root: Path,
    spec: FeatureSpec,
    number: int,
    samples: int,
    random: np.random.Generator,
    captions: Iterator[tuple[str, ...]],
    split: str = "train",
) -> Sidecar:
    """Write one shard of random grids with the next `captions`; returns what is known of it."""
    name, rows, digest = f"{split}-{number:06d}.tar", [], hashlib.sha256()
    with files.replacing(root / name) as temporary, open(temporary, "wb") as file:
        for index in range(samples):
            grid = random.integers(0, 1 << 14, spec.shape, dtype=np.uint16).view(np.float16)
            row = SampleRow(
                key=f"k{number}-{index}",
                image_id=f"k{number}-{index}",
                file_name=f"{index}.jpg",
                split=split,
                shard=name,
                offset=file.tell(),
                nbytes=0,
                xxh3=0,
                captions=next(captions),
                width=224,
                height=224,
                id_is_number=False,
            )
            blob = sample_bytes(
                row.key,
                {"npy": spec.npy_bytes(grid)},
                image_id=row.image_id,
                file_name=row.file_name,
                captions=row.captions,
                width=row.width,
                height=row.height,
                **spec.about_values,
            )
            rows.append(replace(row, nbytes=len(blob), xxh3=xxhash.xxh3_64_intdigest(blob)))
            digest.update(blob)
            file.write(blob)
        digest.update(END_OF_TAR)
        file.write(END_OF_TAR)
        size = file.tell()
    return Sidecar(name, split, "", samples, size, digest.hexdigest(), tuple(rows), ())


def captions_of(index: int) -> tuple[str, ...]:
    """Five captions of 8 to 12 words."""
    words = ["a", "man", "rides", "two", "horses", "along", "the", "quiet", "beach", "at", "noon", "today"]
    return tuple(" ".join(words[(index + k) % 3 : 9 + k]) for k in range(5))


def measure(root: Path, workers: int, cache: str, rounds: int) -> dict[str, Any]:
    """One row: median samples/s of each contender, taking turns; MB/s of ours, and the checksums' share of its time."""
    shards = sorted(root.glob("*.tar"))
    ours = OurEpochs(root, workers, epochs=WARM_UP + rounds)
    samples = ours.samples
    megabytes = sum(path.stat().st_size for path in shards) / 1e6
    batch_bytes = int(megabytes * 1e6 * BATCH / samples)
    buffers = [np.ones(batch_bytes, np.uint8) for _ in range(SLOTS)]
    contenders: dict[str, Callable[[list[Path]], None]] = {
        "raw": lambda paths: read_raw(paths, buffers),
        "webdataset": lambda paths: read_webdataset(paths, workers),
    }
    rates: dict[str, list[float]] = {name: [] for name in ("ours", *contenders)}
    contenders["webdataset"](shards[: max(workers, 1)])  # imports
    for _ in range(WARM_UP):
        ours.samples_per_s()
    for _ in range(rounds):
        prepare_cache(shards, cache)
        rates["ours"].append(ours.samples_per_s())
        for name, contender in contenders.items():
            prepare_cache(shards, cache)
            began = time.perf_counter()
            contender(shards)
            rates[name].append(samples / (time.perf_counter() - began))
    rate = {name: statistics.median(values) for name, values in rates.items()}
    return {
        "workers": workers,
        "cache": cache,
        "samples_per_s": rate["ours"],
        "raw_samples_per_s": rate["raw"],
        "webdataset_samples_per_s": rate["webdataset"],
        "mb_per_s": rate["ours"] / samples * megabytes,
        "of_raw": rate["ours"] / rate["raw"],
        "of_webdataset": rate["ours"] / rate["webdataset"],
        "checksum_share": rate["ours"] * checksum_seconds(batch_bytes // BATCH) / max(workers, 1),
    }


def checksum_seconds(nbytes: int, repeats: int = 200) -> float:
    """Seconds that the checksum of `nbytes` takes where they were just read, as the reader's are."""
    data = np.ones(nbytes, np.uint8)
    began = time.perf_counter()
    for _ in range(repeats):
        xxhash.xxh3_64_intdigest(data.data)
    return (time.perf_counter() - began) / repeats


def prepare_cache(shards: list[Path], cache: str) -> None:
    """Bring the shards into the page cache, or drop them from it."""
    if cache == "warm":
        read_raw(shards, [np.ones(1 << 20, np.uint8)])
        return
    for path in shards:
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def read_raw(shards: list[Path], buffers: list[npt.NDArray[np.uint8]]) -> None:
    """Read all files from start to end into the buffers, one after the other and again from the first."""
    turns = itertools.cycle(buffers)
    for path in shards:
        with open(path, "rb", buffering=0) as file:
            while file.readinto(next(turns).data):
                pass


class OurEpochs:
    """Our loader over several epochs, each in another order, timed one at a time."""

    def __init__(self, root: Path, workers: int, epochs: int):
        from sat.data.loader import Reading, read_references, training_batches
        from sat.data.options import LoaderOptions
        from sat.data.plan import Cursor
        from sat.shards.manifest import load_manifest
        from sat.text import build_tokenizer

        sources = [(load_manifest(str(root)), 1.0)]
        captions = read_references(sources[0][0], "train")
        self.samples = len(captions)
        self._ready = 2 * workers
        self._batches = training_batches(
            sources,
            build_tokenizer([text for texts in captions.values() for text in texts], 1),
            Reading(LoaderOptions(num_workers=workers)),
            splits=["train"],
            cursor=Cursor.start(sources, 1),
            epochs=epochs,
            global_batch=BATCH,
        )

    def samples_per_s(self) -> float:
        """Rate over the next epoch, without the batches that the workers had ready while they waited."""
        batches = -(-self.samples // BATCH)
        for batch in itertools.islice(self._batches, self._ready):
            del batch
        counted, began = 0, time.perf_counter()
        for batch in itertools.islice(self._batches, batches - self._ready):
            counted += len(batch.sample_keys)
        return counted / (time.perf_counter() - began)


def read_webdataset(shards: list[Path], workers: int) -> None:
    """webdataset as its documentation shows it: decode, tuples, batches in the workers."""
    import webdataset

    urls = [str(path) for path in shards]
    dataset = webdataset.WebDataset(urls, shardshuffle=False).decode().to_tuple("npy", "json").batched(BATCH)
    for _ in webdataset.WebLoader(dataset, batch_size=None, num_workers=workers):
        pass
