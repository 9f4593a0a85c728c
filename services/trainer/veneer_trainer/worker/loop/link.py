"""The child's end of the socket to its worker."""

from __future__ import annotations

import os
import socket
import threading
from queue import SimpleQueue

from veneer_trainer.worker.messages import (
    Delegation,
    ExportTask,
    Failed,
    Leave,
    Measure,
    OfJob,
    Stop,
    Task,
    Told,
    ToParent,
    frame,
    read_from_parent,
)


class Link:
    """Speaks to the worker; a thread listens. When the worker has ended, so does this process.

    Args:
        connection: to the worker.
        leads: whether this process tells how jobs go on; one of several ranks that does not says only why it cannot.

    Attributes:
        task: what the worker started this process for.
        jobs: to train, the first of `task`, as they come.
        delegation: the newest credential.
    """

    def __init__(self, connection: socket.socket, *, leads: bool = True) -> None:
        task = read_from_parent(connection)
        if not isinstance(task, Task | Measure | ExportTask):
            raise ConnectionError("the worker ended before it gave a task")
        self.task: Task | Measure | ExportTask = task
        self.jobs: SimpleQueue[JobLink] = SimpleQueue()
        self.delegation = "" if isinstance(task, Measure) else task.delegation
        self.leads = leads
        self._connection = connection
        self._sending = threading.Lock()  # jobs that get ready do so in threads of their own
        self._known: dict[str, JobLink] = {}
        if isinstance(task, Task):
            self._add(task)
        threading.Thread(target=self._listen, name="orders", daemon=True).start()

    def send(self, message: ToParent) -> None:
        """Sends a message."""
        with self._sending:
            self._connection.sendall(frame(message))

    def _add(self, task: Task) -> None:
        self._known[task.folder] = JobLink(self, task)
        self.jobs.put(self._known[task.folder])

    def _listen(self) -> None:
        while (message := read_from_parent(self._connection)) is not None:
            match message:
                case Task():
                    self._add(message)
                case Stop():
                    if message.folder in self._known:
                        self._known[message.folder].stopping.set()
                case Leave():
                    if message.folder in self._known:
                        self._known.pop(message.folder).left.set()
                case Delegation():
                    self.delegation = message.delegation
        os._exit(1)  # nobody is left to work for, and the main thread may be deep in a product


class JobLink:
    """Speaks to the worker about one job.

    Attributes:
        task: the job's.
        stopping: set once the worker wants it to stop after the step.
        left: set once the worker listens to it no more.
    """

    def __init__(self, link: Link, task: Task) -> None:
        self.task = task
        self.stopping = threading.Event()
        self.left = threading.Event()
        self._link = link

    @property
    def delegation(self) -> str:
        """The newest credential; all jobs of a process are of one tenant."""
        return self._link.delegation

    def send(self, message: OfJob) -> None:
        """Sends a message, if it is this process that has to."""
        if self._link.leads or isinstance(message, Failed):
            self._link.send(Told(self.task.folder, message))
