"""Exports as their owners and their workers use them."""

from __future__ import annotations

import json
import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from veneer_rpc.certificate import CERTIFICATE_FILE, SIGNER_FILE
from veneer_rpc.errors import DataLoss, FailedPrecondition, NotFound, Violation, invalid
from veneer_rpc.names import AdapterName, DatasetVersionName, ExportName
from veneer_trainer.domain.adapters import AdapterVersion
from veneer_trainer.domain.attempts import AttemptKey, Attempts
from veneer_trainer.domain.control import Control
from veneer_trainer.domain.dispatch import Dispatch
from veneer_trainer.domain.exports import (
    CHECKED_SPLITS,
    DTYPES,
    Export,
    ExportOrder,
    ExportOutcome,
    ExportSpec,
    as_json,
    export_of,
)
from veneer_trainer.domain.files import StoredFile
from veneer_trainer.domain.lifecycle import State, wrong_state
from veneer_trainer.domain.registry import chosen
from veneer_trainer.domain.requests import Request
from veneer_trainer.domain.work import Needs, NewWork, Work, WorkKind, WorkRef
from veneer_trainer.export_ports import ExportFolders, Signer
from veneer_trainer.ports import Datasets, Requests, WorkStore
from veneer_trainer.registry_ports import OpenFiles, RegistryStore

_OWN_FILES = {CERTIFICATE_FILE, SIGNER_FILE}


@dataclass(frozen=True, slots=True)
class ExportHeader:
    """What a worker says of an export that it publishes; `measured` is a JSON object."""

    digest: str
    files: tuple[StoredFile, ...]
    measured: bytes
    code_version: str = ""


class Exports:
    """The use cases of exports in AdapterService, and the worker's publishing.

    Args:
        max_queued: exports of one tenant that may wait at once.
        (the rest): the ports and parts that it stands on.
    """

    def __init__(
        self,
        store: WorkStore,
        registry: RegistryStore,
        datasets: Datasets,
        folders: ExportFolders,
        requests: Requests,
        dispatch: Dispatch,
        attempts: Attempts,
        signer: Signer,
        max_queued: int,
    ) -> None:
        self._store = store
        self._registry = registry
        self._datasets = datasets
        self._folders = folders
        self._requests = requests
        self._dispatch = dispatch
        self._attempts = attempts
        self._signer = signer
        self._max_queued = max_queued
        self._control = Control(store)

    def create(self, request: Request, spec: ExportSpec) -> Export:
        """Accepts an export: when this returns it is durable.

        Raises:
            InvalidArgument: bounds, or a split that the adapter's data does not have.
            NotFound: the version.
            FailedPrecondition: CHECK_DATA_MISSING: a split is named, but the adapter's data is not there.
            ResourceExhausted: QUEUE_FULL.
            Unavailable: the dataset service does not answer.
        """
        if request.key is not None and (uid := self._requests.find(request.key, request.body_sha256)) is not None:
            return self._known(uid.decode())
        spec.check()
        version = self._registry.version(request.tenant, spec.adapter_version)
        model = self._registry.get(request.tenant, AdapterName(version.name.adapter)).model
        data, split = self._checked_on(request.tenant, version, spec)
        spec = replace(spec, check_split=split, dtype=spec.dtype or DTYPES[spec.format][0])
        order = ExportOrder(spec, str(model), version.digest, str(data or ""))
        new = _new_work(request.tenant, order, version.content.contract.model_digest)
        if data is not None:
            self._datasets.hold(request.tenant, data, new.ref.name)
        made = None
        try:
            made = self._once(request, lambda: self._store.submit(new, self._max_queued))
        finally:
            if data is not None and (made is None or made.uid != new.uid):
                self._datasets.release(request.tenant, data, new.ref.name)
        self._dispatch.settle(made)
        return export_of(made)

    def get(self, tenant: str, name: ExportName) -> Export:
        """Returns an export; raises NotFound."""
        return export_of(self._store.get(_ref(tenant, name)))

    def page(self, tenant: str, after: tuple[float, str] | None, limit: int, version: str) -> list[Export]:
        """Returns exports, newest first, older than a (created_s, uid)."""
        return [*map(export_of, self._store.page(tenant, WorkKind.EXPORT, after, limit, (), version))]

    def cancel(self, tenant: str, name: ExportName) -> Export:
        """Stops an export for good; see Control."""
        work = self._control.cancel(_ref(tenant, name))
        self._dispatch.settle(work)
        return export_of(work)

    def delete(self, tenant: str, name: ExportName) -> None:
        """Forgets a finished export with its files; raises FailedPrecondition for another."""
        work = self._store.get(_ref(tenant, name))
        if not work.state.terminal:
            raise wrong_state(work.ref.name, work.state, State.CANCELLED)
        if work.held_dataset:
            self._datasets.release(tenant, DatasetVersionName.parse(work.dataset_version), work.ref.name)
        self._store.delete(work)
        self._folders.forget(work.uid)

    def open(self, tenant: str, name: ExportName, paths: tuple[str, ...]) -> tuple[tuple[StoredFile, ...], OpenFiles]:
        """Opens files of an export, sorted by path: all for no paths.

        Raises:
            NotFound: the export, or a path that it does not have.
            FailedPrecondition: NOT_EXPORTED: it has not succeeded.
        """
        export = self.get(tenant, name)
        if export.work.state is not State.SUCCEEDED:
            text = f"{name} is {export.work.state.value}: it has files once it has succeeded"
            raise FailedPrecondition("NOT_EXPORTED", text, resource=str(name))
        files = chosen(export.outcome.files, paths, str(name))
        return files, self._folders.read(export.work.uid, files)

    def publish(self, key: AttemptKey, header: ExportHeader, folder: Path) -> Export:
        """Signs a received export and keeps it; at most one for a piece of work.

        Args:
            key: the attempt.
            header: what the worker announced; sizes and SHA-256 of the files hold already.
            folder: the files; they are moved, and the caller removes what is left.

        Raises:
            Aborted: STALE_TOKEN.
            InvalidArgument: what was measured is no JSON object, or a file has a name of the trainer's own.
            DataLoss: the model's digest is not the announced one.
            FailedPrecondition: the work is no export, or is being cancelled.
        """
        work = self._attempts.held(key)
        if work.ref.kind is not WorkKind.EXPORT:
            raise FailedPrecondition("NO_EXPORT", f"{key.work[:80]} is no export")
        if work.outcome:
            return export_of(work)
        measured = _measured(header)
        digest = self._folders.digest(folder, header.files)
        if digest != header.digest:
            text = f"the export's digest is {digest}, announced was {header.digest[:64]}"
            raise DataLoss("EXPORT_DAMAGED", text, metadata={"digest": digest})
        predicate = _predicate(work, digest, measured, header.code_version)
        envelope = self._signer.sign({file.path: file.digest for file in header.files}, predicate)
        own = [
            self._folders.add(folder, CERTIFICATE_FILE, envelope),
            self._folders.add(folder, SIGNER_FILE, self._signer.public_key_pem),
        ]
        files = tuple(sorted((*header.files, *own), key=lambda file: file.path))
        self._folders.forget(work.uid)  # of an attempt that died between the two lines below
        self._folders.take(folder, work.uid)
        outcome = ExportOutcome(digest, files, envelope.decode())
        return export_of(self._store.change(self._attempts.held(key), outcome=as_json(outcome)))

    def clear(self) -> None:
        """Removes folders that no export has, after a process died."""
        found = self._store.in_states(set(State))
        self._folders.keep_only([work.uid for work in found if work.ref.kind is WorkKind.EXPORT and work.outcome])

    def _checked_on(
        self, tenant: str, version: AdapterVersion, spec: ExportSpec
    ) -> tuple[DatasetVersionName | None, str]:
        """The data and the split to check on; none where the version's own data is not there."""
        trained = version.lineage.spec
        try:
            splits = self._datasets.version(tenant, trained.dataset_version).splits if trained else None
        except NotFound:
            splits = None
        if trained is None or splits is None:
            if spec.check_split:
                text = f"the data of {version.name} is not here: leave check_split empty"
                raise FailedPrecondition("CHECK_DATA_MISSING", text, resource=str(version.name))
            return None, ""
        split = spec.check_split or next((each for each in CHECKED_SPLITS if each in splits), "")
        if split not in splits:
            text = f"{trained.dataset_version} has {', '.join(sorted(splits))}, not {split or CHECKED_SPLITS[0]!r}"
            raise invalid(Violation("spec.check_split", "SPLIT_UNKNOWN", text))
        return trained.dataset_version, split

    def _once(self, request: Request, act: Callable[[], Work]) -> Work:
        if request.key is None:
            return act()
        uid = self._requests.once(request.key, request.body_sha256, lambda: act().uid.encode()).decode()
        return self._known(uid).work

    def _known(self, uid: str) -> Export:
        work = self._store.find(uid)
        if work is None:
            raise NotFound("WORK_UNKNOWN", "the export that this request made has been deleted")
        return export_of(work)


