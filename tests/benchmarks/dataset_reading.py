"""ReadExamples of a real service process, against bare gRPC streams of the same rows.

    python tests/benchmarks/dataset_reading.py [ROWS] [PICTURE_SIDE] [ROWS_BY_DIGEST]

All servers are processes of their own on loopback and are read by the same client, interleaved. The bare one holds
all messages in memory, serialised; a second one, of pictures as uploaded, has all but the pictures in memory and reads
each file when it sends it. With pictures as uploaded; already resized, as a worker reads the first quarter of them, out
of the service's cache; by digest: many small rows, on the same pictures. Rows come one a message (by digest the first
tenth of them), batched, and batched in an epoch's order; each against a bare stream of its very messages. Ratios are
of medians, with the least and greatest of a round.
"""

import asyncio
import hashlib
import io
import itertools
import json
import multiprocessing
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import grpc
import numpy as np
from PIL import Image

from veneer.dataset.v1 import dataset_service_pb2 as pb
from veneer.dataset.v1.dataset_service_pb2_grpc import DatasetServiceStub
from veneer.trainer.v1.model_pb2 import Model, ModelFile
from veneer.trainer.v1.model_service_pb2 import DownloadModelFilesResponse
from veneer.trainer.v1.model_service_pb2_grpc import ModelServiceServicer, add_ModelServiceServicer_to_server
from veneer_base.unfold import base_directory
from veneer_rpc.tokens import add_token

RUNS = 11
_BARE = "/bench.Bare/Read"
_PIECE_BYTES = 1 << 20
_MODEL = "models/tiny"
_WEIGHTS = ".safetensors"

_Messages = list[list[bytes | Path]]
"""Each message as its pieces, some of which are in files."""


