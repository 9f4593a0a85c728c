"""The table between exceptions and statuses; the wire itself is in tests/integration."""

from google.rpc import error_details_pb2, status_pb2
from hypothesis import given
from hypothesis import strategies as st

from veneer_rpc import status
from veneer_rpc.errors import InvalidArgument, NotFound, ResourceExhausted, Unavailable, Violation

texts = st.text(alphabet=st.characters(), max_size=2000)  # lone surrogates included


class FakeRpcError(Exception):
    """What a failed call offers."""

    def __init__(self, wire: status_pb2.Status, metadata: list[tuple[str, str | bytes]]) -> None:
        self._wire, self._metadata = wire, metadata

    def code(self) -> object:
        return next(code for code in status.grpc.StatusCode if code.value[0] == self._wire.code)

    def details(self) -> str:
        return self._wire.message

    def trailing_metadata(self) -> list[tuple[str, str | bytes]]:
        return self._metadata


def travel(error: Exception) -> object:
    wire = status.from_exception(error)
    return status.from_rpc_error(FakeRpcError(wire, [(status.DETAILS_KEY, wire.SerializeToString())]))  # type: ignore[arg-type]


@given(
    message=texts,
    metadata=st.dictionaries(texts, texts, max_size=20),
    found=st.lists(st.builds(Violation, texts, texts, texts), max_size=50),
    retry_after_s=st.none() | st.floats(0, 1e6),
    resource=texts,
)
def test_whatever_the_domain_says_stays_within_its_bounds(
    message: str,
    metadata: dict[str, str],
    found: list[Violation],
    retry_after_s: float | None,
    resource: str,
) -> None:
    error = InvalidArgument(
        "A_REASON",
        message,
        metadata=metadata,
        violations=found,
        retry_after_s=retry_after_s,
        resource=resource,
    )
    wire = status.from_exception(error)
    assert len(wire.message.encode()) <= 512
    assert wire.ByteSize() <= status.MAX_DETAILS_BYTES + status.MAX_MESSAGE_BYTES
    back = travel(error)
    assert type(back) is InvalidArgument
    assert (back.reason, len(back.violations) > 0) == ("A_REASON", bool(found))


@given(st.integers(1, 400), st.integers(0, 300))
def test_each_violation_is_told_or_counted(count: int, size: int) -> None:
    found = [Violation(f"f[{index}]", "BAD", "x" * size) for index in range(count)]
    back = travel(InvalidArgument("A_REASON", "m", violations=found))
    assert isinstance(back, InvalidArgument)
    if len(back.violations) == count and back.violations[-1].reason == "BAD":
        assert back.violations == tuple(found)
    else:
        *told, last = back.violations
        assert told == found[: len(told)]
        assert last.description == f"{count - len(told)} more, left out here"


def test_a_long_message_is_cut_between_characters() -> None:
    wire = status.from_exception(NotFound("NOT_THERE", "票" * 200))
    assert len(wire.message.encode()) <= 512
    assert wire.message == "票" * 169 + "…"


def test_a_subclass_has_its_parents_status() -> None:
    class StaleToken(Unavailable):
        pass

    assert type(travel(StaleToken("STALE_TOKEN", "stale"))) is Unavailable


def test_every_error_has_error_info_of_our_domain() -> None:
    for error in (ResourceExhausted("FULL_NOW", "full", retry_after_s=0.0001), ValueError("/srv/x")):
        info = error_details_pb2.ErrorInfo()
        details = status.from_exception(error).details
        assert details[0].Unpack(info)
        assert info.domain == "veneer"
    back = travel(ResourceExhausted("FULL_NOW", "full", retry_after_s=0.0001))
    assert isinstance(back, ResourceExhausted)
    assert back.retry_after_s == 0.001  # never sooner than said


def test_a_resource_is_told_with_its_type() -> None:
    wire = status.from_exception(NotFound("NOT_THERE", "no", resource="adapters/x/versions/3"))
    info = error_details_pb2.ResourceInfo()
    assert wire.details[1].Unpack(info)
    assert (info.resource_type, info.resource_name) == ("veneer/AdapterVersion", "adapters/x/versions/3")


def test_a_foreign_or_damaged_status_still_has_code_and_message() -> None:
    wire = status_pb2.Status(code=14, message="proxy says no")
    for metadata in ([], [(status.DETAILS_KEY, b"\xff\xff")], [("x", "y")]):
        back = status.from_rpc_error(FakeRpcError(wire, metadata))  # type: ignore[arg-type]
        assert type(back) is Unavailable
        assert (back.reason, back.message) == ("UNAVAILABLE", "proxy says no")
