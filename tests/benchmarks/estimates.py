"""E1: what jobs are estimated to take, against what they take: time and peak memory of a spread of jobs.

    python tests/benchmarks/estimates.py [--base DIR_OR_HUB_ID] [--seconds 6] [--threads 1] [--json]

A real trainer, dataset service and worker. The worker measures its default shapes in idle time; then each job is
estimated, trained for as many steps as shall take `--seconds`, and compared: time in steps, and peak memory. No two
jobs share pictures, so that a frozen tower sees all of them. The rate of a matrix product is measured during the job,
which is held meanwhile, as it is with each calibration: `scaled` is the estimate times the rate at calibration over
that. In the end, when the worker has measured each job's own shape too, the same jobs are estimated again.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
from PIL import Image

from veneer.trainer.v1.training_job_pb2 import JobState, TrainingEstimate, TrainingJob, TrainingSpec
from veneer.trainer.v1.worker_service_pb2 import Calibration
from veneer_client import Client
from veneer_cluster import base, credentials
from veneer_cluster.folder import Folder
from veneer_cluster.programs import FLAGS, free_ports
from veneer_trainer.worker.loop.calibration import gemm_flops_per_s
from veneer_vlm import bfloat16

ROWS = 64
ALL = "decoder+merger+vision"
LOOK_EVERY_S = 0.6
DEFAULTS = {("attention", 8), ("decoder", 16), (ALL, 8)}  # what a worker measures by itself
WITHOUT = {"redis", "inference", "metrics-port"}  # of a cluster's flags
READY = {"veneer_trainer": "veneer_trainer listening", "veneer_dataset": "veneer_dataset listening",
         "veneer_trainer.worker": "veneer_worker"}  # fmt: skip


@dataclass(frozen=True)
class Shape:
    """A job: its adapter, its rows, and how many of them make a step. A side of 0 is a row without a picture."""

    targets: str
    rank: int
    side: int
    prompt_words: int
    answer_words: int
    batch_size: int
    accumulation: int

    def __str__(self) -> str:
        rows = f"{self.batch_size}x{self.accumulation}"
        return f"{self.targets} r{self.rank}, {self.side} px, {self.prompt_words}+{self.answer_words} words, {rows}"


SHAPES = (
    Shape("attention", 8, 128, 6, 6, 1, 2),
    Shape("attention", 8, 448, 6, 6, 1, 2),
    Shape("attention", 64, 224, 20, 20, 2, 2),
    Shape("attention", 16, 0, 60, 60, 4, 1),
    Shape("attention", 8, 224, 10, 60, 16, 1),
    Shape("q_proj", 4, 320, 30, 10, 2, 1),
    Shape("decoder", 16, 224, 20, 20, 1, 2),
    Shape("decoder", 8, 448, 10, 100, 2, 1),
    Shape("decoder", 64, 128, 6, 6, 4, 2),
    Shape("decoder", 16, 320, 20, 20, 8, 1),
    Shape("decoder", 32, 0, 100, 20, 2, 4),
    Shape("decoder+merger", 16, 224, 20, 20, 2, 2),
    Shape(ALL, 8, 224, 20, 20, 1, 2),
    Shape(ALL, 16, 448, 6, 6, 2, 1),
    Shape(ALL, 8, 128, 20, 60, 8, 1),
)


class Services:
    """Trainer, dataset service and worker on this machine."""

    def __init__(self, root: Path, reference: str | None, threads: int, stack: ExitStack) -> None:
        self._folder, self._stack = Folder(root), stack
        self._folder.create()
        self.token = credentials.ensure(self._folder)
        found = base.find(reference)
        self.dataset, self.trainer = (f"127.0.0.1:{port}" for port in free_ports(2))
        self._values = {
            "root": root, "secrets": self._folder.secrets, "model": found.model, "base": found.directory,
            "dataset": self.dataset, "trainer": self.trainer, "name": "worker-1", "cores": threads,
        }  # fmt: skip
        for module in READY:
            self._start(module)
        self.calibrations = root / "worker-1" / "calibrations"

    def _start(self, module: str) -> None:
        flags = {name: value for name, value in FLAGS[module].items() if name not in WITHOUT}
        if module == "veneer_trainer.worker":
            flags |= {"calibrate-idle-s": "3", "kinds": "training"}
        words = [text for name, value in flags.items() for text in (f"--{name}", value.format_map(self._values))]
        log = self._stack.enter_context(self._folder.log(module).open("wb"))
        process = self._stack.enter_context(
            subprocess.Popen([sys.executable, "-m", module, *words], stdout=subprocess.PIPE, stderr=log, text=True)
        )
        self._stack.callback(process.terminate)
        self.worker = psutil.Process(process.pid)  # the last to start
        assert process.stdout is not None
        line = process.stdout.readline()
        assert line.startswith(READY[module]), self._folder.log(module).read_text("utf-8")

    def measured(self, count: int) -> float:
        """Waits until the worker has measured so many shapes; returns the rate of a product then, in FLOP/s."""
        wait(lambda: len(list(self.calibrations.glob("*.calibration"))) >= count)
        time.sleep(2)  # the worker's next request says what it has measured
        found = [Calibration.FromString(path.read_bytes()) for path in self.calibrations.glob("*.calibration")]
        return statistics.mean(each.gemm_flops_per_s for each in found)


def wait(holds: Callable[[], Any], limit_s: float = 240) -> None:
    end_s = time.monotonic() + limit_s
    while not holds():
        assert time.monotonic() < end_s, "it did not come about"
        time.sleep(0.1)


def watched(client: Client, job: str, worker: psutil.Process) -> tuple[float, float]:
    """Waits for a job's end; returns the seconds that it was held meanwhile, and the rate of a product then, in FLOP/s.

    Beside a job the product would be slower than beside a calibration, and would slow the job: that is held meanwhile.
    """
    held_s, rates = 0.0, []
    while (now := client.jobs.get(job)).state not in (JobState.JOB_STATE_SUCCEEDED, JobState.JOB_STATE_FAILED):
        children = [child for server in worker.children() for child in server.children()]
        if now.state == JobState.JOB_STATE_RUNNING and now.progress.step and children:
            began_s = time.perf_counter()
            with suppress(psutil.NoSuchProcess):
                children[0].suspend()
                rates.append(gemm_flops_per_s(torch.bfloat16 if bfloat16.SUPPORTED else torch.float32, "cpu"))
                children[0].resume()
            held_s += time.perf_counter() - began_s
        time.sleep(LOOK_EVERY_S)
    return held_s, statistics.harmonic_mean(rates)


def write_rows(folder: Path, shape: Shape, seed: int) -> None:
    """Rows of about the shape's length; no other job has their pictures."""
    chance = np.random.default_rng(seed)
    folder.mkdir(parents=True)
    lines = []
    for number in range(ROWS):
        words = ["".join(chance.choice([*"abcdefghij"], 5)) for _ in range(shape.prompt_words + shape.answer_words)]
        row = {"prompt": " ".join(words[: shape.prompt_words]), "text": " ".join(words[shape.prompt_words :])}
        if shape.side:
            row["image"] = f"{number}.png"
            dots = chance.integers(0, 255, (8, 8, 3), np.uint8)
            Image.fromarray(dots).resize((shape.side, shape.side)).save(folder / row["image"])
        lines.append(json.dumps(row))
    (folder / "train.jsonl").write_text("\n".join(lines) + "\n")


