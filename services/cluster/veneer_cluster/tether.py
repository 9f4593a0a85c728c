"""Becomes another program that ends when its parent ends, however that came about.

    python tether.py PARENT_PID NICE PROGRAM ARGUMENTS...

The kernel keeps PR_SET_PDEATHSIG over exec (prctl(2)), so this works for any program, and from its first
moment on: one that asks for it itself would outlive a parent that dies while it is still starting. Imports
nothing of Veneer, so that it costs little.
"""

import ctypes
import os
import signal
import sys

PR_SET_PDEATHSIG = 1


def main() -> None:
    """Ties this process to its parent, then becomes the program."""
    parent, nice, *command = sys.argv[1:]
    if sys.platform == "linux":
        if ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGTERM) != 0:
            sys.exit(f"prctl(PR_SET_PDEATHSIG): {os.strerror(ctypes.get_errno())}")
        if os.getppid() != int(parent):
            sys.exit("the parent is gone already")
    os.nice(int(nice))
    os.execvp(command[0], command)  # noqa: S606  # no shell is wanted


if __name__ == "__main__":
    main()
