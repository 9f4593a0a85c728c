"""Rows as they are read: in every order and form, one a message and several, whatever became of their pack."""

import sqlite3
import uuid
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

import grpc
import pytest

from veneer.dataset.v1 import dataset_service_pb2 as pb
from veneer.dataset.v1.dataset_service_pb2_grpc import DatasetServiceStub

from .conftest import Service, StartService, freeze, lines, png, sha
from .test_faults import until

WORD = "Ä 你 😀 "
FORMS = pb.PICTURE_FORM_DIGEST, pb.PICTURE_FORM_ORIGINAL, pb.PICTURE_FORM_RESIZED


def whole(messages: Iterator[pb.ReadExamplesResponse]) -> list[pb.Example]:
    """Rows with what followed of their pictures put in."""
    rows: list[pb.Example] = []
    for message in messages:
        assert message.ByteSize() < 3 << 20
        if message.HasField("picture_chunk"):
            pictures = [part.picture for said in rows[-1].messages for part in said.parts if part.HasField("picture")]
            picture = pictures[message.picture_chunk.picture_index]
            if picture.HasField("resized"):
                picture.resized.rgb += message.picture_chunk.data
            else:
                picture.data += message.picture_chunk.data
        else:
            rows += message.examples or [message.example]
    return rows


def small_rows(count: int) -> bytes:
    return lines(
        *(
            {
                "messages": [
                    {"role": "user", "content": f"{number}{WORD * 40}"},
                    {"role": "assistant", "content": "a", "weight": number % 2},
                    {"role": "assistant", "content": f"{number}"},
                ],
                "split": "test" if number % 3 == 0 else "train",
            }
            for number in range(count)
        )
    )


@pytest.fixture
def dataset(service: Service) -> str:
    name = f"r{uuid.uuid4().hex[:12]}"
    service.stub().CreateDataset(pb.CreateDatasetRequest(dataset_id=name))
    return name


def test_many_small_rows_fill_several_batches(service: Service, dataset: str) -> None:
    stub, count = service.stub(), 4_000
    version = freeze(stub, dataset, small_rows(count)).version
    assert [(each.split, each.row_count) for each in version.splits] == [("test", 1334), ("train", 2666)]

    def read(split: str = "train", **fields: object) -> list[pb.ReadExamplesResponse]:
        return list(stub.ReadExamples(pb.ReadExamplesRequest(dataset_version=version.name, split=split, **fields)))

    for split, total in (("train", 2666), ("test", 1334)):
        for order in ({}, {"shuffle": pb.Shuffle(seed=3, epoch=1)}):
            single = [message.example for message in read(split, **order)]
            assert [each.index for each in single] == list(range(total))
            assert len({each.messages[0].parts[0].text for each in single}) == total
            assert all(each.messages[0].parts[0].text.endswith(WORD) for each in single)
            learned = [(int(each.messages[2].parts[0].text), each.messages[1].unsupervised) for each in single]
            assert all(unsupervised == (number % 2 == 0) for number, unsupervised in learned)
            batches = read(split, batched=True, **order)
            sizes = [batch.ByteSize() for batch in batches]
            assert len(batches) == (2 if split == "train" else 1)
            assert all(500_000 < size < 1_100_000 for size in sizes[:-1])
            assert [example for batch in batches for example in batch.examples] == single
            for offset, limit in ((0, 1), (130, 0), (1, 1300), (total - 1, 5), (total, 0)):
                some = single[offset : offset + limit] if limit else single[offset:]
                got = [
                    each
                    for batch in read(split, batched=True, offset=offset, limit=limit, **order)
                    for each in batch.examples
                ]
                assert got == some
                if len(some) < 10:
                    assert [each.example for each in read(split, offset=offset, limit=limit, **order)] == some


def test_rows_with_pictures_fill_several_batches(service: Service, dataset: str) -> None:
    stub = service.stub()
    pictures = {f"{seed}.png": png(seed, 150, 100) for seed in range(4)} | {"big.png": png(9, 900, 700)}
    assert len(pictures["0.png"]) > 42_000
    assert len(pictures["big.png"]) > 1 << 20
    files = {sha(data): data for data in pictures.values()}
    rows = [
        {"images": [f"{number % 4}.png", f"{(number + 1) % 4}.png"], "prompt": f"<image>{number}<image>", "text": "t"}
        for number in range(11)
    ]
    rows[4] = {"images": ["0.png", "big.png", "1.png"], "prompt": "a<image><image>b<image>", "text": "t"}
    rows[7] = {"prompt": "none", "text": "t"}
    version = freeze(stub, dataset, lines(*rows), pictures, model="models/tiny").version
    for order in ({}, {"shuffle": pb.Shuffle(seed=5)}):
        read = {}
        for form in FORMS:
            request = pb.ReadExamplesRequest(dataset_version=version.name, split="train", picture_form=form, **order)
            request.model = "models/tiny" if form == pb.PICTURE_FORM_RESIZED else ""
            read[form] = whole(stub.ReadExamples(request))
            request.batched = True
            batches = list(stub.ReadExamples(request))
            assert whole(iter(batches)) == read[form]
            if form == pb.PICTURE_FORM_ORIGINAL:
                several = [batch for batch in batches if len(batch.examples) > 1]
                assert len(several) >= 2
                assert all(batch.ByteSize() > 1 << 18 for batch in several[:-1])
        assert [each.index for each in read[pb.PICTURE_FORM_DIGEST]] == list(range(11))
        for by_digest, original, resized in zip(*(read[form] for form in FORMS), strict=True):
            for row in (original, resized):
                for said in row.messages:
                    for part in said.parts:
                        if part.picture.WhichOneof("source") == "data":
                            part.picture.blob = sha(part.picture.data)
                        elif part.picture.WhichOneof("source") == "resized":
                            pixels = part.picture.resized
                            assert len(pixels.rgb) == 3 * pixels.width * pixels.height > 0
                            assert pixels.blob in files
                            part.picture.blob = pixels.blob
                assert row == by_digest


