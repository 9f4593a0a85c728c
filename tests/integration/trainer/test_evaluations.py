"""Evaluations and models over real connections: an evaluation's life, gates, judgements, files to count tokens with."""

import hashlib
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.rpc import error_details_pb2
from grpc_status import rpc_status

from veneer.trainer.v1 import adapter_service_pb2 as adapters_pb
from veneer.trainer.v1 import evaluation_pb2
from veneer.trainer.v1 import evaluation_service_pb2 as pb
from veneer.trainer.v1 import model_service_pb2 as models_pb
from veneer.trainer.v1 import training_job_pb2 as job_pb
from veneer.trainer.v1 import worker_service_pb2 as worker_pb
from veneer_processing import Processor
from veneer_rpc.delegation import DelegationVerifier

# What the conftest makes; a conftest cannot be imported.
Trainer = Worker = Datasets = Kit = Make = Adapters = Act = Message = Answer = Any
Code = grpc.StatusCode


@pytest.fixture
def trainer(make_trainer: Make) -> Trainer:
    """One whose leases outlast a busy machine."""
    started = make_trainer(lease_s="60")
    started.start()
    return started


def refusal(act: Act) -> tuple[grpc.StatusCode, str]:
    with pytest.raises(grpc.RpcError) as caught:
        act()
    info = error_details_pb2.ErrorInfo()
    assert rpc_status.from_call(caught.value).details[0].Unpack(info)
    return caught.value.code(), info.reason


def publish(trainer: Trainer, worker: Worker, kit: Kit, seed: int = 0, **spec: Message) -> Answer:
    kit.create(trainer.jobs(), **spec)
    attempt = worker.acquire(10).attempt
    version = worker.publish(attempt, kit.peft_folder(seed))
    assert worker.finish(attempt) == job_pb.JOB_STATE_SUCCEEDED
    return version


def evaluate(trainer: Trainer, kit: Kit, subject: str, request_id: str = "", **spec: Message) -> Answer:
    asked = evaluation_pb2.EvaluationSpec(**{"subject": subject, "dataset_version": kit.VERSION} | spec)
    request = pb.CreateEvaluationRequest(spec=asked, request_id=request_id)
    return trainer.evaluations().CreateEvaluation(request, timeout=20)


def get(trainer: Trainer, name: str, token: str | None = None) -> Answer:
    return trainer.evaluations(token).GetEvaluation(pb.GetEvaluationRequest(name=name), timeout=20)


def samples(right: int, wrong: int, start: int = 0) -> list[evaluation_pb2.Sample]:
    return [
        evaluation_pb2.Sample(index=start + index, prompt="?", expected="7", answer="7" if index < right else "1")
        for index in range(right + wrong)
    ]


def put(worker: Worker, attempt: Message, sent: list[Any], figure: float | None, total: int = 4) -> int:
    metrics = [] if figure is None else [
        evaluation_pb2.Metric(metric="exact_match", value=figure, low=0.1, high=0.9, count=len(sent))
    ]  # fmt: skip
    request = worker_pb.PutSamplesRequest(attempt=attempt, samples=sent, metrics=metrics, total_samples=total)
    return int(worker.stub.PutSamples(request, timeout=20).stored_samples)


def run(worker: Worker, figure: float) -> None:
    attempt = worker.acquire(10).attempt
    put(worker, attempt, samples(2, 2), figure)
    assert worker.finish(attempt) == job_pb.JOB_STATE_SUCCEEDED


