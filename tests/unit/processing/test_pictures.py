"""Files become the RGB that transformers' own loading gives, and bad files are refused in words."""

import contextlib
import hashlib
import io
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageFile, ImageOps, PngImagePlugin
from transformers.image_transforms import convert_to_rgb
from transformers.image_utils import load_image

from veneer_processing import PictureError, PictureTooLargeError, decode_rgb, open_picture

RNG = np.random.default_rng(7)
RGB = Image.fromarray(RNG.integers(0, 256, (21, 34, 3), np.uint8))
ALPHA = Image.fromarray(RNG.integers(0, 256, (21, 34), np.uint8))
RGBA = Image.merge("RGBA", (*RGB.split(), ALPHA))
LA = Image.merge("LA", (RGB.convert("L"), ALPHA))
GREY16 = RNG.integers(0, 65_536, (21, 34), np.uint16)


def saved(image: Image.Image, kind: str, **options: object) -> bytes:
    out = io.BytesIO()
    image.save(out, kind, **options)
    return out.getvalue()


def turned(orientation: int) -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return exif


def chunk(name: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))


def png(width: int, height: int, bits: int, colours: int, samples: np.ndarray, *before_pixels: bytes) -> bytes:
    """A PNG written by hand, in forms that Pillow reads and does not write."""
    rows = b"".join(b"\0" + row.tobytes() for row in samples)
    return b"".join(
        (
            b"\x89PNG\r\n\x1a\n",
            chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, bits, colours, 0, 0, 0)),
            *before_pixels,
            chunk(b"IDAT", zlib.compress(rows)),
            chunk(b"IEND", b""),
        )
    )


PALETTE = RGB.quantize(16)
PNG_RGB = saved(RGB, "PNG")
JPEG_RGB = saved(RGB, "JPEG")
WEBP_RGB = saved(RGB, "WEBP", lossless=True)

OPAQUE = {
    "jpeg": JPEG_RGB,
    "jpeg progressive 4:4:4": saved(RGB, "JPEG", progressive=True, subsampling=0),
    "jpeg grey": saved(RGB.convert("L"), "JPEG"),
    "jpeg cmyk": saved(RGB.convert("CMYK"), "JPEG"),
    "jpeg of 1x1": saved(RGB.crop((0, 0, 1, 1)), "JPEG"),
    "png": PNG_RGB,
    "png grey": saved(RGB.convert("L"), "PNG"),
    "png bilevel": saved(RGB.convert("1"), "PNG"),
    "png palette": saved(PALETTE, "PNG"),
    "png palette of 1 bit": saved(RGB.quantize(2), "PNG", bits=1),
    "png interlaced": (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", struct.pack(">IIBBBBB", 1, 1, 8, 2, 0, 0, 1))
        + chunk(b"IDAT", zlib.compress(b"\0\x10\x80\xf0"))
        + chunk(b"IEND", b"")
    ),
    "png rgb of 16 bits": png(34, 21, 16, 2, RNG.integers(0, 65_536, (21, 34 * 3), np.uint16).astype(">u2")),
    "png followed by other bytes": PNG_RGB + b"more",
    "webp lossless": WEBP_RGB,
    "webp lossy": saved(RGB, "WEBP", quality=60),
    **{f"jpeg turned {n}": saved(RGB, "JPEG", exif=turned(n)) for n in range(1, 9)},
    **{f"png turned {n}": saved(RGB, "PNG", exif=turned(n)) for n in range(1, 9)},
    **{f"webp turned {n}": saved(RGB, "WEBP", exif=turned(n)) for n in range(1, 9)},
    "png palette turned": saved(PALETTE, "PNG", exif=turned(6)),
    "jpeg with an orientation that does not exist": saved(RGB, "JPEG", exif=turned(9)),
    "png turned, EXIF after the pixels": PNG_RGB[:-12]
    + chunk(b"eXIf", turned(8).tobytes().removeprefix(b"Exif\0\0"))
    + PNG_RGB[-12:],
}
TRANSPARENT = {
    "png rgba": saved(RGBA, "PNG"),
    "png rgba turned": saved(RGBA, "PNG", exif=turned(5)),
    "png grey with alpha": saved(LA, "PNG"),
    "png palette with one transparent colour": saved(PALETTE, "PNG", transparency=3),
    "png palette with alpha for each colour": saved(PALETTE, "PNG", transparency=bytes(range(0, 256, 16))),
    "png rgb with a transparent colour": saved(RGB, "PNG", transparency=RGB.getpixel((3, 4))),
    "png grey with a transparent level": saved(RGB.convert("L"), "PNG", transparency=120),
    "png rgba of 16 bits": png(34, 21, 16, 6, RNG.integers(0, 65_536, (21, 34 * 4), np.uint16).astype(">u2")),
    "webp rgba": saved(RGBA, "WEBP", lossless=True, exact=True),
    "webp rgba lossy": saved(RGBA, "WEBP", quality=70),
}


