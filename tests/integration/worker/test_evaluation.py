"""An evaluation by a real worker on a real dataset service; trainer and replica are stand-ins on a real socket."""

import json
import queue
import threading
from collections.abc import Iterator
from concurrent import futures
from typing import Any

import grpc
import pytest

from veneer.inference.v1 import inference_pb2, inference_service_pb2, inference_service_pb2_grpc
from veneer.trainer.v1 import evaluation_pb2, training_job_pb2, worker_service_pb2, worker_service_pb2_grpc
from veneer_rpc.delegation import DelegationSigner, DelegationVerifier
from veneer_trainer.domain.evaluations import METRICS

from .conftest import Cluster, Process, Start, push, until

pytestmark = pytest.mark.timeout(300)
Message = Answer = Any  # of generated code
SUBJECT, DIGEST = "adapters/numbers/versions/3", "cd" * 32
ROWS = 25


class Trainer(worker_service_pb2_grpc.WorkerServiceServicer):
    """Hands out what a test puts in, and keeps what comes."""

    def __init__(self) -> None:
        self.leases: queue.Queue[worker_service_pb2.Lease] = queue.Queue()
        self.orders: dict[str, int] = {}
        self.samples: dict[str, dict[int, evaluation_pb2.Sample]] = {}
        self.metrics: dict[str, dict[str, evaluation_pb2.Metric]] = {}
        self.sizes: list[int] = []
        self.finished: dict[str, worker_service_pb2.FinishAttemptRequest] = {}
        self.share_done = 0.0

    def AcquireLease(self, request: Message, context: grpc.ServicerContext) -> Answer:
        while context.is_active():
            try:
                return self.leases.get(timeout=0.05)
            except queue.Empty:
                continue
        return worker_service_pb2.Lease()

    def Heartbeat(self, requests: Iterator[Message], context: grpc.ServicerContext) -> Iterator[Answer]:
        for request in requests:
            self.share_done = max(self.share_done, request.share_done)
            yield worker_service_pb2.HeartbeatResponse(order=self.orders.get(request.attempt.work, 1))  # type: ignore[arg-type]  # an enum's number

    def PutSamples(self, request: Message, context: grpc.ServicerContext) -> Answer:
        kept = self.samples.setdefault(request.attempt.work, {})
        kept |= {sample.index: sample for sample in request.samples}
        self.sizes.append(len(request.samples))
        self.metrics[request.attempt.work] = {metric.metric: metric for metric in request.metrics}
        return worker_service_pb2.PutSamplesResponse(stored_samples=len(kept))

    def GetSamples(self, request: Message, context: grpc.ServicerContext) -> Answer:
        kept = self.samples.get(request.attempt.work, {})
        found = [sample for index, sample in sorted(kept.items()) if index >= request.start_index]
        return worker_service_pb2.GetSamplesResponse(samples=found[:20])

    def FinishAttempt(self, request: Message, context: grpc.ServicerContext) -> Answer:
        self.finished[request.attempt.work] = request
        return worker_service_pb2.FinishAttemptResponse(state=training_job_pb2.JOB_STATE_SUCCEEDED)


class Replica(inference_service_pb2_grpc.InferenceServiceServicer):
    """Doubles even numbers rightly; is away for the first three calls; counts what it does at once."""

    def __init__(self, verifier: DelegationVerifier) -> None:
        self.verifier = verifier
        self.served = inference_pb2.ServedBy(adapter_version=SUBJECT, adapter_digest=DIGEST, model="models/tiny")
        self.requests: list[inference_service_pb2.GenerateRequest] = []
        self.hold = threading.Event()
        self.hold.set()
        self._away = 3
        self._lock = threading.Lock()

    def Generate(self, request: Message, context: grpc.ServicerContext) -> Answer:
        credential = dict(context.invocation_metadata())["authorization"].removeprefix("Bearer ")
        assert self.verifier.verify(str(credential)).tenant == "acme"
        with self._lock:
            self.requests.append(request)
            self._away -= 1
            if self._away >= 0:
                context.abort(grpc.StatusCode.UNAVAILABLE, "starting")
        self.hold.wait(60)
        number = int(request.prompt.messages[-1].parts[-1].text.split()[-1])
        if number == 7:
            context.abort(grpc.StatusCode.INVALID_ARGUMENT, "seven is too much")
        doubled = 2 * number if number % 2 == 0 else 0
        text = json.dumps({"double": doubled, "number": number})
        return inference_service_pb2.GenerateResponse(text=text, served_by=self.served)


