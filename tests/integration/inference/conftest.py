# ruff: noqa: ANN401  # generated messages are untyped here
"""A live replica on a loopback port, with an engine, a trainer and a dataset service of the tests' own."""

import asyncio
import contextlib
import hashlib
import io
import json
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import psutil
import pytest
import torch
from google.rpc import error_details_pb2, status_pb2
from PIL import Image
from safetensors.numpy import save_file

import veneer_inference.base
from veneer.dataset.v1.conversation_pb2 import Message, Part, Picture, Role
from veneer.dataset.v1.dataset_service_pb2 import DownloadBlobsResponse
from veneer.dataset.v1.dataset_service_pb2_grpc import DatasetServiceServicer, add_DatasetServiceServicer_to_server
from veneer.inference.v1.inference_pb2 import Prompt, SamplingParams
from veneer.inference.v1.inference_service_pb2 import GenerateRequest, StreamGenerateRequest
from veneer.inference.v1.inference_service_pb2_grpc import InferenceServiceStub
from veneer.trainer.v1 import adapter_pb2
from veneer.trainer.v1 import adapter_service_pb2 as registry_pb
from veneer.trainer.v1.adapter_service_pb2_grpc import AdapterServiceServicer, add_AdapterServiceServicer_to_server
from veneer_base.unfold import base_directory
from veneer_digests import adapter_digest, contract_digest, model_digest, tensor_digests
from veneer_inference.domain.token_bytes import TokenBytes
from veneer_inference.ports import (
    AdapterState,
    EngineError,
    EngineInfo,
    EnginePrompt,
    EngineStats,
    Sampling,
    Step,
    TokenScore,
)
from veneer_inference.replica import Replica
from veneer_inference.settings import InferenceSettings
from veneer_processing import Processor
from veneer_processing.tokenizer import Tokenizer
from veneer_rpc.delegation import new_key_pair
from veneer_rpc.tokens import add_token
from veneer_vlm import peft_folder
from veneer_vlm.config import ModelConfig
from veneer_vlm.lora import Adapter, AdapterConfig

Answer = Any
TENANTS = ("acme", "other")


async def until(holds: Callable[[], Any], timeout_s: float = 20.0) -> Any:
    """Waits until something holds, and returns it."""
    deadline = time.monotonic() + timeout_s
    while True:
        found = holds()
        if isinstance(found, Awaitable):
            found = await found
        if found:
            return found
        assert time.monotonic() < deadline, "it did not come about"
        await asyncio.sleep(0.01)


@pytest.fixture(scope="session")
def base() -> Path:
    return base_directory()


@pytest.fixture(scope="session")
def base_digest(base: Path) -> str:
    return model_digest(base)


@pytest.fixture(scope="session")
def processor(base: Path, base_digest: str) -> Processor:
    return Processor.load(base, base_digest)


@pytest.fixture(scope="session")
def tokenizer(base: Path) -> Tokenizer:
    return Tokenizer(base)


@pytest.fixture(scope="session")
def token_bytes(base: Path) -> TokenBytes:
    return TokenBytes(base)


