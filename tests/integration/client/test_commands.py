"""The commands, from the command line to what they print and how they exit, against the contract."""

# ruff: noqa: ANN401  # the fake's types stay in conftest

import base64
import io
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from rich.console import Console

from veneer.trainer.v1 import export_pb2, model_pb2
from veneer.trainer.v1.training_job_pb2 import Failure, JobState
from veneer_client.commands import screen

Veneer = Callable[..., Any]


def test_push_prints_digest_report_and_findings(veneer: Veneer, folder: Path) -> None:
    result = veneer("dataset", "push", folder, "--name", "digits")
    assert result.code == 0
    assert "sent 7 files" in result.out
    assert "4 accepted" in result.out
    assert "test 1, train 3" in result.out
    assert "warning test.jsonl:1 $.image PATH_RESOLVED: 3.png. Write images/3.png." in result.out
    again = veneer("dataset", "push", folder, "--name", "digits", "--json")
    assert again.json["version"]["digest"] in result.out
    assert again.json["sent_blobs"] == 0
    assert again.json["version"]["report"]["accepted_rows"] == "4"


def test_push_counts_tokens_by_the_only_base(veneer: Veneer, folder: Path, cluster: Any) -> None:
    asked = cluster.requests["CreateDatasetVersion"]
    result = veneer("dataset", "push", folder, "--name", "digits")
    assert asked[-1].model == "models/tiny"
    assert "18,000 visual, 100 prompt, 6 supervised; 0 an epoch" in result.out
    assert "visual" not in veneer("dataset", "push", folder, "--name", "digits", "--model", "").out
    assert asked[-1].model == ""
    veneer("dataset", "push", folder, "--name", "digits", "--model", "other")
    assert asked[-1].model == "models/other"
    cluster.bases = 2
    assert "visual" not in veneer("dataset", "push", folder, "--name", "digits").out


def test_strict_push_says_which_rows_and_fails(veneer: Veneer, folder: Path) -> None:
    (folder / "images" / "1.png").unlink()
    result = veneer("dataset", "push", folder, "--name", "digits", "--strict")
    assert result.code == 1
    assert "error train.jsonl:2 $.image PICTURE_MISSING: images/1.png, expected a picture" in result.out
    assert result.err == "veneer: 1 of 4 rows were refused (ROWS_REFUSED)\n"


def test_push_of_what_is_no_folder(veneer: Veneer, tmp_path: Path) -> None:
    result = veneer("dataset", "push", tmp_path / "none", "--name", "digits")
    assert (result.code, result.out) == (1, "")
    assert result.err.endswith("none is no folder. Name the folder that holds train.jsonl\n")
    result = veneer("dataset", "push", tmp_path, "--name", "digits", "--json")
    assert "holds no *.jsonl, *.parquet or *.arrow file" in json.loads(result.err)["error"]["message"]


def test_datasets_are_listed_and_shown(trained: Veneer) -> None:
    digest = trained("dataset", "show", "digits", "--json").json["version"]["digest"]
    assert digest[:12] in trained("dataset", "list").out
    assert "PATH_RESOLVED" in trained("dataset", "show", f"digits@{digest[:12]}").out
    assert trained("dataset", "show", "letters").code == 1


def test_train_queues_and_says_how_to_watch(veneer: Veneer, folder: Path) -> None:
    veneer("dataset", "push", folder, "--name", "digits")
    result = veneer("train", "digits", "--adapter", "digits", "--epochs", 5, "--target", "decoder")
    assert result.out == "trainingJobs/j1 queued\nveneer jobs watch j1\n"
    shown = veneer("jobs", "show", "j1", "--json").json
    assert shown["spec"]["epochs"] == 5
    assert shown["spec"]["lora"]["target_modules"] == ["decoder"]
    assert veneer("train", "digits", "--adapter", "digits", "--dry-run").out.startswith("trainingJobs/j2 would be")


