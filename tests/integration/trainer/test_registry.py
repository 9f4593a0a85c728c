"""Adapters over real connections: publish, download, aliases, watching, imports, and one tenant's own."""

import json
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.rpc import error_details_pb2
from grpc_status import rpc_status

from veneer.trainer.v1 import adapter_pb2
from veneer.trainer.v1 import adapter_service_pb2 as pb
from veneer.trainer.v1 import training_job_pb2 as job_pb

# What the conftest makes; a conftest cannot be imported.
Trainer = Worker = Datasets = Kit = Make = Adapters = Act = Message = Answer = Any
Code = grpc.StatusCode


@pytest.fixture
def trainer(make_trainer: Make) -> Trainer:
    """One whose leases outlast a busy machine."""
    started = make_trainer(lease_s="60")
    started.start()
    return started


def refusal(act: Act) -> tuple[grpc.StatusCode, str]:
    with pytest.raises(grpc.RpcError) as caught:
        act()
    info = error_details_pb2.ErrorInfo()
    assert rpc_status.from_call(caught.value).details[0].Unpack(info)
    return caught.value.code(), info.reason


def publish(
    trainer: Trainer, worker: Worker, kit: Kit, seed: int = 0, token: str | None = None, **spec: Message
) -> Answer:
    """One job from order to success; returns its version."""
    kit.create(trainer.jobs(token), **spec)
    attempt = worker.acquire(10).attempt
    version = worker.publish(attempt, kit.peft_folder(seed))
    assert worker.finish(attempt) == job_pb.JOB_STATE_SUCCEEDED
    return version


def download(adapters: Adapters, name: str, **request: Message) -> dict[str, bytes]:
    contents: dict[str, bytes] = {}
    for piece in adapters.DownloadAdapterVersion(pb.DownloadAdapterVersionRequest(name=name, **request), timeout=20):
        contents[piece.path] = contents.get(piece.path, b"") + piece.data
    return contents


def test_a_published_version_has_its_lineage_and_gives_back_its_bytes(
    trainer: Trainer, worker: Worker, kit: Kit
) -> None:
    folder = kit.peft_folder(3)
    kit.create(trainer.jobs(), "first", seed=7)
    lease = worker.acquire(5)
    resolved = job_pb.ResolvedTraining(model_digest=worker.digest, dtype=2, device="cpu", total_steps=150)
    worker.beat(lease.attempt, 1, resolved=resolved)
    published = worker.publish(lease.attempt, folder)
    worker.finish(lease.attempt)
    adapters = trainer.adapters()
    version = adapters.GetAdapterVersion(pb.GetAdapterVersionRequest(name="adapters/digits/versions/1"))
    assert version == published
    assert version.digest == kit.digest_of(folder)
    assert version.contract.digest
    assert version.contract.model_digest == worker.digest
    assert {name.rpartition(".")[2] for name in version.target_modules} == {"q_proj", "v_proj"}
    assert (version.lora.rank, version.lora.alpha) == (8, 16)
    assert [file.path for file in version.files] == sorted(folder)
    assert version.lineage.training_job == "trainingJobs/first"
    assert version.lineage.spec.seed == 7
    assert version.lineage.resolved == resolved
    assert version.lineage.code_version == "0.1"
    assert version.final_progress.step == 10
    assert list(version.aliases) == ["production"]
    assert download(adapters, version.name) == folder
    part = download(adapters, version.name, paths=["adapter_config.json"], offset_bytes=5)
    assert part == {"adapter_config.json": folder["adapter_config.json"][5:]}
    by_alias = pb.GetAdapterVersionRequest(name="adapters/digits/versions/production")
    assert adapters.GetAdapterVersion(by_alias) == version
    adapter = adapters.GetAdapter(pb.GetAdapterRequest(name="adapters/digits"))
    assert (adapter.model, dict(adapter.aliases), adapter.latest_version) == ("models/tiny", {"production": 1}, 1)
    assert refusal(lambda: download(adapters, version.name, paths=["x"])) == (Code.NOT_FOUND, "FILE_UNKNOWN")
    assert refusal(lambda: download(adapters, version.name, offset_bytes=1 << 40))[0] == Code.OUT_OF_RANGE