class FakeEngine:
    """Answers with the digest of the adapter, token by token; breaks off when told to."""

    def __init__(self, tokenizer: Tokenizer, digest: str) -> None:
        self.info = EngineInfo(digest, "float32", "cpu", "fake", 4096, 4096, 8, 64)
        self.tokenizer = tokenizer
        self.tail = " 你好，世界 😀 the end"
        self.pace = asyncio.Event()  # not set: answers stand still after their first token
        self.pace.set()
        self.loads: list[str] = []
        self.held: dict[str, int] = {}
        self.active: list[str] = []
        self.prompts: list[tuple[str, str, EnginePrompt, Sampling]] = []
        self.cancelled = 0
        self.answers: list[AsyncIterator[Step]] = []
        self.flood = 0  # so many steps of 2,000 tokens, as fast as they are asked for
        self.too_slow = False
        self.steps = 0
        self.refuse: dict[str, EngineError] = {}
        self.next_errors: list[EngineError] = []
        self.load_pace = asyncio.Event()
        self.load_pace.set()
        self._gone = asyncio.Event()
        self.closed = False

    def says(self, digest: str) -> str:
        return (digest[:12] or "base") + self.tail

    async def load_adapter(self, digest: str, directory: Path) -> int:
        self._check()
        await self.load_pace.wait()
        if digest in self.refuse:
            raise self.refuse[digest]
        found = folder_digest(directory)
        if found != digest:
            raise EngineError("ADAPTER_INVALID", [f"it hashes to {found}, not to {digest}"])
        self.loads.append(digest)
        self.held[digest] = (directory / "adapter_model.safetensors").stat().st_size
        return self.held[digest]

    async def unload_adapter(self, digest: str) -> None:
        self._check()
        self.held.pop(digest, None)

    def generate(
        self, tenant: str, adapter_digest: str, prompt: EnginePrompt, sampling: Sampling
    ) -> AsyncIterator[Step]:
        answer = self._generate(tenant, adapter_digest, prompt, sampling)
        self.answers.append(answer)  # held: only a close ends it, no garbage collector
        return answer

    async def _generate(
        self, tenant: str, adapter_digest: str, prompt: EnginePrompt, sampling: Sampling
    ) -> AsyncIterator[Step]:
        self._check()
        if self.next_errors:
            raise self.next_errors.pop(0)
        if adapter_digest and adapter_digest not in self.held:
            raise EngineError("ADAPTER_NOT_LOADED", [adapter_digest])
        self.prompts.append((tenant, adapter_digest, prompt, sampling))
        ids = self.tokenizer.encode([self.says(adapter_digest)])[0] + [self.tokenizer.special.im_end]
        ids = ids[: sampling.max_tokens]
        for _ in range(self.flood):
            if self.too_slow:
                raise EngineError("READER_TOO_SLOW", ["512 steps behind"])
            self.steps += 1
            yield Step(tuple(ids[:1]) * 2000)
        self.active.append(adapter_digest)
        ended = False
        try:
            for index, token_id in enumerate(ids):
                if index == 1:
                    await self._paced()
                await asyncio.sleep(0)
                self._check()
                scores = () if sampling.logprobs is None else (_score(token_id, sampling.logprobs),)
                last = index + 1 == len(ids)
                finish = "" if not last else "stop" if token_id in sampling.stop_ids else "length"
                ended = last
                yield Step((token_id,), scores, finish, 2, 0.0)
        finally:
            self.active.remove(adapter_digest)
            self.cancelled += not ended

    async def score(
        self, tenant: str, adapter_digest: str, prompt: EnginePrompt, top_logprobs: int
    ) -> tuple[TokenScore, ...]:
        self._check()
        assert prompt.supervised_T is not None
        return tuple(_score(int(each), top_logprobs) for each in prompt.ids_T[prompt.supervised_T])

    def stats(self) -> EngineStats:
        return EngineStats(
            adapters=tuple(
                AdapterState(digest, digest in self.active, self.active.count(digest), size)
                for digest, size in self.held.items()
            )
        )

    async def gone(self) -> None:
        await self._gone.wait()

    def die(self) -> None:
        self._gone.set()

    async def close(self) -> None:
        self.closed = True
        self._gone.set()

    async def _paced(self) -> None:
        waits = [asyncio.ensure_future(self.pace.wait()), asyncio.ensure_future(self._gone.wait())]
        try:
            await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for each in waits:
                each.cancel()

    def _check(self) -> None:
        if self._gone.is_set():
            raise EngineError("ENGINE_GONE", ["dead"])


def _score(token_id: int, top: int) -> TokenScore:
    return TokenScore(token_id, -0.5, tuple((token_id + rank, -0.5 - rank) for rank in range(top)))


def folder_digest(directory: Path) -> str:
    contract = json.loads((directory / "processing_contract.json").read_bytes())
    config = json.loads((directory / "adapter_config.json").read_bytes())
    return adapter_digest(tensor_digests(directory / "adapter_model.safetensors"), config, contract_digest(contract))


