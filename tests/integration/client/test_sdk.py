"""The SDK against a cluster that speaks the contract: what it sends, and what it does when a call fails."""

# ruff: noqa: ANN401  # the fake's types stay in conftest

import asyncio
import threading
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import pytest

import veneer_client as veneer
from veneer.trainer.v1.training_job_pb2 import JobState
from veneer_client import AsyncClient, Client
from veneer_client._folder import bytes_blob


@pytest.fixture
async def async_client(running: Any) -> AsyncIterator[AsyncClient]:
    async with AsyncClient(**running.where()) as client:
        yield client


def test_the_whole_way_in_ten_lines(client: Client, folder: Path) -> None:
    push = client.datasets.push(folder, "digits")
    job = client.jobs.train("digits", adapter="digits", epochs=5, rank=16)
    losses = [job.progress.loss for job in client.jobs.watch(job.name) if job.progress.step]
    job = client.jobs.wait(job.name)
    client.adapters.promote("digits", 1, reason="the first")
    pieces = list(client.stream("Which digit?", image=folder / "images" / "0.png", adapter="digits"))
    evaluation = client.evaluations.wait(client.evaluations.create("digits", adapter="digits@1").name)
    assert push.version.report.accepted_rows == 4
    assert [finding.code for finding in push.findings] == ["PATH_RESOLVED"]
    assert (push.sent_blobs, push.reused_blobs) == (7, 0)
    assert losses[0] == 2.0
    assert job.adapter_version == "adapters/digits/versions/1"
    assert job.spec.dataset_version == push.version.name
    assert (job.spec.epochs, job.spec.lora.rank, job.spec.model) == (5, 16, "models/tiny")
    assert "".join(piece.text for piece in pieces) == "adapters/digits saw 1 and read 'Which digit?'"
    assert pieces[-1].served_by.adapter_version == "adapters/digits/versions/1"
    assert evaluation.metrics[0].value == 0.75


def test_a_second_push_sends_nothing_but_asks(client: Client, folder: Path) -> None:
    seen: list[veneer.PushProgress] = []
    first = client.datasets.push(folder, "digits", prompt="Which digit?", on_progress=seen.append)
    again = client.datasets.push(folder, "digits", prompt="Which digit is this?")
    assert again.version.name == first.version.name
    assert (again.sent_blobs, again.sent_bytes, again.reused_blobs) == (0, 0, 7)
    assert client.datasets.get("digits").default_prompt == "Which digit is this?"
    phases = [progress.phase for progress in seen]
    assert list(dict.fromkeys(phases)) == ["hashing", "uploading", "reading rows"]
    uploading = [progress for progress in seen if progress.phase == "uploading"]
    assert [progress.done for progress in uploading] == sorted(progress.done for progress in uploading)
    assert uploading[-1].done == uploading[-1].total == first.sent_bytes


def test_splits_are_sent_by_the_names_of_files(client: Client, cluster: Any, folder: Path) -> None:
    (folder / "train.jsonl").rename(folder / "train-0001.jsonl")
    client.datasets.push(folder, "digits")
    files = cluster.requests["CreateDatasetVersion"][0].row_files
    assert [(rows.path, rows.split) for rows in files] == [
        ("test.jsonl", "test"),
        ("train-0001.jsonl", "train"),
    ]


def test_refused_rows_come_with_their_findings(client: Client, folder: Path) -> None:
    (folder / "images" / "1.png").unlink()
    push = client.datasets.push(folder, "digits")
    assert (push.version.report.accepted_rows, push.version.report.refused_rows) == (3, 1)
    with pytest.raises(veneer.RowsRefused, match="1 of 4 rows were refused") as refused:
        client.datasets.push(folder, "digits", strict=True)
    assert [finding.code for finding in refused.value.findings] == ["PATH_RESOLVED", "PICTURE_MISSING"]
    assert isinstance(refused.value, veneer.FailedPrecondition)
    assert len(list(client.datasets.findings("digits"))) == 2


