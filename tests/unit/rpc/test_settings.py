"""Settings: three sources in order, and every problem at once."""

from dataclasses import dataclass
from pathlib import Path

import pytest

from veneer_rpc.settings import ServerSettings, Settings, SettingsError, load, setting

# ruff: noqa: RUF009  # setting() is dataclasses.field with a description


@dataclass(frozen=True, kw_only=True)
class Sample(Settings):
    size_bytes: int = setting("Size.", 10, 1, 100)
    rate: float = setting("Rate, 100% at most.", 0.5, 0, 1)
    loud: bool = setting("Loud.", False)
    title: str = setting("Title.", "x")
    home: Path | None = setting("Home.", None)
    needed: str = setting("Needed.")


def read(*argv: str, environ: dict[str, str] | None = None) -> Sample:
    return load(Sample, "VENEER_S_", argv, environ or {})


def problems(*argv: str, environ: dict[str, str] | None = None) -> list[str]:
    with pytest.raises(SettingsError) as caught:
        read(*argv, environ=environ)
    return str(caught.value).splitlines()


def test_flags_win_over_environment_over_file_over_defaults(tmp_path: Path) -> None:
    file = tmp_path / "s.toml"
    file.write_text('size_bytes = 1\nrate = 1\nloud = true\nneeded = "file"\ntitle = "file"\n')
    environ = {
        "VENEER_S_SIZE_BYTES": "2",
        "VENEER_S_LOUD": "no",
        "VENEER_S_CONFIG": str(file),
        "VENEER_OTHER": "1",
    }
    got = read("--size-bytes", "3", "--home=/tmp", environ=environ)
    assert got == Sample(size_bytes=3, rate=1.0, loud=False, title="file", home=Path("/tmp"), needed="file")  # noqa: S108
    assert isinstance(got.rate, float)
    assert read("--config", str(file)).size_bytes == 1


def test_every_problem_of_every_source_is_told_at_once(tmp_path: Path) -> None:
    file = tmp_path / "s.toml"
    file.write_text('rate = "fast"\nsize_bytes = true\nunknown = 1\nloud = 1\n')
    found = problems(
        "--size-bytes", "many", "--sizes", "3", f"--config={file}",
        environ={"VENEER_S_LOUD": "maybe", "VENEER_S_SIZE": "1"},
    )  # fmt: skip
    assert found == [
        "--sizes: no such flag",
        "3: no such flag",
        "--size-bytes: must be a whole number, was 'many'",
        "VENEER_S_LOUD: must be true or false, was 'maybe'",
        "VENEER_S_SIZE: no such setting",
        f"{file}: rate: must be a number, was 'fast'",
        f"{file}: size_bytes: must be a whole number, was True",
        f"{file}: unknown: no such setting",
        f"{file}: loud: must be true or false, was 1",
        "needed: must be given (--needed, VENEER_S_NEEDED or in the file)",
    ]


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        (
            ["--size-bytes=0", "--rate=1.5"],
            ["size_bytes: must be 1 to 100, was 0", "rate: must be 0 to 1, was 1.5"],
        ),
        (["--rate=nan"], ["rate: must be 0 to 1, was nan"]),
        (["--size-byte=1"], ["--size-byte=1: no such flag"]),
        (["--size-bytes"], ["argument --size-bytes: expected one argument"]),
        (["--config=/nowhere.toml"], ["/nowhere.toml: [Errno 2] No such file or directory: '/nowhere.toml'"]),
    ],
)
def test_what_is_refused(argv: list[str], expected: list[str]) -> None:
    assert problems("--needed=x", *argv) == expected if "--size-bytes" not in argv else expected[0] in problems(*argv)


def test_a_broken_file_is_named(tmp_path: Path) -> None:
    file = tmp_path / "s.toml"
    file.write_bytes(b"rate = \xff")
    assert problems("--needed=x", f"--config={file}")[0].startswith(f"{file}: ")


def test_the_help_tells_every_setting(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        read("--help")
    assert caught.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    assert "--size-bytes X Size. (a whole number; 1 to 100; default 10)" in text
    assert "Rate, 100% at most. (a number; 0 to 1; default 0.5)" in text
    assert "Loud. (true or false; default false)" in text
    assert "Home. (a path)" in text
    assert "Needed. (a text; required)" in text


@pytest.fixture
def tokens_file(tmp_path: Path) -> Path:
    path = tmp_path / "tokens.json"
    path.write_text('{"tokens": []}')
    return path


@pytest.mark.parametrize("bind", ["127.0.0.1:0", "127.9.9.9:1", "[::1]:50051", "localhost:1", "unix:/run/v.sock"])
def test_local_addresses_need_no_tls(tokens_file: Path, bind: str) -> None:
    assert not ServerSettings(tokens_file=tokens_file, bind=bind).tls


@pytest.mark.parametrize("bind", ["0.0.0.0:1", "[::]:1", "10.0.0.1:1", "veneer.example:1", "127.0.0.1.example:1"])
def test_an_open_address_needs_tls(tokens_file: Path, bind: str) -> None:
    with pytest.raises(SettingsError, match="open to other machines"):
        ServerSettings(tokens_file=tokens_file, bind=bind)
    assert ServerSettings(
        tokens_file=tokens_file, bind=bind, tls_certificate_file=tokens_file, tls_key_file=tokens_file
    ).tls


def test_no_server_without_tokens(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match=r"tokens_file: must be given"):
        load(ServerSettings, "VENEER_S_", [], {})
    with pytest.raises(SettingsError, match=r"tokens_file: there is no file"):
        load(ServerSettings, "VENEER_S_", ["--tokens-file", str(tmp_path / "none")], {})


@pytest.mark.parametrize("bind", ["", "x", ":1", "x:", "x:y", "x:65536", "x:-1", "unix:", "x:\u0661"])
def test_malformed_addresses(tokens_file: Path, bind: str) -> None:
    with pytest.raises(SettingsError, match=r"^bind: "):
        ServerSettings(tokens_file=tokens_file, bind=bind)


def test_half_a_tls_pair_and_missing_files_are_told_together(tmp_path: Path) -> None:
    with pytest.raises(SettingsError) as caught:
        ServerSettings(tokens_file=tmp_path / "t", tls_key_file=tmp_path / "k", bind="0.0.0.0:1", grace_s=-1)
    assert len(str(caught.value).splitlines()) == 5
