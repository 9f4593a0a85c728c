"""The engine's process: threads around `EngineCore`.

The main thread steps. One thread reads commands, one compiles schemas, one reads adapters, one writes reports; each
queue between them is bounded, so that whoever is slow holds up the other side and not memory. When the service's end of
the socket closes, nobody is left to answer, and the process ends.
"""

from __future__ import annotations

import contextlib
import logging
import os
import queue
import socket
import threading
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

import torch

from veneer_digests import DigestError, blob_digest, graphs_digest, model_digest
from veneer_inference.engine import messages
from veneer_inference.engine.adapter_folder import read_adapter
from veneer_inference.engine.core import EngineCore, Loaded, TurnedAway
from veneer_inference.engine.grammar import Grammars
from veneer_inference.engine.options import EngineOptions
from veneer_inference.engine.precision import load_base
from veneer_inference.engine.runner import Runner
from veneer_inference.engine.scheduler import Limits
from veneer_inference.ports import EngineError, EngineInfo
from veneer_processing import ProcessingError
from veneer_rpc.certificate import CERTIFICATE_FILE, SIGNER_FILE
from veneer_vlm.config import ModelConfig
from veneer_vlm.errors import RefusedError
from veneer_vlm.graphs import is_graphs
from veneer_vlm.model import VisionLanguageModel

_LOG = logging.getLogger(__name__)
_COMMANDS = 64  # prompts with their pixels lie in it
_REPORTS = 64
_SCHEMAS, _SCHEMA_RETRY_S = 64, 2.0
_BLOCK_TOKENS = 16
_NAME = "veneer-torch"


