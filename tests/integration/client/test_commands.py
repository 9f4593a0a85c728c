"""The commands, from the command line to what they print and how they exit, against the contract."""

# ruff: noqa: ANN401  # the fake's types stay in conftest

import base64
import inspect
import io
import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from veneer.trainer.v1 import export_pb2, model_pb2
from veneer.trainer.v1.training_job_pb2 import Failure, JobState
from veneer_client import cli
from veneer_client.commands import screen

COMMANDS = {
    "adapters.download": "adapters:download",
    "adapters.export": "exports:export",
    "adapters.exports": "exports:list_exports",
    "adapters.list": "adapters:list_adapters",
    "adapters.log": "adapters:log",
    "adapters.promote": "adapters:promote",
    "adapters.rollback": "adapters:rollback",
    "adapters.show": "adapters:show",
    "chat": "chat:chat",
    "dataset.list": "dataset:list_datasets",
    "dataset.push": "dataset:push",
    "dataset.show": "dataset:show",
    "eval": "evaluation:evaluate",
    "jobs.cancel": "train:cancel",
    "jobs.list": "train:list_jobs",
    "jobs.pause": "train:pause",
    "jobs.resume": "train:resume",
    "jobs.retry": "train:retry",
    "jobs.show": "train:show",
    "jobs.watch": "train:watch",
    "models.list": "models:list_models",
    "train": "train:train",
}


@dataclass
class Result:
    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        return json.loads(self.out)


Veneer = Callable[..., Result]


@pytest.fixture
def veneer(running: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Veneer:
    """Runs a command line against the fake cluster, which the environment names."""
    where = running.where()
    monkeypatch.setenv("VENEER_DATASET", where["dataset"])
    monkeypatch.setenv("VENEER_TRAINER", where["trainer"])
    monkeypatch.setenv("VENEER_INFERENCE", ", ".join(where["inference"]))
    monkeypatch.setenv("VENEER_TOKEN", where["token"])
    entries = [EntryPoint(name, f"veneer_client.commands.{at}", cli.COMMANDS) for name, at in COMMANDS.items()]
    monkeypatch.setattr(cli, "entry_points", lambda group: entries)

    def run(*arguments: object) -> Result:
        monkeypatch.setattr("sys.argv", ["veneer", *map(str, arguments)])
        with pytest.raises(SystemExit) as left:
            cli.main()
        captured = capsys.readouterr()
        return Result(int(left.value.code or 0), captured.out, captured.err)

    return run


@pytest.fixture
def trained(veneer: Veneer, folder: Path) -> Veneer:
    """The same after a push and a job that published `digits@1`."""
    assert veneer("dataset", "push", folder, "--name", "digits").code == 0
    assert veneer("train", "digits", "--adapter", "digits", "--rank", 16, "--watch").code == 0
    return veneer


@pytest.mark.parametrize("name", COMMANDS)
def test_help_has_an_example_that_is_called_so(veneer: Veneer, name: str) -> None:
    result = veneer(*name.split("."), "--help")
    assert result.code == 0
    assert f"veneer {name.replace('.', ' ')}" in result.out
    assert "--json" in result.out


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
    assert "holds no *.jsonl file" in json.loads(result.err)["error"]["message"]


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


def test_a_conversation_remembers(trained: Veneer, folder: Path, monkeypatch: pytest.MonkeyPatch, cluster: Any) -> None:
    typed = iter([f"/image {folder / 'images' / '0.png'}", "Which digit?", "Sure?", "/image none.png", "And?", ""])
    monkeypatch.setattr("builtins.input", lambda prompt: next(typed))
    result = trained("chat", "--adapter", "digits")
    asked = [
        request.prompt.messages for name in (1, 2) for request in cluster.requests[f"StreamGenerate@replica-{name}"]
    ]
    assert result.code == 0
    assert sorted(len(messages) for messages in asked) == [1, 3]
    assert "read 'Sure?'" in result.out
    assert "none.png cannot be read" in result.err


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


def test_an_interrupt_exits_with_130(trained: Veneer, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: Any, **__: Any) -> Any:
        raise KeyboardInterrupt

    trained("train", "digits", "--adapter", "digits")
    monkeypatch.setattr("veneer_client.commands.watching._show", interrupt)
    result = trained("jobs", "watch", "j2")
    assert result.code == 130
    assert "j2 goes on without you. `veneer jobs watch j2` shows it again" in result.err


def test_every_option_is_explained() -> None:
    for at in COMMANDS.values():
        function = EntryPoint("", f"veneer_client.commands.{at}", "").load()
        for parameter in inspect.signature(function).parameters.values():
            (option,) = parameter.annotation.__metadata__
            assert option.help, f"{at} {parameter.name}"
