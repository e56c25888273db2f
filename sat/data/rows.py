"""What the reader knows of samples: the rows of a bounded number of shards, and of all others where samples lie.

The surprising decision: of a set with more samples than are kept, the places and checksums of those met go, by number,
to a file without a name, and what a sample is, its own .json says, under the same checksum. So a run of 4 samples does
not cost the rows of the thousand in its shard, and a set of any size is read at one pace.
"""

import json
import logging
import os
import struct
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import xxhash

logger = logging.getLogger(__name__)

Value = TypeVar("Value")
Column = Sequence[Value] | Mapping[int, Value]
"""Values by the number of a sample within its shard."""

RECORD = struct.Struct("<4Q")
"""Offset, nbytes, xxh3, and the checksum of those three: zeros and halves are no records."""
VALUES = RECORD.size - 8


@dataclass(frozen=True)
class Rows:
    """Rows of one shard, made quick to index: all of them, or the one sample that was asked for."""

    shard: int
    """Its index in the manifest."""
    data_set: int
    """The first 64 bits of the data set's digest."""
    keys: Column[str]
    image_ids: Column[str]
    offsets: Column[int]
    nbytes: Column[int]
    xxh3: Column[int]
    captions: pa.ListArray | dict[int, list[str]]
    encoded: dict[int, tuple[npt.NDArray[np.int32], int]] = field(default_factory=dict)
    """Filled by `captions`: token ids of a sample's captions and the longest one's length, once they were encoded."""

    def texts(self, sample: int) -> list[str]:
        """The captions of a sample as they were given."""
        found = self.captions[sample]
        return found if isinstance(found, list) else found.as_py()

    @property
    def whole(self) -> bool:
        """Whether they are all rows of the shard; else it must be told what the sample is."""
        return not isinstance(self.captions, dict)

    def meet(self, sample: int, key: str, text: bytes) -> None:
        """Learn what a sample is from its verified .json. ValueError, KeyError or TypeError for another text."""
        assert isinstance(self.keys, dict) and isinstance(self.image_ids, dict) and isinstance(self.captions, dict)
        document = json.loads(text)
        self.keys[sample], self.image_ids[sample] = key, str(document["image_id"])  # a number, where it was one
        self.captions[sample] = document["captions"]


class Places:
    """Where the samples of a set lie, as far as they were met: 32 bytes each in a file that has no name.

    Processes that are forked share it, and it is gone with the last of them. Where the disk is full, no more is kept.
    """

    def __init__(self, counts: npt.NDArray[np.int64]):
        """counts: samples of each shard, int64 [number of shards]. OSError where no temporary file can be made."""
        self._begins = np.cumsum(counts) - counts
        self._file = tempfile.TemporaryFile(buffering=0)  # noqa: SIM115 it lives as long as this does

    def keep(self, shard: int, rows: Rows) -> None:
        """Keep the places of all samples of a shard."""
        records = np.zeros((len(rows.keys), RECORD.size // 8), "<u8")
        for column, values in enumerate((rows.offsets, rows.nbytes, rows.xxh3)):
            records[:, column] = np.fromiter(values, np.uint64)
        raw = memoryview(records.tobytes())
        records[:, -1] = [xxhash.xxh3_64_intdigest(raw[at : at + VALUES]) for at in range(0, len(raw), RECORD.size)]
        try:
            os.pwrite(self._file.fileno(), records.tobytes(), int(self._begins[shard]) * RECORD.size)
        except OSError as error:
            logger.debug("the places of samples are not kept: %s", error)

    def find(self, shard: int, sample: int) -> tuple[int, int, int] | None:
        """offset, nbytes and xxh3 of a sample; None where it was not met."""
        at = (int(self._begins[shard]) + sample) * RECORD.size
        record = os.pread(self._file.fileno(), RECORD.size, at)
        if len(record) < RECORD.size:
            return None
        offset, nbytes, xxh3, check = RECORD.unpack(record)
        return (offset, nbytes, xxh3) if check == xxhash.xxh3_64_intdigest(record[:VALUES]) else None