def test_files_without_a_contract_get_it_sealed(trainer: Trainer, worker: Worker, kit: Kit) -> None:
    folder = kit.peft_folder()
    kit.create(trainer.jobs())
    attempt = worker.acquire(5).attempt
    sent = {name: data for name, data in folder.items() if name != "processing_contract.json"}
    version = worker.publish(attempt, sent, kit.digest_of(folder))
    stored = download(trainer.adapters(), version.name)
    assert json.loads(stored.pop("processing_contract.json")) == json.loads(folder["processing_contract.json"])
    assert stored == sent


def test_what_does_not_hash_or_fit_is_not_published(trainer: Trainer, worker: Worker, kit: Kit) -> None:
    kit.create(trainer.jobs())
    attempt, good = worker.acquire(5).attempt, kit.peft_folder()
    assert refusal(lambda: worker.publish(attempt, good, "ab" * 32)) == (Code.DATA_LOSS, "ADAPTER_DAMAGED")
    config = json.loads(good["adapter_config.json"])
    contract = json.loads(good["processing_contract.json"])
    unfit = [
        {"adapter_config.json": json.dumps(config | {"r": 4}).encode()},
        {"adapter_config.json": json.dumps(config | {"modules_to_save": ["lm_head"]}).encode()},
        {"adapter_config.json": json.dumps(config | {"target_modules": ["q_proj"]}).encode()},
        {"adapter_config.json": b"[]"},
        {"adapter_model.safetensors": good["adapter_model.safetensors"][:-4] + b"\0\0\xc0\x7f"},  # NaN
        {"adapter_model.safetensors": b"\x80\x04\x95"},
        {"processing_contract.json": json.dumps(contract | {"template_digest": "0" * 64}).encode()},
    ]
    for change in unfit:
        said = refusal(lambda change=change: worker.publish(attempt, good | change, "ab" * 32))
        assert said == (Code.FAILED_PRECONDITION, "ADAPTER_UNFIT")
    scaled = good | {"adapter_config.json": json.dumps(config | {"lora_alpha": 99}).encode()}
    assert refusal(lambda: worker.publish(attempt, scaled)) == (Code.FAILED_PRECONDITION, "LORA_DIFFERS")
    foreign = refusal(lambda: worker.publish(attempt, good | {"adapter_model.bin": b"x"}, "ab" * 32))
    assert foreign[0] == Code.INVALID_ARGUMENT
    assert not trainer.adapters().ListAdapters(pb.ListAdaptersRequest()).adapters
    data = Path(trainer.flags["data"])
    assert not list((data / "adapters").iterdir())
    assert not list((data / "incoming").iterdir())
    assert worker.publish(attempt, good).name == "adapters/digits/versions/1"


def test_everything_is_there_after_a_restart(trainer: Trainer, worker: Worker, kit: Kit) -> None:
    first, second = publish(trainer, worker, kit, 1), publish(trainer, worker, kit, 2)
    adapters = trainer.adapters()
    adapters.PromoteAdapterVersion(pb.PromoteAdapterVersionRequest(name=second.name, reason="better"))
    before = (
        adapters.GetAdapter(pb.GetAdapterRequest(name="adapters/digits")),
        list(adapters.ListAliasMoves(pb.ListAliasMovesRequest(parent="adapters/digits")).alias_moves),
        list(adapters.ListAdapterVersions(pb.ListAdapterVersionsRequest(parent="adapters/digits")).adapter_versions),
    )
    trainer.kill(signal.SIGKILL)
    trainer.start()
    adapters = trainer.adapters()
    assert before == (
        adapters.GetAdapter(pb.GetAdapterRequest(name="adapters/digits")),
        list(adapters.ListAliasMoves(pb.ListAliasMovesRequest(parent="adapters/digits")).alias_moves),
        list(adapters.ListAdapterVersions(pb.ListAdapterVersionsRequest(parent="adapters/digits")).adapter_versions),
    )
    assert download(adapters, first.name) == kit.peft_folder(1)


@pytest.mark.parametrize("place", ["publish.renamed", "publish.inserted"])
def test_a_trainer_killed_in_the_middle_of_publishing_leaves_no_half_version(
    place: str, make_trainer: Make, base_digest: str, kit: Kit
) -> None:
    trainer = make_trainer(lease_s="60")
    trainer.start(f"{place}=kill")
    worker = kit.Worker(trainer.worker_stub(), base_digest)
    kit.create(trainer.jobs())
    attempt = worker.acquire(5).attempt
    with pytest.raises(grpc.RpcError):
        worker.publish(attempt, kit.peft_folder())
    assert trainer.wait() == -signal.SIGKILL
    folders = Path(trainer.flags["data"]) / "adapters"
    assert len(list(folders.iterdir())) == 1
    trainer.start()
    assert not list(folders.iterdir())
    assert not trainer.adapters().ListAdapters(pb.ListAdaptersRequest()).adapters
    assert worker.publish(attempt, kit.peft_folder()).name == "adapters/digits/versions/1"
    assert len(list(folders.iterdir())) == 1