def test_an_evaluation_is_created_leased_answered_and_finished(
    trainer: Trainer, worker: Worker, kit: Kit, datasets: Datasets
) -> None:
    version = publish(trainer, worker, kit)
    kit.until(lambda: not datasets.holders)
    made = evaluate(trainer, kit, "adapters/digits")
    assert made.spec.subject == version.name
    assert (made.spec.split, made.answered_by_digest) == ("test", version.digest)
    assert made.state == job_pb.JOB_STATE_QUEUED
    assert datasets.holders == {made.name}
    lease = worker.acquire(5)
    assert lease.attempt.work == made.name
    assert lease.evaluation.spec == made.spec
    assert lease.evaluation.answered_by_digest == version.digest
    for audience in ("dataset", "inference"):
        assert DelegationVerifier(audience, [trainer.keys.public_pem]).verify(lease.delegation).tenant == "acme"
    attempt = lease.attempt
    assert put(worker, attempt, samples(1, 1), 0.5) == 2
    assert put(worker, attempt, samples(2, 0), None) == 2  # the same again, in the place of the first
    half = get(trainer, made.name)
    assert (half.state, half.answered_samples, half.total_samples) == (job_pb.JOB_STATE_RUNNING, 2, 4)
    assert half.HasField("remaining")
    assert [metric.value for metric in half.metrics] == [0.5]
    stored = worker.stub.GetSamples(worker_pb.GetSamplesRequest(attempt=attempt, start_index=1), timeout=20).samples
    assert [(sample.index, sample.answer) for sample in stored] == [(1, "7")]
    assert refusal(lambda: worker.finish(attempt)) == (Code.FAILED_PRECONDITION, "INCOMPLETE")
    assert put(worker, attempt, samples(1, 1, 2), 0.75) == 4
    assert refusal(lambda: put(worker, attempt, samples(1, 0, 4), None))[0] == Code.INVALID_ARGUMENT
    assert worker.finish(attempt) == job_pb.JOB_STATE_SUCCEEDED
    assert refusal(lambda: put(worker, attempt, samples(1, 0), None)) == (Code.ABORTED, "STALE_TOKEN")
    assert refusal(lambda: worker.stub.GetSamples(worker_pb.GetSamplesRequest(attempt=attempt))) == (
        Code.ABORTED, "STALE_TOKEN",
    )  # fmt: skip
    done = get(trainer, made.name)
    assert (done.state, done.metrics[0].value, done.HasField("end_time")) == (job_pb.JOB_STATE_SUCCEEDED, 0.75, True)
    evaluations = trainer.evaluations()
    first = evaluations.ListSamples(pb.ListSamplesRequest(parent=made.name, page_size=3))
    rest = evaluations.ListSamples(
        pb.ListSamplesRequest(parent=made.name, page_size=3, page_token=first.next_page_token)
    )
    assert [sample.index for sample in [*first.samples, *rest.samples]] == [0, 1, 2, 3]
    misses = evaluations.ListSamples(pb.ListSamplesRequest(parent=made.name, only_misses=True)).samples
    assert [sample.index for sample in misses] == [3]
    asked = adapters_pb.GetAdapterVersionRequest(name=version.name)
    assert list(trainer.adapters().GetAdapterVersion(asked).evaluations) == [made.name]
    kit.until(lambda: not datasets.holders)
    evaluations.DeleteEvaluation(pb.DeleteEvaluationRequest(name=made.name))
    assert refusal(lambda: get(trainer, made.name))[0] == Code.NOT_FOUND


def test_the_base_is_asked_without_an_adapter_and_wrong_words_are_told(
    trainer: Trainer, kit: Kit, base_digest: str, worker: Worker
) -> None:
    request_id = "22222222-2222-4222-8222-222222222222"
    assert evaluate(trainer, kit, "models/tiny", split="test_layout").spec.split == "test_layout"
    worker.finish(worker.acquire(5).attempt, failed=job_pb.Failure(reason="UNANSWERED", message="x"))
    made = evaluate(trainer, kit, "models/tiny", request_id, max_samples=2, prompt="Which digit?")
    assert made.answered_by_digest == base_digest
    assert evaluate(trainer, kit, "models/tiny", request_id, max_samples=2, prompt="Which digit?").name == made.name
    for wrong in (
        {"split": "tset"}, {"max_tokens": 9000}, {"max_samples": -1}, {"prompt": "x" * 20_000},
        {"metrics": ["bleu"]}, {"metrics": ["exact_match", ""]},
    ):  # fmt: skip
        assert refusal(lambda wrong=wrong: evaluate(trainer, kit, "models/tiny", **wrong))[0] == Code.INVALID_ARGUMENT
    assert refusal(lambda: evaluate(trainer, kit, "models/none"))[0] == Code.NOT_FOUND
    assert refusal(lambda: evaluate(trainer, kit, "adapters/none"))[0] == Code.NOT_FOUND
    assert refusal(lambda: evaluate(trainer, kit, "adapters/none/versions/1"))[0] == Code.NOT_FOUND
    assert refusal(lambda: evaluate(trainer, kit, "nothing"))[0] == Code.INVALID_ARGUMENT
    gone = kit.VERSION.replace("ab", "cd")
    assert refusal(lambda: evaluate(trainer, kit, "models/tiny", dataset_version=gone))[0] == Code.NOT_FOUND
    evaluations = trainer.evaluations()
    attempt = worker.acquire(5).attempt
    evaluations.CancelEvaluation(pb.CancelEvaluationRequest(name=made.name))
    assert worker.beat(attempt).order == worker_pb.WORKER_ORDER_CANCEL
    assert worker.finish(attempt, cancelled={}) == job_pb.JOB_STATE_CANCELLED
    watched = evaluations.WatchEvaluation(pb.WatchEvaluationRequest(name=made.name), timeout=20)
    assert [each.evaluation.state for each in watched] == [job_pb.JOB_STATE_CANCELLED]


