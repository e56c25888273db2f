"""Read samples by byte range; every byte is checked against the manifest before anything uses it.

The surprising decision: plain `preadv` into the batch's own memory, not a memory map. It is as fast (one copy, no page
faults), and an I/O error or a truncated file is an exception that can be retried or named, where a map kills the
process. Nothing of a tar is interpreted: the manifest says where a sample lies, and headers are only compared with what
they must be.
"""

import logging
import math
import os
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import xxhash

from sat.data.rows import Places, Rows
from sat.shards.features import NPY_HEADER, npy_header
from sat.shards.manifest import Manifest
from sat.shards.ranges import Range
from sat.shards.retry import Result, io_error, retrying
from sat.shards.store import RemoteStore, ShardStore
from sat.shards.tar import TAR_BLOCK, content_of, name_in, read_members, size_in

logger = logging.getLogger(__name__)

PAYLOAD = TAR_BLOCK + NPY_HEADER
CACHED_ROWS = 200_000
"""Samples whose manifest rows and encoded captions are kept per process (about 1 kB each); of others, see `rows`."""


class BadSample(ValueError):
    """A sample whose bytes are not those that were written; the message names shard and key."""


class SampleReader:
    """Reads samples of one source. Cheap to make: shards, rows and files are opened when they are first needed."""

    def __init__(self, manifest: Manifest, store: ShardStore):
        self.manifest = manifest
        self.store = store
        self._retries = 0
        self._rows: OrderedDict[int, Rows] = OrderedDict()
        self._cached_rows = 0
        self._places = _places_of(manifest) if manifest.shards.samples.sum() > CACHED_ROWS else None
        self._files: dict[int, int] = {}
        self._head = memoryview(bytearray(PAYLOAD))
        self._tail = memoryview(bytearray(1 << 16))
        self._data_set = int(manifest.digest[:16], 16)
        self.spec = manifest.spec
        self._npy_header = b"" if self.spec is None else self.spec.npy_header
        """Comparing it spares parsing it (24 us a sample)."""
        self._whole = bytearray()
        """Room for a sample whose parts' sizes are not known beforehand."""

    def __reduce__(self) -> tuple[type["SampleReader"], tuple[Manifest, ShardStore]]:
        return SampleReader, (self.manifest, self.store)

    def __del__(self) -> None:
        for descriptor in self._files.values():
            os.close(descriptor)

    @property
    def retries(self) -> int:
        """I/O errors so far that another attempt overcame."""
        return self._retries + self.store.retries

    def rows(self, shard: int) -> Rows:
        """Rows of a shard, from a bounded cache. ValueError where they are not those that were written."""
        found = self._rows.get(shard)
        if found is not None:
            self._rows.move_to_end(shard)
            return found
        rows = self._load_rows(shard)
        if self._places is not None:
            self._places.keep(shard, rows)
        self._rows[shard] = rows
        self._cached_rows += len(rows.keys)
        while self._cached_rows > CACHED_ROWS and len(self._rows) > 1:
            self._cached_rows -= len(self._rows.popitem(last=False)[1].keys)
        return rows

    def _load_rows(self, shard: int) -> Rows:
        what = f"{self.manifest.root}: rows of shard {shard}"
        table = self._retrying(lambda: self.store.rows(self.manifest, shard), what)
        info = self.manifest.shards[shard]
        columns = {"keys": "key", "image_ids": "image_id", "offsets": "offset", "nbytes": "nbytes", "xxh3": "xxh3"}
        listed = {field: table[name].to_pylist() for field, name in columns.items()}
        rows = Rows(shard, self._data_set, captions=table["captions"].combine_chunks(), **listed)
        ends = [offset + nbytes for offset, nbytes in zip(listed["offsets"], listed["nbytes"], strict=True)]
        if min(listed["offsets"]) < 0 or min(listed["nbytes"]) < TAR_BLOCK or max(ends) > info.bytes:
            raise ValueError(f"{self.manifest.root}: {info.name}: the manifest places samples outside the shard")
        return rows

    def _rows_of(self, shard: int, sample: int) -> Rows:
        """Rows of a shard that hold at least the place of this sample. Raises as `rows` does."""
        if shard in self._rows or self._places is None:
            return self.rows(shard)
        place = self._places.find(shard, sample)
        if place is None:
            return self.rows(shard)
        offset, nbytes, xxh3 = ({sample: value} for value in place)
        return Rows(shard, self._data_set, {}, {}, offset, nbytes, xxh3, {})

    def read_grid(self, shard: int, sample: int, out: memoryview) -> Rows:
        """Read and verify one feature sample; its grid's bytes (as stored) go to `out`, which they fill exactly.

        Returns the rows of its shard. Raises BadSample for damage and OSError where reading fails for good; `out` is
        then not to be used.
        """
        rows = self._rows_of(shard, sample)
        rest = rows.nbytes[sample] - PAYLOAD - len(out)
        if rest < 0:
            raise self.bad(rows, sample, f"{rows.nbytes[sample]} bytes cannot hold a grid of {len(out)} and its .json")
        if rest > len(self._tail):
            self._tail = memoryview(bytearray(rest))
        head, tail = self._head, self._tail[:rest]
        self._read(shard, rows, sample, [head, out, tail])
        if not rows.whole:
            self._meet(rows, sample, head, content_of(tail[-(NPY_HEADER + len(out)) % TAR_BLOCK :]))
        self._check_member(rows, sample, f"{rows.keys[sample]}.npy".encode(), head, len(out) + NPY_HEADER)
        if head[TAR_BLOCK:] != self._npy_header:
            assert self.spec is not None, "images have no grid"
            raise self.bad(rows, sample, f"its array is not a {self.spec.stored} array of shape {self.spec.shape}")
        return rows

    def read_regions(
        self, shard: int, sample: int, out: memoryview, boxes: npt.NDArray[np.float32] | None
    ) -> tuple[Rows, int]:
        """Read and verify one sample of region features; returns the rows of its shard, and how many regions it has.

        Their bytes (as stored) go to the beginning of `out`, the boxes to that of `boxes` [L, 4], zeros behind them.
        Raises as `read_grid` does.
        """
        rows, spec = self._rows_of(shard, sample), self.spec
        assert spec is not None and spec.kind == "regions"
        if len(self._whole) < rows.nbytes[sample]:
            self._whole = bytearray(rows.nbytes[sample])
        blob = memoryview(self._whole)[: rows.nbytes[sample]]
        self._read(shard, rows, sample, [blob])
        self._meet_members(rows, sample, blob)
        size = size_in(blob) or 0
        count = (size - NPY_HEADER) // (spec.dim * spec.stored.itemsize)
        if not 0 < count <= spec.max_regions:
            raise self.bad(rows, sample, f"an array of {size} bytes; expected 1 to {spec.max_regions} regions")
        end = self._check_array(rows, sample, blob, "npy", spec.stored, (count, spec.dim))
        data = end - count * spec.dim * spec.stored.itemsize
        out[: end - data], out[end - data :] = blob[data:end], bytes(len(out) - (end - data))
        if boxes is not None:
            begin = end + -end % TAR_BLOCK
            end = begin + self._check_array(rows, sample, blob[begin:], "boxes.npy", np.dtype("<f4"), (count, 4))
            boxes[:count] = np.frombuffer(blob[end - 16 * count : end], "<f4").reshape(count, 4)
            boxes[count:] = 0
        return rows, count

    def _check_array(
        self,
        rows: Rows,
        sample: int,
        blob: memoryview,
        extension: str,
        dtype: np.dtype[Any],
        shape: tuple[int, int],
    ) -> int:
        """Where the array of this type and shape ends that the member at the beginning of `blob` holds, and is."""
        size = NPY_HEADER + math.prod(shape) * dtype.itemsize
        if TAR_BLOCK + size > len(blob):
            raise self.bad(rows, sample, f"{len(blob)} bytes cannot hold a .{extension} of {size} bytes")
        self._check_member(rows, sample, f"{rows.keys[sample]}.{extension}".encode(), blob, size)
        if blob[TAR_BLOCK:PAYLOAD] != npy_header(dtype, shape):
            raise self.bad(rows, sample, f"its .{extension} is not a {dtype} array of shape {shape}")
        return TAR_BLOCK + size

    def read_picture(self, shard: int, sample: int) -> tuple[Rows, bytes]:
        """Read and verify one image sample; its rows and the bytes of its picture file. Raises as `read_grid` does."""
        rows = self._rows_of(shard, sample)
        blob = memoryview(bytearray(rows.nbytes[sample]))
        self._read(shard, rows, sample, [blob])
        self._meet_members(rows, sample, blob)
        name, size = name_in(blob), size_in(blob)
        if not name.startswith(f"{rows.keys[sample]}.".encode()) or size is None or size > len(blob) - TAR_BLOCK:
            raise self.bad(rows, sample, f"its place in the shard holds {name!r} of {size} bytes")
        self._check_member(rows, sample, name, blob, size)
        return rows, bytes(blob[TAR_BLOCK : TAR_BLOCK + size])

    def _meet_members(self, rows: Rows, sample: int, blob: memoryview) -> None:
        """Learn what a sample is, where only its place was known, from its verified members."""
        if not rows.whole:
            try:
                text = read_members(blob, "its bytes").get("json", b"")
            except ValueError as error:
                raise self.bad(rows, sample, str(error)) from error
            self._meet(rows, sample, blob, text)

    def _meet(self, rows: Rows, sample: int, head: memoryview, text: bytes) -> None:
        key = name_in(head).decode(errors="replace").partition(".")[0]
        try:
            rows.meet(sample, key, text)
        except (ValueError, LookupError, TypeError) as error:
            raise self.bad(rows, sample, f"its .json does not say what it is: {error!r}") from error

    def expect(self, shard: int, first: int, last: int) -> None:
        """Say that these samples are needed soon: the kernel or the cache of a remote source fetches them meanwhile."""
        if isinstance(self.store, RemoteStore):
            if shard not in self._files and not self.store.expect(self.manifest.shards[shard]):
                begin, end = self._span(shard, first, last)
                self.store.ranges.expect(Range(self.manifest.shards[shard].name, begin, end))
        elif shard in self._files and (shard in self._rows or self._places is not None):
            descriptor, (begin, end) = self._files[shard], self._span(shard, first, last)
            if not _is_in_memory(descriptor, end - 1):
                os.posix_fadvise(descriptor, begin, end - begin, os.POSIX_FADV_WILLNEED)

    def _span(self, shard: int, first: int, last: int) -> tuple[int, int]:
        """Where consecutive samples begin and end in their shard."""
        end = self._rows_of(shard, last)
        return self._rows_of(shard, first).offsets[first], end.offsets[last] + end.nbytes[last]

    def _read(self, shard: int, rows: Rows, sample: int, buffers: list[memoryview]) -> None:
        """Fill the buffers with the sample's verified bytes. Damage of a remote shard is fetched again, once."""
        try:
            self._read_verified(shard, rows, sample, buffers)
        except BadSample:
            if not isinstance(self.store, RemoteStore):
                raise
            copy = self._forget(self.store, shard, rows)
            self._give_up_file(shard)
            try:
                self._read_verified(shard, rows, sample, buffers)
            except BadSample as error:
                raise BadSample(f"{error} (in {copy}, which was fetched a second time)") from error

    def _forget(self, store: RemoteStore, shard: int, rows: Rows) -> object:
        """Drop what was fetched of a shard; where it was."""
        if shard in self._files:
            return store.forget(self.manifest.shards[shard], self._files[shard])
        store.ranges.forget_file(self.manifest.shards[shard].name)
        return "a byte range"

    def _read_verified(self, shard: int, rows: Rows, sample: int, buffers: list[memoryview]) -> None:
        self._fill(shard, rows, sample, buffers)
        checksum = xxhash.xxh3_64()
        for buffer in buffers:
            checksum.update(buffer)
        if checksum.intdigest() != rows.xxh3[sample]:
            raise self.bad(rows, sample, "its bytes do not have the checksum that was recorded")

    def _fill(self, shard: int, rows: Rows, sample: int, buffers: list[memoryview]) -> None:
        """Read into the buffers, one after the other. BadSample where the shard ends too early."""
        offset, expected = rows.offsets[sample], rows.nbytes[sample]
        try:
            if os.preadv(self._files[shard], buffers, offset) == expected:
                return
        except KeyError:
            pass  # not open yet
        except OSError as error:
            if not io_error(error):
                raise
            self._give_up_file(shard)
        name = self.manifest.shards[shard].name
        where = f"{name}: key {rows.keys[sample]}" if rows.whole else f"{name}: sample {sample}"
        # A read may stop short for other reasons than the end of the file; reading on tells them apart.
        got = self._retrying(lambda: self._read_in_pieces(shard, buffers, offset), where, shard)
        if got != expected:
            raise self.bad(rows, sample, f"the shard ends {expected - got} bytes before the end of the sample")

    def _read_in_pieces(self, shard: int, buffers: list[memoryview], offset: int) -> int:
        """Bytes that were read into the buffers before the end of the file."""
        pending, total = list(buffers), 0
        while pending:
            descriptor = self._open(shard)
            if descriptor is None:
                return self._copy_range(shard, buffers, offset)
            got = os.preadv(descriptor, pending, offset + total)
            if not got:
                break
            total += got
            while pending and got >= len(pending[0]):
                got -= len(pending.pop(0))
            if got:
                pending[0] = pending[0][got:]
        return total

    def _copy_range(self, shard: int, buffers: list[memoryview], offset: int) -> int:
        """Fill the buffers from a byte range of a remote shard; how many bytes that is."""
        assert isinstance(self.store, RemoteStore)
        size, done = sum(map(len, buffers)), 0
        blob = self.store.ranges.read(self.manifest.shards[shard].name, offset, offset + size)
        for buffer in buffers:
            buffer[:] = blob[done : done + len(buffer)]
            done += len(buffer)
        return done

    def _open(self, shard: int) -> int | None:
        """A descriptor of the shard; None where it is read by ranges."""
        descriptor = self._files.get(shard)
        if descriptor is not None:
            return descriptor
        info = self.manifest.shards[shard]
        descriptor = self.store.open(info)
        if descriptor is None:
            return None
        size = os.fstat(descriptor).st_size
        if size != info.bytes:
            os.close(descriptor)
            raise BadSample(f"{self.manifest.root}: {info.name} has {size} bytes, {info.bytes} were written")
        if len(self._files) >= self.store.open_files:
            os.close(self._files.pop(next(iter(self._files))))
        self._files[shard] = descriptor
        return descriptor

    def _retrying(self, operation: Callable[[], Result], what: str, shard: int | None = None) -> Result:
        return retrying(operation, what, lambda: self._give_up_file(shard))

    def _give_up_file(self, shard: int | None) -> None:
        """Count a failed attempt. A stale handle stays stale: the next one opens the file anew."""
        self._retries += 1
        if shard is not None and shard in self._files:
            os.close(self._files.pop(shard))

    def _check_member(self, rows: Rows, sample: int, name: bytes, header: memoryview | bytearray, size: int) -> None:
        """Compare a tar header with the one that a regular file of this name and size has."""
        found = bytes(header[: len(name) + 1])
        if found != name + b"\0":
            raise self.bad(rows, sample, f"its place in the shard holds {found!r}")
        if header[156] not in b"0\0" or bytes(header[124:135]) != b"%011o" % size:
            raise self.bad(rows, sample, f"{name.decode()} is not a regular file of {size} bytes")

    def bad(self, rows: Rows, sample: int, problem: str) -> BadSample:
        """The error for one sample of a shard."""
        key = (rows if rows.whole else self.rows(rows.shard)).keys[sample]
        return BadSample(f"{self.manifest.root}: {self.manifest.shards[rows.shard].name}: key {key}: {problem}")


def _is_in_memory(descriptor: int, offset: int) -> bool:
    """Whether the page cache holds this byte; asking is much cheaper than advice about pages that are there already."""
    try:
        return os.preadv(descriptor, [bytearray(1)], offset, os.RWF_NOWAIT) == 1
    except OSError:
        return False


def _places_of(manifest: Manifest) -> Places | None:
    """Room for the places of all its samples; None where this machine has none."""
    try:
        return Places(manifest.shards.samples)
    except OSError as error:
        logger.warning("no temporary file can be made (%s): rows of samples are read again and again", error)
        return None