def test_a_tampered_file_is_not_served(trainer: Trainer, worker: Worker, kit: Kit) -> None:
    version = publish(trainer, worker, kit)
    (folder,) = (Path(trainer.flags["data"]) / "adapters").iterdir()
    file = folder / "adapter_model.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    assert refusal(lambda: download(trainer.adapters(), version.name)) == (Code.DATA_LOSS, "FILE_DAMAGED")


def test_aliases_move_back_and_forth_and_tell_who_moved_them(trainer: Trainer, worker: Worker, kit: Kit) -> None:
    adapters = trainer.adapters()
    names = [publish(trainer, worker, kit, seed).name for seed in (1, 2, 3)]
    adapter = adapters.GetAdapter(pb.GetAdapterRequest(name="adapters/digits"))
    assert dict(adapter.aliases) == {"production": 1}
    promote = pb.PromoteAdapterVersionRequest

    def production() -> int:
        return int(adapters.GetAdapter(pb.GetAdapterRequest(name="adapters/digits")).aliases["production"])

    adapters.PromoteAdapterVersion(promote(name=names[1], expected_version=1, reason="sharper"))
    stale = refusal(lambda: adapters.PromoteAdapterVersion(promote(name=names[2], expected_version=1)))
    assert stale == (Code.ABORTED, "ALIAS_MOVED")
    adapters.PromoteAdapterVersion(promote(name=names[2]))
    assert production() == 3
    back = pb.RollbackAdapterRequest(name="adapters/digits", reason="worse")
    assert adapters.RollbackAdapter(back).aliases["production"] == 2
    assert adapters.RollbackAdapter(back).aliases["production"] == 1
    assert refusal(lambda: adapters.RollbackAdapter(back)) == (Code.FAILED_PRECONDITION, "NOTHING_BEFORE")
    moves = adapters.ListAliasMoves(pb.ListAliasMovesRequest(parent="adapters/digits")).alias_moves
    assert [(move.from_version, move.to_version, move.reason) for move in moves] == [
        (2, 1, "worse"), (3, 2, "worse"), (2, 3, ""), (1, 2, "sharper"), (0, 1, "the first version"),
    ]  # fmt: skip
    assert [move.actor for move in moves][:4] == ["acme"] * 4
    gate = promote(name=names[2], condition="exact_match >= 0.9")
    assert refusal(lambda: adapters.PromoteAdapterVersion(gate)) == (Code.FAILED_PRECONDITION, "GATE_NOT_MET")
    wrong = promote(name=names[2], condition="rm -rf")
    assert refusal(lambda: adapters.PromoteAdapterVersion(wrong))[0] == Code.INVALID_ARGUMENT
    adapters.PromoteAdapterVersion(promote(name=names[2], alias="canary"))
    split = adapter_pb2.Adapter(name="adapters/digits", preload=True)
    split.traffic_split.alias, split.traffic_split.share = "canary", 0.1
    update = pb.UpdateAdapterRequest(adapter=split, update_mask={"paths": ["traffic_split", "preload"]})
    changed = adapters.UpdateAdapter(update)
    assert (changed.traffic_split.share, changed.preload) == (0.1, True)
    split.etag = adapter.etag
    stale_update = pb.UpdateAdapterRequest(adapter=split, update_mask={"paths": ["preload"]})
    assert refusal(lambda: adapters.UpdateAdapter(stale_update)) == (Code.ABORTED, "ETAG_STALE")
    canary = pb.DeleteAliasRequest(adapter="adapters/digits", alias="canary")
    assert refusal(lambda: adapters.DeleteAlias(canary)) == (Code.FAILED_PRECONDITION, "ALIAS_IN_USE")