@pytest.mark.parametrize("name", OPAQUE)
def test_an_opaque_picture_is_what_transformers_loads(name: str, tmp_path: Path) -> None:
    file = tmp_path / "picture"
    file.write_bytes(OPAQUE[name])
    np.testing.assert_array_equal(decode_rgb(OPAQUE[name]), np.asarray(load_image(str(file))))


@pytest.mark.parametrize("name", TRANSPARENT)
def test_transparency_is_laid_over_white_as_the_picture_processor_does(name: str) -> None:
    # load_image drops alpha and shows whatever colour lies under it; the processor's own conversion does not.
    image = ImageOps.exif_transpose(Image.open(io.BytesIO(TRANSPARENT[name])))
    np.testing.assert_array_equal(decode_rgb(TRANSPARENT[name]), convert_to_rgb(image, return_numpy=True))


def test_what_is_fully_transparent_is_white() -> None:
    hidden = Image.new("RGBA", (4, 4), (0, 0, 0, 0))
    assert (decode_rgb(saved(hidden, "PNG")) == 255).all()


def test_grey_of_16_bits_keeps_its_high_byte_and_is_not_clipped_to_white() -> None:
    data = png(34, 21, 16, 0, GREY16.astype(">u2"))
    np.testing.assert_array_equal(decode_rgb(data), np.repeat((GREY16 >> 8)[..., None], 3, axis=2))


def test_a_transparent_level_of_16_bits_is_white() -> None:
    level = int(GREY16[5, 6])
    rgb = decode_rgb(png(34, 21, 16, 0, GREY16.astype(">u2"), chunk(b"tRNS", struct.pack(">H", level))))
    assert (rgb[level == GREY16] == 255).all()
    elsewhere = level != GREY16
    np.testing.assert_array_equal(rgb[elsewhere][:, 0], GREY16[elsewhere] >> 8)


def test_an_orientation_in_xmp_counts_as_one_in_exif() -> None:
    info = PngImagePlugin.PngInfo()
    info.add_itxt("XML:com.adobe.xmp", '<x tiff:Orientation="6"/>')
    rgb = decode_rgb(saved(RGB, "PNG", pnginfo=info))
    np.testing.assert_array_equal(rgb, np.asarray(RGB.transpose(Image.Transpose.ROTATE_270)))


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data")  # Pillow says so, and goes on
@pytest.mark.parametrize("exif", [b"Exif\0\0garbage", b"Exif\0\0", b"Exif\0\0II*\0\xff\xff\xff\xff"])
def test_exif_that_cannot_be_read_counts_as_none(exif: bytes) -> None:
    np.testing.assert_array_equal(decode_rgb(saved(RGB, "JPEG", exif=exif)), decode_rgb(JPEG_RGB))
    np.testing.assert_array_equal(decode_rgb(saved(RGB, "PNG", exif=exif)), np.asarray(RGB))


def test_the_first_frame_of_a_stereo_or_gain_map_photograph_is_taken() -> None:
    data = saved(RGB, "MPO", save_all=True, append_images=[RGB.rotate(180)])
    np.testing.assert_array_equal(decode_rgb(data), np.asarray(load_image(Image.open(io.BytesIO(data)))))


def test_a_picture_knows_its_file_and_its_upright_size() -> None:
    data = saved(RGB, "JPEG", exif=turned(6))
    picture = open_picture(data)
    assert (picture.sha256, picture.width, picture.height) == (hashlib.sha256(data).hexdigest(), 21, 34)
    assert picture.rgb is not None
    assert picture.rgb.shape == (34, 21, 3)


def header_only(width: int, height: int) -> bytes:
    return png(width, height, 8, 2, np.zeros((0, 0), np.uint8))


