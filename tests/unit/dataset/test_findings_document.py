"""docs/findings.md shows the table of the code: the same codes, severities, expectations and remedies."""

import re
from pathlib import Path

from veneer_dataset.domain.findings import KINDS

DOCUMENT = Path(__file__).parents[3] / "docs" / "findings.md"


def test_the_document_holds_the_table() -> None:
    rows = re.findall(r"^\| `([A-Z0-9_]+)` \| (\w+) \| (.+?) \| (.+?) \|$", DOCUMENT.read_text("utf-8"), re.MULTILINE)
    shown = {code: (severity, expected, remedy) for code, severity, expected, remedy in rows}
    kept = {
        code: (kind.severity.name, kind.expected.replace("|", "\\|"), kind.remedy.replace("|", "\\|"))
        for code, kind in KINDS.items()
    }
    assert shown == kept
    assert [code for code, *_ in rows] == list(KINDS)
