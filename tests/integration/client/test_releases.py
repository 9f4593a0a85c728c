"""Releases and evaluations from the command line, against the contract."""

# ruff: noqa: ANN401  # the fake's types stay in conftest

import asyncio
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from veneer.dataset.v1.conversation_pb2 import Message, Part, Picture, ResizedPicture, Role
from veneer.dataset.v1.dataset_service_pb2 import Example
from veneer.trainer.v1.evaluation_pb2 import Evaluation, Metric, Sample
from veneer.trainer.v1.training_job_pb2 import JobState
from veneer_client import AsyncClient, Client, OtherAnswers

Veneer = Callable[..., Any]
ROWS = 40


@pytest.fixture
def rows(cluster: Any) -> list[Example]:
    """A split of forty rows, each with a picture; they are asked "Digit <n>?" and answered with n."""
    pixels = ResizedPicture(width=1, height=1, rgb=b"\x01\x02\x03")
    cluster.examples = [
        Example(
            index=index,
            row_digest=f"{index:064x}",
            messages=[
                Message(
                    role=Role.ROLE_USER, parts=[Part(picture=Picture(resized=pixels)), Part(text=f"Digit {index}?")]
                ),
                Message(role=Role.ROLE_ASSISTANT, parts=[Part(text=str(index))]),
            ],
        )
        for index in range(ROWS)
    ]
    return list(cluster.examples)


def evaluated(cluster: Any, version: int, right: Callable[[int], bool], prompt: str = "") -> Evaluation:
    """An evaluation that succeeded, with its samples."""
    (data,) = cluster.versions
    made = Evaluation(name=f"evaluations/e{version}", state=JobState.JOB_STATE_SUCCEEDED, total_samples=ROWS)
    made.spec.subject, made.spec.dataset_version = f"adapters/digits/versions/{version}", data
    made.spec.split, made.spec.prompt = "test", prompt
    made.answered_by_digest = "ab" * 32
    hits = sum(map(right, range(ROWS)))
    made.metrics.add(metric="exact_match", value=hits / ROWS, low=0.1, high=0.9, count=ROWS)
    cluster.evaluations[made.name] = made
    cluster.samples[made.name] = [
        Sample(
            index=index,
            row_digest=f"{index:064x}",
            picture_blobs=["cd" * 32],
            prompt=f"Digit {index}?",
            expected=str(index),
            answer=str(index) if right(index) else "<b>wrong</b>",
            latency_ms=100.0 + index,
            metrics=[
                Metric(metric="exact_match", value=right(index), low=0, high=1, count=1),
                Metric(metric="cer", value=0.0 if right(index) else 0.5, low=0, high=1, count=4),
            ],
        )
        for index in range(ROWS)
    ]
    return made


def test_an_evaluation_asks_for_its_metrics_and_is_listed(trained: Veneer, cluster: Any) -> None:
    words = ("--metric", "cer", "--metric", "rouge_l")
    assert trained("eval", "--dataset", "digits", "--adapter", "digits@1", *words).code == 0
    assert list(cluster.requests["CreateEvaluation"][0].spec.metrics) == ["cer", "rouge_l"]
    line = trained("eval", "list", "--adapter", "digits@1").out.splitlines()[1]
    assert line.split()[:3] == ["e1", "succeeded", "digits@1"]
    assert "exact_match 75.0 %" in line
    assert len(trained("eval", "list", "--json").json) == 1


def test_two_evaluations_are_compared_and_chance_is_told(trained: Veneer, cluster: Any) -> None:
    evaluated(cluster, 3, lambda index: index < 20)
    evaluated(cluster, 4, lambda index: index < 36 and index != 3)
    for names in (("evaluations/e3", "e4"), ("digits@3", "digits@4")):
        found = trained("eval", "compare", *names, "--json").json
        exact, cer = found["differences"]
        assert (exact["metric"], exact["before"], exact["after"]) == ("exact_match", 0.5, 0.875)
        assert (exact["only_before"], exact["only_after"], exact["test"]) == (1, 16, "McNemar")
        assert exact["p_value"] == pytest.approx(2 * 18 / 2**17)
        assert 0 < exact["low"] < exact["difference"] < exact["high"] < 1
        assert (cer["test"], cer["verdict"], found["rows"]) == ("paired randomisation", "better", ROWS)
        assert cer["difference"] < 0
    out = trained("eval", "compare", "digits@4", "digits@3").out
    assert "worse" in out
    assert "+37.5" not in out
    assert "-37.5" in out
    evaluated(cluster, 5, lambda index: index < 18)
    same = trained("eval", "compare", "digits@3", "digits@5", "--json").json["differences"][0]
    assert (same["verdict"], same["larger_than_chance"]) == ("no clear difference", False)


