"""An evaluation under a lease: every row of a split is asked, and what comes back is scored and stored in order."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack
from functools import partial

import grpc
import structlog

from veneer.dataset.v1 import dataset_service_pb2_grpc
from veneer.trainer.v1 import evaluation_pb2, worker_service_pb2, worker_service_pb2_grpc
from veneer_processing import Conversation, Message, Processor, Text
from veneer_rpc import errors
from veneer_rpc.status import from_rpc_error
from veneer_rpc.threads import in_thread
from veneer_trainer.domain.evaluations import METRICS
from veneer_trainer.worker import metrics
from veneer_trainer.worker.answers import Answers
from veneer_trainer.worker.attempt import Abandoned, Attempt, Order, failure
from veneer_trainer.worker.connections import open_channel
from veneer_trainer.worker.questions import Question, read_questions
from veneer_trainer.worker.refusal import Refused
from veneer_trainer.worker.settings import WorkerSettings

_pb = worker_service_pb2
_log = structlog.get_logger(__name__)
_IN_FLIGHT = 16  # questions that replicas have at once
_AT_ONCE = 20  # samples in one PutSamples; the contract allows 100
_LONGEST_ANSWER = 8192
_AGAIN_S, _LONGEST_AGAIN_S = 0.2, 5.0

Outcome = dict[str, object]


class EvaluationWork:
    """One attempt at an evaluation.

    Args:
        settings: the process's.
        service: the trainer.
        attempt: the lease.
        lease: what it is about.
    """

    def __init__(
        self,
        settings: WorkerSettings,
        service: worker_service_pb2_grpc.WorkerServiceAsyncStub,
        attempt: Attempt,
        lease: _pb.Lease,
    ) -> None:
        self._settings = settings
        self._service = service
        self._attempt = attempt
        self._evaluation = lease.evaluation
        self._spec = lease.evaluation.spec
        self._tally = metrics.Tally()

    async def run(self) -> Outcome | None:
        """Asks; returns the outcome to tell the trainer.

        Raises:
            Abandoned: the attempt is not ours any more.
            VeneerError: the trainer refuses samples.
        """
        asking = asyncio.ensure_future(self._ask())
        ordered = asyncio.ensure_future(self._attempt.ordered.wait())
        try:
            if self._attempt.order is Order.CONTINUE:
                await asyncio.wait([asking, ordered], return_when=asyncio.FIRST_COMPLETED)
            if asking.done():
                asking.result()
                await self._attempt.heard()
                return {"succeeded": _pb.AttemptSucceeded()}
            match self._attempt.order:
                case Order.ABANDON:
                    raise Abandoned(self._attempt.ref.work)
                case Order.CANCEL:
                    return {"cancelled": _pb.AttemptCancelled()}
                case _:
                    return {"released": _pb.AttemptReleased()}
        except Refused as refused:
            return {"failed": failure(refused.reason, refused.message, transient=refused.transient)}
        finally:
            for task in (asking, ordered):
                task.cancel()
            await asyncio.gather(asking, ordered, return_exceptions=True)

    async def _ask(self) -> None:
        if unknown := [name for name in self._spec.metrics if name not in METRICS]:
            raise Refused("METRIC_UNSUPPORTED", f"this worker knows {', '.join(METRICS)}, not {unknown[0]}")
        async with AsyncExitStack() as stack:
            certificates = self._settings.certificates_file
            dataset = dataset_service_pb2_grpc.DatasetServiceStub(
                await stack.enter_async_context(open_channel(self._settings.dataset, certificates))
            )
            replicas = [
                await stack.enter_async_context(open_channel(address, certificates))
                for address in self._settings.replicas
            ]

            def read(start: int, *, with_pictures: bool) -> AsyncIterator[Question]:
                return read_questions(
                    dataset, lambda: self._attempt.delegation, self._spec, start, with_pictures=with_pictures
                )

            texts = self._patiently(partial(read, with_pictures=False), 0)
            expected = [question.expected async for question in texts]
            if not expected:
                raise Refused("NO_ROWS", f"split {self._spec.split} of {self._spec.dataset_version} has no rows")
            answers = Answers(
                replicas,
                lambda: self._attempt.delegation,
                self._spec.subject,
                self._evaluation.answered_by_digest,
                self._spec.max_tokens or await in_thread(self._longest, expected),
                self._settings.inference_patience_s,
            )
            wanted = self._wanted(expected)
            start = await self._count_stored(wanted)
            source = self._patiently(partial(read, with_pictures=True), start)
            await self._answer_all(source, answers, start, len(expected), wanted)

    async def _count_stored(self, wanted: list[str]) -> int:
        """Counts in what attempts before this one were answered; returns how many that are."""
        start = 0
        while start < self._evaluation.answered_samples:
            request = _pb.GetSamplesRequest(attempt=self._attempt.ref, start_index=start)
            found = await self._attempt.call(lambda request=request, **how: self._service.GetSamples(request, **how))
            for sample in found.samples:
                self._tally.add(metrics.scores(sample.expected, sample.answer, wanted))
            start += len(found.samples)
            if not found.samples:
                raise Refused("SAMPLES_MISSING", f"of {self._evaluation.answered_samples} samples {start} are stored")
        return start

    def _wanted(self, expected: list[str]) -> list[str]:
        """The metrics to compute: those named, else those that the expected answers lend themselves to."""
        if self._spec.metrics:
            return list(self._spec.metrics)
        has_fields = any(metrics.fields_of(text) for text in expected)
        return [metrics.EXACT, metrics.FIELDS] if has_fields else [metrics.EXACT]

    async def _answer_all(
        self, source: AsyncIterator[Question], answers: Answers, start: int, total: int, wanted: list[str]
    ) -> None:
        """Keeps questions in flight, and stores samples in the order of their questions: a prefix is always whole."""
        running: deque[asyncio.Task[evaluation_pb2.Sample]] = deque()
        done: list[evaluation_pb2.Sample] = []
        free = asyncio.Semaphore(_IN_FLIGHT)
        stored = start

        async def ask(question: Question) -> evaluation_pb2.Sample:
            async with free:
                return await answers.sample(question)

        async def store(least: int) -> None:
            nonlocal stored
            while running and (running[0].done() or len(running) >= least):
                sample = await running.popleft()
                found = metrics.scores(sample.expected, sample.answer, wanted)
                sample.metrics.extend(metrics.sample_figures(found, wanted))
                self._tally.add(found)
                done.append(sample)
                if len(done) >= _AT_ONCE or (not running and least == 1):
                    await self._put(done, total)
                    stored += len(done)
                    done.clear()
                    self._attempt.share_done(stored / total)

        try:
            async with asyncio.TaskGroup() as group:
                async for question in source:
                    running.append(group.create_task(ask(question)))
                    await store(2 * _IN_FLIGHT)
                await store(1)
        except ExceptionGroup as failed:
            raise failed.exceptions[0] from failed
        if stored != total:
            raise Refused("ROWS_MISSING", f"{total} rows were announced, {stored} came", transient=True)

    async def _put(self, samples: list[evaluation_pb2.Sample], total: int) -> None:
        request = _pb.PutSamplesRequest(
            attempt=self._attempt.ref, samples=samples, metrics=self._tally.metrics(), total_samples=total
        )
        await self._attempt.call(lambda **how: self._service.PutSamples(request, **how))

    async def _patiently(self, read: Callable[[int], AsyncIterator[Question]], start: int) -> AsyncIterator[Question]:
        """Reads questions on through absences of the dataset service."""
        until_s, again_s = time.monotonic() + self._settings.dataset_patience_s, _AGAIN_S
        while True:
            try:
                async for question in read(start):
                    yield question
                    start += 1
                    until_s, again_s = time.monotonic() + self._settings.dataset_patience_s, _AGAIN_S
                return
            except grpc.RpcError as error:
                problem = from_rpc_error(error)
                if isinstance(problem, errors.OutOfRange | errors.NotFound | errors.InvalidArgument):
                    raise Refused(problem.reason, f"the dataset service refuses: {problem.message}") from error
                if time.monotonic() > until_s:
                    text = f"the dataset service does not answer: {problem.message}"
                    raise Refused("DATASET_UNAVAILABLE", text, transient=True) from error
                _log.warning("dataset service away", reason=problem.reason, problem=problem.message)
            await asyncio.sleep(again_s)
            again_s = min(2 * again_s, _LONGEST_AGAIN_S)

    def _longest(self, expected: list[str]) -> int:
        """Tokens of the longest expected answer and a quarter more, by the tokenizers of the bases held here."""
        conversations = [
            Conversation((Message("user", (Text("?"),)), Message("assistant", (Text(text),)))) for text in expected
        ]
        processors = [Processor.load(path, "") for path in self._settings.model_directories.values()]
        longest = max(count.supervised for each in processors for count in each.count(conversations))
        return min(longest + longest // 4 + 1, _LONGEST_ANSWER)
