"""The jobs of one process: each a run of its own, and in passes together while there are several."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from queue import SimpleQueue

import structlog
import torch

from veneer.trainer.v1 import training_job_pb2
from veneer_trainer.worker.failures import failure_of
from veneer_trainer.worker.loop.common import Common
from veneer_trainer.worker.loop.learner import Turn, learn_together
from veneer_trainer.worker.loop.link import JobLink, Link
from veneer_trainer.worker.loop.ranks import ALONE, Ranks
from veneer_trainer.worker.loop.run import train
from veneer_trainer.worker.messages import Shared, Task

_log = structlog.get_logger(__name__)


def train_together(link: Link, ranks: Ranks = ALONE) -> None:
    """Trains the jobs that come over the link, from step to step those that are ready, until the worker ends us.

    Several ranks train one job.
    """
    if isinstance(link.task, Task):
        torch.set_num_threads(link.task.threads)
    ready: SimpleQueue[_Run] = SimpleQueue()
    threading.Thread(target=_prepare, args=(link, ready, ranks), name="jobs", daemon=True).start()
    runs: list[_Run] = []
    while True:
        while not runs or not ready.empty():
            runs.append(ready.get())
            runs = [run for run in runs if run.turn is not None]
        problems = _learn([run.turn for run in runs if run.turn is not None])
        if len(runs) > 1:
            names = {run.name for run in runs}
            for run in runs:
                run.shared_with(names)
        for run, problem in zip(runs, problems, strict=True):
            run.go_on(problem)
        runs = [run for run in runs if run.turn is not None]


class _Run:
    """A job on its way from step to step.

    Attributes:
        name: of the job.
        turn: its part of the next step; None once it is over.
    """

    def __init__(self, link: JobLink, common: Common) -> None:
        self._link = link
        self._steps = train(link, common)
        self._shared: set[str] = set()
        self.name = training_job_pb2.TrainingJob.FromString(link.task.job).name
        self.turn: Turn | None = None
        self.go_on()

    def go_on(self, problem: Exception | None = None) -> None:
        """Has it do all that lies between two steps; what it raises ends it alone."""
        try:
            self.turn = self._steps.send(problem) if self.turn else next(self._steps)
            if self._link.left.is_set():
                self._steps.close()
                self.turn = None
        except StopIteration:
            self.turn = None
        except Exception as error:
            self.turn = None
            self._link.send(failure_of(error))

    def shared_with(self, names: set[str]) -> None:
        """Tells the worker whose company is new."""
        if not names <= self._shared:
            self._shared |= names
            self._link.send(Shared(sorted(self._shared)))


def _prepare(link: Link, ready: SimpleQueue[_Run], ranks: Ranks) -> None:
    """Brings jobs to their first step, one after another, while others train."""
    common: Common | None = None
    while True:
        job = link.jobs.get()
        common = common or Common(job.task, ranks)
        ready.put(_Run(job, common))


def _learn(turns: Sequence[Turn]) -> Sequence[Exception | None]:
    """Takes a step of each job; says for each why its adapter was not moved, None where it was."""
    try:
        return learn_together(turns)
    except Exception as error:  # one of them cannot be computed, and none has moved
        if len(turns) == 1:
            return [error]
        _log.warning("jobs go on one by one", problem=f"{type(error).__name__}: {error}")
        return [_alone(turn) for turn in turns]


def _alone(turn: Turn) -> Exception | None:
    turn.learner.forget()
    (problem,) = _learn([turn])
    return problem
