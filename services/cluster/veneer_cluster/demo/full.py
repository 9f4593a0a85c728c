"""The owner's own job at full size: three rows of office documents, on Qwen3-VL-2B's shape."""

import json
import random
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from PIL import Image

from veneer.trainer.v1.training_job_pb2 import TrainingSpec
from veneer_client import Client, VeneerError, succeeded
from veneer_client.commands import screen
from veneer_client.commands.watching import watch_job
from veneer_cluster.demo.play import say
from veneer_cluster.folder import Folder, ProcessState

MAX_PIXELS = 448 * 448
ANSWER_TOKENS = 16
FULL_SIZE_TRAINABLE = 1_605_632  # rank 8 on q_proj and v_proj of the 2B shape
MOST_MEMORY_BYTES = 24 * 10**9
QUESTION = "这是什么单据?"
ROWS = {
    "invoice_01.png": "这是一张金额为 ¥8,650 的增值税发票,开票日期是2024年3月15日。",
    "table_02.jpg": "表格包含三列:产品名称、单价、数量。其中A款手机售价5999元,库存12台。",
    "form_03.png": "该申请表填写了姓名张伟、部门技术部、请假类型年假、天数3天。",
}
_ENLARGED = 3  # drawn pages are small; a scan is not


def write(folder: Path) -> None:
    """Writes the tutorial's folder: pictures in `images/`, though the rows do not say so."""
    from veneer_base import documents

    (folder / "images").mkdir(parents=True)
    r = random.Random(1)  # noqa: S311  # a choice to repeat, no secret
    for name, kind in zip(ROWS, documents.KINDS, strict=True):
        page = Image.fromarray(documents.draw(r, documents.WRITERS[kind, "zh"](r), "list"))
        size_px = (page.width * _ENLARGED, page.height * _ENLARGED)
        page.resize(size_px, Image.Resampling.BICUBIC).save(folder / "images" / name)
    lines = [json.dumps({"image": name, "text": text}, ensure_ascii=False) for name, text in ROWS.items()]
    (folder / "train.jsonl").write_text("".join(f"{line}\n" for line in lines), "utf-8")


def play(client: Client, cluster: Folder, folder: Path, shape_is_published: bool) -> dict[str, object]:
    """Runs the job, asks base and adapter, prints what each process took, and returns the figures.

    Raises:
        VeneerError: the cluster took too much memory, or the trainable parameters are not the shape's.
    """
    say("the owner's own job")
    started_s = time.monotonic()
    write(folder)
    push = client.datasets.push(folder, "office", prompt=QUESTION)
    for finding in push.findings:
        print(f"{finding.path}:{finding.line} {finding.code}: {finding.remedy}")
    spec = TrainingSpec(gradient_accumulation=2)
    job = client.jobs.train(
        "office",
        "office",
        rank=8,
        target_modules=("q_proj", "v_proj"),
        epochs=3,
        max_pixels=MAX_PIXELS,
        spec=spec,
    )
    job = succeeded(watch_job(client, job.name, json=False))
    trained_s = time.monotonic() - started_s
    trainable = job.resolved.trainable_parameters
    print(f"{trainable:,} trainable parameters; {len(job.attempts)} attempt")
    if shape_is_published and trainable != FULL_SIZE_TRAINABLE:
        raise VeneerError(f"{trainable:,} trainable parameters; this shape has {FULL_SIZE_TRAINABLE:,}")
    picture = folder / "images" / "form_03.png"
    for adapter in (None, "office"):
        print(f"{adapter or 'base'}: ", end="")
        for piece in client.stream(QUESTION, image=picture, adapter=adapter, max_tokens=ANSWER_TOKENS):
            print(piece.text, end="", flush=True)
        print()
    state = cluster.read_state()
    processes = state.processes if state else []
    _print_processes(processes)
    peak_bytes = sum(process.peak_memory_bytes for process in processes)
    if peak_bytes > MOST_MEMORY_BYTES:
        raise VeneerError(f"the cluster took {screen.size(peak_bytes)}, more than {screen.size(MOST_MEMORY_BYTES)}")
    return {
        "trainable_parameters": trainable,
        "training_s": trained_s,
        "total_s": time.monotonic() - started_s,
        "attempts": len(job.attempts),
        "peak_memory_bytes": peak_bytes,
        "processes": [asdict(process) for process in processes],
    }


def _print_processes(processes: Sequence[ProcessState]) -> None:
    rows = [
        (each.name, screen.size(each.peak_memory_bytes), screen.duration(each.cpu_s), str(each.restarts))
        for each in processes
    ]
    screen.print_table(("PROCESS", ">PEAK MEMORY", ">CPU TIME", ">RESTARTS"), rows, "no processes")
