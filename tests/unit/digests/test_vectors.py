import json
from pathlib import Path
from typing import Any

import pytest

from veneer_digests import DatasetVersionHasher, contract_digest, row_digest
from veneer_digests.vectors import evaluate, with_outputs

PATH = Path(__file__).parents[3] / "protos" / "digest_vectors.json"
CASES: list[dict[str, Any]] = json.loads(PATH.read_text("ascii"))["cases"]


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case['kind']}: {case['name']}")
def test_vector(case: dict[str, Any]) -> None:
    expected = {name: case[name] for name in ("output", "refused") if name in case}
    assert evaluate(case["kind"], case["input"]) == expected
    assert ("refused" in case) == case["name"].startswith("refused: ")


def test_the_file_is_what_its_command_writes() -> None:
    assert with_outputs(PATH.read_text("ascii")) == PATH.read_text("ascii")


def test_only_cases_that_say_so_share_a_digest() -> None:
    named = [case for case in CASES if case["kind"] not in ("canonical_json", "epoch_order", "split")]
    first_of = {case["output"]: case["name"] for case in reversed(named) if "output" in case}
    for case in named:
        if "output" in case:
            assert first_of[case["output"]] == case.get("same_as", case["name"])


def test_the_examples_of_the_page_hold() -> None:
    def message(role: str, text: str) -> dict[str, Any]:
        return {"role": role, "content": [{"type": "text", "text": text}]}

    version = DatasetVersionHasher()
    row = row_digest({"messages": [message("user", "Hi"), message("assistant", "Hello.")]})
    version.add("train", row)
    page = PATH.with_name("DIGESTS.md").read_text("utf-8")
    for digest in (row, version.hexdigest(), contract_digest({})):
        assert f"\n{digest}" in page