def test_what_is_named_is_not_deleted(trainer: Trainer, worker: Worker, kit: Kit) -> None:
    adapters = trainer.adapters()
    first, second = publish(trainer, worker, kit, 1).name, publish(trainer, worker, kit, 2).name

    def delete(name: str) -> None:
        adapters.DeleteAdapterVersion(pb.DeleteAdapterVersionRequest(name=name))

    used = (Code.FAILED_PRECONDITION, "VERSION_IN_USE")
    assert refusal(lambda: delete(first)) == used
    job = kit.create(trainer.jobs(), "next", initial_adapter_version=second)
    assert refusal(lambda: delete(second)) == used
    differs = refusal(lambda: kit.create(trainer.jobs(), initial_adapter_version=second, lora={"rank": 4}))
    assert differs == (Code.FAILED_PRECONDITION, "INITIAL_ADAPTER_DIFFERS")
    whole = pb.DeleteAdapterRequest(name="adapters/digits")
    assert refusal(lambda: adapters.DeleteAdapter(whole)) == (Code.FAILED_PRECONDITION, "ADAPTER_IN_USE")
    worker.finish(worker.acquire(5).attempt, failed=job_pb.Failure(reason="BROKEN", message="x"))
    assert kit.get(trainer.jobs(), job.name).state == job_pb.JOB_STATE_FAILED
    delete(second)
    assert refusal(lambda: download(adapters, second)) == (Code.NOT_FOUND, "VERSION_UNKNOWN")
    assert publish(trainer, worker, kit, 3).name == "adapters/digits/versions/3"
    adapters.DeleteAlias(pb.DeleteAliasRequest(adapter="adapters/digits", alias="production"))
    adapters.DeleteAdapter(whole)
    assert not list((Path(trainer.flags["data"]) / "adapters").iterdir())
    again = publish(trainer, worker, kit, 4)
    assert again.name == "adapters/digits/versions/4"
    assert list(again.aliases) == ["production"]


def test_a_worker_reads_only_versions_that_unfinished_work_names(trainer: Trainer, worker: Worker, kit: Kit) -> None:
    named, other = publish(trainer, worker, kit, 1), publish(trainer, worker, kit, 2)
    adapters = trainer.adapters(trainer.keys.worker)
    unknown = (Code.NOT_FOUND, "VERSION_UNKNOWN")
    assert refusal(lambda: download(adapters, named.name, tenant="acme")) == unknown
    job = kit.create(trainer.jobs(), "next", initial_adapter_version=named.name)
    assert download(adapters, named.name, tenant="acme") == kit.peft_folder(1)
    for request in ({"tenant": "acme", "name": other.name}, {"tenant": "other", "name": named.name}):
        assert refusal(lambda request=request: download(adapters, **request)) == unknown
    assert refusal(lambda: download(adapters, named.name)) == unknown  # of its own tenant, which has none
    attempt = worker.acquire(5).attempt
    published = worker.publish(attempt, kit.peft_folder(3))
    assert published.lineage.initial_adapter_version == named.name
    worker.finish(attempt)
    assert kit.get(trainer.jobs(), job.name).state == job_pb.JOB_STATE_SUCCEEDED
    assert refusal(lambda: download(adapters, named.name, tenant="acme")) == unknown