class EngineProcess:
    """What runs until the service lets go of the socket.

    Args:
        connection: to the service.
        options: what to run.
    """

    def __init__(self, connection: socket.socket, options: EngineOptions) -> None:
        self._connection = connection
        self._options = options
        self._commands: queue.Queue[messages.Command | Loaded | TurnedAway] = queue.Queue(_COMMANDS)
        self._loads: queue.SimpleQueue[tuple[str, str]] = queue.SimpleQueue()
        self._reports: queue.Queue[messages.Message] = queue.Queue(_REPORTS)
        self._schemas: queue.Queue[messages.Generate] = queue.Queue(_SCHEMAS)
        self._uncompiled: set[int] = set()  # keys of those
        self._uncompiled_lock = threading.Lock()

    def run(self) -> NoReturn:
        """Loads the base and serves."""
        options = self._options
        torch.set_num_threads(options.threads)
        self._start(self._read_commands)
        self._start(self._write_reports)
        device = "cuda" if torch.cuda.is_available() else "cpu"
        try:
            digest, model, dtype, runner = _opened(options, device)
        except (RefusedError, DigestError, ProcessingError, ValueError, OSError) as error:
            problems = error.violations if isinstance(error, RefusedError) else [str(error)]
            self._connection.sendall(messages.frame(messages.NotStarted(problems)))
            os._exit(1)
        limits = _limits(options, model.config)
        grammars = Grammars(Path(options.model), model.config.text.vocab_size)
        core = EngineCore(
            model,
            limits,
            options.slots,
            options.adapter_bytes,
            options.feature_bytes,
            lambda name, directory: self._loads.put((name, directory)),
            runner,
            prefix_cache=options.prefix_cache,
            speculation=options.speculation,
            grammars=grammars,
        )
        self._start(lambda: self._read_adapters(model.config, digest, model.dtype))
        info = EngineInfo(
            model_digest=digest,
            dtype=dtype,
            device=model.device.type,
            engine=_NAME,
            context_length=limits.context_length,
            kv_capacity_tokens=limits.blocks * limits.block_tokens,
            adapter_slots=options.slots,
            max_rank=options.max_rank,
        )
        self._connection.sendall(messages.frame(messages.Ready(info)))
        grammars.prepare()  # while the service reads the tokenizer for itself, and before anybody waits for a step
        self._start(lambda: self._compile_schemas(grammars))
        self._serve(core)

    def _serve(self, core: EngineCore) -> NoReturn:
        while True:
            if core.idle:
                core.handle(self._commands.get())
            while True:
                try:
                    core.handle(self._commands.get_nowait())
                except queue.Empty:
                    break
            self._reports.put(core.step())

    def _read_adapters(self, model: ModelConfig, digest: str, dtype: torch.dtype) -> None:
        def read(name: str, directory: str) -> Loaded:
            try:
                return Loaded(name, read_adapter(Path(directory), name, model, digest, self._options.max_rank, dtype))
            except EngineError as error:
                return Loaded(name, error=error)
            except Exception as error:  # whatever a hostile file brings about, the engine lives
                _LOG.exception("adapter %s could not be read", name)
                return Loaded(name, error=EngineError("ADAPTER_INVALID", [f"cannot be read: {error}"]))

        while True:
            self._commands.put(read(*self._loads.get()))

    def _read_commands(self) -> None:
        try:
            while (command := messages.receive(self._connection)) is not None:
                if isinstance(command, messages.Generate) and command.sampling.json_schema:
                    self._queue_schema(command)
                    continue
                if isinstance(command, messages.Cancel):
                    with self._uncompiled_lock:
                        self._uncompiled.discard(command.key)
                self._commands.put(command)
        except ConnectionError:
            pass  # as its end
        os._exit(0)

    def _queue_schema(self, command: messages.Generate) -> None:
        """Has a schema compiled; never waits, for others' commands come behind."""
        self._uncompiled.add(command.key)
        try:
            self._schemas.put_nowait(command)
        except queue.Full:
            self._uncompiled.remove(command.key)
            error = EngineError("QUEUE_FULL", [f"{_SCHEMAS} schemas wait to be compiled"], _SCHEMA_RETRY_S)
            self._commands.put(TurnedAway(command.key, error))

    def _compile_schemas(self, grammars: Grammars) -> None:
        """Compiles schemas, so that the step finds them compiled; what is wrong with one, the step says."""
        while True:
            command = self._schemas.get()
            if command.key not in self._uncompiled:
                continue
            with contextlib.suppress(EngineError):
                grammars.grammar(command.sampling.json_schema, command.sampling.stop_ids)
            with self._uncompiled_lock:  # a cancellation comes either before this, or after the request
                if command.key in self._uncompiled:
                    self._uncompiled.remove(command.key)
                    self._commands.put(command)

    def _write_reports(self) -> None:
        try:
            while True:
                self._connection.sendall(messages.frame(self._reports.get()))
        except ConnectionError:
            os._exit(0)

    def _start(self, work: Callable[[], None]) -> None:
        threading.Thread(target=self._or_die, args=(work,), daemon=True).start()

    @staticmethod
    def _or_die(work: Callable[[], None]) -> None:
        """A thread that ends by an error takes the process with it: without it the others would wait for ever."""
        try:
            work()
        except BaseException:
            _LOG.exception("the engine ends")
            os._exit(1)


def _opened(options: EngineOptions, device: str) -> tuple[str, VisionLanguageModel, str, type[Runner]]:
    """The model of a directory with its digest and precision, and what runs it: torch, or exported graphs' runtime."""
    directory = Path(options.model)
    if is_graphs(directory):
        from veneer_inference.engine.graphs import GraphModel, GraphRunner

        own = (CERTIFICATE_FILE, SIGNER_FILE)
        files = {}
        for path in directory.iterdir():
            if path.name not in own:
                with path.open("rb") as file:
                    files[path.name] = blob_digest(file)
        return graphs_digest(files), GraphModel(directory, options.threads), options.dtype, GraphRunner
    digest = model_digest(directory)
    model, dtype = load_base(directory, options.dtype, device, as_stored=options.as_stored)
    model.lm_head.distinct()
    return digest, model, dtype, Runner


def _limits(options: EngineOptions, model: ModelConfig) -> Limits:
    blocks = max(1, options.kv_tokens // _BLOCK_TOKENS)
    return Limits(
        context_length=min(model.text.max_position_embeddings, blocks * _BLOCK_TOKENS),
        blocks=blocks,
        block_tokens=_BLOCK_TOKENS,
        step_tokens=options.step_tokens,
        running=options.running,
        waiting=options.waiting,
        waiting_bytes=options.waiting_bytes,
    )
