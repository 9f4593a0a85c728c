"""Which unfinished work names an adapter, or a version of it."""

from __future__ import annotations

from veneer_rpc.names import AdapterName, AdapterVersionName
from veneer_trainer.domain.jobs import job_of
from veneer_trainer.domain.lifecycle import TERMINAL, State
from veneer_trainer.domain.work import Work, WorkKind
from veneer_trainer.ports import WorkStore


def users(store: WorkStore, tenant: str, name: AdapterName | AdapterVersionName) -> list[str]:
    """Returns the names of a tenant's unfinished work that names an adapter or any version of it, or one version."""
    whole = isinstance(name, AdapterName)
    found = []
    for work in store.in_states(set(State) - TERMINAL, tenant):
        if any(each == str(name) or (whole and each.startswith(f"{name}/")) for each in _named(work)):
            found.append(work.ref.name)
    return found


def _named(work: Work) -> list[str]:
    if work.ref.kind is not WorkKind.TRAINING:
        return [work.subject]
    job = job_of(work)
    return [work.subject, str(job.spec.initial_adapter_version or ""), job.outcome.adapter_version]
