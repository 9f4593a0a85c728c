"""`python -m veneer_inference.engine FD`: an engine that speaks over the inherited socket FD. `client` starts it."""

from __future__ import annotations

import logging
import signal
import socket
import sys

from veneer_rpc.parent import die_with_parent


def main() -> None:
    """Runs until the other end of the socket closes."""
    die_with_parent()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # of a terminal: the service drains and then closes the socket
    logging.basicConfig(stream=sys.stderr, format="%(levelname)s %(name)s %(message)s")
    connection = socket.socket(fileno=int(sys.argv[1]))
    connection.setblocking(True)

    from veneer_inference.engine import messages  # after `die_with_parent`: torch takes seconds to import
    from veneer_inference.engine.process import EngineProcess

    options = messages.receive_start(connection)
    if options is not None:
        EngineProcess(connection, options).run()


if __name__ == "__main__":
    main()
