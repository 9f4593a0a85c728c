"""The way of one folder of pictures through a real service: upload, version, findings, rows, holds."""

import itertools
import json
import uuid

import grpc
import numpy as np
import pytest

from veneer.dataset.v1 import conversation_pb2, dataset_pb2
from veneer.dataset.v1 import dataset_service_pb2 as pb
from veneer_base.unfold import base_directory
from veneer_digests import epoch_order
from veneer_processing import PixelBounds, Processor, open_picture
from veneer_rpc.delegation import DelegationSigner

from .conftest import MODEL_DIGEST, Service, collect, freeze, lines, png, sha, upload


@pytest.fixture
def dataset(service: Service) -> str:
    name = f"d{uuid.uuid4().hex[:12]}"
    service.stub().CreateDataset(pb.CreateDatasetRequest(dataset_id=name))
    return name


def code_of(error: pytest.ExceptionInfo[grpc.RpcError]) -> grpc.StatusCode:
    return error.value.code()


def test_the_tutorial_folder(service: Service, dataset: str) -> None:
    stub = service.stub()
    pictures = {
        f"images/{name}": png(seed) for seed, name in enumerate(["invoice_01.png", "table_02.jpg", "form_03.png"])
    }
    rows = lines(
        {"image": "invoice_01.png", "text": "这是一张金额为 ¥8,650 的增值税发票,开票日期是2024年3月15日。"},
        {"image": "table_02.jpg", "text": "请提取图中文字:欢迎来到人工智能时代"},
        {"image": "form_03.png", "text": "该申请表填写了姓名张伟、部门技术部、请假类型年假、天数3天。"},
        {"image": "gone.png", "text": "x"},
    )
    result = freeze(stub, dataset, rows, pictures)
    report = result.version.report
    assert (report.submitted_rows, report.accepted_rows, report.refused_rows) == (4, 3, 1)
    assert sorted(result.codes) == [
        "INSTRUCTION_IN_TEXT",
        "PATH_SEARCHED",
        "PATH_SEARCHED",
        "PATH_SEARCHED",
        "PICTURE_MISSING",
    ]
    missing = next(each for each in result.findings if each.code == "PICTURE_MISSING")
    assert (missing.path, missing.line, missing.json_path, missing.found) == ("train.jsonl", 4, "$.image", "gone.png")
    assert missing.severity == dataset_pb2.SEVERITY_ERROR
    assert missing.expected
    assert missing.remedy
    assert report.row_files[0].dialect == dataset_pb2.DIALECT_PAIR
    got = stub.GetDatasetVersion(pb.GetDatasetVersionRequest(name=result.version.name[:-52]))
    assert got == result.version
    assert stub.GetDataset(pb.GetDatasetRequest(name=f"datasets/{dataset}")).latest_version == got.name
    listed = stub.ListDatasetVersions(pb.ListDatasetVersionsRequest(parent=f"datasets/{dataset}"))
    assert list(listed.dataset_versions) == [got]


def test_findings_page_by_page(service: Service, dataset: str) -> None:
    stub = service.stub()
    rows = lines(*({"image": f"{number}.png", "text": "t"} for number in range(250)), {"prompt": "p", "text": "t"})
    result = freeze(stub, dataset, rows)
    assert len(result.findings) == 100
    found, token = [], ""
    while True:
        page = stub.ListFindings(pb.ListFindingsRequest(parent=result.version.name, page_token=token, page_size=70))
        found += page.findings
        token = page.next_page_token
        if not token:
            break
    assert [each.line for each in found] == list(range(1, 251))
    none = pb.ListFindingsRequest(parent=result.version.name, severity=dataset_pb2.SEVERITY_INFO)
    assert not stub.ListFindings(none).findings
    everything = freeze(stub, dataset, rows, validate_only=True)
    assert len(everything.findings) == 250
    assert everything.version.name == result.version.name