def run(
    client: Client, folder: Path, model: str, number: int, shape: Shape, seconds: float, worker: psutil.Process
) -> dict[str, Any]:
    """Estimates a job and trains it."""
    name = f"estimates-{number}"
    write_rows(folder / name, shape, number)
    version = client.datasets.push(folder / name, name, model=model).version
    spec = TrainingSpec(
        model=model, dataset_version=version.name, adapter=f"adapters/{name}", steps=1000, max_length=2048,
        batch_size=shape.batch_size, gradient_accumulation=shape.accumulation, checkpoint_interval_steps=1_000_000,
        lora={"rank": shape.rank, "alpha": 2.0 * shape.rank, "target_modules": [shape.targets]},
    )  # fmt: skip
    per_step_s = client.jobs.estimate(spec).duration.ToMilliseconds() / 1e6
    spec.steps = max(4, round(seconds / per_step_s))
    told = client.jobs.estimate(spec)
    job = client.jobs.train(name, name, spec=spec).name
    paused_s, rate = watched(client, job, worker)
    ended: TrainingJob = client.jobs.get(job)
    assert ended.adapter_version, ended.failure
    return {
        "shape": shape, "spec": spec, "told": told, "gemm": rate,
        "seconds": ended.progress.elapsed.ToMilliseconds() / 1e3 - paused_s, "bytes": ended.progress.peak_memory_bytes,
    }  # fmt: skip


