"""Named places where a test lets this process die or dawdle, or a disk fill up; nothing without a test.

`VENEER_FAILPOINTS` in the environment names them: `publish.recorded=kill`, `file.write=full`,
`lease.durable=slow`, several separated by commas; `=kill:3` dies at the third passing, and then only.
"""

from __future__ import annotations

import errno
import os
import signal
import time
from collections import Counter

_SLOW_S = 0.5
_passed: Counter[str] = Counter()


def failpoint(name: str) -> None:
    """Does what the environment asks for at this place.

    Raises:
        OSError: ENOSPC, for `full`.
    """
    for entry in os.environ.get("VENEER_FAILPOINTS", "").split(","):
        place, _, action = entry.partition("=")
        if place != name:
            continue
        act, _, nth = action.partition(":")
        _passed[name] += 1
        if nth and _passed[name] != int(nth):
            continue
        if act == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        if act == "slow":
            time.sleep(_SLOW_S)
        if act == "full":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