def test_strict_and_nothing_accepted_send_findings_first(service: Service, dataset: str) -> None:
    stub = service.stub()
    for rows, fields in (
        (lines({"text": "no prompt"}), {}),
        (lines({"prompt": "p", "text": "t"}, {"text": "no prompt"}), {"strict": True}),
    ):
        found: list[dataset_pb2.Finding] = []
        with pytest.raises(grpc.RpcError) as error:
            freeze(stub, dataset, rows, found=found, **fields)
        assert code_of(error) is grpc.StatusCode.FAILED_PRECONDITION
        assert [each.code for each in found] == ["FIELD_MISSING"]
    assert not stub.ListDatasetVersions(pb.ListDatasetVersionsRequest(parent=f"datasets/{dataset}")).dataset_versions


def test_the_same_content_is_the_same_version_in_any_order(service: Service, dataset: str) -> None:
    stub = service.stub()
    rows = [{"prompt": str(number), "text": "t", "split": "test" if number % 3 else "train"} for number in range(9)]
    first = freeze(stub, dataset, lines(*rows))
    again = freeze(stub, dataset, lines(*reversed(rows)))
    assert again.version.name == first.version.name
    assert [(each.split, each.row_count) for each in first.version.splits] == [("test", 6), ("train", 3)]
    assert stub.GetDataset(pb.GetDatasetRequest(name=f"datasets/{dataset}")).version_count == 1


def test_a_request_id_joins_and_repeats(service: Service, dataset: str) -> None:
    stub = service.stub()
    rows = lines(*({"prompt": str(number), "text": "t"} for number in range(2000)))
    upload(stub, rows)
    request = pb.CreateDatasetVersionRequest(
        parent=f"datasets/{dataset}",
        row_files=[pb.RowFile(path="a.jsonl", digest=sha(rows))],
        request_id=str(uuid.uuid4()),
    )
    calls = [stub.CreateDatasetVersion(request) for _ in range(3)]
    ends = [list(call)[-1].dataset_version for call in calls]
    ends.append(collect(stub, request).version)
    assert len({each.name for each in ends}) == 1
    request.strict = True
    with pytest.raises(grpc.RpcError) as error:
        collect(stub, request)
    assert code_of(error) is grpc.StatusCode.ALREADY_EXISTS


def test_rows_come_in_the_order_of_the_epoch(service: Service, dataset: str) -> None:
    stub = service.stub()
    version = freeze(stub, dataset, lines(*({"prompt": str(each), "text": "t"} for each in range(600)))).version
    stored = list(stub.ReadExamples(pb.ReadExamplesRequest(dataset_version=version.name, split="train")))
    digests = [each.example.row_digest for each in stored]
    assert digests == sorted(digests)
    shuffled = stub.ReadExamples(
        pb.ReadExamplesRequest(
            dataset_version=version.name, split="train", shuffle=pb.Shuffle(seed=7, epoch=2), offset=100, limit=300
        )
    )
    order = epoch_order(7, 2, digests)[100:400]
    read = [(each.example.index, each.example.row_digest) for each in shuffled]
    assert read == [(100 + number, digests[position]) for number, position in enumerate(order)]
    for wrong, code in ((601, grpc.StatusCode.OUT_OF_RANGE), (-1, grpc.StatusCode.INVALID_ARGUMENT)):
        with pytest.raises(grpc.RpcError) as error:
            list(stub.ReadExamples(pb.ReadExamplesRequest(dataset_version=version.name, split="train", offset=wrong)))
        assert code_of(error) is code
    assert not list(stub.ReadExamples(pb.ReadExamplesRequest(dataset_version=version.name, split="train", offset=600)))


