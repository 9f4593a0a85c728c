"""Bad pictures and row files on a live server: a finding or a status, the same process afterwards."""

import io
import json
import struct
import uuid
import zlib
from collections.abc import Callable

import grpc
import pytest
from PIL import Image

from veneer.dataset.v1 import dataset_service_pb2 as pb

from .conftest import Service, collect, freeze, lines, png, sha, upload


def saved(image: Image.Image, kind: str, **options: object) -> bytes:
    out = io.BytesIO()
    image.save(out, kind, **options)
    return out.getvalue()


def plain(mode: str = "RGB", size: tuple[int, int] = (40, 40)) -> Image.Image:
    return Image.new(mode, size)


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def bomb(width: int, height: int) -> bytes:
    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + head + chunk(b"IDAT", zlib.compress(b"\0" * 1000)) + chunk(b"IEND", b"")


def jpeg_cut() -> bytes:
    data = saved(Image.effect_noise((200, 200), 50).convert("RGB"), "JPEG")
    return data[: len(data) // 2]


def many_frames() -> bytes:
    frames = [Image.new("RGB", (8, 8), (number % 256, 0, 0)) for number in range(200)]
    return saved(frames[0], "WEBP", save_all=True, append_images=frames[1:])


def text_chunk() -> bytes:
    data = png(3)
    return data[:33] + chunk(b"zTXt", b"k\0\0" + zlib.compress(b"x" * 100_000_000)) + data[33:]


PICTURES: list[tuple[Callable[[], bytes], set[str]]] = [
    (lambda: bomb(60_000, 60_000), {"PICTURE_OVER_LIMIT"}),
    (lambda: bomb(0, 0), {"PICTURE_BROKEN"}),
    (jpeg_cut, {"PICTURE_BROKEN"}),
    (lambda: saved(plain(), "TIFF"), {"PICTURE_BROKEN"}),
    (lambda: saved(plain(), "GIF"), {"PICTURE_BROKEN"}),
    (lambda: b"%!PS-Adobe-3.0 EPSF-3.0\n", {"PICTURE_BROKEN"}),
    (lambda: b"<svg xmlns='http://www.w3.org/2000/svg'/>", {"PICTURE_BROKEN"}),
    (lambda: b"8BPS" + b"\0" * 100, {"PICTURE_BROKEN"}),
    (lambda: b"", {"PICTURE_BROKEN"}),
    (many_frames, {"PICTURE_OVER_LIMIT"}),
    (text_chunk, {"PICTURE_OVER_LIMIT", "PICTURE_BROKEN"}),
    (lambda: saved(plain(size=(1, 1)), "PNG"), {"PICTURE_TINY"}),
    (lambda: saved(plain(size=(1, 20_000)), "PNG"), {"PICTURE_TOO_THIN"}),
    (lambda: saved(plain("CMYK"), "JPEG"), set()),
    (lambda: saved(plain("I;16"), "PNG"), set()),
    (lambda: saved(plain("P"), "PNG"), set()),
    (lambda: saved(plain("RGBA"), "WEBP"), set()),
]


@pytest.mark.parametrize(("make", "codes"), PICTURES)
def test_pictures(service: Service, make: Callable[[], bytes], codes: set[str]) -> None:
    stub, name = service.stub(), f"p{uuid.uuid4().hex[:10]}"
    stub.CreateDataset(pb.CreateDatasetRequest(dataset_id=name))
    rows = lines({"image": "a.png", "text": "t"}, {"prompt": "p", "text": "t"})
    result = freeze(stub, name, rows, {"a.png": make()})
    assert set(result.codes) <= codes
    assert bool(result.codes) == bool(codes)
    assert result.version.report.submitted_rows == 2
    assert result.version.report.accepted_rows + result.version.report.refused_rows == 2
    assert service.process.poll() is None
    again = freeze(stub, name, rows, {"a.png": make()})
    assert again.codes == result.codes  # from what is remembered


@pytest.mark.parametrize(
    ("rows", "code"),
    [
        (b'{"prompt":"p","text":"' + b"x" * (33 << 20) + b'"}', grpc.StatusCode.RESOURCE_EXHAUSTED),
        (b"\n" * 1_000_001, grpc.StatusCode.RESOURCE_EXHAUSTED),
        (
            json.dumps({"messages": [{"role": "user", "content": "q"}] * 100_000}).encode(),
            grpc.StatusCode.RESOURCE_EXHAUSTED,
        ),
        (b"", grpc.StatusCode.FAILED_PRECONDITION),
    ],
    ids=["long line", "blank lines", "many turns", "empty"],
)
def test_row_files_that_stop_the_push(service: Service, rows: bytes, code: grpc.StatusCode) -> None:
    stub, name = service.stub(), f"r{uuid.uuid4().hex[:10]}"
    stub.CreateDataset(pb.CreateDatasetRequest(dataset_id=name))
    with pytest.raises(grpc.RpcError) as error:
        freeze(stub, name, rows)
    assert error.value.code() is code
    assert len(error.value.details().encode()) <= 512
    assert freeze(stub, name, lines({"prompt": "p", "text": "t"})).version.report.accepted_rows == 1


@pytest.mark.parametrize(
    "fields",
    [
        {"row_files": []},
        {"row_files": [pb.RowFile(path="../a.jsonl", digest="0" * 64)]},
        {"row_files": [pb.RowFile(path="/etc/passwd", digest="0" * 64)]},
        {"row_files": [pb.RowFile(path="a", digest="x")]},
        {"row_files": [pb.RowFile(path="a", digest="0" * 64, split="No Split")]},
        {"picture_manifest": "x"},
        {"max_pixels": -1},
        {"model": "nothing"},
        {"labels": {"Key": "v"}},
        {"request_id": "no-uuid"},
        {"parent": "datasets/UPPER"},
    ],
)
def test_wrong_requests(service: Service, fields: dict[str, object]) -> None:
    good = {"parent": "datasets/none", "row_files": [pb.RowFile(path="a", digest="0" * 64)]}
    with pytest.raises(grpc.RpcError) as error:
        collect(service.stub(), pb.CreateDatasetVersionRequest(**{**good, **fields}))
    assert error.value.code() is grpc.StatusCode.INVALID_ARGUMENT


def test_a_row_file_that_is_not_there(service: Service) -> None:
    stub, name = service.stub(), f"n{uuid.uuid4().hex[:10]}"
    stub.CreateDataset(pb.CreateDatasetRequest(dataset_id=name))
    request = pb.CreateDatasetVersionRequest(
        parent=f"datasets/{name}", row_files=[pb.RowFile(path="a.jsonl", digest="0" * 64)]
    )
    with pytest.raises(grpc.RpcError) as error:
        collect(service.stub(), request)
    assert error.value.code() is grpc.StatusCode.NOT_FOUND
    upload(stub, b"not a manifest")
    request.row_files[0].digest = request.picture_manifest = sha(b"not a manifest")
    with pytest.raises(grpc.RpcError) as error:
        collect(service.stub(), request)
    assert error.value.code() is grpc.StatusCode.INVALID_ARGUMENT


def test_a_long_row_is_refused_by_the_models_context(service: Service) -> None:
    stub, name = service.stub(), f"c{uuid.uuid4().hex[:10]}"
    stub.CreateDataset(pb.CreateDatasetRequest(dataset_id=name))
    rows = lines({"prompt": "p", "text": "hello world " * 2000}, {"prompt": "p", "text": "t"})
    result = freeze(stub, name, rows, model="models/tiny")
    assert "ROW_OVER_CONTEXT" in result.codes
    assert result.version.report.accepted_rows == 1
