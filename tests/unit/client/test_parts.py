"""The SDK's own decisions, without a service: names, folders, addresses, errors, patience and replicas."""

# ruff: noqa: ANN401  # a stand-in for a generated method has no useful type

import asyncio
import json
import os
import stat
from collections import Counter
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.rpc import error_details_pb2, status_pb2
from hypothesis import given
from hypothesis import strategies as st

from veneer_client import Client, Cluster, ClusterNotFound, FolderError, Unavailable, _address, _errors
from veneer_client._calls import Connection, Patience
from veneer_client._errors import Cancelled, Internal, NotFound, ResourceExhausted
from veneer_client._folder import read_folder, split_of
from veneer_client._names import adapter_to_ask, full, short, version
from veneer_client._replicas import Replicas
from veneer_client.commands import screen

IDS = st.from_regex(r"[a-z][a-z0-9-]{0,20}[a-z0-9]", fullmatch=True)


@given(IDS, st.integers(1, 10_000))
def test_names_round_trip(name: str, number: int) -> None:
    assert full("adapters", full("adapters", name)) == full("adapters", name)
    whole = version("adapters", f"{name}@{number}")
    assert whole == f"adapters/{name}/versions/{number}"
    assert short(whole) == f"{name}@{number}"
    assert version("adapters", short(whole)) == version("adapters", whole) == whole
    assert short(full("adapters", name)) == name


def test_an_alias_stays_an_alias_when_asked() -> None:
    assert adapter_to_ask("digits") == "adapters/digits"
    assert adapter_to_ask("digits@canary") == "adapters/digits@canary"
    assert adapter_to_ask("digits@3") == "adapters/digits/versions/3"
    assert adapter_to_ask("adapters/digits/versions/3") == "adapters/digits/versions/3"


@pytest.mark.parametrize(
    ("path", "split"),
    [
        ("train.jsonl", "train"),
        ("data/val.jsonl", "validation"),
        ("dev_2.jsonl", "validation"),
        ("Test-0001.jsonl", "test"),
        ("train2.jsonl", "train"),
        ("training.jsonl", ""),
        ("rows.jsonl", ""),
    ],
)
def test_the_split_that_a_name_says(path: str, split: str) -> None:
    assert split_of(path) == split


@pytest.fixture
def scratch(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("scratch")


def test_a_folder_is_read_without_its_rows(tmp_path: Path, scratch: Path) -> None:
    (tmp_path / "deep" / "images").mkdir(parents=True)
    (tmp_path / ".cache").mkdir()
    (tmp_path / "train.jsonl").write_text("not even JSON\n")
    (tmp_path / "notes.txt").write_text("no")
    (tmp_path / ".cache" / "hidden.png").write_bytes(b"no")
    (tmp_path / "deep" / "images" / "发票 1.JPG").write_bytes(b"a")
    (tmp_path / "b.gif").write_bytes(b"a")
    counts: list[tuple[int, int]] = []
    folder = read_folder(tmp_path, scratch, lambda done, total: counts.append((done, total)))
    assert [rows.path for rows in folder.row_files] == ["train.jsonl"]
    assert [picture.path for picture in folder.pictures] == ["b.gif", "deep/images/发票 1.JPG"]
    assert counts == [(1, 3), (2, 3), (3, 3)]
    assert isinstance(folder.manifest.source, bytes)
    lines = [json.loads(line) for line in folder.manifest.source.splitlines()]
    assert [line["path"] for line in lines] == ["b.gif", "deep/images/发票 1.JPG"]
    assert len(folder.blobs()) == 3  # two pictures are the same bytes


def test_folders_that_cannot_be_pushed(tmp_path: Path, scratch: Path) -> None:
    with pytest.raises(FolderError, match="holds no"):
        read_folder(tmp_path, scratch, lambda done, total: None)
    (tmp_path / "train.jsonl").write_text("{}")
    bad_name = os.fsencode(tmp_path) + b"/\xff.png"
    Path(os.fsdecode(bad_name)).write_bytes(b"x")
    with pytest.raises(FolderError, match="not named in UTF-8"):
        read_folder(tmp_path, scratch, lambda done, total: None)
    Path(os.fsdecode(bad_name)).unlink()
    (tmp_path / "broken.png").symlink_to(tmp_path / "nowhere")
    with pytest.raises(FolderError, match=r"broken\.png cannot be read"):
        read_folder(tmp_path, scratch, lambda done, total: None)


@pytest.fixture
def clean(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    for name in ("DATASET", "TRAINER", "INFERENCE", "TOKEN", "CA_FILE", "DIR"):
        monkeypatch.delenv(f"VENEER_{name}", raising=False)
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path))
    (tmp_path / "veneer").mkdir()
    return tmp_path / "veneer"


