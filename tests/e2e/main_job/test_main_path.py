"""Upload, validate, queue, train, publish, evaluate, promote, swap, answer: on real processes, as people type it."""

# ruff: noqa: ANN401  # the cluster's type stays in conftest

import json
import os
import re
import shutil
import subprocess
import threading
import urllib.request
from pathlib import Path
from typing import Any

import pytest

from veneer_client import Client, InvalidArgument, NotFound, Unauthenticated
from veneer_client.commands.evaluation import METRICS, report
from veneer_rpc.certificate import verify

NODE = Path(__file__).parents[3] / "clients" / "node"
QUESTION = "Which digit is this? Answer with one digit from 0 to 9."
TRAIN = ("--steps", 4, "--rank", 4, "--batch-size", 4, "--learning-rate", 0.01)


def test_the_commands_of_the_readme(cluster: Any, folder: Path, tmp_path: Path) -> None:
    pushed = cluster.veneer("dataset", "push", folder, "--name", "digits")
    assert re.search(r"rows +104 accepted", pushed)
    processes = {process.name: process.pid for process in cluster.state().processes}
    watched = cluster.veneer("train", "digits", "--adapter", "digits", *TRAIN, "--watch")
    assert "adapters/digits/versions/1" in watched or "digits@1" in watched

    picture = folder / "images" / "test" / "0000.png"
    bare = cluster.client.generate(QUESTION, image=picture, max_tokens=4)
    adapted = cluster.client.generate(QUESTION, image=picture, adapter="digits", max_tokens=4)
    version = cluster.client.adapters.get_version("digits@1")
    assert (bare.served_by.adapter_version, bare.served_by.adapter_digest) == ("", "")
    assert adapted.served_by.adapter_version == version.name
    assert adapted.served_by.adapter_digest == version.digest
    assert {process.name: process.pid for process in cluster.state().processes} == processes  # nothing was restarted

    figures = cluster.veneer("eval", "--adapter", "digits", "--dataset", "digits", "--split", "test")
    assert "exact" in figures.lower()
    answer = cluster.veneer("chat", "--adapter", "digits", "--image", picture, "--max-tokens", 4, QUESTION)
    assert adapted.text in answer
    assert "digits" in cluster.veneer("adapters", "list")
    assert version.digest[:12] in cluster.veneer("adapters", "show", "digits")
    jobs = json.loads(cluster.veneer("jobs", "list", "--json"))
    assert [job["state"] for job in (jobs if isinstance(jobs, list) else jobs["jobs"])] == ["JOB_STATE_SUCCEEDED"]

    from peft import PeftConfig
    from safetensors import safe_open

    peft = cluster.client.adapters.download("digits@1", tmp_path / "peft")
    assert PeftConfig.from_pretrained(peft).r == 4
    with safe_open(peft / "adapter_model.safetensors", "pt") as file:
        assert any(file.get_tensor(name).abs().sum() > 0 for name in file.keys() if "lora_B" in name)  # noqa: SIM118


@pytest.mark.parametrize(
    ("process", "series"),
    [("trainer", "veneer_trainer_workers"), ("replica-1", "veneer_requests_total"), ("worker-1", "veneer_worker_busy")],
)
def test_prometheus_reads_each_process_at_the_address_in_its_log(cluster: Any, process: str, series: str) -> None:
    lines = cluster.veneer("logs", process, "--lines", 10_000).splitlines()
    (address, *_) = (each["address"] for line in lines if (each := _event(line)).get("event") == "metrics")
    with urllib.request.urlopen(address, timeout=10) as page:  # noqa: S310  # of our own process
        assert series in page.read().decode()


def _event(line: str) -> dict[str, str]:
    try:
        found = json.loads(line)
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}