def test_a_watched_job_in_plain_lines(veneer: Veneer, folder: Path, cluster: Any) -> None:
    veneer("dataset", "push", folder, "--name", "digits")
    result = veneer("train", "digits", "--adapter", "digits", "--watch")
    lines = result.out.splitlines()
    assert result.code == 0
    assert lines[0] == "trainingJobs/j1 queued"
    assert "step 1/5" in lines[1]
    assert "7.5 rows/s  4 s left" in lines[1]
    assert "trainingJobs/j1 succeeded  step 5/5  epoch 2.50  loss 0.4000" in lines[-2]
    assert lines[-1].startswith("published digits@1")


def test_a_watched_job_in_json(trained: Veneer) -> None:
    trained("train", "digits", "--adapter", "digits")
    result = trained("jobs", "watch", "j2", "--json")
    snapshots = [json.loads(line) for line in result.out.splitlines()]
    assert snapshots[0]["state"] == "JOB_STATE_QUEUED"
    assert snapshots[-1]["adapter_version"] == "adapters/digits/versions/2"


def test_a_watched_job_on_a_terminal(trained: Veneer, monkeypatch: pytest.MonkeyPatch) -> None:
    trained("train", "digits", "--adapter", "digits")
    paper = io.StringIO()
    terminal = Console(file=paper, force_terminal=True, width=100)
    monkeypatch.setattr(screen, "console", lambda: terminal)
    monkeypatch.setattr(type(sys.stdout), "isatty", lambda self: True)
    assert trained("jobs", "watch", "j2").code == 0
    drawn = paper.getvalue()
    assert "5/5" in drawn
    assert "█" in drawn
    assert "━" in drawn
    assert "7.5 rows/s" in drawn


def test_a_jobs_curves_are_drawn(trained: Veneer, tmp_path: Path) -> None:
    out = tmp_path / "curves.png"
    assert trained("jobs", "plot", "j1", "--out", out).out == f"{out}: 5 points, step 1 to 5\n"
    with Image.open(out) as picture:
        assert (picture.format, picture.size) == ("PNG", (1000, 3 * 260))
        colours = {colour for _, colour in picture.getcolors(1 << 20) or []}
    assert {(0x1F, 0x5F, 0xBF), (0xC0, 0x39, 0x2B)} <= colours  # the lines of loss and validation loss
    points = trained("jobs", "plot", "j1", "--json").json
    assert [point["step"] for point in points] == ["1", "2", "3", "4", "5"]
    trained("train", "digits", "--adapter", "digits")
    assert trained("jobs", "plot", "j2", "--out", out).err == "veneer: j2 has no figures yet\n"


def test_an_order_with_all_that_the_command_offers(trained: Veneer) -> None:
    trained("train", "digits", "--adapter", "digits", "--from", "digits@production", "--skip-long",
            "--validate-every", 5, "--patience", 3, "--priority", "high")  # fmt: skip
    spec = trained("jobs", "show", "j2", "--json").json["spec"]
    assert spec["initial_adapter_version"] == "adapters/digits/versions/1"
    assert spec["lora"]["rank"] == 16  # that of the version
    assert (spec["over_length"], spec["priority"]) == ("OVER_LENGTH_SKIP", "PRIORITY_HIGH")
    assert "started from  digits@1" in trained("jobs", "show", "j2").out
    assert (spec["validation_interval_steps"], spec["early_stopping"]) == ("5", {"patience": 3})


def test_a_failed_job_exits_with_1_and_its_reason(veneer: Veneer, folder: Path, cluster: Any) -> None:
    cluster.end = JobState.JOB_STATE_FAILED
    veneer("dataset", "push", folder, "--name", "digits")
    result = veneer("train", "digits", "--adapter", "digits", "--watch")
    assert result.code == 1
    assert result.err == "veneer: trainingJobs/j1 is failed: the loss of step 3 is NaN (NON_FINITE_LOSS)\n"


def test_wrong_fields_are_all_told(trained: Veneer) -> None:
    result = trained("train", "digits", "--adapter", "digits", "--rank", 0)
    assert result.code == 1
    assert "  spec.lora.rank: must be 1 to 512, was 0" in result.err
    result = trained("train", "digits", "--adapter", "digits", "--rank", 0, "--json")
    error = json.loads(result.err)["error"]
    assert (error["kind"], error["reason"]) == ("InvalidArgument", "INVALID_FIELDS")
    assert error["violations"][0]["field"] == "spec.lora.rank"


