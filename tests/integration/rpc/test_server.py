"""A server's life: bound, seen, and stopped; over real sockets and, where it must be, in real processes."""

# ruff: noqa: ANN401  # a servicer's context and a started call have no useful type
# ruff: noqa: ASYNC220, ASYNC221  # starting a process takes a moment, and the test waits for it anyway

import asyncio
import os
import signal
import socket
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.protobuf.wrappers_pb2 import StringValue
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from veneer_rpc import status
from veneer_rpc.channel import open_channel
from veneer_rpc.server import BindError, Server
from veneer_rpc.settings import ServerSettings, SettingsError

SERVICE = "veneer.test.v1.EchoService"
SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING


async def echo(request: StringValue, context: Any) -> StringValue:
    return request


async def health_of(address: str, service: str = "") -> int:
    async with open_channel(address) as channel:  # no token: health is open
        answer = await health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(service=service))
        return answer.status


async def test_a_second_bind_fails_and_names_the_address(serve: Any) -> None:
    running = await serve(unary_unary=echo)
    with pytest.raises(BindError, match=running.address):
        await serve(settings={"bind": running.address}, unary_unary=echo)


async def test_a_second_server_on_a_unix_socket_fails_and_the_first_one_lives(serve: Any, tmp_path: Path) -> None:
    address = f"unix:{tmp_path}/veneer.sock"
    running = await serve(settings={"bind": address}, unary_unary=echo)
    assert running.address == address
    with pytest.raises(BindError, match=r"veneer\.sock"):
        await serve(settings={"bind": address}, unary_unary=echo)
    assert (await (await running.call("unary_unary"))(StringValue(value="x"))).value == "x"


async def test_a_socket_left_behind_is_taken_over(serve: Any, tmp_path: Path) -> None:
    path = tmp_path / "veneer.sock"
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(path))
    running = await serve(settings={"bind": f"unix:{path}"}, unary_unary=echo)
    assert (await (await running.call("unary_unary"))(StringValue(value="x"))).value == "x"


def test_an_open_bind_without_tls_is_refused(credentials: Any) -> None:
    with pytest.raises(SettingsError, match=r"0\.0\.0\.0:0 is open to other machines"):
        ServerSettings(tokens_file=credentials.tokens_file, bind="0.0.0.0:0")


async def test_tls(serve: Any, tmp_path: Path) -> None:
    key, certificate = tmp_path / "key.pem", tmp_path / "cert.pem"
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes",
         "-keyout", key, "-out", certificate, "-days", "1", "-subj", "/CN=localhost",
         "-addext", "subjectAltName=DNS:localhost,IP:127.0.0.1"],
        check=True, capture_output=True,
    )  # fmt: skip
    settings = {"bind": "0.0.0.0:0", "tls_key_file": key, "tls_certificate_file": certificate}
    running = await serve(settings=settings, unary_unary=echo)
    running.address = running.address.replace("0.0.0.0", "127.0.0.1")  # noqa: S104
    call = await running.call("unary_unary", root_certificates_pem=certificate.read_bytes())
    assert (await call(StringValue(value="x"))).value == "x"
    with pytest.raises(grpc.aio.AioRpcError):  # in clear text
        await (await running.call("unary_unary"))(StringValue(value="x"), timeout=2)


async def test_health_is_true(serve: Any) -> None:
    running = await serve(unary_unary=echo)
    assert await health_of(running.address) == NOT_SERVING
    assert await health_of(running.address, SERVICE) == NOT_SERVING
    running.server.health.set_serving(SERVICE, True)
    assert await health_of(running.address, SERVICE) == SERVING
    assert await health_of(running.address) == SERVING
    running.server.health.set_serving(SERVICE, False)
    assert await health_of(running.address) == NOT_SERVING
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await health_of(running.address, "veneer.test.v1.Other")
    assert status.from_rpc_error(caught.value).reason == "SERVICE_UNKNOWN"
    with pytest.raises(KeyError):
        running.server.health.set_serving("veneer.test.v1.Other", True)


async def test_a_watcher_sees_each_state_and_the_end(serve: Any) -> None:
    running = await serve(settings={"grace_s": 30}, unary_unary=echo)
    channel = await running.channel()
    watch = health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest(service=SERVICE))
    assert (await watch.read()).status == NOT_SERVING
    running.server.health.set_serving(SERVICE, True)
    assert (await watch.read()).status == SERVING
    async with asyncio.timeout(5):  # far below the grace: a watcher does not hold it up
        await running.server.stop()
    assert (await watch.read()).status == NOT_SERVING
    assert await watch.read() is grpc.aio.EOF
    running.server.health.set_serving(SERVICE, True)  # too late to matter


