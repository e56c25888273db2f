"""One process's share of an extraction: reads verified pictures, runs the network, writes feature shards.

The surprising decision: the network has a thread of its own, fed by two shards that are under way at once. While it
computes, the others decode, resize, write, sync and hash; it waits for nothing but the first batch. torch is imported
when the first picture is there.
"""

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import TypeVar

import numpy as np
import xxhash

from preprocessing.features.statistics import ChannelSums, restore, store
from preprocessing.features.weights import check_planned
from preprocessing.sharding.plan import Plan
from preprocessing.sharding.write import PlannedShard, Sample, write_shard
from sat.shards.features import FeatureSpec
from sat.shards.manifest import Manifest
from sat.shards.pictures import BadPicture, decode, fit
from sat.shards.tar import read_members

In, Out = TypeVar("In"), TypeVar("Out")


class Extractor:
    """Makes feature shards of one plan on one device; a context manager, its threads end with it."""

    def __init__(self, plan: Plan, source: Manifest, scale: np.ndarray, device: str = "cpu", decode_threads: int = 2):
        """`source` is the image data set, `scale` [D] the int8 scale, `decode_threads` how many decode."""
        self.plan, self.source, self.scale, self.device = plan, source, scale, device
        self.dtype, self.compute = plan.fingerprint["dtype"], plan.fingerprint["compute"]
        self.transform = plan.fingerprint["transform"]
        self.spec = FeatureSpec.from_fingerprint(plan.fingerprint)
        self.decoding = ThreadPoolExecutor(decode_threads, thread_name_prefix="decode")
        self.computing = ThreadPoolExecutor(1, thread_name_prefix="network")
        self.progress: Callable[[int], None] = lambda images: None
        self.network: Callable[[np.ndarray], np.ndarray] | None = None

    def __enter__(self) -> "Extractor":
        return self

    def __exit__(self, *exception: object) -> None:
        self.decoding.shutdown(cancel_futures=True)
        self.computing.shutdown(cancel_futures=True)

    def build(self, plan: Plan, shard: PlannedShard) -> dict:
        """Write one feature shard; returns its sidecar. Raises ValueError naming shard and key of a damaged picture."""
        sums = ChannelSums(plan.fingerprint["dim"])
        return write_shard(plan.root, shard, plan.digest, self._samples(shard, sums), extra=sums.to_json)

    def first_grids(self, split: str, count: int) -> Iterator[np.ndarray]:
        """float32 grids [B, L, D] of the first `count` pictures of a split, in the order of the shards."""
        for index in self.source.shards.of_split(split):
            rows = self.source.rows(index).to_pylist()[:count]
            count -= len(rows)
            for _, grids in self._grids(rows):
                yield grids if grids.dtype == np.float32 else restore(grids, "bf16")
            if count <= 0:
                return

    def _samples(self, shard: PlannedShard, sums: ChannelSums) -> Iterator[Sample]:
        index = self.plan.shards.index(shard)
        for rows, grids in self._grids(self.source.rows(index).to_pylist()):
            grids = self._to_stored(grids)
            sums.add(restore(grids, self.dtype, self.scale))
            for row, grid in zip(rows, grids, strict=True):
                about = {name: row[name] for name in ("key", "image_id", "file_name", "width", "height")}
                yield Sample(**about, captions=tuple(row["captions"]), extension="npy", data=self.spec.npy_bytes(grid))
            self.progress(len(rows))

    def _to_stored(self, grids: np.ndarray) -> np.ndarray:
        """What the network gave (float32, or bf16 as bits) in the format on disk."""
        if grids.dtype != np.float32:
            if self.dtype == "bf16":
                return grids
            grids = restore(grids, "bf16")
        return store(grids, self.dtype, self.scale)

    def _grids(self, rows: list[dict]) -> Iterator[tuple[list[dict], np.ndarray]]:
        """(rows, grids [B, L, D]) batch by batch; pictures are decoded two batches ahead, computed one ahead."""
        size = self.plan.settings["batch_size"]
        groups = [rows[start : start + size] for start in range(0, len(rows), size)]
        pictures = in_flight(self.decoding, self._picture, rows, ahead=2 * size)
        stacked = (np.stack([next(pictures) for _ in group]) for group in groups)
        yield from zip(groups, in_flight(self.computing, self._compute, stacked, ahead=1), strict=True)

    def _picture(self, row: dict) -> np.ndarray:
        """The picture of a row, checked against its digest, as the encoder sees it: uint8 [S, S, 3]."""
        blob = _read_range(Path(self.source.root) / row["shard"], row["offset"], row["nbytes"])
        where = f"{self.source.root}/{row['shard']}: key {row['key']}"
        if xxhash.xxh3_64_intdigest(blob) != row["xxh3"]:
            raise ValueError(
                f"{where} does not have the bytes that were written; run preprocessing.verify_shards --repair"
            )
        members = read_members(blob, where)
        data = next(data for extension, data in members.items() if extension != "json")
        try:
            return fit(decode(data), self.transform["size"], self.transform["geometry"])
        except BadPicture as error:  # decoded when it was sharded, so by another version of the decoder
            raise ValueError(f"{where} cannot be decoded here: {error}") from None

    def _compute(self, pictures: np.ndarray) -> np.ndarray:
        """uint8 [B, S, S, 3] -> grids [B, L, D]: float32, or bf16 as uint16 bits."""
        if self.network is None:
            from preprocessing.features.network import load_network

            stage = self.plan.fingerprint["encoder"]["stage"]
            weights, size = self.plan.settings["weights"], self.transform["size"]
            check_planned(Path(weights), self.plan.fingerprint["encoder"]["weights_sha256"])
            self.network = load_network(weights, stage, size, self.compute, self.device, self.plan.samples)
        return self.network(pictures)


def in_flight(executor: Executor, function: Callable[[In], Out], items: Iterable[In], ahead: int) -> Iterator[Out]:
    """`map` on an executor, in order, with `ahead` calls under way beyond the one waited for."""
    futures: deque[Future] = deque()
    for item in items:
        futures.append(executor.submit(partial(function, item)))
        if len(futures) > ahead:
            yield futures.popleft().result()
    while futures:
        yield futures.popleft().result()


def _read_range(path: Path, offset: int, nbytes: int) -> bytes:
    with open(path, "rb", buffering=0) as file:
        return os.pread(file.fileno(), nbytes, offset)