@pytest.mark.parametrize(
    "arguments",
    [
        ("train", "digits"),
        ("train", "digits", "--adapter", "a", "--epochs", "1", "--steps", "2"),
        ("jobs", "list", "--state", "sleeping"),
        ("jobs", "list", "--limit", "0"),
        ("adapters", "promote", "digits", "zero"),
        ("chat", "--json"),
        ("paint",),
    ],
)
def test_called_wrongly(veneer: Veneer, arguments: tuple[str, ...]) -> None:
    assert veneer(*arguments).code == 2


def test_jobs_are_listed_moved_and_shown(trained: Veneer) -> None:
    for _ in range(4):
        trained("train", "digits", "--adapter", "digits")
    table = trained("jobs", "list").out.splitlines()
    assert table[0].split() == ["JOB", "STATE", "ADAPTER", "DATASET", "STEP", "LOSS", "CREATED"]
    assert len(table) == 6
    assert table[-1].split()[:3] == ["j1", "succeeded", "digits"]
    assert len(trained("jobs", "list", "--limit", 2, "--json").json) == 2
    assert trained("jobs", "pause", "j2").out == "trainingJobs/j2 paused\n"
    assert trained("jobs", "resume", "j2").out == "trainingJobs/j2 queued\n"
    assert trained("jobs", "retry", "j2").out == "trainingJobs/j2 queued\n"
    assert trained("jobs", "cancel", "j2").out == "trainingJobs/j2 cancelled\n"
    assert "step 5/5" in trained("jobs", "show", "j1").out
    missing = trained("jobs", "show", "j9")
    assert (missing.code, missing.err) == (1, "veneer: there is no trainingJobs/j9 (NOT_FOUND)\n")


def test_adapters_are_listed_moved_and_logged(trained: Veneer, tmp_path: Path, cluster: Any) -> None:
    cluster.files = {"adapter_config.json": b"{}"}
    trained("train", "digits", "--adapter", "digits", "--watch")
    assert "production = 1" in trained("adapters", "list").out
    assert trained("adapters", "promote", "digits", 2).out == "adapters/digits: production = 2\n"
    assert "production = 2" in trained("adapters", "show", "digits").out
    assert trained("adapters", "rollback", "digits", "--reason", "worse").out.endswith("production = 1\n")
    log = trained("adapters", "log", "digits").out.splitlines()
    assert "2 -> 1" in log[1]
    assert "worse" in log[1]
    assert trained("adapters", "promote", "digits", 9).code == 1
    result = trained("adapters", "download", "digits@2", tmp_path / "out", "--json")
    assert result.json["files"] == ["adapter_config.json"]


