"""One process's share of an extraction: reads verified pictures, runs the network, writes feature shards.

The surprising decision: the network has threads of its own, fed by two shards that are under way at once. While they
compute, the others decode, resize, write, sync and hash; they wait for nothing but the first batch. On a CPU two of
them share the cores, a batch each: one that had all cores would stand still as a whole whenever another thread takes
one of them. The features are the same bits. torch is imported when the first picture is there.
"""

import os
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path
from queue import SimpleQueue
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
import xxhash

from preprocessing.features.recipe import FeatureRecipe
from preprocessing.features.statistics import ChannelSums, restore, store
from preprocessing.features.weights import check_planned
from preprocessing.sharding.made_on import MADE_ON, made_on
from preprocessing.sharding.plan import FeatureSettings, ImageRecord, Plan, PlannedShard
from preprocessing.sharding.rebuild import Before, as_before
from preprocessing.sharding.write import Sample, write_shard
from sat.machine import available_cores
from sat.shards.location import read_retrying
from sat.shards.manifest import Manifest
from sat.shards.pictures import BadPicture, PixelBudget, decode, fit
from sat.shards.schema import SampleRow, Sidecar, sample_rows
from sat.shards.tar import read_members

BATCHES_AT_ONCE = 2
"""In the network on a CPU."""

Item = TypeVar("Item")
Outcome = TypeVar("Outcome")
Pixels = npt.NDArray[np.uint8]
Grids = npt.NDArray[Any]
"""float32 or a stored type."""


class Extractor:
    """Makes feature shards of one plan on one device; a context manager, its threads end with it."""

    def __init__(
        self,
        plan: Plan,
        recipe: FeatureRecipe,
        source: Manifest,
        scale: npt.NDArray[np.float32],
        device: str = "cpu",
        decode_threads: int = 2,
    ):
        """`recipe` is the plan's, `source` the image data set, `scale` [D] the int8 scale."""
        self.plan, self.recipe, self.source, self.scale, self.device = plan, recipe, source, scale, device
        self.settings = plan.settings_as(FeatureSettings)
        self.decoding = ThreadPoolExecutor(decode_threads, thread_name_prefix="decode")
        self.computing = _network_threads(device)
        self.room = PixelBudget()
        self.before: Mapping[str, Before] | None = None
        """Of shards that are built again."""
        self.progress: Callable[[int], None] = lambda images: None
        self.network: Callable[[Pixels], Grids] | None = None
        self.loading = threading.Lock()

    def __enter__(self) -> "Extractor":
        return self

    def __exit__(self, *exception: object) -> None:
        self.decoding.shutdown(cancel_futures=True)
        self.computing.shutdown(cancel_futures=True)
        if self.network is not None:
            import torch

            torch.set_num_threads(torch.get_num_threads())  # later threads follow the last call

    def build(self, plan: Plan, shard: PlannedShard) -> Sidecar:
        """Write one feature shard; returns its sidecar.

        Raises ValueError naming shard and key of a damaged picture, and of one that is not as it was `before`.
        """
        sums, here = ChannelSums(self.recipe.spec.dim), partial(made_on, self.device)
        samples = as_before(self._samples(shard, sums), self.before, plan.root / shard.name, here)
        return write_shard(
            plan.root, shard, plan.digest, samples, extra=lambda: sums.extra(shard.name) | {MADE_ON: here()}
        )

    def first_grids(self, split: str, count: int) -> Iterator[npt.NDArray[np.float32]]:
        """float32 grids [B, L, D] of the first `count` pictures of a split, in the order of the shards."""
        for index in self.source.shards.of_split(split):
            rows = sample_rows(self.source.rows(index))[:count]
            count -= len(rows)
            for _, grids in self._grids(rows):
                yield grids if grids.dtype == np.float32 else restore(grids, "bf16")
            if count <= 0:
                return

    def _samples(self, shard: PlannedShard, sums: ChannelSums) -> Iterator[Sample]:
        spec, index = self.recipe.spec, self.plan.index(shard)
        for rows, grids in self._grids(sample_rows(self.source.rows(index))):
            if spec.dtype == "int8":
                sums.add_clipped(grids if grids.dtype == np.float32 else restore(grids, "bf16"), self.scale)
            grids = self._to_stored(grids)
            values = restore(grids, spec.dtype, self.scale)
            sums.add(values)
            if not sums.finite:
                self._refuse_infinite(shard, rows, values)
            for row, grid in zip(rows, grids, strict=True):
                yield Sample(_record(row), spec.npy_bytes(grid), "npy", row.width, row.height, about=spec.about_values)
            self.progress(len(rows))

    def _refuse_infinite(self, shard: PlannedShard, rows: Sequence[SampleRow], values: Grids) -> None:
        """ValueError, with their number, for pictures whose float32 features [B, L, D] are not finite as stored."""
        bad = [row for row, grid in zip(rows, values, strict=True) if not np.isfinite(grid).all()]
        if bad:
            raise ValueError(
                f"{shard.name}: the features of {len(bad)} of {len(rows)} pictures are not finite in "
                f"{self.recipe.spec.dtype}, the first is key {bad[0].key} ({bad[0].file_name}); "
                "extract with --dtype bf16 or fp32, or look at the weights"
            )

    def _to_stored(self, grids: Grids) -> Grids:
        """What the network gave (float32, or bf16 as bits) in the format on disk."""
        dtype = self.recipe.spec.dtype
        if grids.dtype != np.float32:
            if dtype == "bf16":
                return grids
            grids = restore(grids, "bf16")
        return store(grids, dtype, self.scale)

    def _grids(self, rows: Sequence[SampleRow]) -> Iterator[tuple[Sequence[SampleRow], Grids]]:
        """(rows, grids [B, L, D]) batch by batch; pictures are decoded two batches ahead, computed one ahead."""
        size = self.recipe.batch_size
        groups = [rows[start : start + size] for start in range(0, len(rows), size)]
        pictures = in_flight(self.decoding, self._picture, rows, ahead=2 * size)
        stacked: Iterator[Pixels] = (np.stack([next(pictures) for _ in group]) for group in groups)
        yield from zip(groups, in_flight(self.computing, self._compute, stacked, ahead=1), strict=True)

    def _picture(self, row: SampleRow) -> Pixels:
        """The picture of a row, checked against its digest, as the encoder sees it: uint8 [S, S, 3]."""
        blob = _read_range(Path(self.source.root) / row.shard, row.offset, row.nbytes)
        where = f"{self.source.root}/{row.shard}: key {row.key}"
        if xxhash.xxh3_64_intdigest(blob) != row.xxh3:
            raise ValueError(
                f"{where} does not have the bytes that were written; run preprocessing.verify_shards --repair"
            )
        members = read_members(blob, where)
        data = next(data for extension, data in members.items() if extension != "json")
        transform = self.recipe.transform
        try:
            with self.room.of(data):
                return fit(decode(data), transform.size, transform.geometry, transform.interpolation)
        except BadPicture as error:  # decoded when it was sharded, so by another version of the decoder
            raise ValueError(f"{where} cannot be decoded here: {error}") from None

    def _compute(self, pictures: Pixels) -> Grids:
        """uint8 [B, S, S, 3] -> grids [B, L, D]: float32, or bf16 as uint16 bits."""
        with self.loading:
            if self.network is None:
                self.network = self._load()
        return self.network(pictures)

    def _load(self) -> Callable[[Pixels], Grids]:
        from preprocessing.features.network import load_network

        encoder, weights = self.recipe.encoder, Path(self.settings.weights)
        check_planned(weights, encoder.weights_sha256)
        options = (self.recipe.transform.size, self.recipe.compute, self.device, self.plan.samples)
        return load_network(weights, encoder.stage, *options)


