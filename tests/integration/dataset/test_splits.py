"""Where rows go: as given, or by content, so that more rows move none; groups stay whole."""

import uuid
from collections import Counter, defaultdict

import pytest

from veneer.dataset.v1 import dataset_pb2
from veneer.dataset.v1 import dataset_service_pb2 as pb

from .conftest import Result, Service, collect, freeze, lines, png, sha, upload

SHARES = {"train": 0.7, "validation": 0.2, "test": 0.1}


@pytest.fixture
def dataset(service: Service) -> str:
    name = f"s{uuid.uuid4().hex[:12]}"
    service.stub().CreateDataset(pb.CreateDatasetRequest(dataset_id=name))
    return name


def by_fractions(**fields: object) -> dataset_pb2.SplitPolicy:
    return dataset_pb2.SplitPolicy(fractions=dataset_pb2.FractionSplits(fractions=SHARES, **fields))


def splits_of(service: Service, result: Result) -> dict[str, set[str]]:
    """The splits in which each prompt's rows are."""
    found: dict[str, set[str]] = defaultdict(set)
    for split in result.version.splits:
        request = pb.ReadExamplesRequest(dataset_version=result.version.name, split=split.split)
        for response in service.stub().ReadExamples(request):
            found[response.example.messages[0].parts[-1].text].add(split.split)
    return found


def texts(count: int) -> list[dict[str, str]]:
    return [{"prompt": f"q{number}", "text": f"a{number % 4}"} for number in range(count)]


def test_more_rows_move_no_other(service: Service, dataset: str) -> None:
    few = splits_of(service, freeze(service.stub(), dataset, lines(*texts(100)), split_policy=by_fractions()))
    many = splits_of(service, freeze(service.stub(), dataset, lines(*texts(400)), split_policy=by_fractions()))
    assert {prompt: many[prompt] for prompt in few} == few
    sizes = Counter(next(iter(splits)) for splits in many.values())
    assert sizes.keys() == SHARES.keys()
    assert abs(sizes["train"] / 400 - 0.7) < 0.08


@pytest.mark.parametrize("key", ["picture", "field"])
def test_groups_stay_in_one_split(service: Service, dataset: str, key: str) -> None:
    pictures = {f"{number}.png": png(number) for number in range(30)}
    rows = [
        {"image": name, "prompt": name if key == "picture" else f"g{number % 12}", "text": f"{name} {turn}"}
        | ({"group": f"g{number % 12}"} if key == "field" else {})
        for number, name in enumerate(pictures)
        for turn in range(3)
    ]
    group_key = dataset_pb2.GROUP_KEY_FIELD if key == "field" else dataset_pb2.GROUP_KEY_PICTURES
    policy = by_fractions(group_key=group_key)
    result = freeze(service.stub(), dataset, lines(*rows), pictures, split_policy=policy)
    assert "PICTURE_IN_TWO_SPLITS" not in result.codes
    splits = splits_of(service, result)
    assert len(splits) == (12 if key == "field" else 30)
    assert all(len(its_splits) == 1 for its_splits in splits.values())


def test_stratified_shares_each_answer_alike_and_says_so(service: Service, dataset: str) -> None:
    policy = by_fractions(stratified=True)
    result = freeze(service.stub(), dataset, lines(*texts(400)), split_policy=policy)
    assert result.codes == ["SPLIT_STRATIFIED"]
    assert {split.split: split.row_count for split in result.version.splits} == {
        "train": 280,
        "validation": 80,
        "test": 40,
    }
    counts = Counter(
        response.example.messages[1].parts[0].text
        for response in service.stub().ReadExamples(
            pb.ReadExamplesRequest(dataset_version=result.version.name, split="test")
        )
    )
    assert set(counts.values()) == {10}


def test_given_by_file_field_and_name(service: Service, dataset: str) -> None:
    stub = service.stub()
    files = {
        "train.jsonl": lines({"prompt": "1", "text": "t"}, {"prompt": "2", "text": "t", "split": "extra"}),
        "data/val.jsonl": lines({"prompt": "3", "text": "t"}),
        "test.jsonl": lines({"prompt": "4", "text": "t"}),
        "rest.jsonl": lines({"prompt": "5", "text": "t"}),
    }
    upload(stub, *files.values())
    request = pb.CreateDatasetVersionRequest(
        parent=f"datasets/{dataset}",
        row_files=[
            pb.RowFile(path=path, digest=sha(data), split="held-out" if path == "rest.jsonl" else "")
            for path, data in files.items()
        ],
    )
    splits = splits_of(service, collect(stub, request))
    assert splits == {"1": {"train"}, "2": {"extra"}, "3": {"validation"}, "4": {"test"}, "5": {"held-out"}}