def test_a_sweep_is_a_job_for_each_combination_set_side_by_side(cluster: Any, folder: Path) -> None:
    cluster.client.datasets.push(folder, "swept")
    order = ["train", "swept", "--adapter", "swept", "--sweep", "rank=2,4", "lr=1e-3,2e-2", "--epochs", "1"]
    assert "4 jobs would be accepted" in cluster.veneer(*order, "--dry-run")
    assert list(cluster.client.jobs.list(adapter="swept")) == []
    refused = cluster.veneer(*order[:4], "--sweep", "rank=2,100000", status=1)  # all are checked before one is queued
    assert "rank" in refused
    assert list(cluster.client.jobs.list(adapter="swept")) == []

    shown = cluster.veneer(*order, "--batch-size", 16, "--watch").partition("JOB")[2].splitlines()
    assert shown[0].split() == ["RANK", "LEARNING", "RATE", "STATE", "LOSS", "VALIDATION", "TIME", "VERSION"]
    rows = [line.split() for line in shown[1:5]]
    assert [row[1:4] for row in rows] == [
        [rank, rate, "succeeded"] for rank in ("2", "4") for rate in ("0.001", "0.02")
    ]
    best = min(rows, key=lambda row: float(row[5]))
    assert [row for row in rows if row[-1] == "best"] == [best]
    compared = cluster.veneer("jobs", "compare", rows[0][0], rows[3][0], "--json")
    assert [job["spec"]["lora"]["rank"] for job in json.loads(compared)] == [2, 4]


def test_later_versions_answer_once_they_are_promoted(cluster: Any, folder: Path) -> None:
    client: Client = cluster.client
    client.datasets.push(folder, "promoted")
    jobs = [
        client.jobs.train("promoted", "promoted", steps=2, rank=4, learning_rate=0.02, seed=seed) for seed in (1, 2)
    ]
    first, second = (client.adapters.get_version(client.jobs.wait(job.name).adapter_version) for job in jobs)
    picture = folder / "images" / "test" / "0001.png"

    def served() -> str:
        answer = client.generate(QUESTION, image=picture, adapter="promoted", max_tokens=1)
        assert (
            answer.served_by.adapter_digest
            == {first.name: first.digest, second.name: second.digest}[answer.served_by.adapter_version]
        )
        return answer.served_by.adapter_version

    assert dict(client.adapters.get("promoted").aliases) == {"production": 1}
    assert served() == first.name
    client.adapters.promote("promoted", 2)
    cluster.until(lambda: served() == second.name, within_s=10)
    client.adapters.rollback("promoted")
    cluster.until(lambda: served() == first.name, within_s=5)

    client.adapters.canary("promoted", 2, 1.0, min_judgement=0.5, min_answers=2)
    cluster.until(lambda: served() == second.name, within_s=5)
    for comment in ("no digit", "no digit either"):
        client.evaluations.judge("promoted@2", 0.0, comment=comment)
    cluster.until(lambda: served() == first.name, within_s=5)
    move = next(iter(client.adapters.log("promoted")))
    assert (move.alias, move.to_version, move.actor) == ("canary", 1, "rollback policy")


def test_an_export_answers_by_itself_as_the_cluster_does(
    cluster: Any, folder: Path, tmp_path: Path, serve: Any
) -> None:
    out, picture = tmp_path / "digits-merged", folder / "images" / "test" / "0001.png"
    cluster.veneer("adapters", "export", "digits", 1, "--format", "merged-fp32", "--out", out)
    expected = cluster.client.generate(QUESTION, image=picture, adapter="digits@1", max_tokens=4)
    with serve(out) as alone:
        answer = alone.generate(QUESTION, image=picture, model="digits-merged", max_tokens=4)
    assert (answer.text, answer.token_ids) == (expected.text, expected.token_ids)
    assert answer.served_by.model_digest == verify(out).predicate["digest"]


