"""Pictures as they come: the right RGB values, or a named reason."""

import hashlib
import io
import resource
import struct
import threading
import time
import zlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from sat.shards import pictures
from sat.shards.pictures import NOTE, RESIZE, BadPicture, PixelBudget, decode, extension_of, fit
from tests.helpers_shards import encoded, picture, real_data

RGB = picture(3)
PIXELS = np.asarray(RGB).astype(int)
GREY = np.asarray(RGB.convert("L")).astype(int)


def pixels(data: bytes) -> np.ndarray:
    return np.asarray(decode(data)).astype(int)


def png_with_depth_16(values: np.ndarray) -> bytes:
    """An RGB PNG of 16 bits per channel, which Pillow cannot write."""
    height, width, _ = values.shape
    lines = b"".join(b"\0" + values[y].astype(">u2").tobytes() for y in range(height))
    chunks = [
        (b"IHDR", struct.pack(">IIBBBBB", width, height, 16, 2, 0, 0, 0)),
        (b"IDAT", zlib.compress(lines)),
        (b"IEND", b""),
    ]
    parts = [struct.pack(">I", len(d)) + n + d + struct.pack(">I", zlib.crc32(n + d)) for n, d in chunks]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


@pytest.mark.parametrize("format", ["PNG", "BMP", "TIFF", "PPM"])
def test_lossless_pictures_keep_every_pixel(format):
    assert np.array_equal(pixels(encoded(RGB, format)), PIXELS)


def test_jpeg_and_webp_are_close():
    for data in (encoded(RGB), encoded(RGB, "WEBP", quality=95)):
        assert np.abs(pixels(data) - PIXELS).mean() < 3


@pytest.mark.faults
def test_grey_pictures_have_three_equal_channels():
    for mode in ("L", "LA"):
        found = pixels(encoded(RGB.convert(mode), "PNG"))
        assert all(np.array_equal(found[..., channel], GREY) for channel in range(3))


@pytest.mark.faults
def test_palettes_are_looked_up_and_black_and_white_is_0_and_255():
    palette = RGB.quantize(32)
    assert np.array_equal(pixels(encoded(palette, "PNG")), np.asarray(palette.convert("RGB")))
    assert np.array_equal(pixels(encoded(palette, "GIF")), np.asarray(palette.convert("RGB")))
    assert set(np.unique(pixels(encoded(RGB.convert("1"), "PNG")))) == {0, 255}


@pytest.mark.faults
def test_cmyk_jpegs_are_converted_not_inverted():
    inks = np.array([255 - PIXELS[..., 0], 255 - PIXELS[..., 1], 255 - PIXELS[..., 2], 0 * GREY]).transpose(1, 2, 0)
    data = encoded(Image.fromarray(inks.astype(np.uint8), "CMYK"), "JPEG", quality=98)
    assert np.abs(pixels(data) - PIXELS).mean() < 3


@pytest.mark.faults
@pytest.mark.parametrize("format", ["PNG", "TIFF"])
def test_16_bit_greys_are_scaled_to_within_1_of_the_8_bit_picture(format):
    wide = (GREY * 257 + np.random.default_rng(0).integers(-60, 60, GREY.shape)).clip(0, 65535).astype(np.uint16)
    found = pixels(encoded(Image.fromarray(wide), format))
    assert np.abs(found - GREY[..., None]).max() <= 1


@pytest.mark.faults
def test_16_bit_rgb_is_scaled_to_within_1_of_the_8_bit_picture():
    assert np.abs(pixels(png_with_depth_16(PIXELS * 257)) - PIXELS).max() <= 1


@pytest.mark.faults
def test_transparent_pixels_are_white_and_opaque_ones_keep_their_colour():
    rgba = np.dstack([PIXELS, np.where(np.arange(64) < 32, 255, 0)[None].repeat(48, 0)]).astype(np.uint8)
    found = pixels(encoded(Image.fromarray(rgba), "PNG"))
    assert np.array_equal(found[:, :32], PIXELS[:, :32]) and (found[:, 32:] == 255).all()
    palette = RGB.quantize(8)
    hidden = palette.getpixel((0, 0))
    found = pixels(encoded(palette, "PNG", transparency=hidden))
    assert (found[np.asarray(palette) == hidden] == 255).all()
    shown = np.asarray(palette) != hidden
    assert np.array_equal(found[shown], np.asarray(palette.convert("RGB"))[shown])


def chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def png(depth: int, colour: int, row: bytes, width: int, extra: bytes = b"") -> bytes:
    """A PNG of one row, written by hand: the depths that Pillow cannot write."""
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, 1, depth, colour, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + extra + chunk(b"IDAT", zlib.compress(b"\0" + row)) + chunk(b"IEND", b"")


@pytest.mark.faults
@pytest.mark.parametrize(
    ("depth", "colour", "row", "hidden", "expected"),
    [
        (16, 0, struct.pack(">3H", 1000, 2000, 65535), struct.pack(">H", 1000), [255, 8, 255]),
        (16, 2, struct.pack(">6H", 514, 771, 1028, 60000, 1, 2), struct.pack(">3H", 514, 771, 1028), [255, 234]),
        (8, 0, bytes([10, 11]), struct.pack(">H", 11), [10, 255]),
        (4, 0, b"\x12", struct.pack(">H", 2), [17, 255]),
        (2, 0, b"\x1b", struct.pack(">H", 1), [0, 255, 170, 255]),
        (1, 0, b"\x40", struct.pack(">H", 0), [255, 255]),
    ],
)
def test_the_transparent_colour_of_a_png_of_any_depth_is_white(depth, colour, row, hidden, expected):
    data = png(depth, colour, row, len(expected), chunk(b"tRNS", hidden))
    assert pixels(data)[0, :, 0].tolist() == expected


@pytest.mark.faults
def test_a_sound_png_with_odd_texts_is_read_and_noted():
    sound = encoded(RGB, "PNG")
    end_of_header = 33
    broken = bytearray(chunk(b"tEXt", b"prompt\0a dog"))
    broken[-1] ^= 1
    long = chunk(b"zTXt", b"prompt\0\0" + zlib.compress(b"x" * 3_000_000))
    for extra in (bytes(broken), long):
        image = decode(sound[:end_of_header] + extra + sound[end_of_header:])
        assert np.array_equal(np.asarray(image), PIXELS) and "metadata" in image.info[NOTE] and image.format == "PNG"
    assert NOTE not in decode(sound).info
    with pytest.raises(BadPicture, match="truncated|damaged|not a picture"):
        decode(sound[:end_of_header] + bytes(broken) + sound[end_of_header:-200])


@pytest.mark.faults
@pytest.mark.parametrize("orientation", range(1, 9))
def test_every_exif_orientation_gives_the_upright_picture(orientation):
    undo = {  # how the camera stored an upright picture with this tag
        1: lambda a: a,
        2: lambda a: a[:, ::-1],
        3: lambda a: a[::-1, ::-1],
        4: lambda a: a[::-1],
        5: lambda a: a.transpose(1, 0, 2),
        6: lambda a: np.rot90(a, 1),
        7: lambda a: a[::-1, ::-1].transpose(1, 0, 2),
        8: lambda a: np.rot90(a, -1),
    }[orientation]
    stored = Image.fromarray(np.ascontiguousarray(undo(PIXELS)).astype(np.uint8))
    exif = Image.Exif()
    exif[0x0112] = orientation
    for format in ("PNG", "TIFF"):
        assert np.array_equal(pixels(encoded(stored, format, exif=exif)), PIXELS)
    assert np.abs(pixels(encoded(stored, "JPEG", exif=exif)) - PIXELS).mean() < 3


@pytest.mark.faults
def test_damaged_exif_of_a_sound_picture_is_ignored():
    data = encoded(RGB, "JPEG", exif=b"Exif\0\0MM\0*\xff\xff\xff\xff" + b"\x01\x12" * 30)
    assert np.abs(pixels(data) - PIXELS).mean() < 3


@pytest.mark.faults
def test_of_an_animation_the_first_frame_is_taken():
    frames = [picture(index).quantize(64) for index in range(3)]
    data = encoded(frames[0], "GIF", save_all=True, append_images=frames[1:])
    assert np.array_equal(pixels(data), np.asarray(frames[0].convert("RGB")))