def test_a_broken_upload_goes_on_where_it_was(client: Client, cluster: Any) -> None:
    data = bytes(range(256)) * 4096 * 5  # 5 MiB: five pieces
    cluster.fail("UploadBlobs", "UNAVAILABLE", after=2 * 1024 * 1024)
    digest = client.datasets.upload_bytes(data)
    headers = cluster.requests["UploadBlobs"]
    assert cluster.blobs[digest] == data
    assert [header.offset_bytes for header in headers] == [0, 2 * 1024 * 1024]


def test_progress_of_a_broken_upload_ends_at_its_total(running: Any, cluster: Any) -> None:
    seen: list[veneer.PushProgress] = []
    cluster.fail("UploadBlobs", "UNAVAILABLE", times=2, after=1024 * 1024)
    blobs = [bytes_blob("a", bytes(3 * 1024 * 1024)), bytes_blob("b", b"b" * 10)]

    async def send() -> None:
        async with AsyncClient(**running.where()) as client:
            await client.datasets.upload(blobs, seen.append)

    asyncio.run(send())
    assert seen[-1].done == seen[-1].total == 3 * 1024 * 1024 + 10
    assert max(progress.done for progress in seen) == seen[-1].total


def test_a_file_that_changes_while_it_is_sent(client: Client, folder: Path, monkeypatch: Any) -> None:
    picture = folder / "images" / "0.png"

    def change(progress: veneer.PushProgress) -> None:
        if progress.phase == "hashing" and progress.done == progress.total:
            picture.write_bytes(b"\x89PNG" + bytes([9]) * 50)

    with pytest.raises(veneer.FolderError, match="changed while it was being sent"):
        client.datasets.push(folder, "digits", on_progress=change)
    picture.write_bytes(b"\x89")
    seen: list[int] = []

    def shrink(progress: veneer.PushProgress) -> None:
        if progress.phase == "hashing" and progress.done == progress.total:
            seen.append(picture.write_bytes(b""))

    with pytest.raises(veneer.FolderError, match="became shorter"):
        client.datasets.push(folder, "digits", on_progress=shrink)


def test_a_broken_version_stream_joins_its_own_work(client: Client, cluster: Any, folder: Path) -> None:
    cluster.fail("CreateDatasetVersion", "UNAVAILABLE", after=1)
    client.datasets.push(folder, "digits")
    ids = {request.request_id for request in cluster.requests["CreateDatasetVersion"]}
    assert len(cluster.requests["CreateDatasetVersion"]) == 2
    assert len(ids) == 1
    assert ids != {""}


def test_a_read_is_made_again_when_the_service_is_unavailable(client: Client, cluster: Any, folder: Path) -> None:
    client.datasets.push(folder, "digits")
    cluster.requests.clear()
    cluster.fail("GetDataset", "UNAVAILABLE", times=2)
    assert client.datasets.get("digits").name == "datasets/digits"
    assert len(cluster.requests["GetDataset"]) == 3


def test_a_read_gives_up_after_its_attempts(client: Client, cluster: Any, monkeypatch: Any) -> None:
    monkeypatch.setattr("veneer_client._calls._LONGEST_WAIT_S", 0.01)
    cluster.fail("GetDataset", "UNAVAILABLE", times=50, message="away")
    with pytest.raises(veneer.Unavailable, match="away"):
        client.datasets.get("digits")
    assert len(cluster.requests["GetDataset"]) == 5


@pytest.mark.parametrize("code", ["INVALID_ARGUMENT", "INTERNAL", "ABORTED", "DATA_LOSS", "DEADLINE_EXCEEDED"])
def test_other_failures_are_not_tried_again(client: Client, cluster: Any, code: str) -> None:
    cluster.fail("GetDataset", code)
    with pytest.raises(veneer.StatusError):
        client.datasets.get("digits")
    assert len(cluster.requests["GetDataset"]) == 1