def test_an_export_is_ordered_watched_and_downloaded_whole(veneer: Veneer, tmp_path: Path, cluster: Any) -> None:
    cluster.files = {"certificate.json": b"{}", "config.json": b"{}", "part/weights": b"\0" * 9}
    measured = {
        "prompts": 100,
        "answers_identical": 99,
        "answers_within_tie": 1,
        "greatest_logit_difference": 2e-6,
        "metrics": {"exact_match": {"adapter": 0.95, "export": 0.94}},
        "tokens_per_second": {"adapter": 50.0, "export": 60.0},
        "problems": [],
    }
    statement = base64.b64encode(json.dumps({"predicate": {"measured": measured}}).encode()).decode()
    cluster.certificate = json.dumps({"payload": statement}).encode()
    out = tmp_path / "out"
    result = veneer("adapters", "export", "digits", 3, "--format", "merged-bf16", "--out", out, "--split", "test")
    assert result.code == 0, result.err
    spec = cluster.requests["ExportAdapterVersion"][0].spec
    assert (spec.adapter_version, spec.check_split, spec.force) == ("adapters/digits/versions/3", "test", False)
    assert (spec.format, spec.dtype) == (export_pb2.EXPORT_FORMAT_MERGED, model_pb2.DTYPE_BFLOAT16)
    assert "50 % done" in result.out
    assert "99 and 1 within a tie of 100 answers" in result.out
    assert "exact_match: 94.0 %, the adapter's 95.0 %" in result.out
    assert {path.relative_to(out).as_posix() for path in out.rglob("*") if path.is_file()} == cluster.files.keys()
    assert "digits@3" in veneer("adapters", "exports").out
    taken = veneer("adapters", "export", "digits", 3, "--out", out)
    assert (taken.code, len(cluster.requests["ExportAdapterVersion"])) == (2, 1)
    assert veneer("adapters", "export", "digits", 3, "--out", tmp_path / "x", "--format", "gguf").code == 2

    cluster.damaged = "config.json"
    damaged = veneer("adapters", "export", "digits", 3, "--out", tmp_path / "damaged")
    assert damaged.code == 1
    assert "sha256" in damaged.err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]  # nothing half-written stays
    cluster.damaged, cluster.export_failure = "", Failure(reason="METRIC_FELL", message="exact_match is 0.5")
    failed = veneer("adapters", "export", "digits", 3, "--out", tmp_path / "failed", "--force", "--json")
    assert (failed.code, cluster.requests["ExportAdapterVersion"][-1].spec.force) == (1, True)
    assert "METRIC_FELL" in failed.err


def test_an_evaluation_prints_its_figures_and_misses(trained: Veneer, cluster: Any) -> None:
    result = trained("eval", "--adapter", "digits", "--dataset", "digits")
    assert result.code == 0
    assert "exact_match  75.0 %" in result.out
    assert "30.0-95.0" in result.out
    assert result.out.splitlines()[-1].split() == ["0", "7", "1"]
    assert cluster.requests["CreateEvaluation"][0].spec.subject == "adapters/digits"
    result = trained("eval", "--dataset", "digits", "--json")
    assert json.loads(result.out.splitlines()[-1])["metrics"][0]["value"] == 0.75
    assert cluster.requests["CreateEvaluation"][1].spec.subject == "models/tiny"


def test_chat_streams_an_answer(trained: Veneer, folder: Path) -> None:
    picture = folder / "images" / "0.png"
    result = trained("chat", "--adapter", "digits", "--image", picture, "Which digit?")
    assert result.out == "adapters/digits saw 1 and read 'Which digit?'\n"
    result = trained("chat", "--image", picture, "Which digit?", "--json")
    pieces = [json.loads(line) for line in result.out.splitlines()]
    assert "".join(piece["text"] for piece in pieces).startswith("models/tiny saw 1")
    assert pieces[-1]["finish_reason"] == "FINISH_REASON_STOP"
    assert "cannot be read" in trained("chat", "--image", folder / "none.png", "What?").err


def test_chat_holds_answers_to_a_schema(trained: Veneer, tmp_path: Path, cluster: Any) -> None:
    schema = tmp_path / "schema.json"
    schema.write_text('{"type": "object"}', "utf-8")
    assert trained("chat", "--schema", schema, "Which digit?").code == 0
    requests = [each for name in (1, 2) for each in cluster.requests.get(f"StreamGenerate@replica-{name}", [])]
    assert requests[-1].sampling.json_schema == '{"type": "object"}'
    assert trained("chat", "--schema", tmp_path / "none.json", "Which digit?").code == 2


def test_a_conversation_remembers(trained: Veneer, folder: Path, monkeypatch: pytest.MonkeyPatch, cluster: Any) -> None:
    typed = iter([f"/image {folder / 'images' / '0.png'}", "Which digit?", "Sure?", "/image none.png", "And?", ""])
    monkeypatch.setattr("builtins.input", lambda prompt: next(typed))
    result = trained("chat", "--adapter", "digits")
    asked = [
        request.prompt.messages for name in (1, 2) for request in cluster.requests[f"StreamGenerate@replica-{name}"]
    ]
    assert result.code == 0
    assert sorted(len(messages) for messages in asked) == [1, 3, 5]
    assert "read 'Sure?'" in result.out
    assert "none.png cannot be read" in result.err