async def test_a_watcher_of_an_unknown_service_is_told_so(serve: Any) -> None:
    running = await serve(unary_unary=echo)
    channel = await running.channel()
    watch = health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest(service="veneer.Other"))
    assert (await watch.read()).status == health_pb2.HealthCheckResponse.SERVICE_UNKNOWN


@pytest.mark.parametrize("grace_s", [5, 0.2])
async def test_a_stop_lets_calls_finish_within_the_grace(serve: Any, grace_s: float) -> None:
    begun, cleaned = asyncio.Event(), []

    async def slow(request: StringValue, context: Any) -> StringValue:
        begun.set()
        try:
            await asyncio.sleep(0.6)
        finally:
            await asyncio.sleep(0.1)
            cleaned.append(True)
        return request

    running = await serve(settings={"grace_s": grace_s}, unary_unary=slow)
    running.server.health.set_serving(SERVICE, True)
    call = await running.call("unary_unary")
    started = asyncio.ensure_future(_value(call))
    await begun.wait()
    stopping = asyncio.create_task(running.server.stop())
    await asyncio.sleep(0.1)
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call(StringValue(value="late"), timeout=1)
    assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
    await stopping
    assert cleaned == [True]  # before stop returned, a cancelled call's clean-up included
    if grace_s > 1:
        assert await started == "x"
    else:
        with pytest.raises(grpc.aio.AioRpcError):
            await started


async def _value(call: Any) -> str:
    return (await call(StringValue(value="x"))).value


async def test_reflection_only_when_asked_and_only_with_a_token(serve: Any) -> None:
    async def ask(running: Any, token: str | None) -> list[str]:
        async def one() -> AsyncIterator[Any]:
            yield reflection_pb2.ServerReflectionRequest(list_services="")

        async with open_channel(running.address, token) as channel:
            answers = reflection_pb2_grpc.ServerReflectionStub(channel).ServerReflectionInfo(one())
            return [service.name async for answer in answers for service in answer.list_services_response.service]

    running = await serve(unary_unary=echo)
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await ask(running, running.token)
    assert caught.value.code() is grpc.StatusCode.UNIMPLEMENTED
    running = await serve(settings={"reflection": True}, unary_unary=echo)
    assert SERVICE in await ask(running, running.token)
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await ask(running, None)
    assert caught.value.code() is grpc.StatusCode.UNAUTHENTICATED


async def test_a_blocking_servicer_and_a_misspelt_role_are_refused(serve: Any) -> None:
    def blocking(request: StringValue, context: Any) -> StringValue:
        return request

    with pytest.raises(ValueError, match="UnaryUnary must be async"):
        await serve(unary_unary=blocking)
    with pytest.raises(ValueError, match=r"EchoService/UnaryUnarry"):
        await serve(roles={f"{SERVICE}/UnaryUnarry": {"worker"}}, unary_unary=echo)


async def test_a_quiet_stream_lives_through_many_keepalives(serve: Any, caplog: Any) -> None:
    async def quiet(request: StringValue, context: Any) -> AsyncIterator[StringValue]:
        await asyncio.sleep(2.5)
        yield request

    often = {"keepalive_s": 0.2, "keepalive_timeout_s": 1}
    running = await serve(settings=often, unary_stream=quiet)
    call = await running.call("unary_stream", **often)
    assert [answer.value async for answer in call(StringValue(value="x"))] == ["x"]


async def test_a_client_that_pings_too_often_is_cut_off_and_the_server_lives(serve: Any) -> None:
    async def quiet(request: StringValue, context: Any) -> AsyncIterator[StringValue]:
        await asyncio.sleep(5 if request.value else 0)
        yield request

    running = await serve(settings={"keepalive_s": 60}, unary_stream=quiet)
    pushy = await running.call("unary_stream", keepalive_s=0.1, keepalive_timeout_s=5)
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        async for _ in pushy(StringValue(value="wait")):
            pass
    assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
    assert (caught.value.details() or "").lower().replace("_", " ") == "too many pings"
    calm = await running.call("unary_stream")
    assert len([answer async for answer in calm(StringValue())]) == 1


FROZEN = """
import sys, grpc
channel = grpc.insecure_channel(sys.argv[1])
call = channel.unary_stream("/veneer.test.v1.EchoService/UnaryStream")
for _ in call(b"", metadata=(("authorization", "Bearer vnr_user"),)):
    print("first", flush=True)
"""


