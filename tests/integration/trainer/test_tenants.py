"""Two tenants see nothing of each other, on every method that takes a name or lists."""

from collections.abc import Callable
from typing import Any

import grpc
import pytest

from veneer.trainer.v1 import (
    adapter_pb2,
    adapter_service_pb2,
    adapter_service_pb2_grpc,
    evaluation_pb2,
    evaluation_service_pb2,
    evaluation_service_pb2_grpc,
    export_pb2,
)
from veneer.trainer.v1 import adapter_service_pb2 as adapters_pb
from veneer.trainer.v1 import evaluation_service_pb2 as evaluations_pb
from veneer.trainer.v1 import training_job_pb2 as job_pb
from veneer.trainer.v1 import worker_service_pb2 as worker_pb

# What the conftest makes; a conftest cannot be imported.
Trainer = Worker = Kit = Make = Method = Message = Any

ADAPTER, VERSION = "adapters/digits", "adapters/digits/versions/1"
REPLICAS = {"ReportServing"}


def calls(kit: Kit, evaluation: str, export: str) -> dict[str, Any]:
    """A request of every method that names what belongs to another tenant."""
    judgement = evaluation_pb2.Judgement(subject=VERSION, score=1, evaluation=evaluation)
    spec = evaluation_pb2.EvaluationSpec(subject=VERSION, dataset_version=kit.VERSION)
    adapter = adapter_pb2.Adapter(name=ADAPTER, preload=True)
    return {
        "GetAdapter": adapters_pb.GetAdapterRequest(name=ADAPTER),
        "UpdateAdapter": adapters_pb.UpdateAdapterRequest(adapter=adapter, update_mask={"paths": ["preload"]}),
        "DeleteAdapter": adapters_pb.DeleteAdapterRequest(name=ADAPTER),
        "GetAdapterVersion": adapters_pb.GetAdapterVersionRequest(name=VERSION),
        "ListAdapterVersions": adapters_pb.ListAdapterVersionsRequest(parent=ADAPTER),
        "DeleteAdapterVersion": adapters_pb.DeleteAdapterVersionRequest(name=VERSION),
        "DownloadAdapterVersion": adapters_pb.DownloadAdapterVersionRequest(name=VERSION, tenant="acme"),
        "PromoteAdapterVersion": adapters_pb.PromoteAdapterVersionRequest(name=VERSION, alias="theirs"),
        "RollbackAdapter": adapters_pb.RollbackAdapterRequest(name=ADAPTER),
        "DeleteAlias": adapters_pb.DeleteAliasRequest(adapter=ADAPTER, alias="production"),
        "ListAliasMoves": adapters_pb.ListAliasMovesRequest(parent=ADAPTER),
        "ExportAdapterVersion": adapters_pb.ExportAdapterVersionRequest(
            spec=export_pb2.ExportSpec(adapter_version=VERSION, format=export_pb2.EXPORT_FORMAT_MERGED)
        ),
        "GetExport": adapters_pb.GetExportRequest(name=export),
        "CancelExport": adapters_pb.CancelExportRequest(name=export),
        "DeleteExport": adapters_pb.DeleteExportRequest(name=export),
        "DownloadExport": adapters_pb.DownloadExportRequest(name=export),
        "CreateEvaluation": evaluations_pb.CreateEvaluationRequest(spec=spec),
        "GetEvaluation": evaluations_pb.GetEvaluationRequest(name=evaluation),
        "CancelEvaluation": evaluations_pb.CancelEvaluationRequest(name=evaluation),
        "DeleteEvaluation": evaluations_pb.DeleteEvaluationRequest(name=evaluation),
        "WatchEvaluation": evaluations_pb.WatchEvaluationRequest(name=evaluation),
        "ListSamples": evaluations_pb.ListSamplesRequest(parent=evaluation),
        "CreateJudgement": evaluations_pb.CreateJudgementRequest(judgement=judgement),
    }


