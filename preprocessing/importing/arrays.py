"""Bytes of an npy or npz file -> arrays of numbers, or a named reason why not. Nothing is ever unpickled.

The surprising decision: an npy file is taken apart here, not by `numpy.load`: the header is read by numpy, and an array
is made only where it promises exactly the bytes that follow. So a cut file has a reason of its own, and a header that
lies about its size cannot fill the memory.
"""

import io
import math
import zipfile
import zlib
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]
MAX_BYTES = 1 << 30
"""More of one picture is refused before it is read."""
NUMBERS = "fiu"
"""Kinds of numpy types that are taken for features: floats and whole numbers."""


class BadFeatures(ValueError):
    """A file or an array that gives no features: `reason` names the rule and is counted, `detail` tells the case."""

    def __init__(self, reason: str, detail: str = ""):
        super().__init__(f"{reason}: {detail}" if detail else reason)
        self.reason, self.detail = reason, detail


def read_npy(blob: bytes) -> Array:
    """The array of an npy file. Raises BadFeatures for everything that is no whole file of numbers."""
    if not blob:
        raise BadFeatures("empty file")
    stream = io.BytesIO(blob)
    shape, fortran_order, dtype = _read_header(stream)
    if dtype.hasobject:
        raise BadFeatures("pickled", "it holds Python objects, which are never loaded; save numbers alone")
    if dtype.kind not in NUMBERS:
        raise BadFeatures("not numbers", f"of type {dtype}")
    promised, found = math.prod(shape) * dtype.itemsize, len(blob) - stream.tell()
    if found < promised:
        raise BadFeatures("truncated", f"{found} bytes of data, its header promises {promised}")
    if found > promised:
        raise BadFeatures("damaged", f"{found} bytes of data, its header promises {promised}")
    flat = np.frombuffer(blob, dtype, math.prod(shape), stream.tell())
    return flat.reshape(shape, order="F" if fortran_order else "C")


def _read_header(stream: io.BytesIO) -> tuple[tuple[int, ...], bool, np.dtype[Any]]:
    head = stream.getvalue()[:6]
    if head != b"\x93NUMPY":
        # a protocol-2 pickle or newer begins with this byte; torch.save and np.save of objects in old files do
        pickled = head[:1] == b"\x80"
        raise BadFeatures("pickled" if pickled else "not an npy file", f"begins with {head!r}")
    readers = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
    try:
        version = np.lib.format.read_magic(stream)
        if version not in readers:
            raise BadFeatures("not an npy file", f"of version {version}; expected 1 or 2")
        shape, fortran_order, dtype = readers[version](stream)
    except BadFeatures:
        raise
    except Exception as error:  # numpy parses the header as Python literals, whose errors are of many types
        raise BadFeatures("damaged", f"its header cannot be read ({error})".replace("\n", " ")) from None
    return shape, fortran_order, dtype


class Npz:
    """The arrays of an npz file, read by name; others in it (pickled ones too) are not touched."""

    def __init__(self, blob: bytes):
        """Raises BadFeatures for what is no whole npz file."""
        if not blob:
            raise BadFeatures("empty file")
        try:
            self._file = zipfile.ZipFile(io.BytesIO(blob))
        except (zipfile.BadZipFile, ValueError, NotImplementedError) as error:
            zipped = blob[:2] == b"PK"
            raise BadFeatures("truncated" if zipped else "not an npz file", str(error)) from None
        self.names = [name.removesuffix(".npy") for name in self._file.namelist()]

    def __contains__(self, name: str) -> bool:
        return name in self.names

    def __getitem__(self, name: str) -> Array:
        """Raises BadFeatures naming the array where it is damaged, pickled or no numbers."""
        try:
            about = self._file.getinfo(f"{name}.npy")
            if about.file_size > MAX_BYTES:
                raise BadFeatures("file too large", f"{name}: {about.file_size} bytes")
            blob = self._file.read(about)
        except BadFeatures:
            raise
        except (
            zipfile.BadZipFile,
            zlib.error,
            EOFError,
            OSError,
            NotImplementedError,
            RuntimeError,
            KeyError,
        ) as error:
            raise BadFeatures("damaged", f"{name}: {error}") from None
        try:
            return read_npy(blob)
        except BadFeatures as error:
            raise BadFeatures(error.reason, f"{name}: {error.detail}") from None