class Stage:
    def __init__(self, cluster: Cluster) -> None:
        rows = [
            {"image": f"{n % 5}.png", "prompt": f"Double {n}", "text": json.dumps({"number": n, "double": 2 * n})}
            for n in range(ROWS)
        ]
        self.version = push(cluster.datasets(), "doubles", {"test.jsonl": rows})
        self.signer = DelegationSigner((cluster.folder / "delegation.pem").read_bytes())
        self.trainer = Trainer()
        self.replica = Replica(DelegationVerifier("inference", [(cluster.folder / "public.pem").read_bytes()]))
        self.server = grpc.server(futures.ThreadPoolExecutor(40))
        worker_service_pb2_grpc.add_WorkerServiceServicer_to_server(self.trainer, self.server)
        inference_service_pb2_grpc.add_InferenceServiceServicer_to_server(self.replica, self.server)
        self.address = f"127.0.0.1:{self.server.add_insecure_port('127.0.0.1:0')}"
        self.server.start()

    def lease(self, name: str, stored: int = 0, **spec: Message) -> str:
        work = f"evaluations/{name}"
        chosen = {"subject": SUBJECT, "dataset_version": self.version, "split": "test"} | spec
        lease = worker_service_pb2.Lease(
            attempt=worker_service_pb2.AttemptRef(work=work, fencing_token=1),
            evaluation=evaluation_pb2.Evaluation(
                name=work,
                spec=evaluation_pb2.EvaluationSpec(**chosen),
                answered_by_digest=DIGEST,
                answered_samples=stored,
            ),
            delegation=self.signer.sign("w", "acme", ["dataset", "inference"], ["user"]),
            tenant="acme",
        )
        lease.lease_duration.FromSeconds(2)
        lease.heartbeat_interval.FromMilliseconds(200)
        self.trainer.leases.put(lease)
        return work

    def finished(self, work: str) -> Answer:
        return until(lambda: self.trainer.finished.get(work))


@pytest.fixture(scope="module")
def stage(cluster: Cluster, start_process: Start) -> Iterator[Stage]:
    made = Stage(cluster)
    flags = {
        "--data": str(cluster.folder / "evaluator"), "--name": "evaluator", "--models": f"tiny={cluster.base}",
        "--trainer": made.address, "--token-file": str(cluster.folder / "worker.token"),
        "--dataset": cluster.dataset, "--inference": f"{made.address},{made.address}", "--kinds": "evaluation",
        "--die-with-parent": "true",
    }  # fmt: skip
    log = cluster.folder / "evaluator.log"
    worker = Process(start_process, "veneer_trainer.worker", flags, "veneer_worker evaluator ready", log)
    yield made
    worker.close()
    assert worker.wait() == 0, log.read_text()[-2000:]
    made.server.stop(0).wait()