def test_a_swap_breaks_no_stream_and_each_answer_names_its_version(cluster: Any, folder: Path) -> None:
    client: Client = cluster.client
    client.datasets.push(folder, "swapped")
    jobs = [client.jobs.train("swapped", "swapped", steps=2, rank=4, learning_rate=0.05, seed=seed) for seed in (1, 2)]
    versions = [client.adapters.get_version(client.jobs.wait(job.name).adapter_version) for job in jobs]
    picture = folder / "images" / "test" / "0002.png"
    expected = {
        version.digest: client.generate(
            QUESTION, image=picture, adapter=f"swapped@{version.name.rpartition('/')[2]}", max_tokens=24
        ).token_ids
        for version in versions
    }
    answered: list[tuple[str, list[int]]] = []
    stop = threading.Event()

    def stream() -> None:
        while not stop.is_set():
            ids, served = [], ""
            for piece in client.stream(QUESTION, image=picture, adapter="swapped", max_tokens=24):
                ids += piece.token_ids
                served = piece.served_by.adapter_digest or served
            answered.append((served, ids))

    threads = [threading.Thread(target=stream) for _ in range(8)]
    for thread in threads:
        thread.start()
    try:
        for turn in range(6):
            client.adapters.promote("swapped", 2 - turn % 2)
            enough = len(answered) + 8
            cluster.until(lambda enough=enough: len(answered) >= enough)
    finally:
        stop.set()
        for thread in threads:
            thread.join()
    assert {digest for digest, _ in answered} == set(expected)
    assert not [digest for digest, ids in answered if ids != list(expected[digest])]


def test_the_same_job_twice_is_the_same_adapter(cluster: Any, folder: Path) -> None:
    client: Client = cluster.client
    client.datasets.push(folder, "twice")
    jobs = [client.jobs.train("twice", f"twice-{name}", steps=3, rank=4, seed=7) for name in "ab"]
    one, other = (client.adapters.get_version(client.jobs.wait(job.name).adapter_version) for job in jobs)
    assert one.digest == other.digest
    again = client.jobs.wait(client.reproduce(one.name, into="twice-c").name)  # from its lineage alone
    assert client.adapters.get_version(again.adapter_version).digest == one.digest
    diff = client.adapter_diff("twice-a@1", "twice-c@1")
    assert [change.name for change in diff.parameters] == ["adapter"]


def test_every_row_is_answered_evaluated_and_shown(cluster: Any, folder: Path, tmp_path: Path) -> None:
    client: Client = cluster.client
    client.datasets.push(folder, "batch")
    made = client.evaluations.create("batch", metrics=METRICS, max_tokens=4)
    out = tmp_path / "answers.jsonl"
    batch = client.generate_split("batch", out, max_tokens=4)
    assert (len(batch.done), batch.failed) == (24, 0)
    lines = {line["row_digest"]: line for line in map(json.loads, out.read_text("utf-8").splitlines())}
    evaluation = client.evaluations.wait(made.name)
    assert {metric.metric for metric in evaluation.metrics} == set(METRICS)
    assert all(metric.low <= metric.value <= metric.high for metric in evaluation.metrics)
    for sample in client.evaluations.samples(made.name):
        line = lines[sample.row_digest]
        assert (line["prompt"], line["expected"]) == (sample.prompt, sample.expected)
    page = tmp_path / "page.html"
    report(made.name, page, against="", samples=200, json=False, directory=cluster.folder.root)
    assert page.read_text("utf-8").count("data:image/png;base64,") == 24


def test_tenants_see_nothing_of_each_other(cluster: Any, folder: Path) -> None:
    client: Client = cluster.client
    client.datasets.push(folder, "private")
    job = client.jobs.wait(client.jobs.train("private", "private", steps=1).name)
    token = cluster.veneer("tokens", "create", "--tenant", "acme").strip()
    picture = folder / "images" / "test" / "0000.png"
    with Client(directory=cluster.folder.root, token=token) as stranger:
        assert not list(stranger.datasets.list())
        assert not list(stranger.jobs.list())
        assert not list(stranger.adapters.list())
        assert not list(stranger.evaluations.list())
        for call in (
            lambda: stranger.datasets.get("private"),
            lambda: stranger.jobs.get(job.name),
            lambda: stranger.jobs.train("private", "private"),
            lambda: stranger.adapters.get("private"),
            lambda: stranger.generate(QUESTION, image=picture, adapter="private"),
        ):
            with pytest.raises(NotFound):
                call()
        assert stranger.generate(QUESTION, image=picture, max_tokens=1).token_ids
    with Client(directory=cluster.folder.root, token="vnr_nobody") as nobody:
        for call in (
            lambda: list(nobody.datasets.list()),
            lambda: list(nobody.jobs.list()),
            lambda: nobody.generate(QUESTION, image=picture),
        ):
            with pytest.raises(Unauthenticated):
                call()


