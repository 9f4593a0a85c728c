"""What is decided before anything starts: base, fit, command lines, credentials, and who holds the folder."""

import json
import stat
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from veneer_cluster import base, credentials, fit, programs
from veneer_cluster.base import Base
from veneer_cluster.fit import Arithmetic, Room
from veneer_cluster.folder import ClusterError, ClusterState, Folder, ProcessState
from veneer_cluster.programs import FLAGS, Plan, Probe
from veneer_rpc.delegation import DelegationSigner, DelegationVerifier
from veneer_rpc.tokens import TokenFile

QWEN = Base(
    "qwen3-vl-2b-instruct", Path("/models/qwen"), 2_130_000_000, 4_260_000_000, 2 * 28 * 8 * 128, 151_936 * 2048
)
BF16, FLOAT32, HALVES = Arithmetic(True, True), Arithmetic(False, False), Arithmetic(False, True)


@pytest.fixture
def folder(tmp_path: Path) -> Folder:
    folder = Folder(tmp_path / "cluster")
    folder.create()
    return folder


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("Qwen3-VL-2B-Instruct", "qwen3-vl-2b-instruct"),
        ("my_base.v2", "my-base-v2"),
        ("7b", "model-7b"),
        ("x" * 80, "x" * 63),
    ],
)
def test_a_base_is_named_after_its_directory(name: str, expected: str) -> None:
    assert base.model_id(name) == expected


def test_a_base_is_measured_without_loading_it(tmp_path: Path) -> None:
    directory = tmp_path / "Tiny Base"
    directory.mkdir()
    save_file({"a": np.zeros((3, 5), np.float16), "b": np.zeros(7, np.float32)}, directory / "model.safetensors")
    with pytest.raises(ClusterError, match=r"holds no config\.json of a Qwen3-VL"):
        base.find(str(directory))
    text = {"num_hidden_layers": 3, "num_key_value_heads": 2, "head_dim": 5, "vocab_size": 7, "hidden_size": 2}
    for each, tied in ((directory, True), (tmp_path, False)):
        (each / "config.json").write_text(json.dumps({"text_config": text, "tie_word_embeddings": tied}))
    found = base.find(str(directory))
    assert found == Base("tiny-base", directory, 22, 58, 60, 14)
    with pytest.raises(ClusterError, match=r"holds no \*\.safetensors file"):
        base.find(str(tmp_path))


def test_a_cluster_that_cannot_fit_is_refused_with_figures() -> None:
    needed = fit.need(QWEN, workers=1, replicas=2, cpu=BF16, room=Room(fit.LEAST_KV_TOKENS, as_stored=False))
    assert needed.weights_bytes == 4_260_000_000 + 2 * QWEN.tied_numbers
    assert 3 * needed.weights_bytes < needed.total_bytes < 20_000_000_000
    with pytest.raises(ClusterError, match=r"4\.9 GB in each of 3 .* and 8\.0 GB of memory are free"):
        fit.room(QWEN, 1, 2, BF16, 8_000_000_000)
    for as_stored, times in ((False, 2), (True, 1)):
        in_float32 = fit.need(QWEN, 1, 2, FLOAT32, Room(0, as_stored))
        assert in_float32.weights_bytes == times * 4_260_000_000
        for packs in (HALVES, BF16):
            assert fit.need(QWEN, 1, 2, packs, Room(0, as_stored)).weights_bytes == needed.weights_bytes


@pytest.mark.parametrize("available_bytes", [18_000_000_000, 20_000_000_000])
def test_replicas_remember_as_many_tokens_as_memory_has_room_for(available_bytes: int) -> None:
    room = fit.room(QWEN, 1, 1, FLOAT32, available_bytes)
    assert fit.LEAST_KV_TOKENS < room.kv_tokens < fit.MOST_KV_TOKENS
    assert not room.as_stored
    assert 0.94 * available_bytes < fit.need(QWEN, 1, 1, FLOAT32, room).total_bytes <= 0.95 * available_bytes
    assert fit.room(QWEN, 1, 1, FLOAT32, 2 * available_bytes) == Room(fit.MOST_KV_TOKENS, as_stored=False)