def _measured(header: ExportHeader) -> dict[str, Any]:
    if names := _OWN_FILES & {file.path for file in header.files}:
        raise invalid(Violation("header.files", "FILE_FOREIGN", f"{sorted(names)[0]} is made by the trainer"))
    try:
        measured = json.loads(header.measured)
    except ValueError as error:
        raise invalid(Violation("header.statement", "MALFORMED", f"is no JSON: {error}")) from error
    if not isinstance(measured, dict):
        raise invalid(Violation("header.statement", "MALFORMED", "must be a JSON object"))
    return measured


def _predicate(work: Work, digest: str, measured: Mapping[str, Any], code_version: str) -> dict[str, Any]:
    order = export_of(work).order
    return {
        "export": work.ref.name,
        "adapter_version": str(order.spec.adapter_version),
        "adapter_digest": order.adapter_digest,
        "model": order.model,
        "model_digest": work.needs.model_digest,
        "format": order.spec.format.value,
        "dtype": order.spec.dtype,
        "digest": digest,
        "forced": order.spec.force,
        "dataset_version": order.dataset_version,
        "split": order.spec.check_split,
        "measured": measured,
        "code_version": code_version,
        "signed_at": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def _new_work(tenant: str, order: ExportOrder, model_digest: str) -> NewWork:
    uid = str(uuid.uuid4())
    ref = WorkRef(tenant, WorkKind.EXPORT, f"export-{uid}")
    return NewWork(
        ref,
        uid,
        as_json(order),
        str(order.spec.adapter_version),
        needs=Needs(model_digest),
        dataset_version=order.dataset_version,
    )


def _ref(tenant: str, name: ExportName) -> WorkRef:
    return WorkRef(tenant, WorkKind.EXPORT, name.export)