def test_watchers_get_a_snapshot_then_changes_and_resume_by_revision(
    trainer: Trainer, worker: Worker, kit: Kit
) -> None:
    first = publish(trainer, worker, kit, 1)
    publish(trainer, worker, kit, 1, trainer.keys.other, adapter="adapters/theirs")
    adapters, replica = trainer.adapters(), trainer.adapters(trainer.keys.replica)
    stream = replica.WatchAdapters(pb.WatchAdaptersRequest(), timeout=30)
    snapshot = next(stream)
    assert snapshot.snapshot
    assert [(each.tenant, each.adapter) for each in snapshot.adapters] == [
        ("acme", "adapters/digits"), ("other", "adapters/theirs"),
    ]  # fmt: skip
    alias = snapshot.adapters[0].aliases[0]
    assert (alias.alias, alias.adapter_version, alias.digest) == ("production", first.name, first.digest)
    own = next(adapters.WatchAdapters(pb.WatchAdaptersRequest(), timeout=30))
    assert [each.adapter for each in own.adapters] == ["adapters/digits"]

    second = publish(trainer, worker, kit, 2)
    adapters.PromoteAdapterVersion(pb.PromoteAdapterVersionRequest(name=second.name))

    def follow(stream: Iterator[Message]) -> Answer:
        for change in stream:
            assert not change.snapshot
            if any(alias.digest == second.digest for each in change.adapters for alias in each.aliases):
                return change
        raise AssertionError

    live = follow(stream)
    assert live.revision > snapshot.revision
    resumed = follow(replica.WatchAdapters(pb.WatchAdaptersRequest(after_revision=snapshot.revision), timeout=30))
    assert [each.adapter for each in resumed.adapters] == ["adapters/digits"]
    assert resumed.revision >= live.revision
    theirs = trainer.adapters(trainer.keys.other)
    theirs.DeleteAlias(pb.DeleteAliasRequest(adapter="adapters/theirs", alias="production"))
    theirs.DeleteAdapter(pb.DeleteAdapterRequest(name="adapters/theirs"))
    after = replica.WatchAdapters(pb.WatchAdaptersRequest(after_revision=resumed.revision), timeout=30)
    gone = next(change for change in after if change.deleted_adapters)
    assert [(each.tenant, each.adapter) for each in gone.deleted_adapters] == [("other", "adapters/theirs")]
    ahead = pb.WatchAdaptersRequest(after_revision=1_000_000)
    assert refusal(lambda: next(replica.WatchAdapters(ahead))) == (Code.OUT_OF_RANGE, "REVISION_UNKNOWN")
    report = pb.ReportServingRequest(replica="r1", address="127.0.0.1:1", model="models/tiny")
    assert replica.ReportServing(report).revision >= gone.revision
    assert refusal(lambda: adapters.ReportServing(report)) == (Code.PERMISSION_DENIED, "ROLE_MISSING")
    assert download(replica, second.name, tenant="acme") == kit.peft_folder(2)


def test_an_import_is_checked_and_named_as_one(trainer: Trainer, kit: Kit) -> None:
    adapters, folder = trainer.adapters(), kit.peft_folder(5)
    del folder["processing_contract.json"]

    def bring(contents: dict[str, bytes], **header: Message) -> Answer:
        values = {"adapter": "adapters/foreign", "model": "models/tiny", "description": "from a friend"} | header
        sent = kit.pieces(pb.ImportAdapterVersionRequest, pb.ImportHeader(**values), contents)
        return adapters.ImportAdapterVersion(sent, timeout=20)

    request_id = "11111111-1111-4111-8111-111111111111"
    version = bring(folder, request_id=request_id)
    assert version.lineage.imported == adapter_pb2.ImportedOrigin(description="from a friend", importer="acme")
    assert not version.lineage.HasField("spec")
    assert version.digest == kit.digest_of(kit.peft_folder(5))
    assert bring(folder, request_id=request_id) == version
    other = refusal(lambda: bring(folder | {"README.md": b"x", "adapter_model.safetensors":
                    kit.peft_folder(6)["adapter_model.safetensors"]}, request_id=request_id))  # fmt: skip
    assert other == (Code.ALREADY_EXISTS, "REQUEST_ID_REUSED")
    assert refusal(lambda: bring(folder, model="models/none"))[0] == Code.NOT_FOUND
    assert refusal(lambda: bring({"adapter_model.bin": b"\x80"}))[0] == Code.INVALID_ARGUMENT
    assert refusal(lambda: bring({"adapter_config.json": b"{}"}))[0] == Code.INVALID_ARGUMENT
    wrong = folder | {"adapter_config.json": b'{"peft_type": "LORA", "r": 3, "target_modules": ["o_proj"]}'}
    assert refusal(lambda: bring(wrong)) == (Code.FAILED_PRECONDITION, "ADAPTER_UNFIT")
    assert adapters.GetAdapter(pb.GetAdapterRequest(name="adapters/foreign")).latest_version == 1


def test_one_adapter_made_by_two_at_once_counts_without_gaps(trainer: Trainer, base_digest: str, kit: Kit) -> None:
    workers = [kit.Worker(trainer.worker_stub(), base_digest, f"w{index}") for index in range(4)]
    for _ in workers:
        kit.create(trainer.jobs())
    names: list[str] = []

    def run(worker: Worker, seed: int) -> None:
        attempt = worker.acquire(10).attempt
        names.append(worker.publish(attempt, kit.peft_folder(seed)).name)
        worker.finish(attempt)

    threads = [threading.Thread(target=run, args=(worker, seed)) for seed, worker in enumerate(workers)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert sorted(names) == [f"adapters/digits/versions/{number}" for number in (1, 2, 3, 4)]
