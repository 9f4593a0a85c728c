"""The session that docs/python.md shows runs as it stands."""

# ruff: noqa: ANN401  # the fake's types stay in conftest

import re
from pathlib import Path
from typing import Any

import pytest

PAGE = Path(__file__).parents[3] / "docs" / "python.md"


def test_the_session_of_the_page(
    running: Any, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    where = running.where()
    for name in ("dataset", "trainer", "token"):
        monkeypatch.setenv(f"VENEER_{name.upper()}", where[name])
    monkeypatch.setenv("VENEER_INFERENCE", ",".join(where["inference"]))
    folder.rename(folder.parent / "pictures")
    (folder.parent / "seven.png").write_bytes(b"\x89PNG seven")
    monkeypatch.chdir(folder.parent)
    session = re.search(r"```python\n(.*?)```", PAGE.read_text("utf-8"), re.DOTALL)
    assert session is not None
    assert len(session[1].splitlines()) <= 10
    exec(session[1], {})  # noqa: S102  # a page of ours
    assert capsys.readouterr().out.endswith("adapters/digits saw 1 and read 'Which digit is this?'")
