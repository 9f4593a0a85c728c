"""The engine itself: commands in, a step at a time, reports out. One thread calls it, and it owns all of its state."""

from __future__ import annotations

import itertools
import logging
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass

import torch

from veneer_inference.engine import messages
from veneer_inference.engine.adapter_memory import AdapterMemory
from veneer_inference.engine.drafts import NGRAM, Answers
from veneer_inference.engine.grammar import Grammars
from veneer_inference.engine.pace import Pace, StepPace
from veneer_inference.engine.request import INVALID, Request, check_prompt, check_sampling
from veneer_inference.engine.runner import Runner
from veneer_inference.engine.sampling import Choice, Sampler, Wish, scores_of
from veneer_inference.engine.scheduler import Limits, Piece, Scheduler, Sequence
from veneer_inference.engine.sight import Picture, Sight, feature_key, touches_tower
from veneer_inference.engine.slots import BASE, AdapterSlots
from veneer_inference.ports import AdapterState, EngineError, EngineStats, Sampling, Step, TokenScore
from veneer_vlm.lora import Adapter
from veneer_vlm.loss import token_losses
from veneer_vlm.model import VisionLanguageModel

_LOG = logging.getLogger(__name__)
_SCORED_AT_ONCE = 64  # positions: 39 MB of float32 logits at a vocabulary of 151,936
_FREE_ROWS = 16  # of a pass: so many cost about what one does, for the weights are read once
_TOWER_SLICE = {"cpu": 4_000_000_000, "cuda": 1_000_000_000_000}  # multiplications; a step takes one, or several


@dataclass(frozen=True, slots=True)
class Loaded:
    """What the loading thread brings.

    Attributes:
        digest: of the adapter.
        adapter: on the device's host.
        error: why there is none.
    """

    digest: str
    adapter: Adapter | None = None
    error: EngineError | None = None


@dataclass(frozen=True, slots=True)
class TurnedAway:
    """A request that the process's threads have no room for.

    Attributes:
        key: of the request.
        error: why.
    """

    key: int
    error: EngineError