def test_what_cannot_be_compared_says_why(trained: Veneer, cluster: Any) -> None:
    evaluated(cluster, 3, lambda index: True)
    evaluated(cluster, 4, lambda index: True, prompt="Other?")
    assert "different prompts" in trained("eval", "compare", "e3", "e4").err
    cluster.evaluations["evaluations/e4"].spec.prompt = ""
    for sample in cluster.samples["evaluations/e4"]:
        sample.row_digest = "f" * 64
    assert "share no answered row" in trained("eval", "compare", "e3", "e4").err
    assert "no two succeeded evaluations" in trained("eval", "compare", "digits@3", "digits@9").err


def test_a_report_is_one_page_that_stands_alone(
    trained: Veneer, cluster: Any, rows: list[Example], tmp_path: Path
) -> None:
    evaluated(cluster, 3, lambda index: index < 10)
    evaluated(cluster, 4, lambda index: index < 30)
    page = tmp_path / "page.html"
    words = ("eval", "report", "e4", "--html", page, "--against", "e3", "--samples", 15)
    assert trained(*words, "--json").json["samples"] == 15
    text = page.read_text("utf-8")
    assert "http://" not in text
    assert "https://" not in text
    assert "<script" not in text
    assert text.count('src="data:image/png;base64,') == 15
    assert "<b>wrong" not in text
    assert "&lt;b&gt;wrong&lt;/b&gt;" in text
    assert text.count('class="sample"') == 10  # the misses, before five hits
    assert text.count('class="sample hit"') == 5
    assert "Digit 30?" in text
    assert "75.0 %" in text
    assert text.count("<svg") == 2  # of cer and of latency
    assert '<td class="better">better</td>' in text
    assert cluster.requests["ReadExamples"][0].shuffle.seed == 0
    cluster.fail("ReadExamples", "NOT_FOUND")
    assert trained("eval", "report", "e4", "--html", page).code == 0  # the samples outlast their data
    assert "src=" not in page.read_text("utf-8")


def test_a_canary_has_a_share_and_bounds(trained: Veneer, cluster: Any) -> None:
    trained("train", "digits", "--adapter", "digits", "--seed", 2, "--watch")
    words = ("--share", 0.25, "--max-error-rate", 0.02, "--min-answers", 20, "--if", "exact_match >= 0.9")
    result = trained("adapters", "canary", "digits", 2, *words)
    assert result.out == "adapters/digits: canary = 2, production = 1\ncanary takes 25 % of the requests\n"
    split = cluster.adapters["adapters/digits"].traffic_split
    assert (split.alias, split.share, split.rollback.min_answers) == ("canary", 0.25, 20)
    assert split.rollback.max_error_rate == 0.02
    assert not split.rollback.HasField("max_latency_ratio")
    assert cluster.requests["PromoteAdapterVersion"][0].condition == "exact_match >= 0.9"
    assert "canary takes 25 % of the requests" in trained("adapters", "show", "digits").out
    assert trained("adapters", "canary", "digits", "--end").code == 0
    assert not cluster.adapters["adapters/digits"].HasField("traffic_split")
    assert trained("adapters", "canary", "digits").code == 2
    assert trained("adapters", "promote", "digits", 2, "--if", "cer <= 0.1").code == 0
    assert cluster.requests["PromoteAdapterVersion"][1].condition == "cer <= 0.1"