def test_a_version_that_is_deleted_while_it_is_read(start_service: StartService, tmp_path: Path) -> None:
    service = start_service(tmp_path, "--collect-every-s", "0.2")
    stub = service.stub()
    stub.CreateDataset(pb.CreateDatasetRequest(dataset_id="d"))
    pictures = {f"{number}.png": png(number, 1000, 1000) for number in range(2)}  # 3 MB each
    rows = lines(*({"images": list(pictures), "text": f"t{number}"} for number in range(40)))  # 240 MB to send
    version = freeze(stub, "d", rows, pictures).version
    request = pb.ReadExamplesRequest(dataset_version=version.name, split="train", picture_form=pb.PICTURE_FORM_ORIGINAL)
    reading = stub.ReadExamples(request)
    next(iter(reading))
    assert len(list((service.data / "packs").iterdir())) == 1
    stub.DeleteDatasetVersion(pb.DeleteDatasetVersionRequest(name=version.name))
    with pytest.raises(grpc.RpcError) as error:
        list(reading)
    assert error.value.code() is grpc.StatusCode.NOT_FOUND
    with pytest.raises(grpc.RpcError) as error:
        list(stub.ReadExamples(request))
    assert error.value.code() is grpc.StatusCode.NOT_FOUND
    until(lambda: not list((service.data / "packs").iterdir()), "its rows are gone from the disk too")


def test_the_same_rows_whatever_became_of_the_pack(start_service: StartService, tmp_path: Path) -> None:
    service = start_service(tmp_path)
    stub = service.stub()
    stub.CreateDataset(pb.CreateDatasetRequest(dataset_id="d"))
    pictures = {f"{seed}.png": png(seed) for seed in range(3)}
    rows = lines(*({"image": f"{number % 3}.png", "text": f"t{number}"} for number in range(60)))
    version = freeze(stub, "d", rows, pictures).version

    def read(stub: DatasetServiceStub, **fields: object) -> list[list[pb.Example]]:
        return [
            whole(
                stub.ReadExamples(
                    pb.ReadExamplesRequest(
                        dataset_version=version.name,
                        split="train",
                        picture_form=form,
                        batched=batched,
                        shuffle=pb.Shuffle(seed=1) if seed else None,
                        **fields,
                    )
                )
            )
            for form in FORMS[:2]
            for batched in (False, True)
            for seed in (0, 1)
        ]

    few = read(stub, offset=7, limit=2)
    assert not list((service.data / "packs").iterdir())  # for two of sixty rows none is made
    expected = read(stub)
    assert few == [each[7:9] for each in expected]
    (pack,) = (service.data / "packs").iterdir()
    sound = pack.read_bytes()
    harms: list[Callable[[], object]] = [
        pack.unlink,
        lambda: pack.write_bytes(sound[:-1]),
        lambda: pack.write_bytes(sound.replace(b"t59", b"t95")),
    ]
    for harm in harms:
        harm()
        assert read(stub) == expected
        assert pack.read_bytes() == sound
    harms[-1]()
    service.process.terminate()
    service.process.wait(30)
    service = start_service(tmp_path)
    assert read(service.stub()) == expected
    assert pack.read_bytes() == sound
    blobs, away = service.data / "blobs", service.data / "away"
    blobs.rename(away)
    with pytest.raises(grpc.RpcError) as error:
        read(service.stub())
    assert error.value.code() is grpc.StatusCode.DATA_LOSS
    assert not pack.exists()  # for the places that it names may be those of another time
    away.rename(blobs)
    assert read(service.stub()) == expected
    cut = next(file for file in blobs.rglob("*-*") if file.read_bytes() in pictures.values())
    file = cut.read_bytes()
    cut.write_bytes(file[:-1])
    with pytest.raises(grpc.RpcError, match="lacks 1 bytes") as error:
        read(service.stub())
    assert error.value.code() is grpc.StatusCode.DATA_LOSS
    cut.write_bytes(file)
    service.process.terminate()
    service.process.wait(30)
    service = start_service(tmp_path, "--pack-cache-bytes", "1000")
    assert read(service.stub()) == expected
    assert not list((service.data / "packs").iterdir())
    service.process.terminate()
    service.process.wait(30)
    with closing(sqlite3.connect(service.data / "metadata.sqlite")) as database, database:
        database.execute("DELETE FROM blobs")
    stub = start_service(tmp_path).stub()
    by_digest = pb.ReadExamplesRequest(dataset_version=version.name, split="train")
    assert whole(stub.ReadExamples(by_digest)) == expected[0]
    by_digest.picture_form = pb.PICTURE_FORM_ORIGINAL
    with pytest.raises(grpc.RpcError, match="is gone, though the version names it") as error:
        list(stub.ReadExamples(by_digest))
    assert error.value.code() is grpc.StatusCode.DATA_LOSS
