"""Who does what next: hands waiting work to workers, takes it back from dead ones, mends the queue.

The store decides, the queue only orders: work is leased by compare-and-set in the store, whatever the queue
says, and `reconcile` makes the queue agree with the store again, whatever became of it.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager, suppress

import structlog

from veneer_rpc.errors import Aborted, Unavailable
from veneer_trainer.domain.fair_share import Lane
from veneer_trainer.domain.leases import ChangeWatch
from veneer_trainer.domain.lifecycle import HELD, State
from veneer_trainer.domain.retries import RetryPolicy
from veneer_trainer.domain.work import Changes, Failure, Work, WorkKind
from veneer_trainer.domain.workers import Worker
from veneer_trainer.failpoints import failpoint
from veneer_trainer.ports import History, WorkQueue, WorkStore

_log = structlog.get_logger(__name__)


@contextmanager
def _queue_may_be_away() -> Iterator[None]:
    """Goes on without the queue: `reconcile` does later what could not be done now."""
    try:
        yield
    except Unavailable as error:
        _log.warning("queue unavailable", problem=str(error.__cause__ or error))


class Dispatch:
    """Queue and leases of all work.

    Args:
        store: decides.
        queue: orders.
        retries: what follows a death.
        watch: measures leases, stalls and delays.
        history: what happened, for the fault tests.
        lease_s: an attempt is dead when no heartbeat has come for so long.
        stall_s: an attempt is dead when its step has not grown for so long.
        max_leased: work of one tenant that may be leased at once.
        on_waiting: called when work has come to wait.
    """

    def __init__(
        self,
        store: WorkStore,
        queue: WorkQueue,
        retries: RetryPolicy,
        watch: ChangeWatch,
        history: History,
        lease_s: float,
        stall_s: float,
        max_leased: int,
        on_waiting: Callable[[], None] = lambda: None,
    ) -> None:
        self._store = store
        self._queue = queue
        self._retries = retries
        self._watch = watch
        self._history = history
        self._lease_s = lease_s
        self._stall_s = stall_s
        self._max_leased = max_leased
        self._on_waiting = on_waiting
        self._taking = threading.Lock()  # between take and lease nothing else may judge what was taken

    def settle(self, work: Work) -> None:
        """Lets work wait for a worker if it is to, and not if it is not; call it after each change of state.

        Without a queue it is left to `reconcile`.
        """
        with _queue_may_be_away():
            if work.state is State.QUEUED and not work.delay_s:
                self._queue.add(work.uid, Lane.of(work))
                self._on_waiting()
            else:
                self._queue.forget(work.uid)

    def acquire(self, worker: Worker, kinds: Collection[WorkKind], beside: Work | None = None) -> Work | None:
        """Leases the next work that a worker can do; None when there is none.

        Args:
            worker: asks.
            kinds: of work that it wants.
            beside: what it does already; then only work that may join that.

        Raises:
            Unavailable: the queue cannot be reached.
        """
        wanted = {kind.value for kind in kinds}
        with self._taking:
            leased = Counter(work.ref.tenant for work in self._store.in_states(HELD))

            def can_run(lane: Lane) -> bool:
                return lane.kind in wanted and leased[lane.tenant] < self._max_leased and worker.can_run(lane)

            lanes: Callable[[Lane], bool] = can_run
            if beside is not None:
                begun, waiting = Lane.of(beside), set(filter(can_run, self._queue.lanes()))
                lanes = {lane for lane in waiting if lane.may_join(begun, waiting)}.__contains__
            while (uid := self._queue.take(worker.name, lanes)) is not None:
                failpoint("lease.taken")
                work = self._lease(uid, worker.name)
                with _queue_may_be_away():
                    self._queue.forget(uid)
                if work is not None:
                    return work
        return None

    def _lease(self, uid: str, worker: str) -> Work | None:
        """Leases work unless it waits no more: the queue may know less than the store."""
        work = self._store.find(uid)
        if work is None or work.state is not State.QUEUED or work.delay_s:
            return None
        with suppress(Aborted):
            work = self._store.lease(work, worker, work.checkpoint_step)
            failpoint("lease.durable")
            self._history.record("leased", work=work.uid, token=work.token, worker=worker)
            return work
        return None

    def sweep(self) -> None:
        """Takes work back from dead and stalled attempts, and queues delayed work whose time has come."""
        self._watch.tick()
        looks = dict[tuple[str, object], None]()
        for work in self._store.in_states(HELD):
            beat, step = ("beat", work.token), ("step", work.token)
            looks[beat] = looks[step] = None
            if self._watch.unchanged_s(beat, work.beats) > self._lease_s:
                self._lose(work, Failure("LEASE_LOST", f"no heartbeat for {self._lease_s:g} s", True))
            elif self._watch.unchanged_s(step, (work.state, work.step)) > self._stall_s:
                text = f"step {work.step} has not grown for {self._stall_s:g} s while {work.state.name}"
                self._lose(work, Failure("PROGRESS_STALLED", text, True))
        for work in self._store.in_states([State.QUEUED]):
            delay = ("delay", work.uid)
            if work.delay_s:
                looks[delay] = None
                if self._watch.unchanged_s(delay, work.retries) >= work.delay_s:
                    with suppress(Aborted):
                        self.settle(self._store.change(work, delay_s=0.0))
        self._watch.keep(looks.keys())

    def end(self, work: Work, then: State, changes: Changes) -> Work:
        """Ends an attempt; `settle` what it returns once that is durable.

        Raises:
            Aborted: the work changed meanwhile.
        """
        moved = self._store.move(work, then, **changes)
        self._history.record("ended", work=work.uid, token=work.token, state=then.value)
        return moved

    def _lose(self, work: Work, failure: Failure) -> None:
        with suppress(Aborted):  # it ended, or beat, in this moment
            self.settle(self.end(work, *self._retries.after(work, failure)))
            _log.warning("attempt lost", work=work.ref.name, token=work.token, reason=failure.reason)

    def reconcile(self) -> None:
        """Makes the queue hold just what the store says is waiting.

        Raises:
            Unavailable: the queue cannot be reached.
        """
        with self._taking:
            contents = self._queue.contents()
            waiting = {work.uid: work for work in self._store.in_states([State.QUEUED]) if not work.delay_s}
            for uid in (contents.waiting | contents.taken) - waiting.keys():
                self._queue.forget(uid)
            for uid in contents.taken & waiting.keys():
                self._queue.put_back(uid)
            for uid in waiting.keys() - contents.waiting - contents.taken:
                self._queue.forget(uid)  # a place whose entry was lost
                self._queue.add(uid, Lane.of(waiting[uid]))
                self._history.record("requeued", work=uid)
            self._on_waiting()