def test_bad_input_is_named_and_hurts_nobody(cluster: Any, folder: Path, tmp_path: Path) -> None:
    processes = {process.name: process.pid for process in cluster.state().processes}
    bad = tmp_path / "bad"
    (bad / "images").mkdir(parents=True)
    shutil.copy(folder / "images" / "test" / "0000.png", bad / "images" / "good.png")
    (bad / "images" / "broken.jpg").write_bytes(b"\xff\xd8\xff\xe0 no picture")
    rows = (
        {"image": "images/gone.png", "text": "1"},
        {"image": "images/broken.jpg", "text": "2"},
        {"image": "images/good.png"},
    )
    rows = (*rows, {"image": "images/good.png", "text": "4"})
    (bad / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    push = cluster.client.datasets.push(bad, "bad")
    assert (push.version.report.accepted_rows, push.version.report.refused_rows) == (1, 3)
    assert {(finding.path, finding.line) for finding in push.findings if finding.line in (1, 2, 3)} == {
        ("train.jsonl", 1), ("train.jsonl", 2), ("train.jsonl", 3),
    }  # fmt: skip
    with pytest.raises(InvalidArgument) as refused:
        cluster.client.jobs.train("bad", "bad", rank=0)
    assert "spec.lora.rank" in str([violation.field for violation in refused.value.violations])
    with pytest.raises(NotFound, match="nobody"):
        cluster.client.generate(QUESTION, adapter="nobody")
    with pytest.raises(InvalidArgument):
        cluster.client.generate(QUESTION, image=b"\xff\xd8\xff\xe0 no picture")
    assert {process.name: process.pid for process in cluster.state().processes} == processes


def test_the_tutorials_folder_is_resolved_and_said(cluster: Any, folder: Path, tmp_path: Path) -> None:
    tutorial = tmp_path / "tutorial"
    (tutorial / "images").mkdir(parents=True)
    shutil.copy(folder / "images" / "test" / "0000.png", tutorial / "images" / "invoice_01.png")
    row = {"image": "invoice_01.png", "text": "这是一张金额为 ¥8,650 的增值税发票。"}
    (tutorial / "train.jsonl").write_text(json.dumps(row, ensure_ascii=False) + "\n", "utf-8")
    push = cluster.client.datasets.push(tutorial, "tutorial", prompt="这是什么单据?")
    assert push.version.report.accepted_rows == 1
    assert any("images/invoice_01.png" in str(finding) for finding in push.findings)


@pytest.mark.skipif(shutil.which("node") is None, reason="Node is not installed")
@pytest.mark.skipif(not (NODE / "node_modules").is_dir(), reason="run `npm ci` in clients/node")
def test_a_program_in_another_language(cluster: Any, folder: Path) -> None:
    where = json.loads((cluster.folder.root / "cluster.json").read_text("utf-8"))
    inference = where["inference"]
    environment = {
        **os.environ,
        "VENEER_DATASET": where["dataset"],
        "VENEER_TRAINER": where["trainer"],
        "VENEER_INFERENCE": inference if isinstance(inference, str) else ",".join(inference),
        "VENEER_TOKEN": where["token"],
    }

    def node(*words: object, **variables: str) -> "subprocess.CompletedProcess[str]":
        command = ["node", NODE / "veneer.mjs", *map(str, words)]
        return subprocess.run(
            command, env=environment | variables, capture_output=True, text=True, timeout=110, check=False
        )

    pushed = node("push", folder, "from-node")
    assert (pushed.returncode, pushed.stderr) == (0, "")
    assert pushed.stdout.split()[0] == cluster.client.datasets.get_version("from-node").digest
    trained = node("train", "from-node", "from-node", 1)
    assert trained.stdout.splitlines()[-1:] == ["adapters/from-node/versions/1"], trained
    asked = node("ask", "adapters/from-node", folder / "images" / "test" / "0000.png", QUESTION)
    assert asked.returncode == 0, asked
    assert asked.stdout.strip()
    refused = node(
        "ask", "adapters/from-node", folder / "images" / "test" / "0000.png", QUESTION, VENEER_TOKEN="vnr_other"
    )
    assert refused.stderr.startswith("UNAUTHENTICATED TOKEN_UNKNOWN")