def test_two_versions_are_compared(trained: Veneer, cluster: Any) -> None:
    cluster.code_version = "2"
    trained("train", "digits", "--adapter", "digits", "--rank", 4, "--watch")
    evaluated(cluster, 1, lambda index: index < 10)
    evaluated(cluster, 2, lambda index: index < 20)
    out = trained("adapters", "diff", "digits", 1, 2).out
    assert "data: the same, digits@" in out
    found = trained("adapters", "diff", "digits", "production", 2, "--json").json
    assert found["parameters"] == [
        {"name": "code_version", "before": "1", "after": "2"},
        {"name": "lora.rank", "before": 16, "after": 4},
    ]
    assert found["metrics"] == [{"name": "digits test: exact_match", "before": 0.25, "after": 0.5}]
    assert not found["same_digest"]
    assert "the same adapter, to the byte" in trained("adapters", "diff", "digits", 1, 1).out


def test_a_folder_made_elsewhere_is_imported(trained: Veneer, cluster: Any, tmp_path: Path) -> None:
    folder = tmp_path / "lora"
    folder.mkdir()
    assert "has no adapter_config.json and no" in trained("adapters", "import", folder, "--name", "forms").err
    tensors = bytes(range(256)) * 10_000  # of more than two pieces
    (folder / "adapter_config.json").write_bytes(b"{}")
    (folder / "adapter_model.bin").write_bytes(b"\x80")
    assert "safe_serialization=True" in trained("adapters", "import", folder, "--name", "forms").err
    (folder / "adapter_model.safetensors").write_bytes(tensors)
    (folder / "optimizer.pt").write_bytes(b"\x80")
    cluster.fail("ImportAdapterVersion", "UNAVAILABLE")
    result = trained("adapters", "import", folder, "--name", "forms", "--description", "from a friend")
    assert result.out.startswith("imported forms@1 (efefefefefef)")
    assert cluster.imported == {"adapter_config.json": b"{}", "adapter_model.safetensors": tensors}
    headers = cluster.requests["ImportAdapterVersion"]
    assert {each.description for each in headers} == {"from a friend"}
    assert headers[0].request_id == headers[-1].request_id != ""
    refused = trained("adapters", "reproduce", "forms", 1)
    assert "was imported: no job made it (NOT_TRAINED)" in refused.err


def test_a_version_is_made_again_and_held_against_the_first(trained: Veneer, cluster: Any) -> None:
    result = trained("adapters", "reproduce", "digits", 1, "--into", "again")
    assert result.code == 0
    assert result.out.splitlines()[-1].startswith("the same: again@1")
    first, again = (request.training_job.spec for request in cluster.requests["CreateTrainingJob"])
    again.adapter = first.adapter
    assert again == first
    cluster.adapter_versions["adapters/digits/versions/1"].digest = "00" * 32
    cluster.code_version = "2"
    result = trained("adapters", "reproduce", "digits", 1)
    assert result.code == 1
    assert "another: digits@2" in result.out
    assert result.out.splitlines()[-1].split() == ["code", "version", "1", "2"]
    result = trained("adapters", "reproduce", "digits", 1, "--json")
    assert (result.code, result.json["same"]) == (1, False)


def test_a_version_that_is_named_is_not_deleted(trained: Veneer, cluster: Any) -> None:
    trained("train", "digits", "--adapter", "digits", "--watch")
    assert "named by alias production (VERSION_IN_USE)" in trained("adapters", "delete", "digits@1").err
    assert trained("adapters", "delete", "digits@2").out.startswith("digits@2 is deleted")
    assert list(cluster.adapter_versions) == ["adapters/digits/versions/1"]


def lines_of(path: Path) -> list[Any]:
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


