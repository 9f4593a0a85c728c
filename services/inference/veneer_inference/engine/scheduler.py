"""Which requests run, and which of their tokens go into the next step. Without torch, without clock.

The policy:

- A request is admitted when key-value blocks for its prompt and its longest answer are free, and a slot for its
  adapter: once admitted it is never stopped for want of memory. Blocks that an earlier request has filled with the
  same beginning are shared, and that part of the prompt is not computed again.
- Tenants take turns. Whoever's turn it is waits for room, and nobody overtakes: a large request is not starved.
- A step takes one token of every answer that is under way, then prompts, oldest first, in pieces up to a budget.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Iterator
from dataclasses import dataclass, field

from veneer_inference.engine.blocks import BlockPool
from veneer_inference.engine.slots import AdapterSlots
from veneer_inference.ports import EngineError


@dataclass(frozen=True, slots=True)
class Limits:
    """Bounds of an engine.

    Attributes:
        context_length: tokens of a sequence at most, its answer included.
        blocks: key-value blocks there are, numbered from 1.
        block_tokens: tokens in a block.
        step_tokens: tokens of a step at most, unless as many answers are under way.
        running: requests admitted at once.
        waiting: requests waiting at once, over all tenants; of one tenant at most half of them.
        waiting_bytes: of the prompts of waiting requests.
    """

    context_length: int
    blocks: int
    block_tokens: int = 16
    step_tokens: int = 512
    running: int = 64
    waiting: int = 256
    waiting_bytes: int = 1 << 30

    @property
    def waiting_of_tenant(self) -> int:
        """Requests of one tenant waiting at once."""
        return -(-self.waiting // 2)


@dataclass(slots=True, eq=False)
class Sequence:
    """A request, as the scheduler sees it.

    Attributes:
        key: names it.
        tenant: whose it is.
        adapter: digest of what it wears; empty for the base.
        prompt_tokens: of its prompt.
        answer_tokens: of its answer at most; 0 for a prompt that is only scored.
        size_bytes: of its prompt, while it waits.
        length: tokens known so far, prompt and answer.
        draft: guesses after them that the next step checks.
        computed: tokens whose keys and values are there.
        cached: tokens of the prompt whose keys and values were there at admission.
        blocks: where they are.
        keys: names of the blocks that it fills, as far as they may be shared; see `prefix`.
        sharable: tokens of its prompt that may come from others: at least one is computed, for what follows it.
        published: blocks that others have been offered.
        ready: its prompt may be computed: the features of its pictures are there.
    """

    key: int
    tenant: str
    adapter: str
    prompt_tokens: int
    answer_tokens: int
    size_bytes: int = 0
    length: int = 0
    draft: int = 0
    computed: int = 0
    cached: int = 0
    blocks: list[int] = field(default_factory=list)
    keys: list[bytes] = field(default_factory=list)
    sharable: int = 0
    published: int = 0
    ready: bool = True

    def __post_init__(self) -> None:
        self.length = self.prompt_tokens


@dataclass(frozen=True, slots=True)
class Piece:
    """Tokens of a sequence that a step computes.

    Attributes:
        sequence: whose.
        start: the first of them.
        tokens: how many.
    """

    sequence: Sequence
    start: int
    tokens: int

    @property
    def ends(self) -> bool:
        """It reaches the last token that is known: the next one follows from it."""
        return self.start + self.tokens >= self.sequence.length


class Scheduler:
    """Waiting and running requests.

    Args:
        limits: the bounds.
        slots: of adapters.
    """

    def __init__(self, limits: Limits, slots: AdapterSlots) -> None:
        self.limits = limits
        self.running: dict[int, Sequence] = {}
        self._slots = slots
        self._pool = BlockPool(limits.blocks)
        self._waiting: OrderedDict[str, deque[Sequence]] = OrderedDict()  # the first tenant is next
        self._waiting_bytes = 0
        self.waiting = 0

    @property
    def blocks_in_use(self) -> int:
        """Key-value blocks that running requests hold."""
        return self._pool.in_use

    def answer_limit(self, prompt_tokens: int, max_tokens: int) -> int:
        """Tokens that an answer may have: `max_tokens`, or what the context leaves.

        Raises:
            EngineError: `TOO_LONG`: the prompt leaves no room for an answer, or prompt and answer exceed all memory.
        """
        self._require(prompt_tokens, 1)
        answer = min(max_tokens, self.limits.context_length - prompt_tokens)
        self._require(prompt_tokens, answer)
        return answer

    def submit(self, sequence: Sequence, retry_s: float) -> None:
        """Lets a request wait for its turn.

        Args:
            sequence: the request.
            retry_s: when a refused one should try again.

        Raises:
            EngineError: `TOO_LONG`, or `QUEUE_FULL`.
        """
        self._require(sequence.prompt_tokens, sequence.answer_tokens)
        limits = self.limits
        own = len(self._waiting.get(sequence.tenant, ()))
        problem = ""
        if self.waiting >= limits.waiting:
            problem = f"{self.waiting} requests wait, {limits.waiting} may"
        elif own >= limits.waiting_of_tenant:
            problem = f"{own} requests of this tenant wait, {limits.waiting_of_tenant} may"
        elif self.waiting and self._waiting_bytes + sequence.size_bytes > limits.waiting_bytes:
            problem = f"prompts of {self._waiting_bytes} bytes wait, {limits.waiting_bytes} may"
        if problem:
            raise EngineError("QUEUE_FULL", [problem], retry_s)
        self._waiting.setdefault(sequence.tenant, deque()).append(sequence)
        self.waiting += 1
        self._waiting_bytes += sequence.size_bytes

    def admit(self) -> list[Sequence]:
        """The requests whose turn and room has come, each with its blocks and its adapter's slot."""
        admitted = []
        while self._waiting and len(self.running) < self.limits.running:
            tenant, queue = next(iter(self._waiting.items()))
            sequence = queue[0]
            need = self._blocks(sequence.prompt_tokens + sequence.answer_tokens)
            taken = self._pool.take(need, sequence.keys[: sequence.sharable // self.limits.block_tokens])
            if taken is None:
                break
            if not self._slots.acquire(sequence.adapter):
                self._pool.give_back(taken[0])
                break
            queue.popleft()
            self._left(tenant, sequence)
            if tenant in self._waiting:
                self._waiting.move_to_end(tenant)
            sequence.blocks, sequence.published = taken
            sequence.cached = sequence.computed = sequence.published * self.limits.block_tokens
            self.running[sequence.key] = sequence
            admitted.append(sequence)
        return admitted

    def answering(self) -> list[Sequence]:
        """The sequences whose answers are under way."""
        return [sequence for sequence in self.running.values() if sequence.computed >= sequence.prompt_tokens]

    @property
    def prompting(self) -> bool:
        """A prompt could be computed now."""
        return next(self._prompts(), None) is not None

    def plan(self, prompt_tokens: int | None = None) -> list[Piece]:
        """The pieces of the next step; empty when there is nothing to compute.

        Args:
            prompt_tokens: of prompts at most, where that is less than the limits allow.
        """
        pieces = [Piece(sequence, sequence.computed, 1 + sequence.draft) for sequence in self.answering()]
        budget = max(self.limits.step_tokens - len(pieces), 1)  # a prompt gets on, however many answers do
        budget = budget if prompt_tokens is None else min(budget, prompt_tokens)
        for sequence in self._prompts():
            if budget <= 0:
                break
            tokens = min(budget, sequence.prompt_tokens - sequence.computed)
            pieces.append(Piece(sequence, sequence.computed, tokens))
            budget -= tokens
        return pieces

    def computed(self, sequence: Sequence, tokens: int) -> None:
        """So many more tokens have been computed: their keys and values are there, and full blocks may be shared."""
        sequence.computed += tokens
        full = min(sequence.computed // self.limits.block_tokens, len(sequence.keys))
        for number in range(sequence.published, full):
            self._pool.publish(sequence.blocks[number], sequence.keys[number])
        sequence.published = max(sequence.published, full)

    def finish(self, key: int) -> Sequence | None:
        """Forgets a request, waiting or running, and frees what it held; None where there is none of this key."""
        sequence = self.running.pop(key, None)
        if sequence is not None:
            self._pool.give_back(sequence.blocks)
            sequence.blocks = []
            self._slots.release(sequence.adapter)
            return sequence
        for tenant, queue in self._waiting.items():
            for sequence in queue:
                if sequence.key == key:
                    queue.remove(sequence)
                    self._left(tenant, sequence)
                    return sequence
        return None

    def _left(self, tenant: str, sequence: Sequence) -> None:
        """A request waits no longer."""
        self.waiting -= 1
        self._waiting_bytes -= sequence.size_bytes
        if not self._waiting[tenant]:
            del self._waiting[tenant]

    def _prompts(self) -> Iterator[Sequence]:
        return (
            sequence
            for sequence in self.running.values()
            if sequence.ready and sequence.computed < sequence.prompt_tokens
        )

    def _blocks(self, tokens: int) -> int:
        return -(-tokens // self.limits.block_tokens)

    def _require(self, prompt_tokens: int, answer_tokens: int) -> None:
        limits = self.limits
        total = prompt_tokens + answer_tokens
        if total > limits.context_length:
            problem = f"a prompt of {prompt_tokens} tokens and an answer of at least {answer_tokens}"
            raise EngineError("TOO_LONG", [f"{problem}; the context is {limits.context_length} tokens"])
        if self._blocks(total) > limits.blocks:
            problem = f"a prompt of {prompt_tokens} tokens and an answer of up to {answer_tokens}"
            capacity = limits.blocks * limits.block_tokens
            raise EngineError("TOO_LONG", [f"{problem}; there is memory for {capacity} tokens"])
