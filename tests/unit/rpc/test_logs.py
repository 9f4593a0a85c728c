"""Logging set-up, in a process of its own since it is the process's."""

import json
import subprocess
import sys

CODE = """
import logging, sys, structlog
from veneer_rpc import logs
logs.configure("info", sys.argv[1])
structlog.contextvars.bind_contextvars(request_id="r-1", tenant="acme")
log = structlog.get_logger("here")
log.debug("unseen")
log.info("hello", text="你好")
logging.getLogger("library").warning("from %s", "outside")
try:
    raise ValueError("boom")
except ValueError as error:
    log.error("failed", exc_info=error)
"""


def run(kind: str) -> list[str]:
    done = subprocess.run([sys.executable, "-c", CODE, kind], check=True, capture_output=True, text=True)
    assert done.stdout == ""
    return done.stderr.splitlines()


def test_json_lines_carry_the_calls_context() -> None:
    hello, library, failed = map(json.loads, run("json"))
    assert hello.pop("timestamp").endswith("Z")
    assert hello == {
        "event": "hello",
        "text": "你好",
        "level": "info",
        "logger": "here",
        "request_id": "r-1",
        "tenant": "acme",
    }
    assert (library["event"], library["level"], library["tenant"]) == ("from outside", "warning", "acme")
    assert "ValueError: boom" in failed["exception"]


def test_console_lines_are_for_people() -> None:
    lines = run("console")
    assert "hello" in lines[0]
    assert "request_id=r-1" in lines[0]
    assert any("ValueError" in line for line in lines)
