"""What an owner may ask of queued work: cancel, pause, resume, retry. The same for every kind."""

from __future__ import annotations

from collections.abc import Collection
from typing import Unpack

from veneer_rpc.errors import Aborted
from veneer_trainer.domain.lifecycle import State, wrong_state
from veneer_trainer.domain.work import Changes, Work, WorkRef
from veneer_trainer.ports import WorkStore

_TRIES = 10  # against a worker that changes the state in the same moment


class Control:
    """Orders of the owner.

    Each returns the work as it is afterwards and may stand in a transaction; once that is durable, the caller
    lets `Dispatch.settle` tell the queue.

    Raises:
        NotFound: each: the tenant has no such work.
        FailedPrecondition: each: WRONG_STATE, see `lifecycle`.
    """

    def __init__(self, store: WorkStore) -> None:
        self._store = store

    def cancel(self, ref: WorkRef) -> Work:
        """Stops work for good: at once if nobody holds it, else its worker hears of it."""
        work = self._store.get(ref)
        return work if work.state is State.CANCELLING else self._stop(ref, State.CANCELLED, State.CANCELLING)

    def pause(self, ref: WorkRef) -> Work:
        """Stops work until it is resumed: at once if nobody holds it, else after a checkpoint."""
        return self._stop(ref, State.PAUSED, State.PAUSING)

    def resume(self, ref: WorkRef) -> Work:
        """Queues paused work again."""
        return self._queue(ref, {State.PAUSED})

    def retry(self, ref: WorkRef) -> Work:
        """Queues failed or dead-lettered work again, with all its tries before it."""
        return self._queue(ref, {State.FAILED, State.DEAD_LETTERED}, deaths=0, retries=0)

    def _stop(self, ref: WorkRef, unheld: State, held: State) -> Work:
        for _ in range(_TRIES):
            work = self._store.get(ref)
            try:
                return self._store.move(work, held if work.state.held else unheld, delay_s=0.0)
            except Aborted:
                continue
        raise Aborted("STATE_CHANGED", f"{ref.name} keeps changing; try again", resource=ref.name)

    def _queue(self, ref: WorkRef, allowed: Collection[State], **changes: Unpack[Changes]) -> Work:
        work = self._store.get(ref)
        if work.state not in allowed:
            raise wrong_state(ref.name, work.state, State.QUEUED)
        changes["held_dataset"] = bool(work.dataset_version)
        return self._store.move(work, State.QUEUED, **changes)