def errors(done: list[dict[str, Any]], told: list[TrainingEstimate], gemm: float) -> dict[str, list[float]]:
    """What estimates are off by: (estimate - seen) / seen."""
    found: dict[str, list[float]] = {"time": [], "scaled": [], "memory": []}
    for each, estimate in zip(done, told, strict=True):
        told_s = estimate.duration.ToMilliseconds() / 1e3
        found["time"].append(told_s / each["seconds"] - 1)
        found["scaled"].append(told_s * gemm / each["gemm"] / each["seconds"] - 1)
        found["memory"].append(estimate.peak_memory_bytes / each["bytes"] - 1)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--base", help="default: the demonstration base")
    parser.add_argument("--seconds", type=float, default=6)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--only", default="", help="numbers of jobs, separated by commas; default: all")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    chosen = [int(number) for number in options.only.split(",")] if options.only else range(len(SHAPES))
    with tempfile.TemporaryDirectory(prefix="veneer-bench-") as name, ExitStack() as stack:
        services = Services(Path(name) / "cluster", options.base, options.threads, stack)
        client = stack.enter_context(
            Client(dataset=services.dataset, trainer=services.trainer, inference=("127.0.0.1:9",), token=services.token)
        )
        model = next(iter(client.models.list())).name
        gemm = services.measured(len(DEFAULTS))
        done = [
            run(client, Path(name), model, number, SHAPES[number], options.seconds, services.worker)
            for number in chosen
        ]
        own_gemm = services.measured(len(DEFAULTS | {(each["shape"].targets, each["shape"].rank) for each in done}))
        again = [client.jobs.estimate(each["spec"]) for each in done]
    first = errors(done, [each["told"] for each in done], gemm)
    second = errors(done, again, own_gemm)
    if options.json:
        print(
            json.dumps(
                {"first": first, "own_shape": second, "gemm": gemm, "jobs": [str(each["shape"]) for each in done]}
            )
        )
        return
    print(f"default shapes were measured at {gemm / 1e9:.1f} GFLOP/s, jobs' own at {own_gemm / 1e9:.1f}")
    print(f"{'job':58} {'steps':>6} {'told s':>7} {'seen s':>7} {'GFLOP/s':>8} {'time':>6} {'scaled':>7} "
          f"{'told MB':>8} {'seen MB':>8} {'memory':>7} {'own shape: scaled, memory':>26}")  # fmt: skip
    for at, each in enumerate(done):
        told = each["told"]
        print(
            f"{each['shape']!s:58} {told.steps:6} {told.duration.ToMilliseconds() / 1e3:7.1f} {each['seconds']:7.1f} "
            f"{each['gemm'] / 1e9:8.1f} {first['time'][at]:+6.0%} {first['scaled'][at]:+7.0%} "
            f"{told.peak_memory_bytes / 1e6:8.0f} {each['bytes'] / 1e6:8.0f} {first['memory'][at]:+7.0%} "
            f"{second['scaled'][at]:+16.0%} {second['memory'][at]:+9.0%}"
        )
    for words, found in (("first", first), ("own shape", second)):
        medians = (f"{name} {statistics.median(map(abs, values)):.1%} (at most {max(map(abs, values)):.0%})"
                   for name, values in found.items())  # fmt: skip
        print(f"median error, {words}: {', '.join(medians)}")


if __name__ == "__main__":
    main()