def test_a_jobs_evaluations_are_queued_with_its_success_and_survive_a_kill(
    trainer: Trainer, worker: Worker, kit: Kit
) -> None:
    planned = [{"split": "test"}, {"split": "validation"}]
    version = publish(trainer, worker, kit, evaluations=planned)
    (job,) = trainer.jobs().ListTrainingJobs(kit.jobs_pb.ListTrainingJobsRequest()).training_jobs
    assert len(job.evaluations) == 2
    trainer.kill()
    trainer.start()
    found = [get(trainer, name) for name in job.evaluations]
    assert [(each.spec.split, each.spec.subject, each.answered_by_digest) for each in found] == [
        ("test", version.name, version.digest), ("validation", version.name, version.digest),
    ]  # fmt: skip
    used = adapters_pb.DeleteAdapterVersionRequest(name=version.name)
    trainer.adapters().DeleteAlias(adapters_pb.DeleteAliasRequest(adapter="adapters/digits", alias="production"))
    refused = refusal(lambda: trainer.adapters().DeleteAdapterVersion(used))
    assert refused == (Code.FAILED_PRECONDITION, "VERSION_IN_USE")
    for _ in found:
        run(worker, 0.5)
    listed = trainer.evaluations().ListEvaluations(pb.ListEvaluationsRequest(subject=version.name)).evaluations
    assert {each.state for each in listed} == {job_pb.JOB_STATE_SUCCEEDED}
    failing = kit.create(trainer.jobs(), "fails", evaluations=planned).name
    worker.finish(worker.acquire(5).attempt, failed=job_pb.Failure(reason="BROKEN", message="x"))
    assert not kit.get(trainer.jobs(), failing).evaluations
    assert len(trainer.evaluations().ListEvaluations(pb.ListEvaluationsRequest()).evaluations) == 2


def test_a_gate_holds_figures_against_numbers_and_production(trainer: Trainer, worker: Worker, kit: Kit) -> None:
    first, second = publish(trainer, worker, kit, 1), publish(trainer, worker, kit, 2)
    adapters = trainer.adapters()

    def promote(condition: str) -> Answer:
        request = adapters_pb.PromoteAdapterVersionRequest(name=second.name, condition=condition)
        return adapters.PromoteAdapterVersion(request)

    def production() -> int:
        return int(adapters.GetAdapter(adapters_pb.GetAdapterRequest(name="adapters/digits")).aliases["production"])

    def closed(condition: str) -> str:
        """A promotion is refused, in words, and nothing moves."""
        moves = adapters.ListAliasMoves(adapters_pb.ListAliasMovesRequest(parent="adapters/digits"))
        with pytest.raises(grpc.RpcError) as caught:
            promote(condition)
        assert caught.value.code() == Code.FAILED_PRECONDITION
        assert production() == 1
        assert moves == adapters.ListAliasMoves(adapters_pb.ListAliasMovesRequest(parent="adapters/digits"))
        return str(caught.value.details())

    evaluate(trainer, kit, second.name)
    attempt = worker.acquire(10).attempt  # it never ends well: its figures count for nothing
    put(worker, attempt, samples(2, 2), 0.99)
    worker.finish(attempt, failed=job_pb.Failure(reason="BROKEN", message="x"))
    assert "no succeeded evaluation has exact_match" in closed("exact_match >= 0.5")
    evaluate(trainer, kit, second.name, split="validation")
    run(worker, 0.99)
    assert "production has no exact_match on the same rows" in closed("exact_match >= production")
    evaluate(trainer, kit, first.name)
    run(worker, 0.6)
    assert "production has no exact_match on the same rows" in closed("exact_match >= production")  # other rows
    for figure in (0.3, 0.8):  # the newest counts
        evaluate(trainer, kit, second.name)
        run(worker, figure)
    both = "exact_match >= 0.9 and exact_match >= production"
    assert "exact_match is 0.8, which is not >= 0.9" in closed(both)
    assert "exact_match is 0.8, which is not < production (0.6)" in closed(
        "exact_match >= 0.5 and exact_match < production"
    )
    assert "no succeeded evaluation has cer" in closed("exact_match >= 0.5 and cer <= 0.1")
    assert promote("exact_match >= 0.75 and exact_match > production").aliases["production"] == 2


