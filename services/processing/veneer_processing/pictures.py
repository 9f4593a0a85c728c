"""From a file's bytes to upright RGB pixels.

Owns which files are pictures (JPEG, PNG and WebP, told by content, of one frame), the limits on them and the
one way in which colours, transparency and orientation become RGB: `PICTURE_RULE`. Pure functions of the
bytes, which a caller may run in a child process. Resizing is in `pixels`.

The rule: the first frame; samples of 16 bits keep their high byte (as Pillow does with 16-bit RGB; its
conversion of 16-bit grey clips instead, and shows white); transparency is laid over white; CMYK is converted
by Pillow without colour profiles, which are ignored everywhere; then the EXIF orientation is applied, and
EXIF that cannot be read counts as none.
"""

import hashlib
from io import BytesIO

import numpy as np
from numpy.typing import NDArray
from PIL import (
    Image,
    JpegImagePlugin,
    PngImagePlugin,
    TiffImagePlugin,  # noqa: F401  # reads EXIF; Pillow would import it in mid-decoding, where no file may be opened
    WebPImagePlugin,
)
from PIL.ExifTags import Base as ExifTag
from PIL.ImageFile import ImageFile

from veneer_processing.conversation import Picture
from veneer_processing.errors import PictureError, PictureTooLargeError

PICTURE_RULE = "rgb-on-white-upright-1"
"""Name of the rule above; part of the processing contract."""

MAX_PICTURE_PIXELS = 50_000_000
"""Default cap on a file's own size, in pixels: a 48-megapixel photograph passes; 50 million take 200 MB to
decode.
"""

_PNG_END = b"IEND\xaeB`\x82"
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""What turns a picture upright, by EXIF orientation (CIPA DC-008, tag 0x0112); 1 is upright."""


def open_picture(data: bytes, max_pixels: int = MAX_PICTURE_PIXELS) -> Picture:
    """A picture from its file's bytes, decoded.

    Args:
        data: the file.
        max_pixels: cap on width times height, checked before anything is decoded.

    Raises:
        PictureTooLargeError: over the cap, more than one frame, or a metadata chunk over Pillow's limit.
        PictureError: another kind of file, a truncated or damaged one, or one of no pixels.
    """
    rgb = decode_rgb(data, max_pixels)
    return Picture(hashlib.sha256(data).hexdigest(), rgb.shape[1], rgb.shape[0], rgb)


def decode_rgb(data: bytes, max_pixels: int = MAX_PICTURE_PIXELS) -> NDArray[np.uint8]:
    """The upright picture as (height, width, 3) uint8; arguments and errors as for `open_picture`."""
    return np.asarray(decode_image(data, max_pixels))


def decode_image(data: bytes, max_pixels: int = MAX_PICTURE_PIXELS) -> Image.Image:
    """The upright picture in RGB as Pillow holds it, for who resizes it at once; the rest as for `open_picture`."""
    kind = _kind(data)
    try:
        with _opened(kind, data) as image:
            _check_limits(image, max_pixels)
            image.load()
            if kind == "PNG" and _PNG_END not in data:
                raise PictureError("the PNG is truncated: its end chunk is missing")
            upright = _UPRIGHT.get(_orientation(image))
            rgb = _rgb(image)
            return rgb if upright is None else rgb.transpose(upright)
    except PictureError:
        raise
    except Image.DecompressionBombError as error:
        raise PictureTooLargeError(f"the {kind} has more than {max_pixels} pixels: {error}"[:400]) from error
    except Exception as error:  # whatever a decoder raises on a hostile file is a fault of the file
        refusal = PictureTooLargeError if "MAX_TEXT" in str(error) else PictureError
        raise refusal(f"the {kind} cannot be decoded: {str(error)[:300] or type(error).__name__}") from error


def _kind(data: bytes) -> str:
    if data.startswith(b"\x89PNG\r\n\x1a\n"):
        return "PNG"
    if data.startswith(b"\xff\xd8\xff"):
        return "JPEG"
    if data.startswith(b"RIFF") and data[8:12] == b"WEBP":
        return "WebP"
    raise PictureError(f"a picture is a JPEG, PNG or WebP file, got {len(data)} bytes that begin {data[:12].hex()!r}")


def _opened(kind: str, data: bytes) -> ImageFile:
    """The file, of which only the header is read; `Image.open` would warn of large ones, and take others."""
    if kind == "PNG":
        return PngImagePlugin.PngImageFile(BytesIO(data))
    if kind == "JPEG":
        return JpegImagePlugin.JpegImageFile(BytesIO(data))
    return WebPImagePlugin.WebPImageFile(BytesIO(data))


def _check_limits(image: ImageFile, max_pixels: int) -> None:
    frames = getattr(image, "n_frames", 1)
    if frames > 1:
        raise PictureTooLargeError(f"a picture has 1 frame, this {image.format} has {frames}")
    if image.width < 1 or image.height < 1:
        raise PictureError(f"a picture has at least 1x1 pixels, got {image.width}x{image.height}")
    if image.width * image.height > max_pixels:
        raise PictureTooLargeError(
            f"a picture has at most {max_pixels} pixels, this {image.format} has "
            f"{image.width}x{image.height} = {image.width * image.height}"
        )


def _orientation(image: ImageFile) -> int:
    try:
        return int(image.getexif().get(ExifTag.Orientation, 1))
    except Exception:  # whatever the parser raises: the rule counts such EXIF as none, as viewers do
        return 1


def _rgb(image: Image.Image) -> Image.Image:
    transparency = image.info.get("transparency")
    if image.mode.startswith("I;16"):
        grey16 = np.asarray(image)
        grey8 = (grey16 >> 8).astype(np.uint8)
        if transparency is not None:
            grey8[grey16 == transparency] = 255
        return Image.fromarray(grey8).convert("RGB")
    if transparency is None and "A" not in image.getbands():
        return image if image.mode == "RGB" else image.convert("RGB")  # which would copy it
    white = Image.new("RGBA", image.size, (255, 255, 255, 255))
    return Image.alpha_composite(white, image.convert("RGBA")).convert("RGB")
