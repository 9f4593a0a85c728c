"""A canary over real connections: what replicas and people say of it, and how its share is taken back."""

import itertools
import time
from collections.abc import Callable
from typing import Any

import grpc
import pytest

from veneer.trainer.v1 import adapter_pb2, evaluation_pb2, evaluation_service_pb2
from veneer.trainer.v1 import adapter_service_pb2 as pb
from veneer.trainer.v1 import training_job_pb2 as job_pb

# What the conftest makes; a conftest cannot be imported.
Trainer = Worker = Kit = Make = Message = Answer = Any
FOLLOWS_WITHIN_S = 5.0
NAME = "adapters/digits"


class Stage:
    """Versions 1 (production), 2 (canary, a tenth of the requests) and 3, and a replica that reports."""

    def __init__(self, trainer: Trainer, worker: Worker, kit: Kit, **bounds: float) -> None:
        self.trainer = trainer
        self.adapters, self.replica = trainer.adapters(), trainer.adapters(trainer.keys.replica)
        self.versions = []
        for seed in (1, 2, 3):
            kit.create(trainer.jobs())
            attempt = worker.acquire(10).attempt
            self.versions.append(worker.publish(attempt, kit.peft_folder(seed)))
            assert worker.finish(attempt) == job_pb.JOB_STATE_SUCCEEDED
        self.promote(2)
        self.split(0.1, **bounds)

    def promote(self, number: int, alias: str = "canary") -> None:
        request = pb.PromoteAdapterVersionRequest(name=f"{NAME}/versions/{number}", alias=alias)
        self.adapters.PromoteAdapterVersion(request)

    def split(self, share: float, **bounds: float) -> None:
        policy = adapter_pb2.RollbackPolicy(**{"min_answers": 10, **bounds})  # type: ignore[arg-type]  # min_answers is no float
        split = adapter_pb2.TrafficSplit(alias="canary", share=share, rollback=policy)
        adapter = adapter_pb2.Adapter(name=NAME, traffic_split=split)
        self.adapters.UpdateAdapter(pb.UpdateAdapterRequest(adapter=adapter, update_mask={"paths": ["traffic_split"]}))

    def report(self, number: int, answered: int, failed: int = 0, p95_ms: float = 100.0, tenant: str = "acme") -> None:
        served = pb.ServedAdapter(
            adapter_version=f"{NAME}/versions/{number}", digest=self.versions[number - 1].digest, answered=answered,
            failed=failed, latency_p95_ms=p95_ms, tenant=tenant,
        )  # fmt: skip
        request = pb.ReportServingRequest(replica="r1", address="127.0.0.1:1", model="models/tiny")
        request.served_adapters.append(served)
        self.replica.ReportServing(request)

    @property
    def adapter(self) -> Answer:
        return self.adapters.GetAdapter(pb.GetAdapterRequest(name=NAME))

    @property
    def is_split(self) -> bool:
        return bool(self.adapter.HasField("traffic_split"))

    @property
    def moves(self) -> list[adapter_pb2.AliasMove]:
        return list(self.adapters.ListAliasMoves(pb.ListAliasMovesRequest(parent=NAME)).alias_moves)


@pytest.fixture
def make_stage(make_trainer: Make, kit: Kit, base_digest: str) -> Callable[..., Stage]:
    def make(**bounds: float) -> Stage:
        trainer = make_trainer(lease_s="60")
        trainer.start()
        return Stage(trainer, kit.Worker(trainer.worker_stub(), base_digest), kit, **bounds)

    return make