def test_a_broken_picture_spoils_no_conversation(
    trained: Veneer, folder: Path, monkeypatch: pytest.MonkeyPatch, cluster: Any
) -> None:
    good, broken = folder / "images" / "0.png", folder / "images" / "broken.png"
    broken.write_bytes(b"GIF89a")
    typed = iter(["Which digit?", f"/image {broken}", "Sure?", f"/image {good}", "Too much?", "And now?", ""])

    def type_next(prompt: str) -> str:
        line = next(typed)
        if line == "Too much?":
            for replica in ("replica-1", "replica-2"):
                cluster.fail(
                    f"StreamGenerate@{replica}", "INVALID_ARGUMENT", reason="INVALID_FIELDS", message="TOO_LONG"
                )
        if line == "And now?":
            cluster.faults.clear()
        return line

    monkeypatch.setattr("builtins.input", type_next)
    result = trained("chat", "--image", broken, "--image", good)
    assert result.code == 0
    told = f"veneer: {broken} is left out: prompt.messages[0].parts[0].picture: a picture is a JPEG, PNG or WebP file"
    assert result.err.count(told) == 2
    assert result.err.endswith("veneer: TOO_LONG (INVALID_FIELDS)\nveneer: its pictures are left out\n")
    answers = [line for line in result.out.splitlines() if "read" in line]
    assert answers == [
        "models/tiny saw 1 and read 'Which digit?'",
        "models/tiny saw 1 and read 'Sure?'",
        "models/tiny saw 1 and read 'And now?'",
    ]


def test_models_are_listed(veneer: Veneer) -> None:
    assert "2,130,000,000" in veneer("models", "list").out
    assert veneer("models", "list", "--json").json[0]["name"] == "models/tiny"


def test_a_wrong_token_says_what_to_do(veneer: Veneer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VENEER_TOKEN", "vnr_other")
    result = veneer("models", "list")
    assert result.code == 1
    assert result.err.startswith("veneer: unknown token (TOKEN_UNKNOWN)\n  set VENEER_TOKEN to a token")


def test_no_cluster_says_what_to_do(veneer: Veneer, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("DATASET", "TRAINER", "INFERENCE", "TOKEN"):
        monkeypatch.delenv(f"VENEER_{name}")
    monkeypatch.setenv("VENEER_DIR", str(tmp_path))
    result = veneer("models", "list")
    assert result.code == 1
    assert f"no cluster runs in {tmp_path}" in result.err
    assert "Set VENEER_" in result.err


@pytest.mark.parametrize("arguments", [("train", "digits", "--adapter", "digits", "--watch"), ("jobs", "watch", "j2")])
@pytest.mark.parametrize("terminal", [False, True])
def test_who_leaves_a_watch_is_told_that_the_job_goes_on(
    trained: Veneer, cluster: Any, arguments: tuple[str, ...], terminal: bool
) -> None:
    """A real process and a real signal: threads and streams are under way when it comes."""
    cluster.step_s = 60.0
    if arguments[0] == "jobs":
        trained("train", "digits", "--adapter", "digits")
    cluster.requests.clear()
    outside, inside = os.openpty() if terminal else os.pipe()
    # What runs in a shell's background ignores the signal, and so do its children. It is not set back by a function
    # between fork and exec: what gRPC says of this process's threads there would come out as the child's.
    heard = "import signal, veneer_client.cli; signal.signal(2, signal.default_int_handler); veneer_client.cli.main()"
    command = [sys.executable, "-c", heard, *arguments]
    process = subprocess.Popen(command, stdout=inside, stderr=subprocess.PIPE, text=True)
    end_s = time.monotonic() + 30
    while not cluster.requests["WatchTrainingJob"] and time.monotonic() < end_s:
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=30)
    os.close(inside)
    os.close(outside)
    assert process.returncode == 130, said
    assert said.strip() == ("job j2 goes on. `veneer jobs watch j2` shows it again, `veneer jobs cancel j2` ends it")
    assert cluster.jobs["trainingJobs/j2"].state == JobState.JOB_STATE_QUEUED
