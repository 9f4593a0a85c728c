"""The child's end of the socket to its worker."""

from __future__ import annotations

import os
import socket
import threading

from veneer_trainer.worker.messages import (
    Delegation,
    ExportTask,
    Measure,
    Stop,
    Task,
    ToParent,
    frame,
    read_from_parent,
)


class Link:
    """Speaks to the worker; a thread listens. When the worker has ended, so does this process.

    Attributes:
        task: what the worker started this process for.
        delegation: the newest credential.
        stopping: set once the worker wants a stop after the step.
    """

    def __init__(self, connection: socket.socket) -> None:
        task = read_from_parent(connection)
        if not isinstance(task, Task | Measure | ExportTask):
            raise ConnectionError("the worker ended before it gave a task")
        self.task: Task | Measure | ExportTask = task
        self.delegation = "" if isinstance(task, Measure) else task.delegation
        self.stopping = threading.Event()
        self._connection = connection
        threading.Thread(target=self._listen, name="orders", daemon=True).start()

    def send(self, message: ToParent) -> None:
        """Sends a message."""
        self._connection.sendall(frame(message))

    def _listen(self) -> None:
        while (message := read_from_parent(self._connection)) is not None:
            if isinstance(message, Stop):
                self.stopping.set()
            elif isinstance(message, Delegation):
                self.delegation = message.delegation
        os._exit(1)  # nobody is left to work for, and the main thread may be deep in a product
