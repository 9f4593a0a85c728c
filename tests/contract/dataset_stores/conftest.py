"""One suite over both databases: SQLite, and PostgreSQL where its server is installed."""

import os
import pwd
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from veneer_dataset.adapters.sql.database import Database


def _binary(name: str) -> str | None:
    found = sorted(Path("/usr/lib/postgresql").glob(f"*/bin/{name}"))
    return str(found[-1]) if found else shutil.which(name)


@pytest.fixture(scope="session")
def postgresql_url() -> Iterator[str]:
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


@pytest.fixture(params=["sqlite", "postgresql"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path / 'metadata.sqlite'}"
    import sqlalchemy as sa

    found: str = request.getfixturevalue("postgresql_url")
    engine = sa.create_engine(found)
    with engine.begin() as connection:
        connection.execute(sa.text("DROP SCHEMA public CASCADE"))
        connection.execute(sa.text("CREATE SCHEMA public"))
    engine.dispose()
    return found


@pytest.fixture
def database(url: str) -> Iterator[Database]:
    opened = Database(url)
    yield opened
    opened.close()
