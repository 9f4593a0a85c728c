"""L1: one machine trains and serves; first token and training's pace, each alone and both together.

python tests/benchmarks/train_and_serve.py [--base DIR_OR_HUB_ID] [--seconds 30] [--runs 3]
"""

import argparse
import itertools
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from inference_limits import spread

from veneer.trainer.v1.training_job_pb2 import JobState
from veneer_client import Client

ASK_EVERY_S = 0.5
QUESTION = "What is the total?"


def veneer(*words: object) -> None:
    subprocess.run([sys.executable, "-m", "veneer_client", *map(str, words)], check=True, stdout=subprocess.DEVNULL)


def main(options: argparse.Namespace) -> None:
    with tempfile.TemporaryDirectory(prefix="veneer-bench-") as name:
        root, rows = Path(name) / "cluster", Path(name) / "rows"
        veneer("dataset", "synth", "--kind", "invoice", "--rows", 64, "--out", rows)
        veneer("up", "--detach", "--dir", root, *(["--base", options.base] if options.base else []))
        try:
            with Client(directory=root) as client:
                measure(client, rows, options)
        finally:
            veneer("down", "--dir", root)


def measure(client: Client, rows: Path, options: argparse.Namespace) -> None:
    client.datasets.push(rows, "invoices")
    picture = next(path for path in sorted(rows.rglob("*")) if path.suffix in (".png", ".jpg"))
    fresh = itertools.count()
    first_tokens(client, picture, 3, fresh)  # warm up
    slower, kept = [], []
    for run in range(options.runs):
        alone_s = statistics.median(first_tokens(client, picture, options.seconds, fresh))
        job = client.jobs.train("invoices", f"bench-{run}", steps=100_000, rank=8, batch_size=4, seed=run).name
        while client.jobs.get(job).progress.step < 2:
            time.sleep(0.5)
        alone_rate = pace(client, job, lambda: time.sleep(options.seconds))
        both_s: list[float] = []
        both_rate = pace(client, job, lambda: both_s.extend(first_tokens(client, picture, options.seconds, fresh)))  # noqa: B023
        client.jobs.cancel(job)
        while client.jobs.get(job).state != JobState.JOB_STATE_CANCELLED:
            time.sleep(0.5)
        slower.append(statistics.median(both_s) / alone_s)
        kept.append(100 * both_rate / alone_rate)
    print(f"first token while training {spread(slower, 2)}x of alone; training keeps {spread(kept)} % of its pace")


def first_tokens(client: Client, picture: Path, seconds: float, fresh: "itertools.count[int]") -> list[float]:
    """Times to first token of questions that come at a steady pace."""
    found, end_s = [], time.monotonic() + seconds
    while time.monotonic() < end_s:
        asked_s = time.monotonic()
        for _ in client.stream(f"{next(fresh)}. {QUESTION}", image=picture, max_tokens=8):
            found.append(time.monotonic() - asked_s)
            break
        time.sleep(max(0.0, asked_s + ASK_EVERY_S - time.monotonic()))
    return found


def pace(client: Client, job: str, meanwhile) -> float:  # noqa: ANN001
    """Steps a second while something happens."""
    first, started_s = client.jobs.get(job).progress.step, time.monotonic()
    meanwhile()
    return (client.jobs.get(job).progress.step - first) / (time.monotonic() - started_s)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--base", help="default: the demonstration base")
    parser.add_argument("--seconds", type=float, default=30)
    parser.add_argument("--runs", type=int, default=3)
    main(parser.parse_args())