def test_replicas_hold_the_base_as_it_is_stored_only_where_it_does_not_fit_otherwise() -> None:
    room = fit.room(QWEN, 1, 1, FLOAT32, 14_000_000_000)
    assert room.as_stored
    assert fit.LEAST_KV_TOKENS < room.kv_tokens < fit.MOST_KV_TOKENS
    with pytest.raises(ClusterError, match=r"4\.3 GB in each of 2 .* and 11\.0 GB of memory are free"):
        fit.room(QWEN, 1, 1, FLOAT32, 11_000_000_000)
    whole = Base("whole", Path("/models/whole"), 2_130_000_000, 8_520_000_000, 2 * 28 * 8 * 128)
    with pytest.raises(ClusterError, match=r"8\.5 GB"):
        fit.room(whole, 1, 1, FLOAT32, 14_000_000_000)


def test_programs_agree_on_addresses_models_and_order(folder: Folder) -> None:
    plan = Plan(QWEN, folder, workers=2, replicas=2, cores=8, room=Room(4321, as_stored=True))
    started = {program.name: program for program in programs.programs(plan)}
    flags = {
        name: dict(zip(program.command[3::2], program.command[4::2], strict=True))
        for name, program in started.items()
        if name != "valkey"
    }
    assert list(started) == ["valkey", "trainer", "dataset", "replica-1", "replica-2", "worker-1", "worker-2"]
    assert [program.stage for program in started.values()] == [0, 1, 1, 2, 2, 2, 2]
    addresses = [program.address for program in started.values() if program.probe is Probe.HEALTH]
    assert len(set(addresses)) == 4
    assert all(address.startswith("127.0.0.1:") for address in addresses)
    assert flags["trainer"]["--bind"] == flags["dataset"]["--trainer"] == flags["worker-1"]["--trainer"]
    assert flags["dataset"]["--bind"] == flags["replica-1"]["--dataset"] == flags["worker-2"]["--dataset"]
    assert flags["worker-1"]["--models"] == flags["trainer"]["--models"] == "qwen3-vl-2b-instruct=/models/qwen"
    assert flags["trainer"]["--redis"] == f"unix://{folder.root}/valkey/valkey.sock"
    assert flags["replica-1"]["--kv-tokens"] == "4321"
    assert flags["replica-1"]["--data"] != flags["replica-2"]["--data"]
    assert all(each["--die-with-parent"] == "true" for each in flags.values())


def test_training_yields_to_serving(folder: Folder) -> None:
    plan = Plan(QWEN, folder, workers=1, replicas=2, cores=8, redis="redis://127.0.0.1:6379")
    started = {program.name: program for program in programs.programs(plan)}
    assert "valkey" not in started
    assert (started["worker-1"].cores, started["worker-1"].nice) == (8, 10)
    assert (started["replica-1"].cores, started["replica-1"].nice) == (4, 0)
    assert started["replica-1"].environment["OMP_NUM_THREADS"] == "4"


def test_no_secret_stands_on_a_command_line(folder: Folder) -> None:
    token = credentials.ensure(folder)
    plan = Plan(QWEN, folder, workers=1, replicas=1, cores=2)
    assert not any(token in part for program in programs.programs(plan) for part in program.command)


def test_a_deep_folder_gets_a_short_socket(tmp_path: Path) -> None:
    folder = Folder(tmp_path / ("deep" * 30))
    folder.create()
    address = programs.programs(Plan(QWEN, folder, 1, 1, 2))[0].address
    assert len(address.removeprefix("unix:")) < 100


def test_every_flag_of_the_table_can_be_filled_in(folder: Folder) -> None:
    plan = Plan(QWEN, folder, workers=1, replicas=1, cores=2)
    modules = {program.command[2] for program in programs.programs(plan) if program.name != "valkey"}
    assert modules == set(FLAGS)
    assert not any("{" in part for program in programs.programs(plan) for part in program.command)


