"""The clients: one object for a whole cluster, async or sync."""

from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

from veneer_client import _address
from veneer_client._adapters import AsyncAdapters
from veneer_client._address import Cluster
from veneer_client._answers import Answers
from veneer_client._calls import Connection
from veneer_client._datasets import AsyncDatasets
from veneer_client._evaluations import AsyncEvaluations
from veneer_client._exports import AsyncExports
from veneer_client._jobs import AsyncJobs
from veneer_client._loop import Blocking, Face, Iterating, LoopThread
from veneer_client._models import AsyncModels
from veneer_client._replicas import Replicas


class AsyncClient(Answers):
    """A cluster, for programs on an event loop. Use it in `async with`, or close it.

    Args:
        dataset: host:port or unix:/path of the dataset service.
        trainer: the same of the trainer service.
        inference: the same of each replica of the inference service.
        token: who calls.
        ca_file: PEM certificates to trust instead of the system's. An address on another machine is only
            ever called with TLS.
        directory: the folder of a cluster on this machine; wins over the environment.

    What is not given comes from the environment (VENEER_DATASET, VENEER_TRAINER, VENEER_INFERENCE with
    commas, VENEER_TOKEN, VENEER_CA_FILE), and then from the folder in VENEER_DIR or the default one.

    Raises:
        ClusterNotFound: an address or the token is missing.
    """

    def __init__(
        self,
        *,
        dataset: str = "",
        trainer: str = "",
        inference: Sequence[str] = (),
        token: str = "",
        ca_file: Path | None = None,
        directory: Path | None = None,
    ) -> None:
        given = Cluster(dataset, trainer, tuple(inference), token, ca_file)
        self.cluster = _address.find(given, directory)
        certificates_pem = self.cluster.ca_file.read_bytes() if self.cluster.ca_file else None

        def connect(address: str) -> Connection:
            return Connection(address, self.cluster.token, certificates_pem)

        self._dataset = connect(self.cluster.dataset)
        self._trainer = connect(self.cluster.trainer)
        self.datasets = AsyncDatasets(self._dataset)
        self.models = AsyncModels(self._trainer)
        self.jobs = AsyncJobs(self._trainer, self.datasets, self.models)
        self.adapters = AsyncAdapters(self._trainer)
        self.exports = AsyncExports(self._trainer)
        self.evaluations = AsyncEvaluations(self._trainer, self.datasets, self.models)
        replicas = Replicas([connect(address) for address in self.cluster.inference])
        super().__init__(replicas, self.datasets, self.models, self.cluster.token)

    async def close(self) -> None:
        """Ends all connections."""
        await self._dataset.close()
        await self._trainer.close()
        await self._replicas.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self.close()


class Datasets(Face[AsyncDatasets]):
    """Datasets and their versions."""

    push = Blocking(AsyncDatasets.push)
    upload_bytes = Blocking(AsyncDatasets.upload_bytes)
    get = Blocking(AsyncDatasets.get)
    list = Iterating(AsyncDatasets.list)
    delete = Blocking(AsyncDatasets.delete)
    get_version = Blocking(AsyncDatasets.get_version)
    versions = Iterating(AsyncDatasets.versions)
    delete_version = Blocking(AsyncDatasets.delete_version)
    findings = Iterating(AsyncDatasets.findings)
    examples = Iterating(AsyncDatasets.examples)
    download = Iterating(AsyncDatasets.download)
    diff = Blocking(AsyncDatasets.diff)


class Models(Face[AsyncModels]):
    """The base models that the cluster holds."""

    get = Blocking(AsyncModels.get)
    list = Iterating(AsyncModels.list)


class Jobs(Face[AsyncJobs]):
    """Training jobs."""

    train = Blocking(AsyncJobs.train)
    estimate = Blocking(AsyncJobs.estimate)
    get = Blocking(AsyncJobs.get)
    list = Iterating(AsyncJobs.list)
    watch = Iterating(AsyncJobs.watch)
    wait = Blocking(AsyncJobs.wait)
    cancel = Blocking(AsyncJobs.cancel)
    pause = Blocking(AsyncJobs.pause)
    resume = Blocking(AsyncJobs.resume)
    retry = Blocking(AsyncJobs.retry)
    delete = Blocking(AsyncJobs.delete)


class Adapters(Face[AsyncAdapters]):
    """Adapters and their versions."""

    get = Blocking(AsyncAdapters.get)
    list = Iterating(AsyncAdapters.list)
    get_version = Blocking(AsyncAdapters.get_version)
    versions = Iterating(AsyncAdapters.versions)
    promote = Blocking(AsyncAdapters.promote)
    rollback = Blocking(AsyncAdapters.rollback)
    log = Iterating(AsyncAdapters.log)
    download = Blocking(AsyncAdapters.download)
    delete = Blocking(AsyncAdapters.delete)
    delete_version = Blocking(AsyncAdapters.delete_version)


class Evaluations(Face[AsyncEvaluations]):
    """Evaluations."""

    create = Blocking(AsyncEvaluations.create)
    get = Blocking(AsyncEvaluations.get)
    list = Iterating(AsyncEvaluations.list)
    watch = Iterating(AsyncEvaluations.watch)
    wait = Blocking(AsyncEvaluations.wait)
    samples = Iterating(AsyncEvaluations.samples)
    cancel = Blocking(AsyncEvaluations.cancel)
    delete = Blocking(AsyncEvaluations.delete)


class Exports(Face[AsyncExports]):
    """Exports."""

    create = Blocking(AsyncExports.create)
    get = Blocking(AsyncExports.get)
    list = Iterating(AsyncExports.list)
    watch = Iterating(AsyncExports.watch)
    wait = Blocking(AsyncExports.wait)
    download = Blocking(AsyncExports.download)
    cancel = Blocking(AsyncExports.cancel)
    delete = Blocking(AsyncExports.delete)


class Client(Face[AsyncClient]):
    """A cluster, for programs without an event loop. Use it in `with`, or close it. See `AsyncClient`.

    Each method waits for its async twin, which runs in one background thread. Threads may share a client.
    """

    def __init__(
        self,
        *,
        dataset: str = "",
        trainer: str = "",
        inference: Sequence[str] = (),
        token: str = "",
        ca_file: Path | None = None,
        directory: Path | None = None,
    ) -> None:
        twin = AsyncClient(
            dataset=dataset,
            trainer=trainer,
            inference=inference,
            token=token,
            ca_file=ca_file,
            directory=directory,
        )
        super().__init__(twin, LoopThread())
        self.cluster = twin.cluster
        self.datasets = Datasets(twin.datasets, self._loop)
        self.models = Models(twin.models, self._loop)
        self.jobs = Jobs(twin.jobs, self._loop)
        self.adapters = Adapters(twin.adapters, self._loop)
        self.exports = Exports(twin.exports, self._loop)
        self.evaluations = Evaluations(twin.evaluations, self._loop)

    generate = Blocking(AsyncClient.generate)
    stream = Iterating(AsyncClient.stream)
    score = Blocking(AsyncClient.score)
    count_tokens = Blocking(AsyncClient.count_tokens)
    resident_models = Blocking(AsyncClient.resident_models)
    loaded_adapters = Iterating(AsyncClient.loaded_adapters)

    def close(self) -> None:
        """Ends all connections and the background thread."""
        self._loop.run(self._twin.close())
        self._loop.stop()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()