@dataclass
class Registry(AdapterServiceServicer):
    """A trainer's AdapterService: adapters of several tenants, their folders, and who asked for what."""

    folders: Path
    processor: Processor
    revision: int = 0
    adapters: dict[tuple[str, str], adapter_pb2.ServingAdapter] = field(default_factory=dict)
    versions: dict[tuple[str, str], Path] = field(default_factory=dict)
    downloads: list[tuple[str, str]] = field(default_factory=list)
    reports: list[registry_pb.ReportServingRequest] = field(default_factory=list)
    watches: list[int] = field(default_factory=list)
    download_pace: asyncio.Event = field(default_factory=asyncio.Event)
    silent: bool = False  # the stream says nothing of changes
    oldest: int = 0
    address: str = "127.0.0.1:0"
    server: grpc.aio.Server | None = None

    async def start(self) -> None:
        self.server = grpc.aio.server(options=[("grpc.so_reuseport", 0)])
        add_AdapterServiceServicer_to_server(self, self.server)
        self.address = f"127.0.0.1:{self.server.add_insecure_port(self.address)}"
        await self.server.start()

    async def stop(self) -> None:
        if self.server is not None:
            await self.server.stop(0)
            self.server = None

    def publish(self, tenant: str, adapter: str, version: int, *, max_pixels: int = 0, like: int | None = None) -> str:
        """Adds a version (with the tensors of version `like`); returns its digest. No alias moves."""
        name = f"adapters/{adapter}/versions/{version}"
        directory = self.folders / tenant / adapter / str(version)
        directory.mkdir(parents=True)
        seed = int.from_bytes(hashlib.sha256(f"{tenant}{adapter}{like or version}".encode()).digest()[:4], "big")
        tensors = {"a": np.random.default_rng(seed).standard_normal((2, 3)).astype(np.float32)}
        save_file(tensors, directory / "adapter_model.safetensors")
        (directory / "adapter_config.json").write_text(json.dumps({"r": 2, "lora_alpha": 4}))
        contract = self.processor.contract.to_dict()
        if max_pixels:
            contract |= {"max_pixels": max_pixels}
        (directory / "processing_contract.json").write_text(json.dumps(contract))
        self.versions[tenant, name] = directory
        return folder_digest(directory)

    def share(self, tenant: str, other: str, adapter: str, version: int) -> None:
        """Gives another tenant a version of the same bytes."""
        name = f"adapters/{adapter}/versions/{version}"
        self.versions[other, name] = self.versions[tenant, name]

    def promote(self, tenant: str, adapter: str, *, preload: bool = False, split: float = 0, **aliases: int) -> None:
        """Points aliases at versions, which must be published."""
        served = self.adapters.get((tenant, adapter))
        if served is None:
            served = adapter_pb2.ServingAdapter(adapter=f"adapters/{adapter}", tenant=tenant)
            self.adapters[tenant, adapter] = served
        known = {each.alias: each.adapter_version for each in served.aliases}
        known |= {alias: f"adapters/{adapter}/versions/{version}" for alias, version in aliases.items()}
        del served.aliases[:]
        for alias, name in known.items():
            served.aliases.add(alias=alias, adapter_version=name, digest=folder_digest(self.versions[tenant, name]))
        served.preload = preload
        if split:
            served.traffic_split.alias, served.traffic_split.share = "canary", split
        self.revision += 1

    def delete(self, tenant: str, adapter: str) -> None:
        del self.adapters[tenant, adapter]
        for key in [key for key in self.versions if key[0] == tenant and key[1].startswith(f"adapters/{adapter}/")]:
            del self.versions[key]
        self.revision += 1

    async def WatchAdapters(self, request: Any, context: Any) -> AsyncIterator[registry_pb.WatchAdaptersResponse]:
        _check_token(context)
        self.watches.append(request.after_revision)
        assert request.model == "models/tiny"
        if request.after_revision and not self.oldest <= request.after_revision <= self.revision:
            await context.abort(grpc.StatusCode.OUT_OF_RANGE, "too old")
        told, state = request.after_revision, dict[Any, bytes]()
        if told == 0:
            state = self._state()
            told = self.revision
            yield registry_pb.WatchAdaptersResponse(revision=told, snapshot=True, adapters=self.adapters.values())
        else:
            yield registry_pb.WatchAdaptersResponse(revision=self.revision, adapters=self.adapters.values())
            state, told = self._state(), self.revision
        while True:
            if self.revision != told and not self.silent:
                now = self._state()
                changed = [self.adapters[key] for key in now if now[key] != state.get(key)]
                gone = [
                    adapter_pb2.DeletedAdapter(tenant=key[0], adapter=f"adapters/{key[1]}")
                    for key in state.keys() - now.keys()
                ]
                told, state = self.revision, now
                yield registry_pb.WatchAdaptersResponse(revision=told, adapters=changed, deleted_adapters=gone)
            await asyncio.sleep(0.005)

    async def ReportServing(self, request: Any, context: Any) -> registry_pb.ReportServingResponse:
        _check_token(context)
        self.reports.append(request)
        return registry_pb.ReportServingResponse(revision=self.revision)

    async def DownloadAdapterVersion(
        self, request: Any, context: Any
    ) -> AsyncIterator[registry_pb.DownloadAdapterVersionResponse]:
        _check_token(context)
        directory = self.versions.get((request.tenant, request.name))
        if directory is None:
            await context.abort(grpc.StatusCode.NOT_FOUND, "no such version")
            return
        if not request.paths:
            self.downloads.append((request.tenant, request.name))
            await self.download_pace.wait()
        for path in sorted(directory.iterdir()):
            data = path.read_bytes()
            for at in range(0, len(data), 64):
                if not request.paths or path.name in request.paths:
                    yield registry_pb.DownloadAdapterVersionResponse(
                        path=path.name, offset_bytes=at, data=data[at : at + 64]
                    )

    def _state(self) -> dict[Any, bytes]:
        return {key: each.SerializeToString(deterministic=True) for key, each in self.adapters.items()}


