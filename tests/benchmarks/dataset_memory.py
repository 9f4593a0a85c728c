"""Peak memory of a service that freezes a version of a million rows, each with a picture of its own.

    python tests/benchmarks/dataset_memory.py [ROWS] [GIB]

The blobs, so many GiB of them altogether, are put into the index alone, together with what decoding them would tell:
freezing opens none that it knows already. So neither upload nor decoder is measured, but the service's own tables,
spools and streams. A million rows take some minutes. Prints peak resident memory (VmHWM) and rows a second.
"""

import hashlib
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import grpc
import sqlalchemy as sa

from veneer.dataset.v1 import dataset_service_pb2 as pb
from veneer.dataset.v1.dataset_service_pb2_grpc import DatasetServiceStub
from veneer_dataset.adapters.sql.database import Database, now_us
from veneer_dataset.adapters.sql.facts import SqlFacts
from veneer_dataset.domain.pictures import PictureFacts
from veneer_rpc.tokens import add_token

BOUND_BYTES = 500 << 20
_PIECE_BYTES = 1 << 20
_AT_ONCE = 5_000
_TENANT = "bench"


@dataclass(frozen=True)
class Peaks:
    """Peak resident memory until then, in bytes, and how long it took."""

    idle_bytes: int
    made_bytes: int
    read_bytes: int
    made_s: float
    read_s: float


def main(count: int, gib: int) -> None:
    peaks = measure(count, gib)
    print(
        f"{count:,} rows and pictures, {gib} GiB: {count / peaks.made_s:,.0f} rows/s made, "
        f"{count / peaks.read_s:,.0f} rows/s read shuffled; peak {peaks.idle_bytes >> 20} MiB idle, "
        f"{peaks.made_bytes >> 20} MiB made, {peaks.read_bytes >> 20} MiB read (bound {BOUND_BYTES >> 20}): "
        f"{'within' if peaks.read_bytes < BOUND_BYTES else 'OVER'}"
    )


def measure(count: int, gib: int) -> Peaks:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        token = add_token(folder / "tokens.json", _TENANT, ["user"])
        pictures = [hashlib.sha256(str(number).encode()).hexdigest() for number in range(count)]
        _sparse(folder / "data", pictures, (gib << 30) // count)
        command = [sys.executable, "-m", "veneer_dataset", "--bind", "127.0.0.1:0", "--log-level", "warning"]
        command += ["--tokens-file", str(folder / "tokens.json"), "--data", str(folder / "data")]
        command += ["--die-with-parent", "true"]
        service = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)  # our own module
        try:
            assert service.stdout is not None
            address = service.stdout.readline().split()[-1]
            metadata = (("authorization", f"Bearer {token}"),)
            channel = grpc.insecure_channel(address)
            stub = DatasetServiceStub(channel)
            stub.CreateDataset(pb.CreateDatasetRequest(dataset_id="bench"), metadata=metadata)
            rows = _upload(stub, metadata, _rows(folder / "train.jsonl", count))
            manifest = _upload(stub, metadata, _manifest(folder / "manifest", pictures))
            idle_bytes, start_s = _peak_bytes(service.pid), time.perf_counter()
            request = pb.CreateDatasetVersionRequest(
                parent="datasets/bench",
                row_files=[pb.RowFile(path="train.jsonl", digest=rows)],
                picture_manifest=manifest,
            )
            *_, last = stub.CreateDatasetVersion(request, metadata=metadata)
            made_s, made_bytes = time.perf_counter() - start_s, _peak_bytes(service.pid)
            read = pb.ReadExamplesRequest(
                dataset_version=last.dataset_version.name, split="train", shuffle=pb.Shuffle(seed=1)
            )
            start_s = time.perf_counter()
            read_rows = sum(1 for _ in stub.ReadExamples(read, metadata=metadata))
            read_s, peak_bytes = time.perf_counter() - start_s, _peak_bytes(service.pid)
            channel.close()
        finally:
            service.terminate()
            service.communicate(timeout=60)
    assert read_rows == last.dataset_version.report.accepted_rows == count
    return Peaks(idle_bytes, made_bytes, peak_bytes, made_s, read_s)


def _sparse(data: Path, pictures: list[str], size_bytes: int) -> None:
    """Says that a tenant has these blobs, and that they are fine pictures; nobody opens one here."""
    data.mkdir()
    database = Database(f"sqlite:///{data / 'metadata.sqlite'}")
    facts, blobs = SqlFacts(database), database.table("blobs")
    for start in range(0, len(pictures), _AT_ONCE):
        some = pictures[start : start + _AT_ONCE]
        with database.write() as connection:  # SqlBlobs would look at each by itself
            rows = [
                {
                    "tenant": _TENANT,
                    "digest": digest,
                    "size_bytes": size_bytes,
                    "location": f"{_TENANT}/{digest[:2]}/{digest}-0",
                    "asked_us": now_us(),
                }
                for digest in some
            ]
            connection.execute(sa.insert(blobs), rows)
            facts.add(_TENANT, {digest: PictureFacts(640, 480, int(digest[:16], 16)) for digest in some})
    database.close()


def _rows(file: Path, count: int) -> Path:
    with file.open("w") as out:
        for number in range(count):
            row = {"image": f"images/{number:08d}.jpg", "text": f"This is picture {number} of {count}."}
            out.write(json.dumps(row | {"prompt": f"What is number {number}?"}) + "\n")
    return file


def _manifest(file: Path, pictures: list[str]) -> Path:
    with file.open("w") as out:
        for number, digest in enumerate(pictures):
            out.write(f'{{"path":"images/{number:08d}.jpg","digest":"{digest}"}}\n')
    return file


def _upload(stub: DatasetServiceStub, metadata: "tuple[tuple[str, str], ...]", file: Path) -> str:
    with file.open("rb") as data:
        digest = hashlib.file_digest(data, "sha256").hexdigest()

    def pieces() -> Iterator[pb.UploadBlobsRequest]:
        yield pb.UploadBlobsRequest(header=pb.BlobHeader(digest=digest, size_bytes=file.stat().st_size))
        with file.open("rb") as data:
            while piece := data.read(_PIECE_BYTES):
                yield pb.UploadBlobsRequest(data=piece)

    stub.UploadBlobs(pieces(), metadata=metadata)
    return digest


def _peak_bytes(pid: int) -> int:
    status = Path(f"/proc/{pid}/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) * 1024


if __name__ == "__main__":
    main(*(int(each) for each in [*sys.argv[1:3], *["1000000", "50"][len(sys.argv) - 1 :]]))