def test_a_full_service_is_asked_again_after_its_hint(client: Client, cluster: Any) -> None:
    cluster.fail("ListModels", "RESOURCE_EXHAUSTED", retry_after_s=0.4)
    started_s = time.monotonic()
    assert [model.name for model in client.models.list()] == ["models/tiny"]
    assert time.monotonic() - started_s >= 0.4
    assert len(cluster.requests["ListModels"]) == 2


def test_a_full_service_without_a_hint_is_not_asked_again(client: Client, cluster: Any) -> None:
    cluster.fail("ListModels", "RESOURCE_EXHAUSTED")
    with pytest.raises(veneer.ResourceExhausted):
        list(client.models.list())
    assert len(cluster.requests["ListModels"]) == 1


def test_a_lost_reply_makes_one_job(client: Client, cluster: Any, folder: Path) -> None:
    client.datasets.push(folder, "digits")
    cluster.fail("CreateTrainingJob.reply", "UNAVAILABLE")
    job = client.jobs.train("digits", "digits")
    first, second = cluster.requests["CreateTrainingJob"]
    assert first.request_id == second.request_id != ""
    assert list(cluster.jobs) == [job.name]


def test_a_change_without_request_id_is_made_once(client: Client, cluster: Any, folder: Path) -> None:
    client.datasets.push(folder, "digits")
    job = client.jobs.train("digits", "digits")
    cluster.fail("DeleteTrainingJob", "UNAVAILABLE")
    with pytest.raises(veneer.Unavailable):
        client.jobs.delete(job.name)
    assert len(cluster.requests["DeleteTrainingJob"]) == 1


def test_errors_carry_what_the_service_said(client: Client, folder: Path) -> None:
    client.datasets.push(folder, "digits")
    with pytest.raises(veneer.InvalidArgument) as wrong:
        client.jobs.train("digits", "digits", rank=0)
    assert wrong.value.reason == "INVALID_FIELDS"
    assert wrong.value.violations == (veneer.Violation("spec.lora.rank", "OUT_OF_RANGE", "must be 1 to 512, was 0"),)


def test_a_wrong_token_and_an_absent_service(running: Any) -> None:
    where = running.where() | {"token": "vnr_other"}
    with Client(**where) as client, pytest.raises(veneer.Unauthenticated, match="TOKEN_UNKNOWN"):
        client.datasets.get("digits")
    address = running.addresses["dataset"]
    running.stop("dataset")
    started_s = time.monotonic()
    with Client(**running.where()) as client, pytest.raises(veneer.Unavailable, match=f"{address} cannot be"):
        client.datasets.get("digits")
    assert time.monotonic() - started_s < 15


def test_a_watch_goes_on_after_the_last_snapshot(client: Client, cluster: Any, folder: Path) -> None:
    client.datasets.push(folder, "digits")
    job = client.jobs.train("digits", "digits")
    cluster.fail("WatchTrainingJob", "UNAVAILABLE", after=3)
    steps = [job.progress.step for job in client.jobs.watch(job.name)]
    assert steps == [0, 1, 2, 3, 4, 5, 5]
    assert [request.after_revision for request in cluster.requests["WatchTrainingJob"]] == [0, 3]


def test_a_failed_job_says_why(client: Client, cluster: Any, folder: Path) -> None:
    client.datasets.push(folder, "digits")
    cluster.end = JobState.JOB_STATE_FAILED
    job = client.jobs.train("digits", "digits")
    with pytest.raises(veneer.WorkFailed, match=r"is failed: the loss of step 3 is NaN \(NON_FINITE") as failed:
        client.jobs.wait(job.name)
    assert failed.value.resource.failure.reason == "NON_FINITE_LOSS"


def test_lists_go_through_all_pages(client: Client, folder: Path) -> None:
    client.datasets.push(folder, "digits")
    names = [client.jobs.train("digits", "digits").name for _ in range(5)]
    assert [job.name for job in client.jobs.list()] == names[::-1]