def test_a_cluster_is_found_in_order(clean: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with pytest.raises(ClusterNotFound, match="Set VENEER_"):
        _address.find()
    _address.write(Cluster("file:1", "file:2", ("file:3", "file:4"), "vnr_file"), clean)
    assert _address.find() == Cluster("file:1", "file:2", ("file:3", "file:4"), "vnr_file")
    monkeypatch.setenv("VENEER_TRAINER", "env:2")
    monkeypatch.setenv("VENEER_INFERENCE", "env:3, env:4,")
    assert _address.find() == Cluster("file:1", "env:2", ("env:3", "env:4"), "vnr_file")
    assert _address.find(Cluster(trainer="own:2")).trainer == "own:2"
    assert _address.find(directory=clean).trainer == "file:2"
    with pytest.raises(ClusterNotFound, match=r"gives its dataset, token\. Set VENEER_DATASET, VENEER_TOKEN"):
        _address.find(directory=tmp_path / "other")


def test_an_inference_service_may_stand_alone(clean: Path) -> None:
    assert _address.find(Cluster(inference=("own:3",), token="vnr_own")).dataset == ""
    with Client(inference=["own:3"], token="vnr_own") as client, pytest.raises(ClusterNotFound, match="answers alone"):
        client.adapters.get("digits")


def test_the_file_of_a_cluster_is_its_owners_alone(clean: Path) -> None:
    _address.write(Cluster("a", "b", ("c",), "vnr_x"), clean)
    assert stat.S_IMODE((clean / "cluster.json").stat().st_mode) == 0o600
    (clean / "cluster.json").write_text("{")
    with pytest.raises(ClusterNotFound, match=r"cluster\.json cannot be read"):
        _address.find()


@pytest.mark.parametrize(
    ("address", "local"),
    [
        ("127.0.0.1:80", True),
        ("[::1]:80", True),
        ("localhost:80", True),
        ("unix:/run/x", True),
        ("10.0.0.1:80", False),
        ("trainer.example:80", False),
    ],
)
def test_which_addresses_are_local(address: str, local: bool) -> None:
    assert _address.is_local(address) is local


async def test_a_token_crosses_no_network_in_clear_text(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise AssertionError("in clear text")

    monkeypatch.setattr(grpc.aio, "insecure_channel", refuse)
    connection = Connection("10.0.0.1:80", "vnr_x")
    connection.stub(lambda channel: channel)
    await connection.close()


def rpc_error(code: grpc.StatusCode, *details: Any, packed: bytes | None = None) -> grpc.aio.AioRpcError:
    status = status_pb2.Status(code=code.value[0])
    for detail in details:
        status.details.add().Pack(detail)
    metadata = grpc.aio.Metadata(("grpc-status-details-bin", packed or status.SerializeToString()))
    return grpc.aio.AioRpcError(code, grpc.aio.Metadata(), metadata, details="text")


def test_details_of_a_status_come_through() -> None:
    info = error_details_pb2.ErrorInfo(reason="NOT_THERE", metadata={"limit": "3"})
    resource = error_details_pb2.ResourceInfo(resource_name="datasets/x")
    error = _errors.from_rpc_error(rpc_error(grpc.StatusCode.NOT_FOUND, resource, info), "here:1")
    assert isinstance(error, NotFound)
    assert (error.reason, error.resource, error.metadata) == ("NOT_THERE", "datasets/x", {"limit": "3"})
    assert str(error) == "text (NOT_THERE)"


def test_a_status_from_elsewhere_keeps_code_and_text() -> None:
    error = _errors.from_rpc_error(rpc_error(grpc.StatusCode.UNKNOWN, packed=b"\xff\xff"), "here:1")
    assert (type(error), error.reason, error.message) == (Internal, "UNKNOWN", "text")
    away = _errors.from_rpc_error(rpc_error(grpc.StatusCode.UNAVAILABLE), "here:1")
    assert away.message == "here:1 cannot be reached: text"


def test_a_call_that_a_stopping_server_dropped_is_unavailable() -> None:
    dropped = _errors.from_rpc_error(rpc_error(grpc.StatusCode.CANCELLED), "here:1")
    assert (type(dropped), dropped.reason) == (Unavailable, "UNAVAILABLE")
    info = error_details_pb2.ErrorInfo(reason="VERSION_CANCELLED")
    assert isinstance(_errors.from_rpc_error(rpc_error(grpc.StatusCode.CANCELLED, info), "here:1"), Cancelled)


def test_every_status_has_an_exception() -> None:
    assert set(_errors._KINDS) == set(grpc.StatusCode) - {grpc.StatusCode.OK}


async def test_an_error_of_grpc_in_the_place_of_the_service_s_is_a_broken_stream() -> None:
    async def method(requests: Any, **_: Any) -> None:
        raise rpc_error(grpc.StatusCode.INTERNAL)

    async def nothing() -> AsyncIterator[None]:
        return
        yield

    with pytest.raises(Unavailable, match="STREAM_BROKEN"):
        await Connection("127.0.0.1:1", "vnr_x").send(method, nothing())  # type: ignore[arg-type]


async def test_patience_ends_with_its_time() -> None:
    patience = Patience(0.05)
    with pytest.raises(Unavailable):
        await patience.wait(Unavailable("AWAY", "away", retry_after_s=0.06))
    with pytest.raises(ResourceExhausted):
        await Patience(1.0).wait(ResourceExhausted("FULL", "full", retry_after_s=5.0))


async def test_progress_renews_patience(monkeypatch: pytest.MonkeyPatch) -> None:
    async def sleep(_: float) -> None:
        return

    monkeypatch.setattr(asyncio, "sleep", sleep)
    patience = Patience(1e9, attempts=3)
    for _ in range(20):
        await patience.wait(Unavailable("AWAY", "away"))
        patience.progressed()
    for _ in range(2):
        await patience.wait(Unavailable("AWAY", "away"))
    with pytest.raises(Unavailable):
        await patience.wait(Unavailable("AWAY", "away"))


def replicas(count: int) -> Replicas:
    return Replicas([f"127.0.0.1:{number}" for number in range(count)], connect)


def connect(address: str, name: str) -> Connection:
    return Connection(address, "vnr_x", name=name)


@given(st.binary(min_size=1, max_size=40), st.integers(2, 8))
def test_a_key_has_one_order_and_losing_the_last_keeps_it(key: bytes, count: int) -> None:
    order = [connection.address for connection in replicas(count).order(key)]
    assert order == [connection.address for connection in replicas(count).order(key)]
    assert sorted(order) == [f"127.0.0.1:{number}" for number in range(count)]
    fewer = [connection.address for connection in replicas(count - 1).order(key)]
    assert fewer == [address for address in order if address in fewer]


def test_keys_spread_evenly() -> None:
    chosen = Counter(replicas(4).order(str(number).encode())[0].address for number in range(2000))
    assert len(chosen) == 4
    assert min(chosen.values()) > 400


def test_a_replica_with_more_than_its_share_is_passed_over() -> None:
    found = replicas(4)
    first = found.order(b"key")[0]
    with found.asking(first), found.asking(first):
        assert found.order(b"key")[0] is not first
    assert found.order(b"key")[0] is first


def test_a_failed_replica_comes_last_for_a_while(monkeypatch: pytest.MonkeyPatch) -> None:
    now_s = 100.0
    monkeypatch.setattr("veneer_client._replicas.time.monotonic", lambda: now_s)
    found = replicas(3)
    first = found.order(b"key")[0]
    found.failed(first)
    assert found.order(b"key")[-1] is first
    now_s += 2.1
    assert found.order(b"key")[0] is first


async def test_replicas_behind_a_name_come_and_go(monkeypatch: pytest.MonkeyPatch) -> None:
    now_s, there, looked_up = 100.0, ["10.0.0.1:5", "10.0.0.2:5"], 0

    async def resolve(name: str) -> list[str]:
        nonlocal looked_up
        assert name == "dns:///replicas:5"
        looked_up += 1
        return there

    monkeypatch.setattr("veneer_client._replicas.time.monotonic", lambda: now_s)
    monkeypatch.setattr("veneer_client._replicas.resolve", resolve)
    found = Replicas(["dns:///replicas:5", "10.0.0.9:5"], connect)

    async def addresses() -> list[str]:
        await found.look_up()
        return sorted(connection.address for connection in found.order(b"key"))

    assert await addresses() == ["10.0.0.1:5", "10.0.0.2:5", "10.0.0.9:5"]
    leaving = next(connection for connection in found.order(b"key") if connection.address == "10.0.0.1:5")
    assert leaving._name == "replicas"
    there = ["10.0.0.2:5", "10.0.0.3:5"]
    now_s += 4.9
    assert "10.0.0.1:5" in await addresses()
    with found.asking(leaving):
        now_s += 0.2
        assert await addresses() == ["10.0.0.2:5", "10.0.0.3:5", "10.0.0.9:5"]
        assert found._leaving == [leaving]  # its request goes on
    now_s += 5
    await addresses()
    assert not found._leaving
    before = looked_up
    there = []  # a name server that knows nothing takes nobody away
    found.failed(found.order(b"key")[0])
    now_s += 1
    assert await addresses() == ["10.0.0.2:5", "10.0.0.3:5", "10.0.0.9:5"]
    assert looked_up == before + 1


async def test_a_name_without_replicas_is_unavailable(monkeypatch: pytest.MonkeyPatch) -> None:
    async def nobody(name: str) -> list[str]:
        return []

    monkeypatch.setattr("veneer_client._replicas.resolve", nobody)
    with pytest.raises(Unavailable, match="dns:///replicas:5"):
        await Replicas(["dns:///replicas:5"], connect).look_up()


async def test_a_name_resolves_to_addresses() -> None:
    from veneer_client._replicas import resolve

    assert "127.0.0.1:50051" in await resolve("dns:///localhost:50051")
    assert await resolve("dns:///no-such-host.invalid:50051") == []


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.2, "0 s"), (59.4, "59 s"), (61, "1 min 1 s"), (3600, "1 h 0 min"), (7500, "2 h 5 min")],
)
def test_durations(seconds: float, text: str) -> None:
    assert screen.duration(seconds) == text


@pytest.mark.parametrize(
    ("size_bytes", "text"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (1000, "1.0 kB"),
        (6_500_000, "6.5 MB"),
        (123_456_789, "123 MB"),
        (4.26e9, "4.3 GB"),
    ],
)
def test_sizes(size_bytes: int, text: str) -> None:
    assert screen.size(size_bytes) == text


@given(st.lists(st.floats(-1e6, 1e6), max_size=200))
def test_a_sparkline_is_as_long_as_it_may_be(values: list[float]) -> None:
    drawn = screen.sparkline(values, 24)
    assert len(drawn) == min(24, len(values))


def test_a_sparkline_falls_with_its_values() -> None:
    assert screen.sparkline([8.0, 4.0, 2.0, 1.0]) == "█▄▂▁"
    assert screen.sparkline([1.0, 1.0]) == "▁▁"
    assert screen.sparkline([0.0, 5e-324]) == "▁█"  # as far apart as numbers can be near
