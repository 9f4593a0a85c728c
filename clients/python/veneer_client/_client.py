"""The clients: one object for a whole cluster, async or sync."""

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from veneer.dataset.v1.conversation_pb2 import Message
from veneer.dataset.v1.dataset_service_pb2 import PICTURE_FORM_ORIGINAL
from veneer.inference.v1.inference_service_pb2 import GenerateResponse
from veneer.trainer.v1.training_job_pb2 import TrainingJob, TrainingSpec
from veneer_client import _adapter_diff, _address
from veneer_client._adapter_diff import AdapterDiff
from veneer_client._adapters import AsyncAdapters
from veneer_client._address import Cluster
from veneer_client._answers import Answers
from veneer_client._batch import Batch
from veneer_client._calls import Connection
from veneer_client._datasets import AsyncDatasets
from veneer_client._errors import FailedPrecondition, NotFound
from veneer_client._evaluations import AsyncEvaluations
from veneer_client._exports import AsyncExports
from veneer_client._jobs import AsyncJobs
from veneer_client._loop import Blocking, Face, Iterating, LoopThread
from veneer_client._models import AsyncModels
from veneer_client._replicas import Replicas

BATCH_ANSWER_TIMEOUT_S = 3600.0  # of one answer, in a batch that nobody waits for