def _network_threads(device: str) -> ThreadPoolExecutor:
    """Of a CPU each with its share of the cores, of which none is left over."""
    if device != "cpu":
        return ThreadPoolExecutor(1, thread_name_prefix="network")
    cores = available_cores()
    count = min(BATCHES_AT_ONCE, cores)
    shares: SimpleQueue[int] = SimpleQueue()
    for number in reversed(range(count)):
        shares.put((cores + number) // count)
    return ThreadPoolExecutor(count, thread_name_prefix="network", initializer=_take_share, initargs=(shares,))


def _take_share(shares: "SimpleQueue[int]") -> None:
    import torch

    torch.set_num_threads(min(shares.get(), torch.get_num_threads()))


def _record(row: SampleRow) -> ImageRecord:
    """The picture of a row, as it goes into the shard of its features."""
    about = (row.image_id, row.file_name, row.split, row.captions, row.key)
    return ImageRecord(*about, id_is_number=row.id_is_number)


def in_flight(
    executor: Executor, function: Callable[[Item], Outcome], items: Iterable[Item], ahead: int
) -> Iterator[Outcome]:
    """`map` on an executor, in order, with `ahead` calls under way beyond the one waited for."""
    futures: deque[Future[Outcome]] = deque()
    for item in items:
        futures.append(executor.submit(partial(function, item)))
        if len(futures) > ahead:
            yield futures.popleft().result()
    while futures:
        yield futures.popleft().result()


def _read_range(path: Path, offset: int, nbytes: int) -> bytes:
    def read() -> bytes:
        with open(path, "rb", buffering=0) as file:
            return os.pread(file.fileno(), nbytes, offset)

    return read_retrying(str(path.parent), path.name, read)