def main(count: int, side: int, count_by_digest: int) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        token = add_token(folder / "tokens.json", "bench", ["user"])
        (folder / "trainer.token").write_text("unused\n")
        trainer, models_address = _models()
        command = [sys.executable, "-m", "veneer_dataset", "--bind", "127.0.0.1:0", "--log-level", "warning"]
        command += ["--tokens-file", str(folder / "tokens.json"), "--data", str(folder / "data")]
        command += ["--die-with-parent", "true", "--trainer", models_address]
        command += ["--trainer-token-file", str(folder / "trainer.token")]
        service = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)  # our own module
        try:
            assert service.stdout is not None
            address = service.stdout.readline().split()[-1]
            metadata = (("authorization", f"Bearer {token}"),)
            stub = DatasetServiceStub(grpc.insecure_channel(address))
            stub.CreateDataset(pb.CreateDatasetRequest(dataset_id="bench"), metadata=metadata)
            pictures = _pictures(count, side)
            versions = {rows: _pushed(stub, metadata, pictures, rows) for rows in (count, count_by_digest)}
            files = _written(folder / "files", pictures)
            for form, rows, read_count in (
                (pb.PICTURE_FORM_ORIGINAL, count, count),
                (pb.PICTURE_FORM_RESIZED, count, count // 4),
                (pb.PICTURE_FORM_DIGEST, count_by_digest, count_by_digest),
            ):
                ways: dict[str, dict[str, Any]] = {
                    "one a message": {"limit": read_count // 10 if form == pb.PICTURE_FORM_DIGEST else read_count},
                    "batched": {"batched": True, "limit": read_count},
                    "batched, shuffled": {"batched": True, "limit": read_count, "shuffle": pb.Shuffle(seed=1)},
                }
                reads = {}
                for way, fields in ways.items():
                    if form == pb.PICTURE_FORM_RESIZED:
                        fields["model"] = _MODEL
                    request = pb.ReadExamplesRequest(
                        dataset_version=versions[rows], split="train", picture_form=form, **fields
                    )
                    reads[way] = fields["limit"], partial(stub.ReadExamples, request, metadata=metadata)
                _compare(pb.PictureForm.Name(form), reads, files if form == pb.PICTURE_FORM_ORIGINAL else {})
        finally:
            service.terminate()
            service.wait(30)
            trainer.stop(0)


class _Models(ModelServiceServicer):
    """The trainer's part: hands out the small files of the demonstration base."""

    def __init__(self) -> None:
        self._files = {path.name: path.read_bytes() for path in base_directory().iterdir() if path.suffix != _WEIGHTS}

    def GetModel(self, request: Any, context: object) -> Model:  # noqa: ANN401
        files = [ModelFile(path=name, digest=_sha256(data), size_bytes=len(data)) for name, data in self._files.items()]
        return Model(name=_MODEL, digest="0" * 64, context_length=4096, files=files)

    def DownloadModelFiles(self, request: Any, context: object) -> Iterator[DownloadModelFilesResponse]:  # noqa: ANN401
        for name in request.paths:
            for at in range(0, len(self._files[name]), _PIECE_BYTES):
                piece = self._files[name][at : at + _PIECE_BYTES]
                yield DownloadModelFilesResponse(file=ModelFile(path=name), offset_bytes=at, data=piece)


def _models() -> tuple[grpc.Server, str]:
    """Serves the model; returns what does, and its address."""
    server = grpc.server(ThreadPoolExecutor(1))
    add_ModelServiceServicer_to_server(_Models(), server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    return server, f"127.0.0.1:{port}"


def _compare(
    name: str, reads: dict[str, tuple[int, Callable[[], Iterable[pb.ReadExamplesResponse]]]], files: dict[bytes, Path]
) -> None:
    """Prints how each of some ways to read so many rows stands to bare streams of its messages.

    Args:
        name: for people.
        reads: by name the rows that a way reads, and how.
        files: by its bytes where a picture lies.
    """
    for way, (count, read) in reads.items():
        messages = [each.SerializeToString() for each in read()]
        size_bytes = sum(map(len, messages))
        peers: dict[str, _Messages] = {"bare": [[each] for each in messages]}
        if files:
            peers["bare from files"] = [_cut(each, files) for each in messages]
        with _served(peers.values()) as streams:
            runs = [[_seconds(stream()) for stream in (read, *streams)] for _ in range(RUNS)]
        own, *others = (statistics.median(run) for run in zip(*runs, strict=True))
        print(
            f"{name}, {count:,} rows, {way}: {len(messages):,} messages, {size_bytes / 1e6:,.1f} MB; ReadExamples "
            f"{size_bytes / own / 1e6:,.0f} MB/s, {count / own:,.0f} rows/s"
        )
        for at, (peer, seconds) in enumerate(zip(peers, others, strict=True), 1):
            ratios = sorted(run[at] / run[0] for run in runs)
            print(
                f"  {peer} {size_bytes / seconds / 1e6:,.0f} MB/s, {count / seconds:,.0f} rows/s: "
                f"ratio {seconds / own:.0%} ({ratios[0]:.0%} to {ratios[-1]:.0%})",
                flush=True,
            )


def _cut(message: bytes, files: dict[bytes, Path]) -> list[bytes | Path]:
    """A message as what is in memory, and the files between."""
    pieces: list[bytes | Path] = []
    done = 0
    for data, path in files.items():
        at = message.find(data, done)
        if at >= 0:
            pieces += (message[done:at], path)
            done = at + len(data)
    return [*pieces, message[done:]]


def _written(folder: Path, pictures: dict[str, bytes]) -> dict[bytes, Path]:
    folder.mkdir()
    files = {}
    for name, data in pictures.items():
        files[data] = folder / name
        files[data].write_bytes(data)
    return files


@contextmanager
def _served(peers: Iterable[_Messages]) -> Iterator[list[Callable[[], Iterable[pb.ReadExamplesResponse]]]]:
    """Serves each peer's messages from a process of its own, and gives what reads them."""
    spawn = multiprocessing.get_context("spawn")  # a process that forks after gRPC started misbehaves
    streams: list[Callable[[], Iterable[pb.ReadExamplesResponse]]] = []
    processes = []
    for messages in peers:
        ours, theirs = spawn.Pipe()
        processes.append(spawn.Process(target=_serve, args=(theirs,), daemon=True))
        processes[-1].start()
        ours.send(messages)
        bare = grpc.insecure_channel(f"127.0.0.1:{ours.recv()}").unary_stream(
            _BARE, request_serializer=bytes, response_deserializer=pb.ReadExamplesResponse.FromString
        )
        streams.append(partial(bare, b""))
    try:
        yield streams
    finally:
        for process in processes:
            process.terminate()
            process.join()


def _seconds(stream: Iterable[object]) -> float:
    start_s = time.perf_counter()
    for _ in stream:
        pass
    return time.perf_counter() - start_s


def _serve(pipe: Connection) -> None:
    asyncio.run(_serve_bare(pipe))


async def _serve_bare(pipe: Connection) -> None:
    messages: _Messages = pipe.recv()

    async def read(request: bytes, context: object) -> AsyncIterator[bytes]:
        for message in messages:
            first, *more = message
            if more:
                yield b"".join(piece if isinstance(piece, bytes) else piece.read_bytes() for piece in message)
            elif isinstance(first, bytes):
                yield first

    server = grpc.aio.server()
    service, method = _BARE[1:].split("/")
    handler = grpc.unary_stream_rpc_method_handler(read)
    server.add_generic_rpc_handlers([grpc.method_handlers_generic_handler(service, {method: handler})])
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    pipe.send(port)
    await server.wait_for_termination()


def _pictures(count: int, side: int) -> dict[str, bytes]:
    rng = np.random.default_rng(0)
    pictures = {}
    for number in range(count):
        out = io.BytesIO()
        noise = rng.integers(0, 255, (side // 8, side // 8, 3), np.uint8)
        Image.fromarray(noise).resize((side, side), Image.Resampling.BICUBIC).save(out, "JPEG", quality=90)
        pictures[f"{number}.jpg"] = out.getvalue()
    return pictures


def _pushed(
    stub: DatasetServiceStub, metadata: "tuple[tuple[str, str], ...]", pictures: dict[str, bytes], count: int
) -> str:
    """Makes a version of so many rows, each with one of the pictures; returns its name."""
    paths = itertools.islice(itertools.cycle(pictures), count)
    rows = _lines(
        {"image": path, "prompt": "What is it?", "text": f"It is {number} and {path}."}
        for number, path in enumerate(paths)
    )
    manifest = _lines({"path": path, "digest": _sha256(data)} for path, data in pictures.items())

    def pieces() -> Iterator[pb.UploadBlobsRequest]:
        for blob in (rows, manifest, *pictures.values()):
            yield pb.UploadBlobsRequest(header=pb.BlobHeader(digest=_sha256(blob), size_bytes=len(blob)))
            for start in range(0, len(blob), _PIECE_BYTES):
                yield pb.UploadBlobsRequest(data=blob[start : start + _PIECE_BYTES])

    stub.UploadBlobs(pieces(), metadata=metadata)
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
    main(*(int(each) for each in [*sys.argv[1:4], *["2000", "400", "100000"][len(sys.argv) - 1 :]]))
