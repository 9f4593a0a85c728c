"""What a well-trained adapter keeps in each form: figures on held-out rows, and answers of the form alone."""

# ruff: noqa: ANN401  # the cluster's type stays in conftest

import json
from pathlib import Path
from typing import Any

import pytest

from veneer_client._exports import FORMATS
from veneer_cluster.demo.scenes import HANDWRITING, write
from veneer_rpc.certificate import verify

pytestmark = [pytest.mark.e2e_long, pytest.mark.timeout(900)]
_ASKED = 8


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[tuple[str, str]]]:
    """All handwritten digits as a folder to push, and some held-out pictures with their questions."""
    root = tmp_path_factory.mktemp("digits") / "digits"
    write(HANDWRITING, root)
    lines = (root / "test.jsonl").read_text("utf-8").splitlines()[:_ASKED]
    return root, [(row["image"], row["prompt"]) for row in map(json.loads, lines)]


def test_every_form_of_a_trained_adapter_keeps_its_figure(
    learned: Any, digits: tuple[Path, list[tuple[str, str]]], tmp_path: Path, serve: Any, capsys: Any
) -> None:
    folder, asked = digits
    learned.veneer("dataset", "push", folder, "--name", "digits")
    job = learned.client.jobs.wait(learned.client.jobs.train("digits", "digits", spec=HANDWRITING.recipe).name)
    assert job.adapter_version == "adapters/digits/versions/1"

    def answers(client: Any, **who: str) -> list[list[int]]:
        return [
            list(client.generate(question, image=folder / picture, max_tokens=4, **who).token_ids)
            for picture, question in asked
        ]

    expected = answers(learned.client, adapter="digits@1")
    for form in FORMATS:
        out = tmp_path / form
        learned.veneer("adapters", "export", "digits", 1, "--format", form, "--out", out)
        measured = verify(out).predicate["measured"]
        figure = measured["metrics"]["exact_match"]
        with serve(out) as alone:
            found = answers(alone, model=form)
        same = sum(one == other for one, other in zip(found, expected, strict=True))
        with capsys.disabled():
            print(
                f"\n{form}: exact match {figure['export']:.3f}, the adapter's {figure['adapter']:.3f}, "
                f"of {measured['prompts']} held-out rows; {same} of {_ASKED} answers alone are the cluster's"
            )
        assert figure["adapter"] >= 0.9
        assert figure["export"] >= figure["adapter"] - 0.01
        assert same >= (_ASKED if form.endswith("fp32") else _ASKED - 1)  # one may lie at a tie