class EngineCore:
    """Everything but processes and threads.

    Args:
        model: the base.
        limits: of the scheduler.
        adapter_slots: adapters that running requests wear at once.
        adapter_bytes: of adapters in memory.
        feature_bytes: of pictures' features that are kept.
        prefix_cache: whether requests share the key-value blocks of equal beginnings.
        speculation: whether answers guess ahead; no answer changes by it.
        grammars: of the base's JSON schemas; None where it has no tokenizer.
        load: starts loading an adapter, given its digest and folder; a `Loaded` comes to `handle` later.
        runner: runs the model's passes.
    """

    def __init__(
        self,
        model: VisionLanguageModel,
        limits: Limits,
        adapter_slots: int,
        adapter_bytes: int,
        feature_bytes: int,
        load: Callable[[str, str], None],
        runner: type[Runner] = Runner,
        *,
        prefix_cache: bool = True,
        speculation: bool = True,
        grammars: Grammars | None = None,
    ) -> None:
        self._model = model
        self._runner = runner(model, limits.blocks, limits.block_tokens)
        self._sampler = Sampler(model)
        self._sight = Sight(model, _TOWER_SLICE[model.device.type], feature_bytes)
        self._load = load
        self._prefix_cache = prefix_cache
        self._speculation = speculation
        self._grammars = grammars
        self._loading: dict[str, list[int]] = {}
        self._worn: dict[str, Adapter] = {}  # what is in a slot, on the model's device
        self._slots = AdapterSlots(adapter_slots, self._enter_slot, self._leave_slot)
        self._memory: AdapterMemory[Adapter] = AdapterMemory(adapter_bytes, self._slots.drop)
        self._scheduler = Scheduler(limits, self._slots)
        self._requests: dict[int, Request] = {}
        self._pace = Pace()
        self._step_pace = StepPace()
        self._saw = False  # in the last step
        self._said = Answers()
        self._counters: dict[str, int] = defaultdict(int)
        self._steps = 0
        self._reported_adapters: tuple[AdapterState, ...] = ()
        self._report = self._new_report()

    @property
    def idle(self) -> bool:
        """Nothing can be done before the next command."""
        return not self._requests

    def handle(self, command: messages.Command | Loaded | TurnedAway) -> None:
        """Takes a command, or an adapter that has been read, or what is refused already."""
        if isinstance(command, Loaded):
            self._loaded(command)
            return
        if isinstance(command, TurnedAway):
            self._fail(command.key, command.error)
            return
        try:
            match command:
                case messages.Generate():
                    self._submit(command, command.sampling, 0)
                case messages.Score():
                    self._submit(command, None, command.top_logprobs)
                case messages.Cancel():
                    if command.key in self._requests:
                        self._counters["cancelled"] += 1
                        self._forget(command.key)
                case messages.Load():
                    self._begin_load(command)
                case messages.Unload():
                    self._memory.retire(command.digest)
                    self._report.done.append(messages.Done(command.key))
        except EngineError as error:
            self._fail(command.key, error)

    @torch.inference_mode()
    def step(self) -> messages.Report:
        """Computes a step, and reports what it and the commands before it brought."""
        for sequence in self._scheduler.admit():
            self._begin(self._requests[sequence.key])
        answering = self._scheduler.answering()
        # Pictures and prompts take turns where answers wait for either.
        self._saw = self._sight.busy and not (answering and self._saw and self._scheduler.prompting)
        seen_s = self._see(self._step_pace.room_s) if self._saw else 0.0
        self._guess(answering)
        most = self._scheduler.limits.step_tokens
        pieces = self._scheduler.plan(self._step_pace.tokens(most, seen_s) if answering else None)
        if pieces:
            pieces.sort(key=lambda piece: piece.sequence.adapter)
            prompt_tokens = sum(piece.tokens for piece in pieces if piece.start < piece.sequence.prompt_tokens)
            started_s = time.monotonic()
            try:
                self._compute(pieces)
                self._step_pace.computed(time.monotonic() - started_s, len(answering), prompt_tokens)
            except Exception as error:  # whatever it is, requests outside this pass go on
                _LOG.exception("a pass over %d sequences failed", len(pieces))
                self._give_up([piece.sequence.key for piece in pieces], error)
        self._steps += bool(pieces)
        self._counters["sequences"] += len(pieces)
        report, self._report = self._report, self._new_report()
        report.stats = self._stats()
        adapters = self._adapters()
        if adapters != self._reported_adapters:
            report.adapters = self._reported_adapters = adapters
        return report

    def _submit(
        self, command: messages.Generate | messages.Score, sampling: Sampling | None, top_logprobs: int
    ) -> None:
        try:
            prompt = command.prompt.unpacked()
        except ValueError as error:
            raise EngineError(INVALID, [f"arrays of a wrong shape: {error}"]) from error
        check_prompt(prompt, self._model.config, scored=sampling is None)
        if top_logprobs < 0:
            raise EngineError(INVALID, [f"top_logprobs is {top_logprobs}, at least 0 is needed"])
        answer = 0
        if sampling is not None:
            check_sampling(sampling)
            answer = self._scheduler.answer_limit(len(prompt.ids_T), sampling.max_tokens)
        size_bytes = prompt.ids_T.nbytes + prompt.positions_3_T.nbytes + prompt.patches_N_P.nbytes
        sequence = Sequence(command.key, command.tenant, command.adapter, len(prompt.ids_T), answer, size_bytes)
        request = Request.of(sequence, prompt, sampling, top_logprobs, self._model.config.image_token_id)
        if sampling is not None and sampling.json_schema:
            if self._grammars is None:
                raise EngineError("SCHEMA_UNSUPPORTED", ["this engine has no tokenizer"])
            request.grammar = self._grammars.grammar(sampling.json_schema, sampling.stop_ids)
        if self._speculation:
            request.speculate()
        if self._prefix_cache:
            request.share(self._scheduler.limits.block_tokens)
        if command.adapter != BASE:
            self._memory.acquire(command.adapter)
        try:
            self._scheduler.submit(sequence, self._pace.wait_s(self._scheduler.waiting + 1))
        except EngineError:
            if command.adapter != BASE:
                self._memory.release(command.adapter)
            raise
        self._requests[command.key] = request
        self._counters["requests"] += 1

    def _begin(self, request: Request) -> None:
        """A request has been admitted."""
        sequence, prompt = request.sequence, request.prompt
        request.queued_s = time.monotonic() - request.arrived_s
        request.adapter = self._worn.get(sequence.adapter)
        self._counters["prompt_tokens"] += sequence.prompt_tokens
        self._counters["cached_tokens"] += sequence.cached
        worn = request.adapter if request.adapter is not None and touches_tower(request.adapter) else None
        worn_digest = BASE if worn is None else sequence.adapter
        for index in request.to_see():
            grid, patches_P_X = request.picture(index)
            key = None
            if prompt.picture_digests:
                key = feature_key(sequence.tenant, prompt.picture_digests[index], grid, worn_digest)
            features = self._sight.show(Picture(sequence.key, index, grid, patches_P_X, worn, worn_digest, key))
            if features is not None:
                request.saw(index, features)
        request.let_go_of_pixels()

    def _see(self, room_s: float) -> float:
        """Runs slices of the tower for about so long, one at least; how long it took."""
        started_s = time.monotonic()
        took_s, slices = 0.0, 0
        while self._sight.busy and took_s * (slices + 1) <= room_s * slices:  # another one would still fit
            try:
                for picture, features in self._sight.advance():
                    if request := self._requests.get(picture.request):
                        request.saw(picture.index, features)
            except Exception as error:  # whatever it is, requests without these pictures go on
                _LOG.exception("a pass through the tower failed")
                self._give_up(self._sight.give_up(), error)
            took_s, slices = time.monotonic() - started_s, slices + 1
        return took_s

    def _compute(self, pieces: list[Piece]) -> None:
        """One pass, and what follows from it for each of its sequences."""
        requests = [self._requests[piece.sequence.key] for piece in pieces]
        items = [request.item(piece) for request, piece in zip(requests, pieces, strict=True)]
        hidden_N_D = self._runner.run(items)
        answering: list[tuple[Request, Sampling, list[Wish]]] = []
        rows: list[int] = []
        start = 0
        scored = []
        for request, piece, item in zip(requests, pieces, items, strict=True):
            self._counters["computed_tokens"] += piece.tokens
            if request.sampling is None or not item.wanted:
                self._keep(request, piece.tokens)
            if request.sampling is None:
                scored.append((request, [piece.start + token + 1 for token in item.wanted], start))
            elif item.wanted:
                self._keep(request, piece.tokens - 1 - request.sequence.draft)
                try:
                    answering.append((request, request.sampling, request.wishes(request.sampling)))
                    rows += range(start, start + len(item.wanted))
                except EngineError as error:
                    self._refuse(request, error)
            start += len(item.wanted)
        for request, places, first in scored:
            self._score(request, places, hidden_N_D[first : first + len(places)])
        if answering:
            hidden = hidden_N_D if len(rows) == len(hidden_N_D) else hidden_N_D[rows]
            choices = iter(self._sampler.choose(hidden, [wish for *_, wishes in answering for wish in wishes]))
            for request, sampling, wishes in answering:
                self._answer(request, sampling, list(itertools.islice(choices, len(wishes))))

    def _answer(self, request: Request, sampling: Sampling, choices: list[Choice]) -> None:
        """Reports a request's next token, and those after it for as long as its guesses were right."""
        sequence = request.sequence
        guesses = request.ids_T[sequence.length : sequence.length + sequence.draft].tolist()
        taken: list[Choice] = []
        try:
            for choice, guess in zip(choices, [*guesses, None], strict=True):
                finish = request.append(choice.token, sampling)
                taken.append(choice)
                if finish or choice.token != guess:
                    break
        except EngineError as error:
            self._refuse(request, error)
            return
        request.checked(len(guesses), len(taken) - 1)
        sequence.draft = 0
        self._keep(request, len(taken))
        self._counters["drafted_tokens"] += len(guesses)
        self._counters["accepted_tokens"] += len(taken) - 1
        self._counters["answer_tokens"] += len(taken)
        tokens = tuple(choice.token for choice in taken)
        scores = tuple(choice.score for choice in taken if choice.score is not None)
        step = Step(tokens, scores, finish, sequence.cached, request.queued_s)
        self._report.progress.append(messages.Progress(sequence.key, step))
        if finish:
            if request.said is not None:
                first = max(0, sequence.prompt_tokens - NGRAM)
                self._said.add(sequence.tenant, sequence.adapter, request.ids_T[first : sequence.length].tolist())
            self._forget(sequence.key)

    def _keep(self, request: Request, tokens: int) -> None:
        """So many more tokens of a request have their keys and values."""
        request.name_blocks()
        self._scheduler.computed(request.sequence, tokens)

    def _guess(self, answering: list[Sequence]) -> None:
        """Lets answers guess ahead while a pass has rows that cost next to nothing: it reads all weights anyhow."""
        room = _FREE_ROWS // max(len(answering), 1) - 1
        for sequence in answering:
            others = self._said.of(sequence.tenant, sequence.adapter)
            self._requests[sequence.key].guess(room, others, self._model.config.image_token_id)

    def _refuse(self, request: Request, error: EngineError) -> None:
        """Ends one request of a pass; the others go on."""
        self._forget(request.sequence.key)
        self._fail(request.sequence.key, error)

    def _score(self, request: Request, places: list[int], hidden_N_D: torch.Tensor) -> None:
        """Scores targets that follow the hidden states; a prompt's last piece ends the request."""
        for first in range(0, len(places), _SCORED_AT_ONCE):
            hidden = hidden_N_D[first : first + _SCORED_AT_ONCE]
            targets = request.ids_T[places[first : first + _SCORED_AT_ONCE]]
            if request.top_logprobs:
                logits_N_V = self._model.logits(hidden)
                request.scores += scores_of(logits_N_V, targets.tolist(), request.top_logprobs)
            else:
                losses_N = token_losses(self._model.lm_head, hidden, torch.from_numpy(targets).to(hidden.device))
                scores = zip(targets.tolist(), (-losses_N).tolist(), strict=True)
                request.scores += [TokenScore(token, logprob) for token, logprob in scores]
        if request.sequence.computed == request.sequence.prompt_tokens:
            self._report.done.append(messages.Done(request.sequence.key, tuple(request.scores)))
            self._forget(request.sequence.key)

    def _forget(self, key: int) -> None:
        """Frees all that a request held."""
        del self._requests[key]
        sequence = self._scheduler.finish(key)
        self._sight.forget(key)
        if sequence is not None and sequence.adapter != BASE:
            self._memory.release(sequence.adapter)
        self._pace.ended(time.monotonic(), more=bool(self._requests))

    def _give_up(self, keys: list[int], error: Exception) -> None:
        for key in set(keys) & self._requests.keys():
            self._forget(key)
            self._fail(key, EngineError("ENGINE_GONE", [f"the engine failed in a step: {error}"]))

    def _fail(self, key: int, error: EngineError) -> None:
        self._counters["refused"] += 1
        self._report.failures.append(messages.Failure(key, error.reason, error.problems, error.retry_s))

    def _begin_load(self, command: messages.Load) -> None:
        size_bytes = self._memory.revive(command.digest)
        if size_bytes is not None:
            self._report.done.append(messages.Done(command.key, size_bytes=size_bytes))
        elif command.digest in self._loading:
            self._loading[command.digest].append(command.key)
        else:
            self._loading[command.digest] = [command.key]
            self._load(command.digest, command.directory)

    def _loaded(self, loaded: Loaded) -> None:
        keys = self._loading.pop(loaded.digest)
        error = loaded.error
        size_bytes = 0
        if loaded.adapter is not None:
            size_bytes = sum(tensor.nbytes for _, tensor in loaded.adapter.tensors())
            try:
                self._memory.add(loaded.digest, loaded.adapter, size_bytes, self._pace.wait_s(1))
                self._counters["adapters_loaded"] += 1
            except EngineError as refused:
                error = refused
        for key in keys:
            if error is None:
                self._report.done.append(messages.Done(key, size_bytes=size_bytes))
            else:
                self._fail(key, error)

    def _enter_slot(self, digest: str) -> None:
        adapter = self._memory[digest]
        self._worn[digest] = adapter.to(self._model.device)
        self._counters["slot_loads"] += 1

    def _leave_slot(self, digest: str) -> None:
        self._runner.forget(self._worn.pop(digest))

    def _adapters(self) -> tuple[AdapterState, ...]:
        return tuple(
            AdapterState(digest, digest in self._slots, references, size_bytes)
            for digest, references, size_bytes in self._memory.held()
        )

    def _stats(self) -> EngineStats:
        scheduler, cache = self._scheduler, self._sight.cache
        self._counters["adapters_evicted"] = self._memory.evictions
        self._counters["feature_hits"] = cache.hits
        self._counters["feature_misses"] = cache.misses
        self._counters["feature_bytes"] = cache.size_bytes
        return EngineStats(
            waiting=scheduler.waiting,
            running=len(scheduler.running),
            kv_tokens_in_use=scheduler.blocks_in_use * scheduler.limits.block_tokens,
            steps=self._steps,
            counters=dict(self._counters),
        )

    def _new_report(self) -> messages.Report:
        return messages.Report([], [], [], EngineStats(), None)
