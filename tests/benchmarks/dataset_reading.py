"""ReadExamples of a real service process, against a bare gRPC stream of the very same messages.

    python tests/benchmarks/dataset_reading.py [ROWS] [PICTURE_SIDE]

Both servers are processes of their own on loopback and are read by the same client, interleaved. The bare one holds
all messages in memory, serialised. Once with pictures as uploaded, once by digest (many small messages).
"""

import asyncio
import hashlib
import io
import json
import multiprocessing
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Iterable, Iterator
from multiprocessing.connection import Connection
from pathlib import Path

import grpc
import numpy as np
from PIL import Image

from veneer.dataset.v1 import dataset_service_pb2 as pb
from veneer.dataset.v1.dataset_service_pb2_grpc import DatasetServiceStub
from veneer_rpc.tokens import add_token

RUNS = 5
_BARE = "/bench.Bare/Read"
_PIECE_BYTES = 1 << 20


def main(count: int, side: int) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        token = add_token(folder / "tokens.json", "bench", ["user"])
        command = [sys.executable, "-m", "veneer_dataset", "--bind", "127.0.0.1:0", "--log-level", "warning"]
        command += ["--tokens-file", str(folder / "tokens.json"), "--data", str(folder / "data")]
        command += ["--die-with-parent", "true"]
        service = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)  # our own module
        try:
            assert service.stdout is not None
            address = service.stdout.readline().split()[-1]
            metadata = (("authorization", f"Bearer {token}"),)
            stub = DatasetServiceStub(grpc.insecure_channel(address))
            version = _pushed(stub, metadata, count, side)
            for form in (pb.PICTURE_FORM_ORIGINAL, pb.PICTURE_FORM_DIGEST):
                request = pb.ReadExamplesRequest(dataset_version=version, split="train", picture_form=form)
                _compare(pb.PictureForm.Name(form), lambda: stub.ReadExamples(request, metadata=metadata))  # noqa: B023
        finally:
            service.terminate()
            service.wait(30)


def _compare(name: str, read: "Iterable[pb.ReadExamplesResponse]") -> None:
    messages = [each.SerializeToString() for each in read()]  # type: ignore[operator]
    size_bytes = sum(map(len, messages))
    spawn = multiprocessing.get_context("spawn")  # a process that forks after gRPC started misbehaves
    ours, theirs = spawn.Pipe()
    process = spawn.Process(target=_serve, args=(theirs,), daemon=True)
    process.start()
    ours.send(messages)
    bare = grpc.insecure_channel(f"127.0.0.1:{ours.recv()}").unary_stream(
        _BARE, request_serializer=bytes, response_deserializer=pb.ReadExamplesResponse.FromString
    )
    own_s, peer_s = [], []
    for _ in range(RUNS):
        own_s.append(_seconds(read()))  # type: ignore[operator]
        peer_s.append(_seconds(bare(b"")))
    process.terminate()
    process.join()
    own, peer = statistics.median(own_s), statistics.median(peer_s)
    print(
        f"{name}: {len(messages):,} messages, {size_bytes / 1e6:,.1f} MB; ReadExamples {size_bytes / own / 1e6:,.0f} "
        f"MB/s, {len(messages) / own:,.0f}/s; bare {size_bytes / peer / 1e6:,.0f} MB/s, {len(messages) / peer:,.0f}/s; "
        f"ratio {peer / own:.0%}"
    )


def _seconds(stream: Iterable[object]) -> float:
    start_s = time.perf_counter()
    for _ in stream:
        pass
    return time.perf_counter() - start_s


def _serve(pipe: Connection) -> None:
    asyncio.run(_serve_bare(pipe))


async def _serve_bare(pipe: Connection) -> None:
    messages: list[bytes] = pipe.recv()

    async def read(request: bytes, context: object) -> AsyncIterator[bytes]:
        for message in messages:
            yield message

    server = grpc.aio.server()
    service, method = _BARE[1:].split("/")
    handler = grpc.unary_stream_rpc_method_handler(read)
    server.add_generic_rpc_handlers([grpc.method_handlers_generic_handler(service, {method: handler})])
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    pipe.send(port)
    await server.wait_for_termination()


def _pushed(stub: DatasetServiceStub, metadata: "tuple[tuple[str, str], ...]", count: int, side: int) -> str:
    rng = np.random.default_rng(0)
    pictures = {}
    for number in range(count):
        out = io.BytesIO()
        noise = rng.integers(0, 255, (side // 8, side // 8, 3), np.uint8)
        Image.fromarray(noise).resize((side, side), Image.Resampling.BICUBIC).save(out, "JPEG", quality=90)
        pictures[f"{number}.jpg"] = out.getvalue()
    rows = _lines({"image": path, "prompt": "What is it?", "text": f"It is {path}."} for path in pictures)
    manifest = _lines({"path": path, "digest": _sha256(data)} for path, data in pictures.items())

    def pieces() -> Iterator[pb.UploadBlobsRequest]:
        for blob in (rows, manifest, *pictures.values()):
            yield pb.UploadBlobsRequest(header=pb.BlobHeader(digest=_sha256(blob), size_bytes=len(blob)))
            for start in range(0, len(blob), _PIECE_BYTES):
                yield pb.UploadBlobsRequest(data=blob[start : start + _PIECE_BYTES])

    stub.UploadBlobs(pieces(), metadata=metadata)
    stub.CreateDataset(pb.CreateDatasetRequest(dataset_id="bench"), metadata=metadata)
    request = pb.CreateDatasetVersionRequest(
        parent="datasets/bench",
        row_files=[pb.RowFile(path="train.jsonl", digest=_sha256(rows))],
        picture_manifest=_sha256(manifest),
    )
    *_, last = stub.CreateDatasetVersion(request, metadata=metadata)
    return last.dataset_version.name


def _lines(rows: Iterable[object]) -> bytes:
    return b"".join(json.dumps(row).encode() + b"\n" for row in rows)


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


if __name__ == "__main__":
    main(*(int(each) for each in [*sys.argv[1:3], *["2000", "400"][len(sys.argv) - 1 :]]))
