"""What a process did, one JSON object a line, for the checker of the fault tests."""

from __future__ import annotations

import json
import os
from pathlib import Path


class FileHistory:
    """Appends events to a file, each with one write, so that a kill cuts no line in two.

    Args:
        path: the file; None keeps nothing.
        process: what the process calls itself in its lines.
    """

    def __init__(self, path: Path | None, process: str) -> None:
        self._process = process
        flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND
        self._descriptor = None if path is None else os.open(path, flags, 0o600)

    def record(self, event: str, **facts: str | int | float | bool) -> None:
        """See History."""
        if self._descriptor is not None:
            line = json.dumps({"process": self._process, "event": event, **facts}) + "\n"
            os.write(self._descriptor, line.encode())

    def close(self) -> None:
        """Closes the file."""
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None
