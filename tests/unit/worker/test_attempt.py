"""What an attempt tells the trainer, and what it takes for its end."""

import asyncio
from typing import Any

import pytest

from veneer.trainer.v1 import training_job_pb2, worker_service_pb2
from veneer_rpc.errors import Aborted, NotFound, Unavailable, VeneerError
from veneer_trainer.worker.attempt import Attempt, _lost


class Line:
    """A heartbeat stream that keeps what is sent; figures may come while an answer is waited for."""

    def __init__(self, attempt: Attempt, meanwhile: int = 0) -> None:
        self.attempt, self.meanwhile = attempt, meanwhile
        self.sent: list[worker_service_pb2.HeartbeatRequest] = []

    async def write(self, request: worker_service_pb2.HeartbeatRequest) -> None:
        self.sent.append(request)

    async def read(self) -> worker_service_pb2.HeartbeatResponse:
        if self.meanwhile:
            self.attempt.progress(training_job_pb2.TrainingProgress(step=self.meanwhile))
        return worker_service_pb2.HeartbeatResponse(order=worker_service_pb2.WORKER_ORDER_CONTINUE)


@pytest.fixture
def attempt() -> Attempt:
    service: Any = None  # nothing is called
    return Attempt(service, "token", worker_service_pb2.Lease())


def steps(request: worker_service_pb2.HeartbeatRequest) -> list[int]:
    return [figures.step for figures in (*request.earlier, request.training)]


async def test_each_figure_is_told_once_and_of_too_many_the_newest(attempt: Attempt) -> None:
    for step in range(1, 151):
        attempt.progress(training_job_pb2.TrainingProgress(step=step))
    line: Any = Line(attempt, meanwhile=151)
    await attempt._beat(line)
    line.meanwhile = 0
    await attempt._beat(line)
    await attempt._beat(line)
    assert [steps(request) for request in line.sent] == [list(range(51, 151)), [151], [0]]
    assert attempt.latest is not None
    assert attempt.latest.step == 151


async def test_what_is_told_by_now_is_waited_for_and_nothing_that_comes_later(attempt: Attempt) -> None:
    attempt.progress(training_job_pb2.TrainingProgress(step=1))
    hearing = asyncio.ensure_future(attempt.heard())
    await asyncio.sleep(0.1)
    assert not hearing.done()
    line: Any = Line(attempt, meanwhile=2)
    await attempt._beat(line)
    await asyncio.wait_for(hearing, 10)
    assert [steps(request) for request in line.sent] == [[1]]


@pytest.mark.parametrize(
    ("problem", "is_lost"),
    [
        (Aborted("STALE_TOKEN", ""), True),
        (Aborted("STATE_CHANGED", ""), False),
        (NotFound("WORK_UNKNOWN", ""), True),
        (NotFound("NO_CHECKPOINT", ""), False),
        (NotFound("VERSION_UNKNOWN", ""), False),  # what it starts from is gone: the job fails and says so
        (Unavailable("AWAY", ""), False),
    ],
)
def test_what_means_that_the_work_is_anothers(problem: VeneerError, is_lost: bool) -> None:
    assert _lost(problem) is is_lost
