"""Bytes of a picture file -> the RGB pixels the encoder sees, or a named reason why not.

The surprising decision: transparent pixels are laid on white, as a viewer shows them; merely dropping the alpha channel
would reveal whatever colour hides under it. 16-bit greys are scaled (Pillow's own conversion would clip them to white).
A PNG whose pixels are sound is read even where its texts are damaged or too long; `NOTE` in the picture's `info` says
so. Colour profiles (ICC) and gamma (gAMA, cHRM) are ignored, as by the programs that made the published features:
values are taken for sRGB as they stand.
"""

import io
import struct
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
from PIL import Image, UnidentifiedImageError

MAX_PIXELS = 80_000_000
"""Larger pictures are refused before they are decoded (240 MB as RGB); below Pillow's own limit, at which it warns."""
BAND_PIXELS = 1 << 20
"""Pixels that are laid on white at once."""
MAX_BYTES = 256 << 20
"""Larger files are refused before they are read."""
FORMATS = ("JPEG", "PNG", "GIF", "WEBP", "BMP", "TIFF", "PPM")
"""Formats tried (JPEG includes MPO, of cameras with two lenses); not those that start other programs (EPS)."""
GEOMETRIES = ("squash", "center_crop")
RESIZE = "antialiased, by torch"
"""How `fit` computes beside its interpolation, for the fingerprint of features: change it with every change of the
values `fit` gives."""
EXTENSIONS = {"JPEG": "jpg", "MPO": "jpg", "TIFF": "tif"}
"""File name extension by format, where it is not the format's name in lower case."""
NOTE = "note"
"""Key of `info` under which a decoded picture says what was odd about its file."""
_ORIENTATION = 0x0112
_PNG, _PNG_CHUNKS = b"\x89PNG\r\n\x1a\n", (b"IHDR", b"PLTE", b"tRNS", b"eXIf", b"IDAT", b"IEND")
"""How a PNG begins, and the chunks of it that shape the pixels."""
_TRANSPOSE = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""What undoes each EXIF orientation."""


class PixelBudget:
    """Bounds the memory of threads that decode at once, by the pixels of their pictures.

    A picture waits until there is room for it; one larger than all that may be there is decoded alone.
    """

    def __init__(self, pixels: int = MAX_PIXELS):
        self.pixels, self._taken, self._changed = pixels, 0, threading.Condition()

    @contextmanager
    def of(self, data: bytes) -> Iterator[None]:
        """Hold the room that the picture in this file takes, by its header; a file without one takes none."""
        pixels = _claimed_pixels(data)
        with self._changed:
            self._changed.wait_for(lambda: not self._taken or self._taken + pixels <= self.pixels)
            self._taken += pixels
        try:
            yield
        finally:
            with self._changed:
                self._taken -= pixels
                self._changed.notify_all()


def _claimed_pixels(data: bytes) -> int:
    try:
        Image.init()
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            return image.width * image.height
    except Exception:  # `decode` says what it is
        return 0


class BadPicture(ValueError):
    """A file that gives no pixels: `reason` names the rule, `detail` the case."""

    def __init__(self, reason: str, detail: str = ""):
        super().__init__(f"{reason}: {detail}" if detail else reason)
        self.reason, self.detail = reason, detail


def decode(data: bytes, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """The picture upright in mode RGB; of an animation the first frame. `format` tells what the file was.

    Raises BadPicture with the reason for everything that is no sound picture; no other exception.
    """
    if not data:
        raise BadPicture("empty file")
    try:
        return _decode(data, max_pixels)
    except BadPicture as bad:
        if not data.startswith(_PNG) or bad.reason == "too many pixels":
            raise
        bare = b"".join([_PNG, *(blob for kind, blob in _png_chunks(data) if kind in _PNG_CHUNKS)])
        if len(bare) == len(data):
            raise
        try:
            rgb = _decode(bare, max_pixels)
        except BadPicture:
            raise bad from None
        rgb.info[NOTE] = "damaged or oversized metadata ignored"
        return rgb


def _decode(data: bytes, max_pixels: int) -> Image.Image:
    try:
        Image.init()  # registers all formats, once; opening by `formats` needs that
        image = Image.open(io.BytesIO(data), formats=FORMATS)
        if image.width * image.height > max_pixels:
            raise BadPicture("too many pixels", f"{image.width} x {image.height}")
        image.load()
        rgb = _upright(_to_rgb(image, data), image)
    except BadPicture:
        raise
    except Image.DecompressionBombError as error:
        raise BadPicture("too many pixels", str(error)) from None
    except UnidentifiedImageError:
        raise BadPicture("not a picture", _beginning(data)) from None
    except Exception as error:  # Pillow's decoders raise many types for damaged files
        reason = "truncated" if "truncated" in str(error).lower() else "damaged"
        raise BadPicture(reason, f"{type(error).__name__}: {error}") from None
    rgb.format = image.format
    return rgb


def fit(image: Image.Image, size: int, geometry: str = "squash", interpolation: str = "bicubic") -> np.ndarray:
    """RGB picture -> uint8 [size, size, 3], with antialiasing; `interpolation` is bicubic or bilinear.

    `squash` keeps the whole picture and not its proportions; `center_crop` keeps the largest square in its middle.
    Raises ValueError for another geometry.
    """
    if geometry not in GEOMETRIES:
        raise ValueError(f"geometry {geometry!r} is unknown; choose one of {', '.join(GEOMETRIES)}")
    pixels = np.array(image)
    if geometry == "center_crop":
        side = min(image.size)
        left, top = (image.width - side) // 2, (image.height - side) // 2
        pixels = np.ascontiguousarray(pixels[top : top + side, left : left + side])
    return pixels if pixels.shape[:2] == (size, size) else _resize(pixels, size, interpolation)


def _resize(pixels: np.ndarray, size: int, interpolation: str) -> np.ndarray:
    """By PyTorch, single-threaded: four times as fast as Pillow, whose values it gives but for rounding."""
    import torch  # here, as cutting image shards does without

    planes = torch.from_numpy(pixels).permute(2, 0, 1)[None]  # channels_last, which its fast path wants
    planes = torch.nn.functional.interpolate(planes, (size, size), mode=interpolation, antialias=True)
    return planes[0].permute(1, 2, 0).contiguous().numpy()


def extension_of(image: Image.Image) -> str:
    """File name extension of the format a picture was decoded from."""
    assert image.format is not None, "not an image that `decode` gave"
    return EXTENSIONS.get(image.format, image.format.lower())


def _upright(image: Image.Image, source: Image.Image) -> Image.Image:
    """`image` turned as the EXIF data of `source` says."""
    try:
        orientation = source.getexif().get(_ORIENTATION, 1)
    except Exception:  # damaged metadata of a sound picture: shown as it is stored, like a viewer does
        orientation = 1
    method = _TRANSPOSE.get(orientation)
    return image if method is None else image.transpose(method)


def _to_rgb(image: Image.Image, data: bytes) -> Image.Image:
    if image.mode == "RGB" and "transparency" not in image.info:
        return image
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format == "PNG"):
        values = np.asarray(image).astype(np.uint32)
        grey = ((values + 128) // 257).astype(np.uint8)
        grey[values == image.info.get("transparency", -1)] = 255
        return Image.fromarray(grey).convert("RGB")
    if image.mode in ("I", "F"):
        raise BadPicture("no defined brightness range", f"mode {image.mode}")
    if image.has_transparency_data:
        _scale_transparency(image, data)
        return _on_white(image)
    return image.convert("RGB")


def _on_white(image: Image.Image) -> Image.Image:
    """The picture laid on white, some rows at a time: three RGBA copies of it all would be four times its size."""
    rgb, rows = Image.new("RGB", image.size), max(BAND_PIXELS // image.width, 1)
    for top in range(0, image.height, rows):
        box = (0, top, image.width, min(top + rows, image.height))
        rgba = image.crop(box).convert("RGBA")
        white = Image.new("RGBA", rgba.size, (255, 255, 255, 255))
        rgb.paste(Image.alpha_composite(white, rgba).convert("RGB"), box)
    return rgb


def _scale_transparency(image: Image.Image, data: bytes) -> None:
    """Bring the transparent colour of a PNG of 2, 4 or 16 bits to the 8 bits that Pillow has made of its pixels."""
    depth, hidden = data[24] if image.format == "PNG" else 8, image.info.get("transparency")
    if image.mode == "L" and depth in (2, 4) and isinstance(hidden, int):
        image.info["transparency"] = hidden * 255 // (2**depth - 1)
    elif image.mode == "RGB" and depth == 16 and isinstance(hidden, tuple):
        image.info["transparency"] = tuple(value >> 8 for value in hidden)


def _png_chunks(data: bytes) -> Iterator[tuple[bytes, bytes]]:
    """(type, whole chunk) of a PNG, as far as they are whole."""
    position = len(_PNG)
    while position + 12 <= len(data):
        end = position + 12 + struct.unpack_from(">I", data, position)[0]
        if end > len(data):
            return
        yield data[position + 4 : position + 8], data[position:end]
        position = end


def _beginning(data: bytes) -> str:
    head = data[:64].lstrip().lower()
    if head.startswith((b"<!doctype html", b"<html")):
        return "an HTML page"
    return f"begins with {data[:16]!r}"