def test_the_same_picture_goes_to_the_same_replica(client: Client, cluster: Any) -> None:
    for _ in range(4):
        client.generate("What?", image=b"\x89PNG one", adapter="digits")
    assert len(set(cluster.answered_by)) == 1
    cluster.answered_by.clear()
    for number in range(32):
        client.generate("What?", image=f"picture {number}".encode(), adapter="digits")
    assert set(cluster.answered_by) == {"replica-1", "replica-2"}


def test_questions_without_a_picture_take_turns(client: Client, cluster: Any) -> None:
    for _ in range(4):
        client.generate("What?", model="tiny")
    assert cluster.answered_by[:2] * 2 == cluster.answered_by
    assert set(cluster.answered_by) == {"replica-1", "replica-2"}


def test_a_lost_replica_is_passed_over_at_once(running: Any, client: Client, cluster: Any) -> None:
    running.stop("replica-1")
    started_s = time.monotonic()
    for number in range(8):
        client.generate("What?", image=f"picture {number}".encode(), model="tiny")
    assert cluster.answered_by == ["replica-2"] * 8
    assert time.monotonic() - started_s < 5


def test_a_full_replica_hands_over_without_waiting(client: Client, cluster: Any) -> None:
    for replica in ("replica-1", "replica-2"):
        cluster.fail(f"Generate@{replica}", "RESOURCE_EXHAUSTED", retry_after_s=30.0)
        cluster.faults["Generate@replica-2"].clear()
    for _ in range(2):
        client.generate("What?", model="tiny")
    assert set(cluster.answered_by) == {"replica-2"} or len(cluster.answered_by) == 2


def test_a_stream_that_has_sent_nothing_begins_again_elsewhere(client: Client, cluster: Any) -> None:
    for replica in ("replica-1", "replica-2"):
        cluster.fail(f"StreamGenerate@{replica}", "UNAVAILABLE")
    text = "".join(piece.text for piece in client.stream("What?", image=b"x", model="tiny"))
    assert text == "models/tiny saw 1 and read 'What?'"


def test_a_stream_that_has_begun_is_never_begun_again(client: Client, cluster: Any) -> None:
    for replica in ("replica-1", "replica-2"):
        cluster.fail(f"StreamGenerate@{replica}", "UNAVAILABLE", after=1)
    pieces = []
    with pytest.raises(veneer.Unavailable):
        pieces += [piece.text for piece in client.stream("What?", image=b"x", model="tiny")]
    calls = [len(cluster.requests[f"StreamGenerate@replica-{number}"]) for number in (1, 2)]
    assert sorted(calls) == [0, 1]


def test_leaving_a_stream_early_ends_it(client: Client, cluster: Any) -> None:
    cluster.piece_s = 0.05
    for piece in client.stream("What?", model="tiny"):
        assert piece.text
        break
    assert client.generate("What?", model="tiny").text


def test_a_large_picture_travels_as_a_blob(client: Client, cluster: Any) -> None:
    data = bytes(3 * 1024 * 1024 + 1)
    client.generate("What?", image=data, model="tiny")
    picture = cluster.requests["Generate"][-1].prompt.messages[0].parts[0].picture
    assert cluster.blobs[picture.blob] == data


def test_pictures_that_are_too_much_together_travel_as_blobs(client: Client, cluster: Any) -> None:
    images = [bytes([number]) * 2 * 1024 * 1024 for number in range(3)]
    client.generate("What?", images=images, model="tiny")
    parts = cluster.requests["Generate"][-1].prompt.messages[0].parts
    assert [part.picture.WhichOneof("source") for part in parts[:3]] == ["data", "blob", "blob"]