class AsyncClient(Answers):
    """A cluster, for programs on an event loop. Use it in `async with`, or close it.

    Args:
        dataset: host:port or unix:/path of the dataset service.
        trainer: the same of the trainer service.
        inference: the same of each replica of the inference service; `dns:///host:port` stands for every
            replica that the name resolves to, also those that come later.
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

        def connect(address: str, name: str = "") -> Connection:
            return Connection(address, self.cluster.token, certificates_pem, name)

        self._dataset = connect(self.cluster.dataset)
        self._trainer = connect(self.cluster.trainer)
        self.datasets = AsyncDatasets(self._dataset)
        self.models = AsyncModels(self._trainer)
        self.adapters = AsyncAdapters(self._trainer, self.models)
        self.jobs = AsyncJobs(self._trainer, self.datasets, self.models, self.adapters)
        self.exports = AsyncExports(self._trainer)
        self.evaluations = AsyncEvaluations(self._trainer, self.datasets, self.models)
        replicas = Replicas(self.cluster.inference, connect)
        super().__init__(replicas, self.datasets, self.models, self.cluster.token)

    async def adapter_diff(self, before: str, after: str) -> AdapterDiff:
        """Says what changed between two adapter versions, such as `digits@3` and `digits@4`."""
        old, new = await self.adapters.get_version(before), await self.adapters.get_version(after)
        olds = [each async for each in self.evaluations.list(subject=old.name)]
        news = [each async for each in self.evaluations.list(subject=new.name)]
        data, sets = None, [each.lineage.spec.dataset_version for each in (old, new)]
        if all(sets) and sets[0] != sets[1]:
            with suppress(NotFound):  # the data may be gone; the versions stay
                data = await self.datasets.diff(*sets)
        parameters = _adapter_diff.parameters(old, new)
        return AdapterDiff(old, new, data, parameters, _adapter_diff.metrics(old, new, olds, news))

    async def generate_split(
        self,
        dataset: str,
        out: str | Path,
        *,
        adapter: str | None = None,
        model: str | None = None,
        split: str = "test",
        prompt: str = "",
        max_tokens: int = 256,
        in_flight: int = 64,
        on_progress: Callable[[Batch], None] = lambda batch: None,
    ) -> Batch:
        """Answers every row of a split into a file of JSON lines; goes on with what a broken run has left.

        Args:
            dataset: `digits` for the newest version, `digits@<digest>` for another.
            out: the file. A row that it has an answer to is not asked again.
            adapter: who answers: `digits` (its production version, as it is now), `digits@3`. Default: the base.
            model: the base, where no adapter is named. Default: the only one there is.
            split: which of its splits.
            prompt: replaces each row's question.
            max_tokens: of an answer.
            in_flight: rows that are asked at once: as many as the replicas have room for, and some that wait.
            on_progress: is told after each row.

        Raises:
            OtherAnswers: the file was made of another version, of other rows or with other settings.
            NotFound: the data, or who answers.
        """
        rows = await self.datasets.get_version(dataset)
        asked: dict[str, Any] = {"dataset_version": rows.name, "split": split}
        if adapter:
            who = await self.adapters.get_version(adapter)
            asked |= {"answered_by": who.name, "digest": who.digest}
        else:
            base = await self.models.get(await self.models.name_or_only(model))
            asked |= {"answered_by": base.name, "digest": base.digest}
        count = next((each.row_count for each in rows.splits if each.split == split), None)
        if count is None:
            names = ", ".join(each.split for each in rows.splits)
            raise NotFound("SPLIT_UNKNOWN", f"{rows.name} has {names}, not {split}", resource=rows.name)
        batch = Batch(Path(out), asked | {"prompt": prompt, "max_tokens": max_tokens}, count)
        await asyncio.to_thread(batch.resume)
        first = next((index for index in range(count) if index not in batch.done), None)
        if first is None:
            return batch
        examples = self.datasets.examples(rows.name, split, offset=first, picture_form=PICTURE_FORM_ORIGINAL)

        def answer(prompt: Sequence[Message]) -> Awaitable[GenerateResponse]:
            which = {"adapter": asked["answered_by"]} if adapter else {"model": asked["answered_by"]}
            return self.generate(prompt, max_tokens=max_tokens, timeout_s=BATCH_ANSWER_TIMEOUT_S, **which)

        await batch.run(examples, answer, in_flight, on_progress)
        return batch

    async def reproduce(self, name: str, *, into: str = "", request_id: str = "") -> TrainingJob:
        """Queues the job of an adapter version again; its new version has the same digest where all is as it was.

        Args:
            name: the version, such as `digits@3`.
            into: the adapter that gets the new version. Default: its own.
            request_id: a UUID of yours. Default: made here.

        Raises:
            FailedPrecondition: NOT_TRAINED: it was imported.
        """
        found = await self.adapters.get_version(name)
        if not found.lineage.HasField("spec"):
            raise FailedPrecondition("NOT_TRAINED", f"{found.name} was imported: no job made it", resource=found.name)
        spec = TrainingSpec()
        spec.CopyFrom(found.lineage.spec)
        del spec.evaluations[:]  # they take no part in what comes out
        return await self.jobs.train(spec.dataset_version, into or spec.adapter, spec=spec, request_id=request_id)

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
    sweep = Blocking(AsyncJobs.sweep)
    estimate = Blocking(AsyncJobs.estimate)
    get = Blocking(AsyncJobs.get)
    list = Iterating(AsyncJobs.list)
    watch = Iterating(AsyncJobs.watch)
    curve = Blocking(AsyncJobs.curve)
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
    canary = Blocking(AsyncAdapters.canary)
    end_canary = Blocking(AsyncAdapters.end_canary)
    delete_alias = Blocking(AsyncAdapters.delete_alias)
    import_folder = Blocking(AsyncAdapters.import_folder)
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
    compare = Blocking(AsyncEvaluations.compare)
    judge = Blocking(AsyncEvaluations.judge)
    judgements = Iterating(AsyncEvaluations.judgements)
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
    adapter_diff = Blocking(AsyncClient.adapter_diff)
    generate_split = Blocking(AsyncClient.generate_split)
    reproduce = Blocking(AsyncClient.reproduce)
    resident_models = Blocking(AsyncClient.resident_models)
    loaded_adapters = Iterating(AsyncClient.loaded_adapters)

    def close(self) -> None:
        """Ends all connections and the background thread."""
        self._loop.run(self._twin.close)
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
