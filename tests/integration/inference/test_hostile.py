# ruff: noqa: ANN401  # the kit is the conftest's
"""Hostile adapters and crowds at a live process: each is refused by name, and the same process answers on."""

import asyncio
import json
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import grpc
import psutil
import pytest
import torch
from safetensors.torch import load_file, save_file

from veneer.inference.v1 import inference_service_pb2 as pb

TENSORS, CONFIG, CONTRACT = "adapter_model.safetensors", "adapter_config.json", "processing_contract.json"
GROWTH_BYTES = 64 << 20


def tensors(change: Callable[[dict[str, torch.Tensor], str], Any]) -> Callable[[Path], None]:
    def apply(directory: Path) -> None:
        held = load_file(directory / TENSORS)
        change(held, next(name for name in held if name.endswith("lora_A.weight")))
        save_file(held, directory / TENSORS)

    return apply


def values(name: str, **changes: Any) -> Callable[[Path], None]:
    def apply(directory: Path) -> None:
        path = directory / name
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return apply


def header(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    def apply(directory: Path) -> None:
        path = directory / TENSORS
        data = path.read_bytes()
        (size,) = struct.unpack("<Q", data[:8])
        told = json.loads(data[8 : 8 + size])
        change(told)
        text = json.dumps(told).encode()
        path.write_bytes(struct.pack("<Q", len(text)) + text + data[8 + size :])

    return apply


def overlap(told: dict[str, Any]) -> None:
    first, second = [each for name, each in told.items() if name != "__metadata__"][:2]
    second["data_offsets"] = first["data_offsets"]


def beyond(told: dict[str, Any]) -> None:
    next(each for name, each in told.items() if name != "__metadata__")["data_offsets"] = [0, 1 << 62]


def file(name: str, content: bytes) -> Callable[[Path], None]:
    return lambda directory: (directory / name).write_bytes(content) and None


HOSTILE: dict[str, tuple[Callable[[Path], None], str]] = {
    "a pickle under another name": (file(TENSORS, b"\x80\x04cos\nsystem\n(S'true'\ntR."), ""),
    "a header of 2**63 bytes": (file(TENSORS, struct.pack("<Q", 1 << 63) + b"{}"), ""),
    "ranges that overlap": (header(overlap), "overlap"),
    "ranges beyond the file": (header(beyond), ""),
    "not a number": (tensors(lambda held, name: held[name].fill_(torch.nan)), "not finite"),
    "infinite": (tensors(lambda held, name: held[name].fill_(torch.inf)), "not finite"),
    "a rank unlike its configuration": (values(CONFIG, r=5), "is needed"),
    "a rank above the limit": (values(CONFIG, r=4096), ""),
    "a wrong shape": (tensors(lambda held, name: held.update({name: torch.ones(3, 3)})), "has shape (3, 3)"),
    "a key missing": (tensors(lambda held, name: held.pop(name)), "is missing"),
    "a key too many": (tensors(lambda held, name: held.update(strange=torch.ones(1))), "strange is unknown"),
    "modules to save": (values(CONFIG, modules_to_save=["lm_head"]), "modules_to_save"),
    "a pattern that matches for ever": (values(CONFIG, target_modules="(a+)+$"), ""),
    "another base": (values(CONTRACT, model_digest="cd" * 32), "model_digest"),
    "another template": (values(CONTRACT, template_digest="cd" * 32), "template_digest"),
    "no contract": (lambda directory: (directory / CONTRACT).unlink(), CONTRACT),
    "a file with a path": (file("a b", b"x"), "a b"),
}


@pytest.mark.timeout(300)
async def test_hostile_adapters_are_refused_by_name_and_the_process_lives(kit: Any) -> None:
    kit.train(1)
    good = kit.registry.versions["acme", "adapters/digits/versions/1"]
    kit.registry.promote("acme", "digits", production=1)
    process = kit.process()
    await process.start()
    right = (await kit.ask("adapters/digits", max_tokens=4)).token_ids
    pids = process.process.pid, process.engine_pid()

    def memory_bytes() -> int:
        return sum(psutil.Process(pid).memory_info().rss for pid in pids)

    before_bytes = memory_bytes()
    for number, (change, said) in enumerate(HOSTILE.values(), 2):
        directory = kit.registry.folders / "hostile" / str(number)
        shutil.copytree(good, directory)
        change(directory)
        name = f"adapters/digits/versions/{number}"
        kit.registry.versions["acme", name] = directory
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await kit.ask(name)
        assert refused.value.code() is grpc.StatusCode.FAILED_PRECONDITION, (name, refused.value.details())
        text = str(refused.value.details())
        assert said in text, text
        assert len(text.encode()) <= 512
        assert str(kit.tmp) not in text
        assert "Traceback" not in text
        assert (await kit.ask("adapters/digits", max_tokens=4)).token_ids == right
    with pytest.raises(grpc.aio.AioRpcError) as refused:
        await kit.ask("adapters/digits/versions/1", tenant="other")
    assert refused.value.code() is grpc.StatusCode.NOT_FOUND
    assert (process.process.pid, process.engine_pid()) == pids
    assert memory_bytes() - before_bytes < GROWTH_BYTES
    kept = [each.name for each in (kit.tmp / "data/r1/adapters").iterdir()]
    assert len(kept) == 1  # of what was refused nothing stays
    page = await kit.stub().ListLoadedAdapters(pb.ListLoadedAdaptersRequest())
    assert [each.adapter_version for each in page.loaded_adapters] == ["adapters/digits/versions/1"]


async def test_a_thousand_streams_on_one_connection_are_capped(kit: Any) -> None:
    await kit.start(max_concurrent_calls=32)
    kit.engine.pace.clear()
    stub = kit.stub()
    streams = [stub.StreamGenerate(kit.stream_request("models/tiny")) for _ in range(1000)]
    first = await asyncio.gather(*(each.read() for each in streams), return_exceptions=True)
    refused = [each for each in first if isinstance(each, grpc.aio.AioRpcError)]
    begun = [each for each, piece in zip(streams, first, strict=True) if not isinstance(piece, BaseException)]
    assert len(begun) == len(kit.engine.active) == 32
    assert {each.code() for each in refused} == {grpc.StatusCode.RESOURCE_EXHAUSTED}
    assert kit.retry_s(refused[0]) > 0
    kit.engine.pace.set()
    for stream in begun:
        assert [each async for each in stream][-1].finish_reason
    assert (await kit.ask("models/tiny")).text
    assert not kit.engine.active