def test_names_and_sampling_of_a_question(client: Client, cluster: Any) -> None:
    client.generate("What?", adapter="digits@3", max_tokens=5, temperature=0.0)
    client.generate([veneer.message("system", "Be brief."), veneer.message("user", "What?")], adapter="digits@canary")
    first, second = cluster.requests["Generate"]
    assert first.model == "adapters/digits/versions/3"
    assert second.model == "adapters/digits@canary"
    assert (first.sampling.max_tokens, first.sampling.HasField("temperature")) == (5, True)
    assert not second.sampling.HasField("temperature")


def test_a_score_adds_the_answer(client: Client, cluster: Any) -> None:
    assert client.score("What?", "7", model="tiny").total_logprob == -1.5
    messages = cluster.requests["Score"][0].prompt.messages
    assert messages[1].parts[0].text == "7"
    assert client.count_tokens("What?", model="tiny").total_tokens == 42


def test_a_picture_that_is_not_there(client: Client, tmp_path: Path) -> None:
    with pytest.raises(veneer.VeneerError, match=r"none\.png cannot be read: No such file"):
        client.generate("What?", image=tmp_path / "none.png", model="tiny")


def test_a_broken_download_goes_on_where_it_was(client: Client, cluster: Any, folder: Path, tmp_path: Path) -> None:
    cluster.files = {
        "adapter_config.json": b"{}",
        "adapter_model.safetensors": bytes(range(26)),
        "empty": b"",
    }
    client.datasets.push(folder, "digits")
    client.jobs.wait(client.jobs.train("digits", "digits").name)
    cluster.fail("DownloadAdapterVersion", "UNAVAILABLE", after=4)
    target = client.adapters.download("digits", tmp_path / "adapter")
    assert {path.name: path.read_bytes() for path in target.iterdir()} == cluster.files
    first, second = cluster.requests["DownloadAdapterVersion"]
    assert (first.offset_bytes, second.offset_bytes) == (0, 12)
    assert second.paths[0] == "adapter_model.safetensors"
    cluster.files["adapter_config.json"] = b"[]"
    with pytest.raises(veneer.DataLoss, match="has sha256"):
        client.adapters.download("digits", tmp_path / "adapter")


def test_a_download_never_leaves_its_folder(client: Client, cluster: Any, folder: Path, tmp_path: Path) -> None:
    cluster.files = {"../outside": b"x"}
    client.datasets.push(folder, "digits")
    client.jobs.wait(client.jobs.train("digits", "digits").name)
    with pytest.raises(veneer.DataLoss, match="outside of its folder"):
        client.adapters.download("digits@1", tmp_path / "adapter")
    assert not (tmp_path / "outside").exists()


async def test_the_async_client(async_client: AsyncClient, folder: Path) -> None:
    await async_client.datasets.push(folder, "digits")
    job = await async_client.jobs.train("digits", "digits")
    assert [job.progress.step async for job in async_client.jobs.watch(job.name)][-1] == 5
    answers = await asyncio.gather(*(async_client.generate(f"{n}?", model="tiny") for n in range(8)))
    assert len({answer.text for answer in answers}) == 8


async def test_a_call_has_a_deadline(async_client: AsyncClient, cluster: Any) -> None:
    cluster.piece_s = 5.0
    started_s = time.monotonic()
    with pytest.raises(veneer.DeadlineExceeded):
        async for _ in async_client.stream("What?", model="tiny", timeout_s=0.3):
            pass
    assert time.monotonic() - started_s < 3


def test_threads_share_a_client(client: Client) -> None:
    answers: list[str] = []

    def ask(number: int) -> None:
        answers.append(client.generate(f"{number}?", model="tiny").text)

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set(answers)) == 8


def test_no_grpc_error_comes_through(client: Client, cluster: Any) -> None:
    for code in grpc.StatusCode:
        if code is grpc.StatusCode.OK:
            continue
        cluster.fail("GetDataset", code.name, times=6, retry_after_s=0.0)
        with pytest.raises(veneer.StatusError) as failed:
            client.datasets.get("digits")
        assert failed.value.reason == "FAULT"
        cluster.faults.clear()