LISTS: dict[str, tuple[Any, str]] = {
    "ListAdapters": (adapters_pb.ListAdaptersRequest(), "adapters"),
    "ListExports": (adapters_pb.ListExportsRequest(), "exports"),
    "ListEvaluations": (evaluations_pb.ListEvaluationsRequest(), "evaluations"),
    "ListJudgements": (evaluations_pb.ListJudgementsRequest(), "judgements"),
    "WatchAdapters": (adapters_pb.WatchAdaptersRequest(), "adapters"),
}
OWN = {"CreateAdapter", "ImportAdapterVersion"}  # they make something of the caller's own


def code_of(act: Callable[[], Any]) -> grpc.StatusCode:
    with pytest.raises(grpc.RpcError) as caught:
        act()
    return caught.value.code()


def methods() -> dict[str, str]:
    """Every method of both services, with its service."""
    files = (adapter_service_pb2, evaluation_service_pb2)
    return {
        method.name: service.name
        for file in files
        for service in file.DESCRIPTOR.services_by_name.values()
        for method in service.methods
    }


def test_another_tenants_adapters_and_evaluations_are_not_there(make_trainer: Make, base_digest: str, kit: Kit) -> None:
    trainer = make_trainer(lease_s="60")
    trainer.start()
    worker = kit.Worker(trainer.worker_stub(), base_digest)
    kit.create(trainer.jobs(), evaluations=[{"split": "test"}])
    attempt = worker.acquire(10).attempt
    worker.publish(attempt, kit.peft_folder())
    worker.finish(attempt)
    lease = worker.acquire(10)
    sample = evaluation_pb2.Sample(index=0, expected="7", answer="7")
    worker.stub.PutSamples(worker_pb.PutSamplesRequest(attempt=lease.attempt, samples=[sample], total_samples=1))
    assert worker.finish(lease.attempt) == job_pb.JOB_STATE_SUCCEEDED
    evaluation = lease.evaluation.name
    own = evaluation_pb2.Judgement(subject=VERSION, score=1, evaluation=evaluation)
    trainer.evaluations().CreateJudgement(evaluations_pb.CreateJudgementRequest(judgement=own))

    exporting = adapters_pb.ExportAdapterVersionRequest(
        spec=export_pb2.ExportSpec(adapter_version=VERSION, format=export_pb2.EXPORT_FORMAT_MERGED)
    )
    export = trainer.adapters().ExportAdapterVersion(exporting).name

    channel = trainer.channel(trainer.keys.other)
    stubs = {
        "AdapterService": adapter_service_pb2_grpc.AdapterServiceStub(channel),
        "EvaluationService": evaluation_service_pb2_grpc.EvaluationServiceStub(channel),
    }
    named = calls(kit, evaluation, export)
    assert named.keys() | LISTS.keys() | REPLICAS | OWN == methods().keys()
    for method, service in methods().items():
        call = getattr(stubs[service], method)
        if method in named:

            def ask(call: Method = call, request: Message = named[method]) -> None:
                answer = call(request, timeout=20)
                for _ in answer if hasattr(answer, "__next__") else ():
                    pass

            assert code_of(ask) == grpc.StatusCode.NOT_FOUND, method
        elif method in LISTS:
            request, items = LISTS[method]
            answer = call(request, timeout=20)
            page = next(answer) if method == "WatchAdapters" else answer
            assert not getattr(page, items), method
            mine = getattr(
                trainer.adapters() if service == "AdapterService" else trainer.evaluations(), method
            )(request, timeout=20)  # fmt: skip
            assert getattr(next(mine) if method == "WatchAdapters" else mine, items), method
    created = stubs["AdapterService"].CreateAdapter(
        adapters_pb.CreateAdapterRequest(adapter_id="digits", adapter=adapter_pb2.Adapter(model="models/tiny"))
    )
    assert (created.latest_version, dict(created.aliases)) == (0, {})
    assert dict(trainer.adapters().GetAdapter(named["GetAdapter"]).aliases) == {"production": 1}