def test_services_know_their_callers_and_no_others(folder: Folder) -> None:
    user = credentials.ensure(folder)
    files = {name: TokenFile(credentials.tokens_file(folder, name)) for name in credentials.SERVICES}
    worker = credentials.token_file(folder, "worker").read_text()
    for each in files.values():
        entry = each.find(user)
        assert entry is not None
        assert (entry.tenant, entry.roles) == ("local", {"user"})
    assert files["trainer"].find(worker)
    assert files["dataset"].find(worker) is None
    assert credentials.ensure(folder) == user


def test_secrets_are_their_owners_alone(folder: Folder) -> None:
    user = credentials.ensure(folder)
    for path in (folder.root, folder.secrets, *folder.secrets.iterdir()):
        assert stat.S_IMODE(path.stat().st_mode) & 0o077 == 0, path
    hashes = credentials.tokens_file(folder, "trainer").read_text()
    assert user not in hashes
    assert len(json.loads(hashes)["tokens"]) == 4


def test_the_signing_key_and_the_public_one_fit(folder: Folder) -> None:
    credentials.ensure(folder)
    signer = DelegationSigner((folder.secrets / "delegation.pem").read_bytes())
    verifier = DelegationVerifier("dataset", [(folder.secrets / "delegation-public.pem").read_bytes()])
    assert verifier.verify(signer.sign("trainer", "local", ["dataset"], ["user"])).tenant == "local"


def test_a_token_for_another_tenant(folder: Folder) -> None:
    credentials.ensure(folder)
    token = credentials.grant(folder, "accounting")
    for service in credentials.SERVICES:
        entry = TokenFile(credentials.tokens_file(folder, service)).find(token)
        assert entry is not None
        assert entry.tenant == "accounting"
    before = credentials.tokens_file(folder, "dataset").read_text()
    with pytest.raises(ClusterError, match="tenant must be 1-63"):
        credentials.grant(folder, "Not A Tenant")
    assert credentials.tokens_file(folder, "dataset").read_text() == before
    assert {path.suffix for path in folder.secrets.iterdir()} == {".json", ".pem", ".token"}  # and nothing half made


def test_tokens_made_at_once_are_all_known(folder: Folder) -> None:
    credentials.ensure(folder)
    with ThreadPoolExecutor(8) as pool:
        tokens = list(pool.map(lambda number: credentials.grant(folder, f"tenant-{number}"), range(24)))
    for service in credentials.SERVICES:
        file = TokenFile(credentials.tokens_file(folder, service))
        found = [file.find(token) for token in tokens]
        assert [entry and entry.tenant for entry in found] == [f"tenant-{number}" for number in range(24)]


def test_a_folder_has_one_launcher(folder: Folder) -> None:
    holder = "import sys, time; from pathlib import Path; from veneer_cluster.folder import Folder\n"
    holder += "with Folder(Path(sys.argv[1])).lock(): print('held', flush=True); time.sleep(9)"
    process = subprocess.Popen([sys.executable, "-c", holder, folder.root], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    with process:
        assert process.stdout.readline() == "held\n"
        assert folder.runner() == process.pid
        with pytest.raises(ClusterError, match=rf"runs in .* already \(pid {process.pid}\)"), folder.lock():
            pass
        process.kill()
    assert folder.runner() is None
    with folder.lock():
        assert folder.runner() is not None


def test_the_state_of_a_dead_launcher_is_no_state(folder: Folder) -> None:
    process = ProcessState("trainer", 7, "127.0.0.1:1", "running", 0, 1, 5, 6, 0.5)
    assert folder.read_state() is None
    folder.write_state(ClusterState(1, "models/x", "/x", True, [process]))
    assert folder.read_state() is None
    with folder.lock():
        assert folder.read_state() is None
        pid = folder.runner()
        assert pid is not None
        state = ClusterState(pid, "models/x", "/x", True, [process])
        folder.write_state(state)
        assert folder.read_state() == state