def _check_token(context: Any) -> None:
    assert dict(context.invocation_metadata())["authorization"] == "Bearer replica-token"


class Datasets(DatasetServiceServicer):
    """Blobs by credential."""

    def __init__(self) -> None:
        self.blobs: dict[tuple[str, str], bytes] = {}
        self.server = grpc.aio.server()
        add_DatasetServiceServicer_to_server(self, self.server)
        self.address = f"127.0.0.1:{self.server.add_insecure_port('127.0.0.1:0')}"

    def put(self, token: str, data: bytes) -> str:
        digest = hashlib.sha256(data).hexdigest()
        self.blobs[f"Bearer {token}", digest] = data
        return digest

    async def DownloadBlobs(self, request: Any, context: Any) -> AsyncIterator[DownloadBlobsResponse]:
        credential = dict(context.invocation_metadata())["authorization"]
        for digest in request.digests:
            data = self.blobs.get((credential, digest))
            if data is None:
                await context.abort(grpc.StatusCode.NOT_FOUND, "no such blob")
                return
            for at in range(0, len(data), 1000):
                yield DownloadBlobsResponse(
                    digest=digest, offset_bytes=at, size_bytes=len(data), data=data[at : at + 1000]
                )


@dataclass
class KitOf:
    """One replica and everything around it."""

    tmp: Path
    base: Path
    base_digest: str
    tokenizer: Tokenizer
    registry: Registry
    datasets: Datasets
    tokens: dict[str, str]
    private_pem: bytes
    start_process: Any
    flags: dict[str, Any] = field(default_factory=dict)
    engines: list[FakeEngine] = field(default_factory=list)
    replica: Replica | None = None
    address: str = ""
    channels: list[grpc.aio.Channel] = field(default_factory=list)
    processes: list["Process"] = field(default_factory=list)
    until = staticmethod(until)

    @property
    def engine(self) -> FakeEngine:
        return self.engines[-1]

    async def start_engine(self) -> Any:
        self.engines.append(FakeEngine(self.tokenizer, self.base_digest))
        return self.engines[-1]

    async def start(self, start_engine: Any = None, **flags: Any) -> None:
        settings = InferenceSettings(
            **{
                "bind": "127.0.0.1:0", "tokens_file": self.tmp / "tokens.json", "data": self.tmp / "data",
                "replica": "r1", "models": f"tiny={self.base}", "trainer": self.registry.address,
                "trainer_token_file": self.tmp / "replica.token", "dataset": self.datasets.address,
                "delegation_public_key_file": self.tmp / "public.pem", "report_s": 0.1, "grace_s": 5.0,
                "recheck_s": 0.0, **self.flags, **flags,
            }
        )  # fmt: skip
        self.replica = Replica(settings, start_engine or self.start_engine)
        self.address = await self.replica.start()

    async def stop(self) -> None:
        for channel in self.channels:
            await channel.close()
        self.channels.clear()
        if self.replica is not None:
            await self.replica.stop()
            await self.replica.close()
            self.replica = None

    def stub(self, tenant: str = "acme", token: str | None = None) -> InferenceServiceStub:
        channel = grpc.aio.insecure_channel(
            self.address, interceptors=[kind(token or self.tokens[tenant]) for kind in (_Unary, _Stream)]
        )
        self.channels.append(channel)
        return InferenceServiceStub(channel)

    @staticmethod
    def details(error: grpc.aio.AioRpcError) -> dict[str, Any]:
        """The details of an error, by kind."""
        status = status_pb2.Status()
        status.ParseFromString(dict(error.trailing_metadata() or ())["grpc-status-details-bin"])
        found = {}
        for each in status.details:
            kind = each.type_url.rpartition(".")[2]
            found[kind] = getattr(error_details_pb2, kind)()
            each.Unpack(found[kind])
        return found

    def retry_s(self, error: grpc.aio.AioRpcError) -> float:
        """When a refused request may come again."""
        return float(self.details(error)["RetryInfo"].retry_delay.ToMilliseconds()) / 1000

    def registry_message(self) -> registry_pb.WatchAdaptersResponse:
        """What a stream that lags would say of the registry as it is now, a revision ago."""
        message = registry_pb.WatchAdaptersResponse(revision=self.registry.revision)
        message.adapters.extend(self.registry.adapters.values())
        return message

    async def ask(self, model: str, tenant: str = "acme", **sampling: Any) -> Answer:
        return await self.stub(tenant).Generate(self.request(model, **sampling), timeout=30)

    def request(self, model: str, *parts: Any, routing_key: str = "", **sampling: Any) -> GenerateRequest:
        return GenerateRequest(
            model=model,
            prompt=self.prompt(*parts),
            sampling=SamplingParams(**sampling),
            routing_key=routing_key,
        )

    def stream_request(self, model: str, *parts: Any, **sampling: Any) -> StreamGenerateRequest:
        return StreamGenerateRequest(model=model, prompt=self.prompt(*parts), sampling=SamplingParams(**sampling))

    def prompt(self, *parts: Any) -> Prompt:
        parts = parts or ("Which digit is this?",)
        content = [
            Part(text=each) if isinstance(each, str) else Part(picture=each if isinstance(each, Picture) else
                                                               Picture(data=each))
            for each in parts
        ]  # fmt: skip
        return Prompt(messages=[Message(role=Role.ROLE_USER, parts=content)])

    def train(self, version: int) -> None:
        """Publishes a version that changes answers: an adapter of the base's shape with large random factors."""
        model = ModelConfig.from_directory(self.base)
        adapter = Adapter.new(model, AdapterConfig(r=4, lora_alpha=64), seed=version)
        generator = torch.Generator().manual_seed(version)
        for pair in adapter.pairs.values():
            pair.b_O_R.normal_(0, 0.5, generator=generator)
        name = f"adapters/digits/versions/{version}"
        directory = self.registry.folders / "real" / str(version)
        peft_folder.write(adapter, directory)
        (directory / "processing_contract.json").write_text(json.dumps(self.registry.processor.contract.to_dict()))
        self.registry.versions["acme", name] = directory

    def process(self, replica: str = "r1", bind: str = "127.0.0.1:0") -> "Process":
        self.processes.append(Process(self, replica, bind))
        return self.processes[-1]

    @staticmethod
    def png(width: int = 64, height: int = 64, seed: int = 0) -> bytes:
        rgb = np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)
        file = io.BytesIO()
        Image.fromarray(rgb).save(file, "PNG")
        return file.getvalue()