def test_pictures_come_in_three_forms(service: Service, dataset: str) -> None:
    stub = service.stub()
    big = png(1, 900, 700)
    assert len(big) > 1 << 20
    pictures = {"big.png": big, "small.png": png(2)}
    row = {"images": ["small.png", "big.png"], "prompt": "<image> and <image>", "text": "two"}
    result = freeze(stub, dataset, lines(row), pictures, model="models/tiny")
    version = result.version
    tokens = version.splits[0].tokens
    processor = Processor.load(base_directory(), MODEL_DIGEST)
    assert version.report.contract_digest == processor.contract.digest
    assert tokens.visual > 0
    assert tokens.supervised > 0
    assert tokens.longest_row == tokens.visual + tokens.prompt + tokens.supervised
    assert version.report.train_tokens_per_epoch == tokens.longest_row
    assert sum(each.row_count for each in version.report.length_histogram) == 1

    def read(**fields: object) -> tuple[list[conversation_pb2.Picture], dict[int, bytes]]:
        messages = list(
            stub.ReadExamples(pb.ReadExamplesRequest(dataset_version=version.name, split="train", **fields))
        )
        parts = [part for said in messages[0].example.messages for part in said.parts if part.HasField("picture")]
        more: dict[int, bytes] = {}
        for each in messages[1:]:
            chunk = each.picture_chunk
            assert len(chunk.data) <= 1 << 20
            more[chunk.picture_index] = more.get(chunk.picture_index, b"") + chunk.data
        return [part.picture for part in parts], more

    by_digest, _ = read()
    assert [each.blob for each in by_digest] == [sha(pictures["small.png"]), sha(big)]
    original, more = read(picture_form=pb.PICTURE_FORM_ORIGINAL)
    assert original[0].data == pictures["small.png"]
    assert original[1].data + more[1] == big
    for max_pixels, bounds in ((0, processor.pixels.bounds), (16_384, PixelBounds(16_384, 16_384))):
        own = Processor.load(
            base_directory(),
            MODEL_DIGEST,
            PixelBounds(min(bounds.min_pixels, processor.model_bounds.min_pixels), bounds.max_pixels),
        )
        for _ in range(2):  # made, then from the cache
            resized, more = read(picture_form=pb.PICTURE_FORM_RESIZED, model="models/tiny", max_pixels=max_pixels)
            for number, (picture, data) in enumerate(zip(resized, (pictures["small.png"], big), strict=True)):
                expected = own.pixels.resize(open_picture(data))
                got = picture.resized.rgb + more.get(number, b"")
                assert (picture.resized.height, picture.resized.width) == expected.shape[:2]
                assert np.array_equal(np.frombuffer(got, np.uint8).reshape(expected.shape), expected)
    with pytest.raises(grpc.RpcError) as error:
        read(picture_form=pb.PICTURE_FORM_RESIZED, model="models/tiny", max_pixels=10**9)
    assert code_of(error) is grpc.StatusCode.INVALID_ARGUMENT
    with pytest.raises(grpc.RpcError) as error:
        read(picture_form=pb.PICTURE_FORM_RESIZED, model="models/none")
    assert code_of(error) is grpc.StatusCode.NOT_FOUND


def test_a_hold_keeps_a_version(service: Service, dataset: str) -> None:
    stub = service.stub()
    version = freeze(stub, dataset, lines({"prompt": "p", "text": "t"})).version
    signer = DelegationSigner(service.delegation_key)
    trainer = service.stub(signer.sign("trainer", "acme", ["dataset"], ["service"]))
    hold = pb.PlaceHoldRequest(dataset_version=version.name, holder="trainingJobs/j")
    for _ in range(2):
        trainer.PlaceHold(hold)
    assert trainer.GetDatasetVersion(pb.GetDatasetVersionRequest(name=version.name)).hold_count == 1
    for delete in (
        lambda: stub.DeleteDatasetVersion(pb.DeleteDatasetVersionRequest(name=version.name)),
        lambda: stub.DeleteDataset(pb.DeleteDatasetRequest(name=f"datasets/{dataset}")),
    ):
        with pytest.raises(grpc.RpcError) as error:
            delete()
        assert code_of(error) is grpc.StatusCode.FAILED_PRECONDITION
    for _ in range(2):
        trainer.ReleaseHold(pb.ReleaseHoldRequest(dataset_version=version.name, holder="trainingJobs/j"))
    stub.DeleteDatasetVersion(pb.DeleteDatasetVersionRequest(name=version.name))
    stub.DeleteDataset(pb.DeleteDatasetRequest(name=f"datasets/{dataset}"))
    with pytest.raises(grpc.RpcError) as error:
        stub.GetDataset(pb.GetDatasetRequest(name=f"datasets/{dataset}"))
    assert code_of(error) is grpc.StatusCode.NOT_FOUND


