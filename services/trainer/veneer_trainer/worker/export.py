"""An export under a lease: the adapter is fetched, the child writes and checks the model, this publishes it."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Mapping
from pathlib import Path

import structlog

from veneer.trainer.v1 import adapter_service_pb2_grpc, worker_service_pb2, worker_service_pb2_grpc
from veneer_rpc.errors import FailedPrecondition
from veneer_rpc.names import ModelName
from veneer_rpc.threads import in_thread
from veneer_trainer.worker import adapter_download, folders
from veneer_trainer.worker.attempt import Abandoned, Attempt, Order, failure
from veneer_trainer.worker.child_process import ChildProcess
from veneer_trainer.worker.messages import Delegation, Exported, ExportTask, Failed, ShareDone, ToParent
from veneer_trainer.worker.settings import WorkerSettings

_pb = worker_service_pb2
_log = structlog.get_logger(__name__)
_ORDER_S = 15.0  # for the order that explains a refused publish

Outcome = dict[str, object]


class ExportWork:
    """One attempt at an export. It keeps no checkpoint: one that is given back begins anew.

    Args:
        settings: the process's.
        digests: of the bases it holds.
        service: the trainer.
        adapters: the trainer's registry.
        attempt: the lease.
        lease: what it is about.
        folder: the attempt's own; the caller removes it.
    """

    def __init__(
        self,
        settings: WorkerSettings,
        digests: Mapping[ModelName, str],
        service: worker_service_pb2_grpc.WorkerServiceAsyncStub,
        adapters: adapter_service_pb2_grpc.AdapterServiceAsyncStub,
        attempt: Attempt,
        lease: _pb.Lease,
        folder: Path,
    ) -> None:
        self._settings = settings
        self._digests = digests
        self._service = service
        self._adapters = adapters
        self._attempt = attempt
        self._lease = lease
        self._folder = folder

    async def run(self) -> Outcome | None:
        """Exports; returns the outcome to tell the trainer.

        Raises:
            Abandoned: the attempt is not ours any more.
            VeneerError: the trainer refuses the adapter or the export.
        """
        child = await ChildProcess.start(await self._task(), self._settings.log_level)
        self._attempt.on_delegation = lambda delegation: child.send(Delegation(delegation))
        child.send(Delegation(self._attempt.delegation))
        obeying = asyncio.create_task(self._obey(child))
        try:
            last = await self._listen(child)
            status = await child.ended()
            if self._attempt.order is not Order.CONTINUE:
                return self._given_back()
            if isinstance(last, Exported):
                return await self._publish(last)
            if isinstance(last, Failed):
                return {"failed": failure(last.reason, last.message, transient=last.transient)}
            return {"failed": failure("PROCESS_DIED", f"the export ended with status {status}", transient=True)}
        finally:
            child.kill()
            await child.ended()
            obeying.cancel()

    async def _task(self) -> ExportTask:
        export, settings = self._lease.export, self._settings
        model = ModelName.parse(export.model)
        return ExportTask(
            export=export.SerializeToString(),
            model_directory=str(settings.model_directories[model]),
            model_digest=self._digests[model],
            dataset=settings.dataset,
            certificates_file=str(settings.certificates_file or ""),
            delegation=self._attempt.delegation,
            folder=str(self._folder),
            adapter_folder=str(await self._fetch_adapter()),
            threads=settings.threads,
            prompts=settings.export_prompts,
            dataset_patience_s=settings.dataset_patience_s,
        )

    async def _fetch_adapter(self) -> Path:
        """Downloads the version; the child holds it against its digest."""
        folder = self._folder / "adapter"
        name = self._lease.export.spec.adapter_version
        await adapter_download.fetch(self._adapters, self._attempt, self._lease.tenant, name, folder)
        return folder

    async def _listen(self, child: ChildProcess) -> ToParent | None:
        """Hears the child to its end; returns its last message."""
        last: ToParent | None = None
        while (message := await child.receive()) is not None:
            if isinstance(message, ShareDone):
                self._attempt.share_done(message.share)
            else:
                last = message
        return last

    async def _obey(self, child: ChildProcess) -> None:
        """Ends the child at any order: there is nothing to keep."""
        await self._attempt.ordered.wait()
        child.kill()

    def _given_back(self) -> Outcome:
        match self._attempt.order:
            case Order.ABANDON:
                raise Abandoned(self._attempt.ref.work)
            case Order.CANCEL:
                return {"cancelled": _pb.AttemptCancelled()}
            case _:
                return {"released": _pb.AttemptReleased()}

    async def _publish(self, exported: Exported) -> Outcome:
        folder = Path(exported.folder)
        files = await in_thread(folders.described, folder)
        header = _pb.PublishExportHeader(
            attempt=self._attempt.ref, digest=exported.digest, files=files, statement=exported.measured
        )

        async def pieces() -> AsyncIterator[_pb.PublishExportRequest]:
            yield _pb.PublishExportRequest(header=header)
            for piece in folders.pieces(folder, files):
                yield _pb.PublishExportRequest(file=piece)

        try:
            await self._attempt.call(lambda **how: self._service.PublishExport(pieces(), **how), timeout_s=None)
        except FailedPrecondition:
            # Its owner has asked for something in this moment; the next heartbeat says what.
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(_ORDER_S):
                    await self._attempt.ordered.wait()
            if self._attempt.order is Order.CONTINUE:
                raise
            return self._given_back()
        _log.info("export published", work=self._attempt.ref.work, digest=exported.digest)
        return {"succeeded": _pb.AttemptSucceeded()}
