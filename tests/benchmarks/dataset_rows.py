"""Rows validated a second on one core: parsed, read, canonical, hashed; no pictures, no tokens.

    python tests/benchmarks/dataset_rows.py [ROWS]

Against the least that a row can cost, in the same run, interleaved: its line parsed, one form of it written, hashed
and written to a file.
"""

import hashlib
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import msgspec

from veneer_dataset.domain.finding_log import FindingLog
from veneer_dataset.domain.intake import RowIntake, RowRecord
from veneer_dataset.domain.picture_paths import PictureManifest
from veneer_dataset.domain.pictures import PictureTable
from veneer_dataset.domain.spool import Spool

RUNS = 5


def main(count: int) -> None:
    rows = [
        {"prompt": f"What is number {number}?", "text": "这张图片展示了一个红色的消防车正在街道上行驶。"}
        for number in range(count)
    ]
    data = b"".join(json.dumps(row, ensure_ascii=False).encode() + b"\n" for row in rows)

    def validate() -> None:
        with (
            tempfile.TemporaryDirectory() as name,
            Path(name, "rows").open("w+b") as spool,
            Path(name, "findings").open("w+b") as log,
        ):
            intake = RowIntake(
                PictureManifest(),
                PictureTable(),
                Spool(spool, RowRecord),
                FindingLog(log),
                Path(name),
                "",
                lambda _: None,
            )
            intake.read(0, "train.jsonl", [data[at : at + (1 << 20)] for at in range(0, len(data), 1 << 20)])

    decode, encode = msgspec.json.Decoder().decode, msgspec.json.Encoder(order="sorted").encode

    def least() -> None:
        with tempfile.TemporaryFile() as file:
            for line in data.splitlines():
                written = encode(decode(line))
                file.write(hashlib.sha256(written).digest() + written)

    own, bare = [], []
    for _ in range(RUNS):
        own.append(count / seconds(validate))
        bare.append(count / seconds(least))
    print(f"validated {statistics.median(own):,.0f} rows/s ({min(own):,.0f}-{max(own):,.0f})")
    print(f"parsed, hashed and written alone {statistics.median(bare):,.0f} rows/s ({min(bare):,.0f}-{max(bare):,.0f})")
    print(f"ratio {statistics.median(own) / statistics.median(bare):.0%}")


def seconds(work: Callable[[], None]) -> float:
    """Processor seconds: rows a second a core."""
    start_s = time.process_time()
    work()
    return time.process_time() - start_s


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 200_000)
