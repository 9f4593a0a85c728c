"""The exceptions, and the collector of violations."""

import subprocess
import sys

import pytest

from veneer_rpc.errors import FailedPrecondition, InvalidArgument, NotFound, Violation, invalid, violations


def test_every_violation_is_told_at_once() -> None:
    with pytest.raises(InvalidArgument) as caught, violations() as wrong:  # noqa: PT012  # the block is tested
        wrong.add("spec.lora.rank", "OUT_OF_RANGE", "must be 1..512, was 0")
        wrong.add("spec.seed", "REQUIRED", "must be given")
    assert [found.field for found in caught.value.violations] == ["spec.lora.rank", "spec.seed"]
    assert caught.value.message == "spec.lora.rank: must be 1..512, was 0 (and 1 more)"


def test_nothing_is_raised_when_nothing_is_wrong() -> None:
    with violations() as wrong:
        assert wrong.attempt(int, "3") == 3


def test_a_failed_attempt_adds_its_violations_and_goes_on() -> None:
    def parse(text: str) -> str:
        raise invalid(Violation("name", "BAD", text))

    with pytest.raises(InvalidArgument) as caught, violations() as wrong:  # noqa: PT012  # the block is tested
        assert wrong.attempt(parse, "a") is None
        assert wrong.attempt(parse, "b") is None
    assert [found.description for found in caught.value.violations] == ["a", "b"]


def test_other_errors_pass_an_attempt() -> None:
    def refuse() -> None:
        raise NotFound("GONE_NOW", "gone")

    def vague() -> None:
        raise InvalidArgument("VAGUE_ONE", "no field is named")

    with violations() as wrong, pytest.raises(NotFound):
        wrong.attempt(refuse)
    with violations() as wrong, pytest.raises(InvalidArgument, match="no field"):
        wrong.attempt(vague)


@pytest.mark.parametrize("reason", ["", "A", "lower_case", "WITH SPACE", "_LEADING", "TRAILING_", "X" * 64, "OK\n"])
def test_a_reason_is_upper_snake(reason: str) -> None:
    with pytest.raises(ValueError, match="UPPER_SNAKE"):
        FailedPrecondition(reason, "text")


def test_what_a_domain_may_import_pulls_in_neither_grpc_nor_protobuf() -> None:
    code = (
        "import sys, veneer_rpc.errors, veneer_rpc.names, veneer_rpc.paging, veneer_rpc.idempotency;"
        "import veneer_rpc.calls;"
        "print([m for m in sys.modules if m.split('.')[0] in ('grpc', 'google', 'structlog')])"
    )
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert done.stdout == "[]\n"


def test_a_client_pulls_in_no_server_code() -> None:
    code = "import sys, veneer_rpc.channel, veneer_rpc.status;print(sorted(m for m in sys.modules if 'veneer' in m))"
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert done.stdout.strip() == str(
        [
            "veneer_rpc",
            *(f"veneer_rpc.{m}" for m in ("addresses", "calls", "channel", "errors", "names", "status")),
        ]
    )
