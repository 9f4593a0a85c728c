"""The command line's skeleton: commands come from packages, and one that cannot run says what to install."""

from importlib.metadata import EntryPoint
from pathlib import Path

import pytest
from typer.testing import CliRunner

from veneer_client import cli

runner = CliRunner()


@pytest.fixture
def part(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """An installed part of Veneer: one command that works, one that lacks a package when it runs."""
    (tmp_path / "veneer_fake.py").write_text(
        "def hello(name: str) -> None:\n"
        "    '''Says hello.'''\n"
        "    print(f'hello {name}')\n"
        "def heavy() -> None:\n"
        "    import surely_not_installed\n"
    )
    (tmp_path / "veneer_broken.py").write_text("import surely_not_installed\n")
    monkeypatch.syspath_prepend(tmp_path)
    return "veneer_fake"


def entry(name: str, value: str) -> EntryPoint:
    return EntryPoint(name, value, cli.COMMANDS)


def test_a_dotted_name_is_a_place_in_the_tree(part: str) -> None:
    app = cli.build_app([entry("base.hello", f"{part}:hello"), entry("hello", f"{part}:hello")])
    assert runner.invoke(app, ["base", "hello", "a"]).stdout == "hello a\n"
    assert runner.invoke(app, ["hello", "b"]).stdout == "hello b\n"
    assert "Base models" in runner.invoke(app, ["--help"]).stdout


def test_a_command_may_have_others_below_it_and_a_namesake_elsewhere(part: str) -> None:
    app = cli.build_app([entry(name, f"{part}:hello") for name in ("base.eval", "eval", "eval.list")])
    for words in (["base", "eval"], ["eval"], ["eval", "list"]):
        assert runner.invoke(app, [*words, "a"]).stdout == "hello a\n", words


@pytest.mark.parametrize(
    ("line", "loaded"),
    [
        ("base eval --json", ["base.eval"]),
        ("eval --adapter a", ["eval", "eval.list"]),
        ("eval list", ["eval.list"]),
        ("eval nonsense", ["eval", "eval.list"]),
        ("base", None),
        ("nonsense", None),
        ("--help", None),
        ("", None),
    ],
)
def test_only_the_command_that_is_named_is_imported(line: str, loaded: list[str] | None) -> None:
    entries = [entry(name, "unimportable:x") for name in ("base.eval", "eval", "eval.list")]
    found = [each.name for each in cli.meant(entries, line.split())]
    assert found == (loaded or [each.name for each in entries])


def test_a_package_that_cannot_be_imported_names_its_extra(part: str) -> None:
    app = cli.build_app([entry("base.hello", f"{part}:hello"), entry("base.verify", "veneer_broken:verify")])
    assert "Not installed" in runner.invoke(app, ["base", "--help"]).stdout
    result = runner.invoke(app, ["base", "verify", "DIR", "--dtype", "float32"])
    assert result.exit_code == 1
    assert result.stderr == (
        "veneer: `base verify` needs surely_not_installed, which is not installed. "
        "Install it with: pip install 'veneer[broken]'\n"
    )
    assert runner.invoke(app, ["base", "hello", "a"]).exit_code == 0


def test_a_command_that_lacks_a_package_when_it_runs_names_its_extra(
    part: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(cli, "entry_points", lambda group: [entry("heavy", f"{part}:heavy")])
    monkeypatch.setattr("sys.argv", ["veneer", "heavy"])
    with pytest.raises(SystemExit) as left:
        cli.main()
    assert left.value.code == 1
    assert capsys.readouterr().err == (
        "veneer: this command needs surely_not_installed, which is not installed. "
        "Install it with: pip install 'veneer[fake]'\n"
    )


def test_a_missing_package_that_no_extra_brings_is_our_own_defect(tmp_path: Path) -> None:
    with pytest.raises(ModuleNotFoundError):
        cli.build_app([entry("base.hello", "surely_not_installed:hello")])


def test_version() -> None:
    assert runner.invoke(cli.build_app([]), ["--version"]).exit_code == 0


def test_called_wrongly_exits_with_2(part: str) -> None:
    app = cli.build_app([entry("hello", f"{part}:hello")])
    assert runner.invoke(app, ["hello"]).exit_code == 2
    assert runner.invoke(app, ["unknown"]).exit_code == 2
