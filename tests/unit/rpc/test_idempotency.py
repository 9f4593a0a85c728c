"""One result for one request id, however often and from however many threads."""

import threading
import uuid
from concurrent.futures import ThreadPoolExecutor

import pytest
from google.protobuf.struct_pb2 import Struct
from hypothesis import given
from hypothesis import strategies as st

from veneer_rpc.errors import AlreadyExists, InvalidArgument, ResourceExhausted, Unavailable
from veneer_rpc.idempotency import MemoryStore, RequestKey, body_sha256, parse_request_id

KEY = RequestKey("acme", "Create", "11111111-1111-4111-8111-111111111111")


def test_the_first_result_comes_back() -> None:
    store = MemoryStore()
    assert store.once(KEY, b"body", lambda: b"one") == b"one"
    assert store.once(KEY, b"body", lambda: b"two") == b"one"


def test_another_body_is_refused() -> None:
    store = MemoryStore()
    store.once(KEY, b"body", lambda: b"one")
    with pytest.raises(AlreadyExists) as caught:
        store.once(KEY, b"other", lambda: b"two")
    assert caught.value.reason == "REQUEST_ID_REUSED"


def test_tenants_and_methods_do_not_meet() -> None:
    store = MemoryStore()
    store.once(KEY, b"body", lambda: b"one")
    assert store.once(RequestKey("globex", KEY.method, KEY.request_id), b"other", lambda: b"two") == b"two"
    assert store.once(RequestKey("acme", "Delete", KEY.request_id), b"other", lambda: b"two") == b"two"


def test_an_error_is_not_remembered() -> None:
    store = MemoryStore()

    def fail() -> bytes:
        raise Unavailable("DOWN_NOW", "down")

    with pytest.raises(Unavailable):
        store.once(KEY, b"body", fail)
    assert store.once(KEY, b"other", lambda: b"two") == b"two"


@pytest.mark.parametrize("fail_first", [False, True])
def test_64_at_once_act_once(fail_first: bool) -> None:
    store, acts, barrier = MemoryStore(), list[int](), threading.Barrier(64)

    def act() -> bytes:
        acts.append(1)
        threading.Event().wait(0.01)
        if fail_first and len(acts) == 1:
            raise Unavailable("DOWN_NOW", "down")
        return b"result %d" % len(acts)

    def send() -> bytes | None:
        barrier.wait()
        try:
            return store.once(KEY, b"body", act)
        except Unavailable:
            return None

    with ThreadPoolExecutor(64) as pool:
        results = [future.result() for future in [pool.submit(send) for _ in range(64)]]
    assert len(acts) == 1 + fail_first
    assert sorted(results, key=str) == sorted(
        [b"result %d" % len(acts)] * (64 - fail_first) + [None] * fail_first, key=str
    )


def test_a_waiting_caller_with_another_body_is_refused_at_once() -> None:
    store, begun, release = MemoryStore(), threading.Event(), threading.Event()

    def act() -> bytes:
        begun.set()
        release.wait(5)
        return b"one"

    with ThreadPoolExecutor(1) as pool:
        first = pool.submit(store.once, KEY, b"body", act)
        begun.wait(5)
        with pytest.raises(AlreadyExists):
            store.once(KEY, b"other", lambda: b"two")
        release.set()
        assert first.result() == b"one"


def test_results_are_forgotten_after_the_retention_and_bounded_before() -> None:
    now_s = [0.0]
    store = MemoryStore(retention_s=10, max_per_tenant=2, clock=lambda: now_s[0])
    keys = [RequestKey("acme", "Create", str(uuid.uuid4())) for _ in range(4)]
    store.once(keys[0], b"b", lambda: b"0")
    now_s[0] = 5
    store.once(keys[1], b"b", lambda: b"1")
    with pytest.raises(ResourceExhausted) as caught:
        store.once(keys[2], b"b", lambda: b"2")
    assert caught.value.retry_after_s == 10
    assert store.once(RequestKey("globex", "Create", keys[2].request_id), b"b", lambda: b"g") == b"g"
    now_s[0] = 10  # the first one's time is over, the second one's is not
    assert store.once(keys[1], b"b", lambda: b"x") == b"1"
    assert store.once(keys[2], b"b", lambda: b"2") == b"2"
    assert sum(map(len, store._tenants.values())) <= 3


@given(st.uuids().filter(lambda value: value.int))
def test_any_uuid_is_a_request_id(value: uuid.UUID) -> None:
    assert parse_request_id(str(value).upper()) == str(value)


@pytest.mark.parametrize(
    "text", ["", "x", "0" * 32, str(uuid.UUID(int=0)), "3e41af9bbe32447d8d6ac8a8461dc833", f"{{{uuid.UUID(int=7)}}}"]
)
def test_what_is_not_a_uuid_is_refused(text: str) -> None:
    with pytest.raises(InvalidArgument, match="request_id"):
        parse_request_id(text)


json_values = st.dictionaries(
    st.text(max_size=5), st.text(max_size=5) | st.booleans() | st.integers(-99, 99), max_size=6
)


class Request:
    """A message with a request id, such as the contract's; Struct stands for the rest of its fields."""

    def __init__(self, request_id: str = "", body: dict[str, object] | None = None) -> None:
        self.request_id = request_id
        self.body = Struct()
        self.body.update(body or {})

    def CopyFrom(self, other: "Request") -> None:  # protobuf's names
        self.request_id = other.request_id
        self.body.CopyFrom(other.body)

    def ClearField(self, field_name: str) -> None:
        assert field_name == "request_id"
        self.request_id = ""

    def SerializeToString(self, *, deterministic: bool = False) -> bytes:
        return self.request_id.encode() + self.body.SerializeToString(deterministic=deterministic)


@given(json_values, json_values)
def test_equal_bodies_have_equal_digests_whatever_the_id_and_the_order(
    one: dict[str, object], other: dict[str, object]
) -> None:
    turned = dict(reversed(one.items()))
    assert body_sha256(Request("a", one)) == body_sha256(Request("b", turned))
    assert (body_sha256(Request("a", one)) == body_sha256(Request("a", other))) == (
        Request("", one).body == Request("", other).body
    )
    request = Request("kept", one)
    body_sha256(request)
    assert request.request_id == "kept"
