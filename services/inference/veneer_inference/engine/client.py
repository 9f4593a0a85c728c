"""The engine, seen from the service's event loop: a process of its own behind `ports.Engine`."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import signal
import socket
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Unpack

from veneer_inference.engine import messages
from veneer_inference.engine.options import Choices, EngineOptions
from veneer_inference.ports import (
    AdapterState,
    EngineError,
    EngineInfo,
    EnginePrompt,
    EngineStats,
    Sampling,
    Step,
    TokenScore,
)
from veneer_rpc import forks

READER_STEPS = 512  # that a reader may fall behind
_END_S = 5.0

_Answer = asyncio.Queue[Step | EngineError]
_Pending = asyncio.Future[messages.Done]


class EngineProcess:
    """An engine in a child process; an `ports.Engine`. Made by `start`, and used from one event loop."""

    def __init__(
        self,
        process: forks.Child,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        info: EngineInfo,
        reader_steps: int,
    ) -> None:
        self._process = process
        self._reader = reader
        self._writer = writer
        self._info = info
        self._reader_steps = reader_steps
        self._next_key = 0
        self._answers: dict[int, _Answer] = {}
        self._pending: dict[int, _Pending] = {}
        self._stats = EngineStats()
        self._adapters: tuple[AdapterState, ...] = ()
        self._gone: EngineError | None = None
        self._reading = asyncio.create_task(self._read())

    @classmethod
    async def start(
        cls,
        model_directory: Path,
        threads: int,
        *,
        reader_steps: int = READER_STEPS,
        **choices: Unpack[Choices],
    ) -> EngineProcess:
        """Starts an engine, and returns when it has its base.

        Args:
            model_directory: of the base.
            threads: that torch computes with.
            reader_steps: steps that the reader of an answer may fall behind.
            choices: the rest of `EngineOptions`.

        Raises:
            EngineError: `ENGINE_GONE`, with what the engine said of the base.
        """
        options = EngineOptions(model=str(model_directory), threads=threads, **choices)
        ours, theirs = socket.socketpair()
        with theirs:
            try:
                forks.get_ready("veneer_inference.engine.process", __name__)
                process = await forks.Child.start(_engine, theirs)
            except BaseException:
                ours.close()
                raise
        reader, writer = await asyncio.open_connection(sock=ours)
        try:
            writer.write(messages.frame(messages.Start(options)))
            first = await _next(reader)
            if not isinstance(first, messages.Ready):
                problems = first.problems if isinstance(first, messages.NotStarted) else ["no sign of readiness"]
                raise EngineError("ENGINE_GONE", problems)
        except BaseException as error:
            await _end(process, writer)
            if isinstance(error, asyncio.IncompleteReadError | ConnectionError):
                status = await process.ended()
                raise EngineError(
                    "ENGINE_GONE", [f"the engine ended with status {status} before it was ready"]
                ) from error
            raise
        return cls(process, reader, writer, first.info, reader_steps)

    @property
    def info(self) -> EngineInfo:
        """See ports.Engine."""
        return self._info

    @property
    def pid(self) -> int:
        """Of the process."""
        return self._process.pid

    async def load_adapter(self, digest: str, directory: Path) -> int:
        """See ports.Engine. The folder has `processing_contract.json` beside PEFT's files."""
        done = await self._call(messages.Load(self._key(), digest, str(directory)))
        return done.size_bytes

    async def unload_adapter(self, digest: str) -> None:
        """See ports.Engine. Returns at once; requests that use the adapter still end as they began."""
        await self._call(messages.Unload(self._key(), digest))

    async def generate(
        self, tenant: str, adapter_digest: str, prompt: EnginePrompt, sampling: Sampling
    ) -> AsyncIterator[Step]:
        """See ports.Engine. The request goes out when the first step is asked for."""
        key = self._key()
        answer = self._answers[key] = _Answer(self._reader_steps + 1)
        try:
            await self._send(messages.Generate(key, tenant, adapter_digest, messages.Prompt.of(prompt), sampling))
            while True:
                step = await answer.get()
                if isinstance(step, EngineError):
                    raise step
                if step.finish:
                    self._answers.pop(key, None)
                yield step
                if step.finish:
                    return
        finally:
            self._cancel(key, self._answers)

    async def score(
        self, tenant: str, adapter_digest: str, prompt: EnginePrompt, top_logprobs: int
    ) -> tuple[TokenScore, ...]:
        """See ports.Engine."""
        packed = messages.Prompt.of(prompt)
        done = await self._call(messages.Score(self._key(), tenant, adapter_digest, packed, top_logprobs))
        return done.scores

    def stats(self) -> EngineStats:
        """See ports.Engine."""
        return self._stats

    async def gone(self) -> None:
        """See ports.Engine."""
        await asyncio.wait([self._reading])

    async def close(self) -> None:
        """See ports.Engine."""
        self._fail_all(EngineError("ENGINE_GONE", ["the engine was closed"]))
        await _end(self._process, self._writer)
        await asyncio.wait([self._reading])

    def _key(self) -> int:
        self._next_key += 1
        return self._next_key

    async def _call(self, command: messages.Score | messages.Load | messages.Unload) -> messages.Done:
        pending: _Pending = asyncio.get_running_loop().create_future()
        self._pending[command.key] = pending
        try:
            await self._send(command)
            return await pending
        finally:
            self._cancel(command.key, self._pending)

    async def _send(self, command: messages.Command) -> None:
        if self._gone is not None:
            raise self._gone
        self._writer.write(messages.frame(command))
        try:
            await self._writer.drain()
        except ConnectionError as error:
            raise EngineError("ENGINE_GONE", [f"the engine has gone: {error}"]) from error

    def _cancel(self, key: int, owned: dict[int, _Answer] | dict[int, _Pending]) -> None:
        """Tells the engine that nobody waits for this any more, unless it is over."""
        if owned.pop(key, None) is not None and self._gone is None:
            self._writer.write(messages.frame(messages.Cancel(key)))

    async def _read(self) -> None:
        problem = "it closed its socket"
        try:
            while isinstance(report := await _next(self._reader), messages.Report):
                self._take(report)
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        except Exception as error:  # what cannot be read ends it: no request may wait for ever
            problem = f"its message cannot be read: {error}"
        finally:
            self._fail_all(EngineError("ENGINE_GONE", [f"the engine has gone: {problem}"]))
            await _end(self._process, self._writer)

    def _take(self, report: messages.Report) -> None:
        if report.adapters is not None:
            self._adapters = report.adapters
        stats = report.stats
        self._stats = EngineStats(
            stats.waiting, stats.running, stats.kv_tokens_in_use, stats.steps, self._adapters, stats.counters
        )
        for progress in report.progress:
            answer = self._answers.get(progress.key)
            if answer is None:
                continue  # cancelled, and the engine does not know yet
            if answer.qsize() < self._reader_steps:
                answer.put_nowait(progress.step)
            else:
                self._cancel(progress.key, self._answers)
                problem = f"the reader fell more than {self._reader_steps} steps behind"
                answer.put_nowait(EngineError("READER_TOO_SLOW", [problem]))
        for done in report.done:
            if (pending := self._pending.pop(done.key, None)) and not pending.done():
                pending.set_result(done)
        for failure in report.failures:
            error = EngineError(failure.reason, failure.problems, failure.retry_s)
            self._fail(failure.key, error)

    def _fail(self, key: int, error: EngineError) -> None:
        if answer := self._answers.pop(key, None):
            if answer.full():
                answer.get_nowait()
            answer.put_nowait(error)
        if (pending := self._pending.pop(key, None)) and not pending.done():
            pending.set_exception(error)

    def _fail_all(self, error: EngineError) -> None:
        if self._gone is None:
            self._gone = error
        for key in [*self._answers, *self._pending]:
            self._fail(key, self._gone)


async def _next(reader: asyncio.StreamReader) -> messages.Message:
    length = await reader.readexactly(messages.LENGTH_BYTES)
    return messages.parse(await reader.readexactly(int.from_bytes(length, "big")))


async def _end(process: forks.Child, writer: asyncio.StreamWriter) -> None:
    """Closes the socket, at which the engine ends, and makes sure that it does."""
    writer.close()
    with contextlib.suppress(ConnectionError):
        await writer.wait_closed()
    try:
        async with asyncio.timeout(_END_S):
            await process.ended()
    except TimeoutError:
        process.kill()
        await process.ended()


def _engine(connection: socket.socket) -> None:
    """The engine's process: it runs until the other end of the socket closes."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # of a terminal: the service drains and then closes the socket
    logging.basicConfig(stream=sys.stderr, format="%(levelname)s %(name)s %(message)s")
    from veneer_inference.engine.process import EngineProcess as Process  # with torch, which the service does without

    options = messages.receive_start(connection)
    if options is not None:
        Process(connection, options).run()
