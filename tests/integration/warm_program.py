"""Forks processes that run a module as `python -m` would, out of one that has imported it: the imports cost once.

Started with the module's name and a socket. Of each message it takes the command line, the environment and three file
descriptors (standard output, standard error, and a pipe that gets the exit status), and answers with the process id.
"""

import array
import gc
import importlib
import json
import os
import runpy
import select
import signal
import socket
import sys


def serve(control: socket.socket) -> list[str] | None:
    """Forks until the socket is closed; returns in a child, with its command line."""
    woken, waker = os.pipe()
    os.set_blocking(waker, False)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    signal.set_wakeup_fd(waker)
    pipes: dict[int, int] = {}
    while True:
        ready, _, _ = select.select([control, woken], [], [])
        if woken in ready:
            os.read(woken, 4096)
            _reap(pipes)
        if control not in ready:
            continue
        size = array.array("i", [0, 0, 0])
        message, ancillary, _, _ = control.recvmsg(1 << 20, socket.CMSG_SPACE(size.itemsize * 3))
        if not message:
            return None
        fds = array.array("i")
        fds.frombytes(ancillary[0][2])
        out, err, ends = fds
        asked = json.loads(message)
        pid = os.fork()
        if pid == 0:
            signal.set_wakeup_fd(-1)
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            control.close()
            os.dup2(out, 1)
            os.dup2(err, 2)
            for fd in (woken, waker, out, err, ends, *pipes.values()):
                os.close(fd)
            os.environ.clear()
            os.environ.update(asked["environment"])
            return list(asked["arguments"])
        os.close(out)
        os.close(err)
        pipes[pid] = ends
        control.send(str(pid).encode())


def _reap(pipes: dict[int, int]) -> None:
    while pipes:
        pid, status = os.waitpid(-1, os.WNOHANG)
        if not pid:
            return
        with open(pipes.pop(pid), "wb") as ends:
            ends.write(str(os.waitstatus_to_exitcode(status)).encode())


if __name__ == "__main__":
    module, control_fd = sys.argv[1], int(sys.argv[2])
    importlib.import_module(f"{module}.__main__")
    del sys.modules[f"{module}.__main__"]  # each child runs it
    gc.freeze()
    arguments = serve(socket.socket(fileno=control_fd))
    if arguments is not None:
        sys.argv = [module, *arguments]
        runpy.run_module(module, run_name="__main__", alter_sys=True)