def test_a_split_is_answered_into_a_file(trained: Veneer, cluster: Any, rows: list[Example], tmp_path: Path) -> None:
    out = tmp_path / "answers.jsonl"
    cluster.versions[next(iter(cluster.versions))].splits[0].row_count = ROWS
    words = ("generate", "--dataset", "digits", "--split", "test", "--adapter", "digits", "--out", out)
    result = trained(*words, "--json")
    assert (result.code, result.json["answered"]) == (0, ROWS), result.err
    lines = lines_of(out)
    assert sorted(line["index"] for line in lines) == list(range(ROWS))
    assert lines[0]["answer"].startswith("adapters/digits/versions/1 saw 1 and read 'Digit")
    assert {line["expected"] for line in lines} == {str(index) for index in range(ROWS)}
    assert lines[0]["asked"]["answered_by"] == "adapters/digits/versions/1"
    asked = len(cluster.requests["Generate"])
    assert asked == ROWS
    assert trained(*words).code == 0
    assert len(cluster.requests["Generate"]) == asked  # nothing is asked twice


def test_a_broken_run_goes_on_with_what_is_left(
    trained: Veneer, cluster: Any, rows: list[Example], tmp_path: Path
) -> None:
    out = tmp_path / "answers.jsonl"
    cluster.versions[next(iter(cluster.versions))].splits[0].row_count = ROWS
    words = ("generate", "--dataset", "digits", "--adapter", "digits", "--out", out)
    for replica in ("replica-1", "replica-2"):
        cluster.fail(f"Generate@{replica}", "INVALID_ARGUMENT")
    assert trained(*words, "--in-flight", 1).code == 1  # a row has no answer
    lines = out.read_bytes().splitlines(keepends=True)
    failed = [json.loads(line)["index"] for line in lines if b'"error"' in line]
    assert failed
    out.write_bytes(b"".join(lines[:30]) + lines[30][:25])  # as a kill leaves it
    kept = {line["index"] for line in map(json.loads, lines[:30]) if "answer" in line}
    cluster.requests["Generate"].clear()
    cluster.faults.clear()
    result = trained(*words)
    assert result.code == 0
    assert f"has answered {ROWS} of {ROWS} rows" in result.out
    asked = {request.prompt.messages[0].parts[-1].text for request in cluster.requests["Generate"]}
    assert asked == {f"Digit {index}?" for index in set(range(ROWS)) - kept}
    after = lines_of(out)
    assert sorted(line["index"] for line in after) == list(range(ROWS))
    assert all("answer" in line for line in after)


def test_answers_of_another_are_not_mixed_in(
    trained: Veneer, client: Client, cluster: Any, rows: list[Example], tmp_path: Path
) -> None:
    out = tmp_path / "answers.jsonl"
    cluster.versions[next(iter(cluster.versions))].splits[0].row_count = ROWS
    client.generate_split("digits", out, adapter="digits")
    before = out.read_bytes()
    for other in ({"adapter": None}, {"prompt": "Which?"}, {"max_tokens": 7}):
        with pytest.raises(OtherAnswers, match="name another file"):
            client.generate_split("digits", out, **({"adapter": "digits"} | other))
    out.write_bytes(before + b"no JSON\n")
    with pytest.raises(OtherAnswers, match="41 is no line of a batch"):
        client.generate_split("digits", out, adapter="digits")
    assert out.read_bytes() == before + b"no JSON\n"
    assert (
        "has test, train, not val"
        in trained("generate", "--dataset", "digits", "--split", "val", "--out", tmp_path / "x").err
    )


def test_many_rows_are_in_flight_and_full_replicas_are_waited_for(
    running: Any, trained: Veneer, cluster: Any, rows: list[Example], tmp_path: Path
) -> None:
    cluster.versions[next(iter(cluster.versions))].splits[0].row_count = ROWS
    for replica in ("replica-1", "replica-2"):
        cluster.fail(f"Generate@{replica}", "RESOURCE_EXHAUSTED", times=30, retry_after_s=0.01)
    together, most = 0, 0

    async def run() -> int:
        async with AsyncClient(**running.where()) as client:
            generate = client.generate

            async def counted(*arguments: Any, **how: Any) -> Any:
                nonlocal together, most
                together += 1
                most = max(most, together)
                try:
                    return await generate(*arguments, **how)
                finally:
                    together -= 1

            client.generate = counted  # type: ignore[method-assign]  # to count
            batch = await client.generate_split("digits", tmp_path / "a.jsonl", adapter="digits", in_flight=12)
            return len(batch.done)

    assert asyncio.run(run()) == ROWS
    assert most == 12