def test_tenants_see_nothing_of_each_other(service: Service, dataset: str) -> None:
    mine, theirs = service.stub(), service.stub(service.stranger)
    picture = png(77)
    version = freeze(mine, dataset, lines({"image": "p.png", "text": "t"}), {"p.png": picture}).version
    for call in (
        lambda: theirs.GetDataset(pb.GetDatasetRequest(name=f"datasets/{dataset}")),
        lambda: theirs.GetDatasetVersion(pb.GetDatasetVersionRequest(name=version.name)),
        lambda: list(theirs.ReadExamples(pb.ReadExamplesRequest(dataset_version=version.name, split="train"))),
        lambda: list(theirs.DownloadBlobs(pb.DownloadBlobsRequest(digests=[sha(picture)]))),
        lambda: theirs.ListFindings(pb.ListFindingsRequest(parent=version.name)),
        lambda: theirs.PlaceHold(pb.PlaceHoldRequest(dataset_version=version.name, holder="h")),
    ):
        with pytest.raises(grpc.RpcError) as error:
            call()
        assert code_of(error) is grpc.StatusCode.NOT_FOUND
    assert [
        each.digest for each in theirs.FindMissingBlobs(pb.FindMissingBlobsRequest(digests=[sha(picture)])).missing
    ] == [sha(picture)]
    theirs.CreateDataset(pb.CreateDatasetRequest(dataset_id=dataset))
    manifest = lines({"path": "p.png", "digest": sha(picture)})
    rows = lines({"image": "p.png", "text": "t"}, {"prompt": "p", "text": "t"})
    upload(theirs, manifest, rows)
    stolen = collect(
        theirs,
        pb.CreateDatasetVersionRequest(
            parent=f"datasets/{dataset}",
            row_files=[pb.RowFile(path="a.jsonl", digest=sha(rows))],
            picture_manifest=sha(manifest),
        ),
    )
    assert stolen.codes == ["PICTURE_NOT_UPLOADED"]
    for method in ("GetDataset", "ListDatasets", "FindMissingBlobs"):
        call = getattr(service.stub("vnr_wrong"), method)
        with pytest.raises(grpc.RpcError) as error:
            call(getattr(pb, f"{method}Request")())
        assert code_of(error) is grpc.StatusCode.UNAUTHENTICATED


def test_datasets_are_changed_and_listed(service: Service) -> None:
    stub = service.stub()
    names = [f"l{uuid.uuid4().hex[:10]}" for _ in range(5)]
    made = [
        stub.CreateDataset(pb.CreateDatasetRequest(dataset_id=name, request_id=str(uuid.uuid4()))) for name in names
    ]
    with pytest.raises(grpc.RpcError) as error:
        stub.CreateDataset(pb.CreateDatasetRequest(dataset_id=names[0]))
    assert code_of(error) is grpc.StatusCode.ALREADY_EXISTS
    listed, token = [], ""
    for _ in itertools.count():
        page = stub.ListDatasets(pb.ListDatasetsRequest(page_size=2, page_token=token))
        listed += [each.name for each in page.datasets]
        token = page.next_page_token
        if not token:
            break
    assert len(set(listed)) == len(listed)
    assert [name for name in listed if name in {each.name for each in made}] == [each.name for each in reversed(made)]
    new = dataset_pb2.Dataset(name=made[0].name, default_prompt="What is it?", etag=made[0].etag)
    changed = stub.UpdateDataset(pb.UpdateDatasetRequest(dataset=new))
    assert changed.default_prompt == "What is it?"
    with pytest.raises(grpc.RpcError) as error:
        stub.UpdateDataset(pb.UpdateDatasetRequest(dataset=new))
    assert code_of(error) is grpc.StatusCode.ABORTED
    version = freeze(stub, names[0], lines({"image": "a.png", "text": "t"}), {"a.png": png(5)}).version
    row = next(iter(stub.ReadExamples(pb.ReadExamplesRequest(dataset_version=version.name, split="train")))).example
    assert row.messages[0].parts[1].text == "What is it?"
    assert json.dumps("What is it?")
