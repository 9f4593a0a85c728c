"""Forks processes that run a module as `python -m` would, out of one that has imported it: the imports cost once.

Started with a socket, the module's name, and that of one that the processes' own children import, if they have any:
then each has a second fork beside it, which becomes the server that it forks its children from. Of each message it
takes the command line, the environment and three file descriptors (standard output, standard error, and a pipe that
gets the exit status), and answers with the process id.
"""

import array
import fcntl
import gc
import importlib
import json
import multiprocessing.util
import os
import runpy
import select
import signal
import socket
import sys
from collections.abc import Sequence


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


def keep_a_fork_server() -> None:
    """Forks what `multiprocessing` would start as a fresh interpreter for its fork server; it waits to be that."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    pid = os.fork()
    if pid == 0:
        ours.close()
        message, received, _, _ = socket.recv_fds(theirs, 1 << 20, 16)
        theirs.close()
        if message:
            asked = json.loads(message)
            out_of_the_way = [fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, 200) for fd in received]
            for fd, number in zip(out_of_the_way, asked["fds"], strict=True):
                os.dup2(fd, number)
                os.close(fd)
            os.environ.update(asked["environment"])
            exec(asked["program"], {"__name__": "__main__"})  # noqa: S102 (what `python -c` would run)
        os._exit(0)
    theirs.close()
    start_afresh = multiprocessing.util.spawnv_passfds  # type: ignore[attr-defined]

    def start(path: bytes, arguments: Sequence[str], fds: Sequence[int]) -> int:
        program = arguments[-1]
        if "forkserver" not in program or ours.fileno() < 0:
            return int(start_afresh(path, arguments, fds))
        asked = {"program": program, "fds": list(fds), "environment": dict(os.environ)}
        socket.send_fds(ours, [json.dumps(asked).encode()], fds)
        ours.close()
        return pid

    multiprocessing.util.spawnv_passfds = start  # type: ignore[attr-defined]


if __name__ == "__main__":
    control_fd, module, *of_children = sys.argv[1:]
    for name in (f"{module}.__main__", *of_children):
        importlib.import_module(name)
    del sys.modules[f"{module}.__main__"]  # each child runs it
    gc.freeze()
    arguments = serve(socket.socket(fileno=int(control_fd)))
    if arguments is not None:
        if of_children:
            keep_a_fork_server()
        sys.argv = [module, *arguments]
        runpy.run_module(module, run_name="__main__", alter_sys=True)