def test_every_row_is_asked_and_scored(stage: Stage) -> None:
    work = stage.lease("all")
    assert stage.finished(work).WhichOneof("outcome") == "succeeded"
    samples = stage.trainer.samples[work]
    assert list(samples) == list(range(ROWS))
    assert max(stage.trainer.sizes) <= 100
    assert stage.trainer.share_done > 0
    for sample in samples.values():
        number = json.loads(sample.expected)["number"]
        assert sample.prompt == f"Double {number}"
        assert len(sample.picture_blobs) == 1
        if number == 7:
            assert (sample.failure.message, sample.answer) == ("seven is too much", "")
        else:
            assert json.loads(sample.answer)["number"] == number
        (exact, fields) = sample.metrics
        right = number % 2 == 0
        assert (exact.metric, exact.value, fields.metric) == ("exact_match", 0.0, "field_match")
        assert fields.value == (1.0 if right else 0.0 if number == 7 else 0.5)
    metrics = stage.trainer.metrics[work]
    assert (metrics["field_match"].count, metrics["field_match"].value) == (50, (24 + 13) / 50)
    assert (metrics["field_match/double"].count, metrics["field_match/double"].value) == (25, 13 / 25)
    assert 0 <= metrics["exact_match"].low <= metrics["exact_match"].value <= metrics["exact_match"].high <= 1
    request = stage.replica.requests[-1]
    assert request.model == SUBJECT
    assert request.sampling.temperature == 0
    assert 8 < request.sampling.max_tokens < 64  # the longest expected answer and a quarter more
    assert [message.role for message in request.prompt.messages] == [2]
    assert request.prompt.messages[0].parts[0].picture.data.startswith(b"\x89PNG")


def test_a_resumed_evaluation_asks_the_rest_and_keeps_the_figures(stage: Stage) -> None:
    first = stage.lease("broken", max_samples=20)
    stage.finished(first)
    asked = len(stage.replica.requests)
    stage.trainer.samples["evaluations/resumed"] = dict(stage.trainer.samples[first])
    rest = stage.lease("resumed", stored=20)
    assert stage.finished(rest).WhichOneof("outcome") == "succeeded"
    assert list(stage.trainer.samples[rest]) == list(range(ROWS))
    assert len(stage.replica.requests) - asked == 5
    whole = stage.lease("whole")
    assert stage.finished(whole).WhichOneof("outcome") == "succeeded"
    assert stage.trainer.metrics[rest] == stage.trainer.metrics[whole]  # intervals included
    assert stage.trainer.metrics[rest]["field_match"].count == 50


def test_an_answer_of_another_version_ends_it(stage: Stage) -> None:
    stage.replica.served.adapter_digest = "ef" * 32
    failed = stage.finished(stage.lease("wrong", max_samples=3)).failed
    stage.replica.served.adapter_digest = DIGEST
    assert failed.reason == "ANOTHER_ANSWERED"
    assert "ef" * 32 in failed.message
    assert "evaluations/wrong" not in stage.trainer.samples


def test_a_cancel_is_obeyed_while_replicas_think(stage: Stage) -> None:
    stage.replica.hold.clear()
    work = stage.lease("cancelled")
    asked = len(stage.replica.requests)
    until(lambda: len(stage.replica.requests) >= asked + 16)
    stage.trainer.orders[work] = worker_service_pb2.WORKER_ORDER_CANCEL
    assert stage.finished(work).WhichOneof("outcome") == "cancelled"
    assert len(stage.replica.requests) == asked + 16  # so many at once, no more
    stage.replica.hold.set()


def test_every_metric_is_computed_when_it_is_asked_for(stage: Stage) -> None:
    work = stage.lease("metrics", metrics=METRICS)
    assert stage.finished(work).WhichOneof("outcome") == "succeeded"
    metrics = stage.trainer.metrics[work]
    assert set(METRICS) < set(metrics)
    assert [metric.metric for metric in stage.trainer.samples[work][0].metrics] == list(METRICS)
    assert metrics["field_f1"].value == pytest.approx((24 + 13) / (50 + 48) * 2)  # no fields came of the seventh
    assert all(metrics[name].low < metrics[name].value < metrics[name].high for name in ("cer", "anls", "rouge_l"))


def test_a_metric_that_nobody_knows_and_a_split_that_is_not_there_are_refused(stage: Stage) -> None:
    failed = stage.finished(stage.lease("split", split="gone")).failed
    assert (failed.reason, failed.transient) == ("SPLIT_NOT_FOUND", False)
    failed = stage.finished(stage.lease("bleu", metrics=["bleu"])).failed
    assert failed.reason == "METRIC_UNSUPPORTED"
