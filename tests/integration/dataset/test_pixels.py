"""Resized pictures are, bit for bit, what `veneer_processing` makes of the same file: whatever the file is."""

import io
import uuid
from collections.abc import Callable

import numpy as np
import pytest
from PIL import Image
from PIL.ExifTags import Base

from veneer.dataset.v1 import dataset_service_pb2 as pb
from veneer_base.unfold import base_directory
from veneer_processing import Processor, open_picture

from .conftest import MODEL_DIGEST, Service, freeze, lines


def picture(mode: str = "RGB", size: tuple[int, int] = (130, 70)) -> Image.Image:
    noise = np.random.default_rng(3).integers(0, 255, (*size[::-1], 4), np.uint8)
    whole = Image.fromarray(noise, "RGBA") if mode == "RGBA" else Image.fromarray(noise[..., :3])
    return whole if mode in ("RGB", "RGBA") else whole.convert(mode)


def saved(image: Image.Image, kind: str, **options: object) -> bytes:
    out = io.BytesIO()
    image.save(out, kind, **options)
    return out.getvalue()


def turned(orientation: int, kind: str = "JPEG") -> bytes:
    exif = Image.Exif()
    exif[Base.Orientation] = orientation
    return saved(picture(), kind, exif=exif)


def deep() -> bytes:
    grey = np.random.default_rng(3).integers(0, 2**16, (70, 130), np.uint16)
    return saved(Image.fromarray(grey), "PNG")


FILES: dict[str, Callable[[], bytes]] = {
    **{f"turned-{number}": lambda number=number: turned(number) for number in range(1, 9)},
    "turned-png": lambda: turned(6, "PNG"),
    "turned-webp": lambda: turned(6, "WEBP"),
    "cmyk": lambda: saved(picture("CMYK"), "JPEG"),
    "palette": lambda: saved(picture("P"), "PNG"),
    "grey": lambda: saved(picture("L"), "PNG"),
    "alpha": lambda: saved(picture("RGBA"), "PNG"),
    "alpha-webp": lambda: saved(picture("RGBA"), "WEBP", quality=70),
    "sixteen-bit": deep,
    "large": lambda: saved(picture(size=(1500, 1100)), "JPEG", quality=80),
    "long": lambda: saved(picture(size=(40, 700)), "PNG"),
}


def test_every_kind_of_file(service: Service) -> None:
    stub, name = service.stub(), f"x{uuid.uuid4().hex[:12]}"
    stub.CreateDataset(pb.CreateDatasetRequest(dataset_id=name))
    data = {f"{key}.bin": make() for key, make in FILES.items()}
    rows = lines(*({"image": path, "text": path} for path in data))
    result = freeze(stub, name, rows, data, model="models/tiny")
    assert result.version.report.accepted_rows == len(data)
    processor = Processor.load(base_directory(), MODEL_DIGEST)
    request = pb.ReadExamplesRequest(
        dataset_version=result.version.name, split="train", picture_form=pb.PICTURE_FORM_RESIZED, model="models/tiny"
    )
    got: dict[str, list[bytes]] = {}
    sizes: dict[str, tuple[int, int]] = {}
    path = ""
    for response in stub.ReadExamples(request):
        if response.HasField("picture_chunk"):
            got[path].append(response.picture_chunk.data)
            continue
        path = response.example.messages[1].parts[0].text
        resized = response.example.messages[0].parts[0].picture.resized
        got[path], sizes[path] = [resized.rgb], (resized.height, resized.width)
    assert got.keys() == data.keys()
    for path, file in data.items():
        expected = processor.pixels.resize(open_picture(file))
        assert sizes[path] == expected.shape[:2], path
        assert np.array_equal(np.frombuffer(b"".join(got[path]), np.uint8).reshape(expected.shape), expected), path
    height, width = sizes["turned-1.bin"]
    assert height < width
    for turned_file in ("turned-6.bin", "turned-png.bin", "turned-webp.bin"):
        assert sizes[turned_file] == (width, height), turned_file


@pytest.mark.parametrize("orientation", [0, 9, 65535])
def test_an_orientation_that_is_none(orientation: int) -> None:
    assert open_picture(turned(orientation)).width == 130