def test_verdicts_of_people_are_kept(trainer: Trainer, worker: Worker, kit: Kit) -> None:
    version = publish(trainer, worker, kit)
    made = evaluate(trainer, kit, version.name)
    run(worker, 0.5)
    evaluations = trainer.evaluations()

    def judge(**values: Message) -> Answer:
        said = evaluation_pb2.Judgement(**{"subject": version.name, "score": 1.0} | values)
        return evaluations.CreateJudgement(pb.CreateJudgementRequest(judgement=said))

    verdict = judge(evaluation=made.name, sample_index=1, other_subject="models/tiny", comment="clearer")
    assert (verdict.judge, bool(verdict.uid)) == ("acme", True)
    assert refusal(lambda: judge(evaluation=made.name, sample_index=9)) == (Code.NOT_FOUND, "SAMPLE_UNKNOWN")
    assert refusal(lambda: judge(score=2.0))[0] == Code.INVALID_ARGUMENT
    assert refusal(lambda: judge(subject="adapters/digits/versions/9"))[0] == Code.NOT_FOUND
    assert list(evaluations.ListJudgements(pb.ListJudgementsRequest(subject="models/tiny")).judgements) == [verdict]


def test_a_models_small_files_count_tokens_elsewhere(
    trainer: Trainer, worker: Worker, kit: Kit, base_digest: str, tmp_path: Path
) -> None:
    models = trainer.models()
    (model,) = models.ListModels(models_pb.ListModelsRequest()).models
    assert models.GetModel(models_pb.GetModelRequest(name="models/tiny")) == model
    assert (model.digest, model.contract.model_digest) == (base_digest, base_digest)
    assert model.parameter_count > 1_000_000
    assert model.context_length > 0
    assert {group.group for group in model.linear_groups} == {"decoder", "merger", "vision"}
    assert "q_proj" in model.linear_groups[0].target_modules
    assert not model.workers
    contents: dict[str, bytes] = {}
    for piece in models.DownloadModelFiles(models_pb.DownloadModelFilesRequest(name="models/tiny"), timeout=20):
        assert piece.offset_bytes == len(contents.get(piece.file.path, b""))
        contents[piece.file.path] = contents.get(piece.file.path, b"") + piece.data
    assert {file.path: file.digest for file in model.files} == {
        path: hashlib.sha256(data).hexdigest() for path, data in contents.items()
    }
    for path, data in contents.items():
        (tmp_path / path).write_bytes(data)
    assert Processor.load(tmp_path, model.digest).contract.tokenizer_digest == model.contract.tokenizer_digest
    unknown = models_pb.DownloadModelFilesRequest(name="models/tiny", paths=["model.safetensors"])
    assert refusal(lambda: list(models.DownloadModelFiles(unknown))) == (Code.NOT_FOUND, "FILE_UNKNOWN")
    assert refusal(lambda: worker.acquire()) == (Code.NOT_FOUND, "NO_WORK")
    assert list(models.GetModel(models_pb.GetModelRequest(name="models/tiny")).workers) == ["w1"]
