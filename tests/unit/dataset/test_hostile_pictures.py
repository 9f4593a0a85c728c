"""Any bytes are a picture or refused as one: files of every kind, cut, bent and glued together by hypothesis.

In the decoding child, which can open nothing, the same must hold: so nothing may be imported while it decodes.
"""

import io
import json
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from PIL.ExifTags import Base
from PIL.PngImagePlugin import PngInfo

from veneer_dataset.adapters.pictures.frames import Job
from veneer_dataset.adapters.pictures.pool import PicturePool
from veneer_processing import PictureError, open_picture

MAX_PIXELS = 200_000
EXAMPLES = 300


def _saved(image: Image.Image, kind: str, **options: object) -> bytes:
    out = io.BytesIO()
    image.save(out, kind, **options)
    return out.getvalue()


def _files() -> list[bytes]:
    noise = np.random.default_rng(0).integers(0, 255, (24, 36, 4), np.uint8)
    rgba = Image.fromarray(noise, "RGBA")
    rgb = rgba.convert("RGB")
    exif = Image.Exif()
    exif[Base.Orientation] = 6
    deep = Image.fromarray(np.random.default_rng(0).integers(0, 2**16, (24, 36), np.uint16))
    words = PngInfo()
    words.add_text("k", "Straße", zip=True)
    words.add_itxt("k", "文字", "zh", "键")
    return [
        _saved(rgb, "PNG", pnginfo=words, icc_profile=b"x" * 200),
        *(_saved(rgb, kind, exif=exif) for kind in ("JPEG", "PNG", "WEBP")),
        *(_saved(rgba, kind) for kind in ("PNG", "WEBP")),
        _saved(rgb, "JPEG", progressive=True, icc_profile=b"x" * 200),
        _saved(rgb.convert("CMYK"), "JPEG"),
        _saved(rgb.convert("L"), "JPEG"),
        _saved(rgb.convert("P"), "PNG", transparency=3),
        _saved(rgb.convert("1"), "PNG"),
        _saved(deep, "PNG"),
        _saved(rgb, "WEBP", lossless=True),
        _saved(rgb, "GIF"),
        _saved(rgb, "MPO", save_all=True, append_images=[rgb]),
    ]


FILES = _files()


@st.composite
def bent(draw: st.DrawFn) -> bytes:
    """A file with some bytes changed, cut out, doubled, or another's tail."""
    data = bytearray(draw(st.sampled_from(FILES)))
    for _ in range(draw(st.integers(1, 6))):
        start = draw(st.integers(0, max(0, len(data) - 1)))
        length = draw(st.integers(1, 40))
        match draw(st.sampled_from(["set", "cut", "double", "tail"])):
            case "set":
                data[start : start + length] = draw(st.binary(min_size=length, max_size=length))
            case "cut":
                del data[start : start + length]
            case "double":
                data[start:start] = data[start : start + length]
            case _:
                other = draw(st.sampled_from(FILES))
                data[start:] = other[min(start, len(other)) :]
    return bytes(data)


@given(bent() | st.binary(max_size=200))
@settings(max_examples=EXAMPLES)
@pytest.mark.filterwarnings("ignore")  # Pillow warns of what it mends
def test_any_bytes_are_a_picture_or_a_picture_error(data: bytes) -> None:
    try:
        picture = open_picture(data, MAX_PIXELS)
    except PictureError as error:
        assert str(error)  # noqa: PT017  # there may be none
        return
    assert picture.rgb is not None
    assert picture.rgb.shape == (picture.height, picture.width, 3)
    assert 0 < picture.width * picture.height <= MAX_PIXELS


def test_the_child_decodes_as_this_process_does() -> None:
    pool = PicturePool(1, 4 << 30, 20, 60)
    try:
        for data in FILES:
            outcome, _ = pool.run(Job(), data)
            try:
                picture = open_picture(data)
            except PictureError:
                assert outcome.code in ("PICTURE_BROKEN", "PICTURE_OVER_LIMIT")
                continue
            assert (outcome.code, outcome.width, outcome.height) == ("", picture.width, picture.height)
    finally:
        pool.close()


_WATCH = """
import json, sys
from veneer_dataset.adapters.pictures import child
from veneer_dataset.adapters.pictures.frames import Job
child.prepare()
before = set(sys.modules)
for data in json.load(sys.stdin):
    child._work(Job(), bytes.fromhex(data))
    child._work(Job((1024, 200704, 16, 2, 2)), bytes.fromhex(data))
print(json.dumps(sorted(set(sys.modules) - before)))
"""


def test_the_child_imports_nothing_while_it_decodes() -> None:
    cut = [data[: len(data) * 2 // 3] for data in FILES]
    given_files = json.dumps([data.hex() for data in [*FILES, *cut]])
    run = subprocess.run([sys.executable, "-c", _WATCH], input=given_files, capture_output=True, text=True, check=True)
    assert json.loads(run.stdout) == []