ANIMATED = {"save_all": True, "append_images": [RGB.rotate(90), RGB.rotate(180)], "duration": 10}
FRAMES = [Image.new("RGB", (1, 1), (n % 256, n // 256, 0)) for n in range(300)]

REFUSED = {
    "nothing": (b"", PictureError, "0 bytes"),
    "tiff": (saved(RGB, "TIFF"), PictureError, "JPEG, PNG or WebP"),
    "gif": (saved(RGB, "GIF"), PictureError, "JPEG, PNG or WebP"),
    "bmp": (saved(RGB, "BMP"), PictureError, "JPEG, PNG or WebP"),
    "eps": (saved(RGB, "EPS"), PictureError, "JPEG, PNG or WebP"),
    "psd": (b"8BPS\0\1" + bytes(60), PictureError, "JPEG, PNG or WebP"),
    "fits": (b"SIMPLE  =                    T".ljust(2880), PictureError, "JPEG, PNG or WebP"),
    "svg": (b'<svg xmlns="http://www.w3.org/2000/svg"/>', PictureError, "JPEG, PNG or WebP"),
    "html": (b"<html>\x89PNG\r\n\x1a\n", PictureError, "JPEG, PNG or WebP"),
    "riff that is no webp": (b"RIFF\0\0\0\0WAVEfmt ", PictureError, "JPEG, PNG or WebP"),
    "only a magic, png": (PNG_RGB[:8], PictureError, "PNG cannot be decoded"),
    "only a magic, jpeg": (JPEG_RGB[:3], PictureError, "JPEG cannot be decoded"),
    "only a magic, webp": (WEBP_RGB[:12], PictureError, "WebP cannot be decoded"),
    "png bomb": (header_only(60_000, 60_000), PictureTooLargeError, "60000x60000 = 3600000000"),
    "png of many pixels": (header_only(10_000, 5_001), PictureTooLargeError, "at most 50000000 pixels"),
    "png of no width": (header_only(0, 5), PictureError, "PNG cannot be decoded"),
    "png of no height": (header_only(5, 0), PictureError, "PNG cannot be decoded"),
    "webp bomb": (
        b"RIFF\x16\0\0\0WEBPVP8X\x0a\0\0\0" + bytes(4) + b"\xff\x3f\0\xff\x3f\0",
        PictureTooLargeError,
        "pixels",
    ),
    "png with a huge text": (
        saved(RGB, "PNG").replace(
            PNG_RGB[8:33], PNG_RGB[8:33] + chunk(b"zTXt", b"a\0\0" + zlib.compress(bytes(80_000_000)))
        ),
        PictureTooLargeError,
        "MAX_TEXT_CHUNK",
    ),
    "animated png": (saved(RGB, "PNG", **ANIMATED), PictureTooLargeError, "1 frame, this PNG has 3"),
    "animated webp": (saved(RGB, "WEBP", **ANIMATED), PictureTooLargeError, "1 frame, this WEBP has 3"),
    "webp of 300 frames": (
        saved(FRAMES[0], "WEBP", save_all=True, append_images=FRAMES[1:], duration=10, lossless=True),
        PictureTooLargeError,
        "has 300",
    ),
    "png with a broken header": (
        PNG_RGB[:20] + b"\xff" + PNG_RGB[21:],
        PictureError,
        "PNG cannot be decoded",
    ),
    "png without its end": (PNG_RGB[:-12], PictureError, "truncated"),
    "jpeg without its end": (JPEG_RGB[:-2], PictureError, "JPEG cannot be decoded"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_bad_file_is_refused_in_words(name: str) -> None:
    data, error, words = REFUSED[name]
    with pytest.raises(error, match=words) as refusal:
        open_picture(data)
    assert type(refusal.value) is error
    assert len(str(refusal.value).encode()) <= 512
    np.testing.assert_array_equal(decode_rgb(PNG_RGB), np.asarray(RGB))  # and the next good file passes


def test_the_pixel_cap_is_the_callers() -> None:
    assert decode_rgb(PNG_RGB, max_pixels=21 * 34).shape == (21, 34, 3)
    with pytest.raises(PictureTooLargeError, match="at most 713 pixels, this PNG has 34x21 = 714"):
        decode_rgb(PNG_RGB, max_pixels=21 * 34 - 1)


@pytest.mark.parametrize("data", [PNG_RGB, JPEG_RGB, WEBP_RGB], ids=["png", "jpeg", "webp"])
def test_no_truncated_file_passes(data: bytes) -> None:
    for size in range(len(data)):
        with pytest.raises(PictureError):
            decode_rgb(data[:size])


@settings(max_examples=300)
@given(data=st.data())
def test_a_damaged_file_is_decoded_or_refused(data: st.DataObject) -> None:
    good = bytearray(data.draw(st.sampled_from([PNG_RGB, JPEG_RGB, WEBP_RGB, *TRANSPARENT.values()])))
    for _ in range(data.draw(st.integers(1, 8))):
        good[data.draw(st.integers(0, len(good) - 1))] = data.draw(st.integers(0, 255))
    with contextlib.suppress(PictureError):
        rgb = decode_rgb(bytes(good), max_pixels=1_000_000)
        assert rgb.dtype == np.uint8
        assert rgb.shape[2] == 3


def test_pillow_is_not_set_to_load_truncated_files() -> None:
    assert not ImageFile.LOAD_TRUNCATED_IMAGES
