"""How a PEFT folder becomes an adapter's next version: of a training job, or made elsewhere."""

from __future__ import annotations

import hashlib
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

from veneer_rpc.errors import DataLoss, FailedPrecondition, Internal
from veneer_rpc.names import AdapterName, AdapterVersionName, ModelName
from veneer_trainer.domain.adapters import (
    PRODUCTION,
    Adapter,
    AdapterVersion,
    Imported,
    Inspected,
    Lineage,
    NewVersion,
    Settings,
)
from veneer_trainer.domain.jobs import TrainingJob
from veneer_trainer.domain.requests import Request
from veneer_trainer.domain.spec import TrainingSpec
from veneer_trainer.domain.targets import targeted
from veneer_trainer.failpoints import failpoint
from veneer_trainer.ports import ModelCatalog, PublishHeader, Requests
from veneer_trainer.registry_ports import AdapterFolders, RegistryStore


class Publishing:
    """The `ports.Registry`, and imports.

    Args:
        store: adapters and versions.
        folders: their files.
        catalog: the bases they stand on.
        requests: what repeated imports returned.
    """

    def __init__(
        self, store: RegistryStore, folders: AdapterFolders, catalog: ModelCatalog, requests: Requests
    ) -> None:
        self._store = store
        self._requests = requests
        self._folders = folders
        self._catalog = catalog

    def publish(
        self, tenant: str, job: TrainingJob, header: PublishHeader, folder: Path, fence: Callable[[], Any]
    ) -> AdapterVersion:
        """See Registry."""
        fence()
        if (first := self._store.version_of_job(job.work.uid)) is not None:
            return first
        spec = job.spec
        if spec.adapter is None:
            raise Internal("JOB_WITHOUT_ADAPTER", f"{job.name} names no adapter")
        base = self._catalog.get(spec.model)
        content = self._folders.inspect(folder, base, self._catalog.contract(spec.model, spec.max_pixels))
        if content.digest != header.digest:
            raise DataLoss(
                "ADAPTER_DAMAGED",
                f"the adapter's digest is {content.digest}, announced was {header.digest[:64]}",
                metadata={"digest": content.digest},
            )
        if (content.lora.rank, content.lora.alpha, content.lora.use_rslora) != (
            spec.lora.rank, spec.lora.alpha, spec.lora.use_rslora,
        ):  # fmt: skip
            raise FailedPrecondition("LORA_DIFFERS", f"{content.lora} was trained, {job.name} asked for {spec.lora}")
        lineage = Lineage(
            training_job=str(job.name),
            spec=spec,
            resolved=job.outcome.resolved,
            code_version=header.code_version,
            initial_adapter_version=str(spec.initial_adapter_version or ""),
        )
        new = NewVersion(str(uuid.uuid4()), content, lineage, header.final_progress, job.work.uid)
        return self._register(tenant, spec.adapter, spec.model, new, folder, fence, str(job.name))

    def bring_in(
        self,
        request: Request,
        name: AdapterName,
        model: ModelName,
        max_pixels: int,
        folder: Path,
        imported: Imported,
        code_version: str,
    ) -> AdapterVersion:
        """Registers a PEFT folder that was made elsewhere; once for a request id, whose body is what came in.

        Raises:
            NotFound: the base.
            InvalidArgument, FailedPrecondition: what is wrong with the folder; the adapter is of another base.
            AlreadyExists: the request id came with another body before.
        """
        content = self._folders.inspect(folder, self._catalog.get(model), self._catalog.contract(model, max_pixels))
        new = NewVersion(str(uuid.uuid4()), content, Lineage(imported=imported, code_version=code_version))

        def register() -> AdapterVersion:
            return self._register(request.tenant, name, model, new, folder, lambda: None, request.actor)

        if request.key is None:
            return register()
        body = hashlib.sha256(request.body_sha256 + content.digest.encode()).digest()
        with self._store.together():
            made = self._requests.once(request.key, body, lambda: str(register().name).encode()).decode()
            return self._store.version(request.tenant, AdapterVersionName.parse(made))

    def check_adapter(self, tenant: str, spec: TrainingSpec) -> None:
        """See Registry."""
        if spec.adapter is not None:
            _check_base(self._store.find(tenant, spec.adapter), spec.model)
        if spec.initial_adapter_version is None:
            return
        content = self._store.version(tenant, spec.initial_adapter_version).content
        base = self._catalog.get(spec.model)
        problems = _differences(content, spec, base.digest, tuple(targeted(base.linears, spec.lora)))
        if problems:
            raise FailedPrecondition(
                "INITIAL_ADAPTER_DIFFERS",
                f"{spec.initial_adapter_version} cannot be continued: {'; '.join(problems)}",
                resource=str(spec.initial_adapter_version),
            )

    def _register(
        self,
        tenant: str,
        name: AdapterName,
        model: ModelName,
        new: NewVersion,
        folder: Path,
        fence: Callable[[], Any],
        actor: str,
    ) -> AdapterVersion:
        """Puts the folder in its place, then makes it known; one that nobody knows is removed at the next start."""
        self._folders.take(folder, new.uid)
        try:
            with self._store.together():
                fence()
                if new.job_uid and (first := self._store.version_of_job(new.job_uid)) is not None:
                    self._folders.forget(new.uid)
                    return first
                adapter = self._store.find(tenant, name)
                _check_base(adapter, model)
                adapter = adapter or self._store.create(tenant, name, model, Settings())
                version = self._store.add_version(adapter, new)
                if not self._store.moves(adapter, None, 1):
                    adapter = self._store.get(tenant, name)
                    self._store.move(adapter, PRODUCTION, version.name.version, actor, "the first version")
                failpoint("publish.inserted")
                return self._store.version(tenant, version.name)
        except BaseException:
            if new.uid not in self._store.version_uids():  # it may have failed after all was durable
                self._folders.forget(new.uid)
            raise


def _check_base(adapter: Adapter | None, model: ModelName) -> None:
    if adapter is not None and adapter.model != model:
        raise FailedPrecondition(
            "OTHER_BASE", f"{adapter.name} stands on {adapter.model}, not on {model}", resource=str(adapter.name)
        )


def _differences(content: Inspected, spec: TrainingSpec, base_digest: str, targets: tuple[str, ...]) -> list[str]:
    pairs = [
        ("base", content.contract.model_digest, base_digest),
        ("rank", content.lora.rank, spec.lora.rank),
        ("alpha", content.lora.alpha, spec.lora.alpha),
        ("use_rslora", content.lora.use_rslora, spec.lora.use_rslora),
        ("use_dora", content.lora.use_dora, spec.lora.use_dora),
    ]
    found = [f"its {name} is {theirs}, the job's {ours}" for name, theirs, ours in pairs if theirs != ours]
    if content.target_modules != targets:
        found.append(f"it adapts {len(content.target_modules)} linears, the job others ({len(targets)})")
    return found
