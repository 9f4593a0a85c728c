"""Named places where a test lets this process die or dawdle, or a disk fill up; nothing without a test.

`VENEER_FAILPOINTS` in the environment names them: `publish.recorded=kill`, `file.write=full`,
`lease.durable=slow`, several separated by commas; `=kill:3` dies at the third passing, and then only. Passings are
those of this process, or of all that share the folder that `VENEER_FAILPOINT_COUNTS` names.
"""

from __future__ import annotations

import errno
import os
import signal
import time
from collections import Counter
from pathlib import Path

_SLOW_S = 0.5
_passed: Counter[str] = Counter()


def failpoint(name: str) -> None:
    """Does what the environment asks for at this place.

    Raises:
        OSError: ENOSPC, for `full`.
    """
    entries = (entry.partition("=") for entry in os.environ.get("VENEER_FAILPOINTS", "").split(","))
    actions = [action.partition(":") for place, _, action in entries if place == name]
    passings = _count(name) if actions else 0
    for act, _, nth in actions:
        if nth and passings != int(nth):
            continue
        if act == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        if act == "slow":
            time.sleep(_SLOW_S)
        if act == "full":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def _count(name: str) -> int:
    """Counts a passing; returns their number so far."""
    folder = os.environ.get("VENEER_FAILPOINT_COUNTS")
    if not folder:
        _passed[name] += 1
        return _passed[name]
    with (Path(folder) / name).open("ab") as file:  # a byte for each, appended at once
        file.write(b".")
        file.flush()
        return file.tell()