@contextmanager
def at_most_more_memory(size: int) -> Iterator[None]:
    """Let the process grow by so many bytes only, whoever asks for them: tracemalloc sees neither Pillow nor torch."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


@pytest.mark.faults
def test_the_bound_of_memory_counts_what_pillow_and_torch_allocate():
    # 2 GB: more than a process may hold freed and ready from before.
    for allocate in (lambda: Image.new("L", (45_000, 45_000)), lambda: torch.zeros(2 << 30, dtype=torch.uint8)):
        with at_most_more_memory(50_000_000), pytest.raises((MemoryError, RuntimeError)):
            allocate()


@pytest.mark.faults
@pytest.mark.parametrize("geometry", ["squash", "center_crop"])
@pytest.mark.parametrize("size", [(1, 1), (20_000, 1), (1, 20_000)])
def test_extreme_shapes_fit_without_extreme_memory(size, geometry):
    image = decode(encoded(Image.new("RGB", size, (9, 99, 199)), "PNG"))
    assert image.size == size
    fit(RGB, 224)  # what is loaded with the first picture does not count
    with at_most_more_memory(50_000_000):
        fitted = fit(image, 224, geometry)
    assert fitted.shape == (224, 224, 3) and (fitted == [9, 99, 199]).all()


def test_transparency_is_laid_on_white_band_by_band_as_in_one_piece(monkeypatch):
    alpha = Image.fromarray(np.random.default_rng(3).integers(0, 256, (48, 64), dtype=np.uint8))
    clear = RGB.copy()
    clear.putalpha(alpha)
    white = Image.new("RGBA", clear.size, (255, 255, 255, 255))
    whole = np.asarray(Image.alpha_composite(white, clear).convert("RGB"))
    for band in (1, 64 * 7, 1 << 20):
        monkeypatch.setattr(pictures, "BAND_PIXELS", band)
        assert np.array_equal(pixels(encoded(clear, "PNG")), whole)


@pytest.mark.faults
def test_a_large_transparent_picture_takes_little_more_than_itself():
    data = encoded(Image.new("RGBA", (5000, 4000), (9, 99, 199, 128)), "PNG")
    decode(encoded(RGB))  # what is loaded with the first picture does not count
    with at_most_more_memory(9 * 5000 * 4000):  # RGBA as it is read, RGB as it is given, Pillow's own
        assert decode(data).size == (5000, 4000)


def test_threads_that_decode_hold_no_more_pixels_at_once_than_allowed():
    room, lock, held, most = PixelBudget(3 * 64 * 48), threading.Lock(), [0], [0]
    small, large = encoded(RGB), encoded(Image.new("RGB", (256, 256)))

    def work(data: bytes) -> None:
        size = Image.open(io.BytesIO(data)).size
        with room.of(data):
            with lock:
                held[0] += size[0] * size[1]
                most[0] = max(most[0], held[0])
                assert held[0] <= room.pixels or held[0] == 256 * 256, "a larger one is alone"
            time.sleep(0.002)
            with lock:
                held[0] -= size[0] * size[1]

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(work, [small, large, small, small, small] * 8))
        assert list(pool.map(lambda data: room.of(data).__enter__(), [b"", b"no picture"])) == [None, None]
    assert held == [0] and most == [256 * 256]


def png_claiming(width: int, height: int) -> bytes:
    data = encoded(Image.new("L", (8, 8)), "PNG")
    header = struct.pack(">II", width, height) + data[24:29]
    return data[:16] + header + struct.pack(">I", zlib.crc32(b"IHDR" + header)) + data[33:]


@pytest.mark.faults
@pytest.mark.parametrize(
    ("data", "reason", "detail"),
    [
        (b"", "empty file", ""),
        (b"just some text\n" * 9, "not a picture", "begins with"),
        (b"  <!DOCTYPE html><html><body>404</body></html>", "not a picture", "HTML"),
        (encoded(RGB)[: len(encoded(RGB)) // 2], "truncated", ""),
        (encoded(RGB)[:200], "truncated|damaged|not a picture", ""),
        (encoded(RGB, "PNG")[:-200], "truncated|damaged", ""),
        (png_claiming(50_000, 50_000), "too many pixels", ""),
        (png_claiming(9_500, 9_500), "too many pixels", "9500 x 9500"),
        (encoded(Image.fromarray(np.float32(GREY)), "TIFF"), "no defined brightness range", "mode F"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "not a picture", ""),
    ],
    ids=["empty", "text", "html", "half", "head", "png", "bomb", "large", "float", "program"],
)
def test_what_is_no_sound_picture_has_a_named_reason(data, reason, detail):
    import re

    decode(encoded(RGB))  # what is loaded with the first picture does not count
    with at_most_more_memory(50_000_000), pytest.raises(BadPicture) as caught:
        decode(data)
    assert re.fullmatch(reason, caught.value.reason) and detail in caught.value.detail


@pytest.mark.faults
def test_random_damage_gives_pixels_or_a_reason_never_another_error():
    generator = np.random.default_rng(5)
    for data in (
        encoded(RGB),
        encoded(RGB, "PNG"),
        encoded(RGB.quantize(16), "GIF"),
        encoded(RGB, "TIFF"),
        encoded(RGB, "WEBP"),
    ):
        for _ in range(40):
            damaged = np.frombuffer(data, np.uint8).copy()
            damaged[generator.integers(len(data), size=4)] = generator.integers(256, size=4)
            try:
                assert decode(damaged[: generator.integers(1, len(data) + 1)].tobytes()).mode == "RGB"
            except BadPicture as bad:
                assert bad.reason


def test_squash_keeps_the_whole_picture_and_center_crop_its_middle_square():
    wide = Image.fromarray(
        np.repeat(np.repeat([[[255, 0, 0], [0, 255, 0], [0, 0, 255]]], 32, 0), 32, 1).astype(np.uint8)
    )
    squashed, cropped = fit(wide, 32, "squash"), fit(wide, 32, "center_crop")
    assert squashed[16, 2].argmax() == 0 and squashed[16, 16].argmax() == 1 and squashed[16, 29].argmax() == 2
    assert (cropped[..., 1] > 200)[:, 2:-2].all()
    by_pillow = np.asarray(RGB.resize((40, 40), Image.Resampling.BICUBIC)).astype(int)
    assert abs(fit(RGB, 40) - by_pillow).max() <= 1
    with pytest.raises(ValueError, match="choose one of squash, center_crop"):
        fit(RGB, 32, "stretch")


@pytest.mark.parametrize(("geometry", "digest"), [("squash", "4fda1faa9592ee29"), ("center_crop", "d44d79bd7f05d260")])
def test_the_values_of_fit_are_those_its_name_in_the_fingerprint_stands_for(geometry, digest):
    """Where this fails because `fit` was changed, give RESIZE another name too: shards of both must not be mixed."""
    if torch.backends.cpu.get_cpu_capability() not in ("AVX2", "AVX512"):
        pytest.skip("the digests are those of PyTorch's AVX2 code")
    noise = np.frombuffer(hashlib.shake_128(b"noise").digest(90 * 70 * 3), np.uint8).reshape(70, 90, 3)
    fitted = [fit(Image.fromarray(noise), size, geometry).tobytes() for size in (32, 128)]
    assert RESIZE == "antialiased, by torch"
    assert hashlib.sha256(b"".join(fitted)).hexdigest()[:16] == digest


def test_the_extension_is_that_of_the_format_not_of_the_name():
    formats = {"JPEG": "jpg", "PNG": "png", "GIF": "gif", "WEBP": "webp", "BMP": "bmp", "TIFF": "tif"}
    assert {format: extension_of(decode(encoded(RGB, format))) for format in formats} == formats


def test_real_photographs_decode_to_what_pillow_shows():
    for path in sorted((real_data() / "coco_mini" / "train2017").glob("*.jpg"))[:20]:
        data = path.read_bytes()
        assert np.array_equal(np.asarray(decode(data)), np.asarray(Image.open(io.BytesIO(data)).convert("RGB")))