def test_a_canary_that_fails_too_often_is_rolled_back_and_watchers_hear_within_5_s(
    make_stage: Callable[..., Stage],
) -> None:
    stage = make_stage(max_error_rate=0.2)
    watched = stage.replica.WatchAdapters(pb.WatchAdaptersRequest(), timeout=30)
    assert next(watched).adapters[0].traffic_split.share == pytest.approx(0.1)
    stage.report(1, 0, 50)  # production's own failures are no canary's
    stage.report(2, 7, 2)
    stage.report(2, 0, 9, tenant="other")  # another tenant's adapter of the same name
    assert stage.is_split
    failed_s = time.monotonic()
    stage.report(2, 0, 1)
    change = next(each for each in watched if not each.adapters[0].HasField("traffic_split"))
    assert time.monotonic() - failed_s < FOLLOWS_WITHIN_S
    digests = {alias.alias: alias.digest for alias in change.adapters[0].aliases}
    assert digests["canary"] == digests["production"] == stage.versions[0].digest
    move = stage.moves[0]
    assert (move.alias, move.from_version, move.to_version, move.actor) == ("canary", 2, 1, "rollback policy")
    assert move.reason == "30.0% of 10 requests failed, bound 20.0%"
    assert [(each.alias, each.from_version, each.to_version, each.reason) for each in stage.moves[1:3]] == [
        ("canary", 2, 2, "takes 10 % of the requests"), ("canary", 0, 2, ""),
    ]  # fmt: skip
    stage.report(2, 0, 100)  # what still comes in of it changes nothing more
    assert stage.moves[0] == move
    stage.split(0.1, max_error_rate=0.2)  # of the version that is production's too: there is nothing to go back to
    stage.report(1, 0, 100)
    assert stage.is_split


def test_latency_is_held_against_productions_own(make_stage: Callable[..., Stage]) -> None:
    stage = make_stage(max_latency_ratio=2.0)
    stage.report(2, 50, p95_ms=900.0)
    assert stage.is_split  # nothing to compare with yet
    stage.report(1, 50, p95_ms=500.0)
    assert stage.is_split
    stage.report(2, 50, p95_ms=1300.0)
    assert not stage.is_split
    assert "1100 ms is 2.20 times production's 500 ms" in stage.moves[0].reason


def test_peoples_judgements_roll_back(make_stage: Callable[..., Stage]) -> None:
    stage = make_stage(min_judgement=0.6, min_answers=4)
    evaluations = stage.trainer.evaluations()
    mine, theirs = (version.name for version in stage.versions[1::-1])

    def judge(**said: Message) -> None:
        judgement = evaluation_pb2.Judgement(**said)
        evaluations.CreateJudgement(evaluation_service_pb2.CreateJudgementRequest(judgement=judgement))

    judge(subject=mine, score=1.0)
    judge(subject=mine, score=0.5)
    judge(subject=theirs, score=0.0)  # of production
    judge(subject="models/tiny", score=0.0)
    judge(subject=theirs, other_subject=mine, score=1.0)  # production answers better
    assert stage.is_split
    judge(subject=mine, score=0.0)
    assert not stage.is_split
    assert "people judged 4 answers 0.38" in stage.moves[0].reason


def test_counts_outlast_a_kill_and_begin_anew_with_another_canary(make_stage: Callable[..., Stage]) -> None:
    stage = make_stage(max_error_rate=0.2)
    stage.report(2, 0, 9)
    stage.promote(3)
    stage.promote(2)
    stage.report(2, 1, 8)  # nine again
    assert stage.is_split
    stage.split(0.5, max_error_rate=0.2)
    stage.report(2, 1, 8)
    assert stage.is_split
    stage.trainer.kill()
    stage.trainer.start()
    stage.report(2, 1)
    assert not stage.is_split


def test_without_a_policy_nothing_moves_by_itself_and_wrong_figures_are_refused(
    make_stage: Callable[..., Stage],
) -> None:
    stage = make_stage()
    for _ in itertools.repeat(None, 3):
        stage.report(2, 0, 1000)
    assert stage.is_split
    for wrong in ({"answered": -1}, {"answered": 1, "p95_ms": float("nan")}):
        with pytest.raises(grpc.RpcError) as caught:
            stage.report(2, **wrong)
        assert caught.value.code() == grpc.StatusCode.INVALID_ARGUMENT