async def test_a_frozen_client_is_found_in_keepalive_time_and_timeout(serve: Any) -> None:
    ended = asyncio.Event()

    async def hold(request: StringValue, context: Any) -> AsyncIterator[StringValue]:
        try:
            yield request
            await asyncio.sleep(3600)
        finally:
            ended.set()

    running = await serve(settings={"keepalive_s": 1, "keepalive_timeout_s": 1}, unary_stream=hold)
    client = subprocess.Popen([sys.executable, "-c", FROZEN, running.address], stdout=subprocess.PIPE, text=True)
    try:
        assert client.stdout is not None
        assert await asyncio.to_thread(client.stdout.readline) == "first\n"
        await asyncio.sleep(0.5)
        assert not ended.is_set()
        client.send_signal(signal.SIGSTOP)
        async with asyncio.timeout(1 + 1 + 2):
            await ended.wait()
    finally:
        client.kill()
        await asyncio.to_thread(client.communicate)


PROCESS = """
import asyncio, sys
from google.protobuf.wrappers_pb2 import StringValue
import grpc
from veneer_rpc import logs, settings
from veneer_rpc.authentication import BearerAuthenticator
from veneer_rpc.server import Server
from veneer_rpc.tokens import TokenFile

async def slow(request, context):
    print("begun", flush=True)
    await asyncio.sleep(float(request.value))
    return request

def register(server):
    handlers = {"UnaryUnary": grpc.unary_unary_rpc_method_handler(
        slow, StringValue.FromString, StringValue.SerializeToString)}
    name = "veneer.test.v1.EchoService"
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(name, handlers),))
    server.add_registered_method_handlers(name, handlers)

async def main():
    chosen = settings.load(settings.ServerSettings, "VENEER_TEST_", sys.argv[1:], {})
    logs.configure(chosen.log_level, chosen.log_format)
    server = Server(chosen, [register], BearerAuthenticator(TokenFile(chosen.tokens_file)))
    print(await server.start(), flush=True)
    await server.run()

asyncio.run(main())
"""


async def test_a_frozen_server_is_found_in_keepalive_time_and_timeout(credentials: Any) -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", PROCESS, "--tokens-file", credentials.tokens_file],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    try:
        assert process.stdout is not None
        address = (await asyncio.to_thread(process.stdout.readline)).strip()
        async with open_channel(address, credentials.user, keepalive_s=1, keepalive_timeout_s=1) as channel:
            call = channel.unary_unary(f"/{SERVICE}/UnaryUnary", StringValue.SerializeToString)
            waiting = asyncio.ensure_future(_outcome(call(StringValue(value="60"))))
            assert await asyncio.to_thread(process.stdout.readline) == "begun\n"
            process.send_signal(signal.SIGSTOP)
            assert await asyncio.wait_for(waiting, 1 + 1 + 2) is grpc.StatusCode.UNAVAILABLE
    finally:
        process.kill()
        await asyncio.to_thread(process.communicate)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("twice", [False, True])
async def test_a_signal_stops_the_process_with_grace(credentials: Any, number: int, twice: bool) -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", PROCESS, "--tokens-file", credentials.tokens_file, "--grace-s", "20"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONWARNINGS": "error"},
    )
    try:
        assert process.stdout is not None
        address = (await asyncio.to_thread(process.stdout.readline)).strip()
        async with open_channel(address, credentials.user) as channel:
            call = channel.unary_unary(f"/{SERVICE}/UnaryUnary", StringValue.SerializeToString, StringValue.FromString)
            started = call(StringValue(value="15" if twice else "0.5"))
            waiting = asyncio.ensure_future(_outcome(started))
            assert await asyncio.to_thread(process.stdout.readline) == "begun\n"
            process.send_signal(number)
            if twice:
                await asyncio.sleep(0.3)
                process.send_signal(number)
            outcome = await waiting
        _, errors = await asyncio.wait_for(asyncio.to_thread(process.communicate), 10)
    finally:
        process.kill()
    assert process.returncode == 0, errors
    assert "Traceback" not in errors
    assert '"event": "stopping"' in errors
    assert (outcome is grpc.StatusCode.OK) is not twice


async def _outcome(started: Any) -> grpc.StatusCode:
    return await started.code()


async def test_the_services_settings_are_the_servers(credentials: Any) -> None:
    chosen = ServerSettings(tokens_file=credentials.tokens_file)
    server = Server(chosen, [], credentials.authenticator)
    address = await server.start()
    assert address.startswith("127.0.0.1:")
    assert not address.endswith(":0")
    assert await health_of(address) == NOT_SERVING  # nothing to serve is not health
    await server.stop()