class Process:
    """`python -m veneer_inference` and its flags; the kit's address is that of the last one started."""

    def __init__(self, kit: "KitOf", replica: str = "r1", bind: str = "127.0.0.1:0") -> None:
        self.kit = kit
        self.replica = replica
        self.bind = bind
        self.address = ""
        self.flags: dict[str, Any] = {}  # beside the usual ones
        self.process: Any = None

    async def start(self) -> None:
        flags = {
            "bind": self.bind, "tokens-file": self.kit.tmp / "tokens.json",
            "data": self.kit.tmp / "data" / self.replica,
            "replica": self.replica, "models": f"tiny={self.kit.base}", "trainer": self.kit.registry.address,
            "trainer-token-file": self.kit.tmp / "replica.token", "dataset": self.kit.datasets.address,
            "delegation-public-key-file": self.kit.tmp / "public.pem", "threads": 1, "report-s": 0.1,
            "die-with-parent": "true", "grace-s": 20, **self.flags,
        }  # fmt: skip
        arguments = [str(text) for flag, value in flags.items() for text in (f"--{flag}", value)]
        log = self.kit.tmp / f"{self.replica}.log"
        with log.open("a") as file:
            self.process = self.kit.start_process("veneer_inference", arguments, file, OMP_NUM_THREADS="1")
        while line := await asyncio.to_thread(self.process.stdout.readline):
            if line.startswith("veneer_inference listening on "):
                self.address = self.kit.address = line.split()[-1]
                return
        raise AssertionError(f"it ended before it listened:\n{log.read_text()}")

    async def stop(self) -> int:
        assert self.process is not None
        self.process.terminate()
        return await self._ended()

    async def kill(self) -> None:
        assert self.process is not None
        self.process.kill()
        await self._ended()

    async def _ended(self) -> int:
        process, self.process = self.process, None
        with process.stdout:
            await asyncio.to_thread(process.stdout.read)
        return int(await asyncio.to_thread(process.wait))

    def engine_pid(self) -> int:
        """Of the process forked from the one that waits to be; 0 while there is none."""
        for server in psutil.Process(self.process.pid).children():
            for engine in server.children():
                return engine.pid
        return 0


class _Bearer:
    def __init__(self, token: str) -> None:
        self._token = token

    async def _call(self, continuation: Any, details: Any, request: Any) -> Any:
        metadata = grpc.aio.Metadata(*(details.metadata or ()), ("authorization", f"Bearer {self._token}"))
        return await continuation(details._replace(metadata=metadata), request)


class _Unary(_Bearer, grpc.aio.UnaryUnaryClientInterceptor):
    intercept_unary_unary = _Bearer._call


class _Stream(_Bearer, grpc.aio.UnaryStreamClientInterceptor):
    intercept_unary_stream = _Bearer._call


@pytest.fixture
async def kit(
    tmp_path: Path,
    base: Path,
    base_digest: str,
    processor: Processor,
    tokenizer: Tokenizer,
    token_bytes: TokenBytes,
    monkeypatch: pytest.MonkeyPatch,
    start_process: Any,
) -> AsyncIterator[KitOf]:
    """Trainer and dataset service are there; `await kit.start()` starts the replica."""
    # Reading the real vocabulary takes a second: once for all tests.
    monkeypatch.setattr(veneer_inference.base.Processor, "load", lambda *_: processor)
    monkeypatch.setattr(veneer_inference.base, "TokenBytes", lambda _: token_bytes)
    private, public = new_key_pair()
    (tmp_path / "public.pem").write_bytes(public)
    (tmp_path / "replica.token").write_text("replica-token\n")
    tokens = {tenant: add_token(tmp_path / "tokens.json", tenant, ["user"]) for tenant in TENANTS}
    registry, datasets = Registry(tmp_path / "registry", processor), Datasets()
    registry.download_pace.set()
    await registry.start()
    await datasets.server.start()
    kit = KitOf(
        tmp_path, base, base_digest, tokenizer, registry, datasets, tokens, private, start_process=start_process
    )
    try:
        yield kit
    finally:
        with contextlib.suppress(Exception):
            await kit.stop()
        for process in kit.processes:
            if process.process is not None:
                await process.stop()
        await registry.stop()
        await datasets.server.stop(0)
