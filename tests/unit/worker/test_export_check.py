"""What an export is held to: equal answers, ties, logits, and metrics that may fall by a point."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from veneer.trainer.v1 import export_pb2
from veneer_processing import Encoded, ProcessingContract
from veneer_trainer.worker.exporting.comparison import Comparison, Found, Reference, inequalities, losses
from veneer_trainer.worker.exporting.prompts import Asked
from veneer_trainer.worker.exporting.run import _adapter, _insist, _problems
from veneer_trainer.worker.refusal import Refused

END, IMAGE, VOCABULARY = 0, 1, 40
TEXT = {2: "a", 3: "b", 4: "c"}


class Scripted:
    """Answers each prompt with given tokens, chosen by a clear margin; `second` comes close behind at one place."""

    def __init__(self, answers: Sequence[Sequence[int]], second: tuple[int, float] | None = None) -> None:
        self._answers = iter(answers)
        self._left: list[int] = []
        self._second = second

    def start(self, encoded: Encoded, max_tokens: int) -> torch.Tensor:
        self._left = [*next(self._answers), END]
        return self.step(0)

    def step(self, token: int) -> torch.Tensor:
        logits_V = torch.zeros(VOCABULARY)
        logits_V[IMAGE] = 99.0  # never chosen, and never compared
        logits_V[self._left.pop(0)] = 5.0
        if self._second is not None:
            logits_V[self._second[0]] = 5.0 - self._second[1]
        return logits_V


class Words:
    """Stands for a processor where ids become text."""

    def decode(self, ids: Sequence[int]) -> str:
        return "".join(TEXT.get(each, "?") for each in ids)


def asked(expected: str | None) -> Asked:
    positions = np.zeros((3, 1), np.int64)
    encoded = Encoded(np.array([5]), positions, 0, np.zeros(1, bool), np.zeros((0, 3), np.int64), None)
    return Asked(encoded, expected, 8)


def compared(
    tmp_path: Path, adapter: Scripted, export: Scripted, expected: Sequence[str | None]
) -> tuple[dict[str, Any], list[int]]:
    told: list[int] = []
    words: Any = Words()
    comparison = Comparison([asked(each) for each in expected], words, {END}, IMAGE, tmp_path, told.append)
    reference = comparison.reference(adapter)
    return comparison.report(reference, comparison.export(export, reference)), told


def test_equal_answers_are_equal(tmp_path: Path) -> None:
    answers = [[2, 3], [4]]
    measured, told = compared(tmp_path, Scripted(answers), Scripted(answers), ["ab", "b"])
    assert (measured["prompts"], measured["answers_identical"], measured["answers_within_tie"]) == (2, 2, 0)
    assert measured["greatest_logit_difference"] == 0
    assert measured["logits_compared"] == 5  # the ending tokens too
    assert measured["metrics"] == {"exact_match": {"adapter": 0.5, "export": 0.5}}
    assert told == [1, 2, 1, 2]
    assert inequalities(measured) == losses(measured) == []


def test_answers_that_part_at_a_tie_are_equal_and_others_are_not(tmp_path: Path) -> None:
    tied = compared(tmp_path, Scripted([[2, 3]], second=(4, 1e-4)), Scripted([[2, 4]], second=(3, 1e-4)), [None])[0]
    assert (tied["answers_identical"], tied["answers_within_tie"], tied["metrics"]) == (0, 1, {})
    apart = compared(tmp_path, Scripted([[2, 3]], second=(4, 1e-2)), Scripted([[2, 4]], second=(3, 1e-2)), [None])[0]
    assert apart["answers_within_tie"] == 0
    assert inequalities(apart)[0] == "1 of 1 answers differ from the adapter's"


@pytest.mark.parametrize(("answer", "more"), [([2], "shorter"), ([2, 3, 4], "longer")])
def test_an_answer_that_ends_elsewhere_differs(tmp_path: Path, answer: list[int], more: str) -> None:
    measured = compared(tmp_path, Scripted([[2, 3]]), Scripted([answer]), [None])[0]
    assert measured["answers_identical"] + measured["answers_within_tie"] == 0, more


def test_a_logit_out_of_reach_is_found(tmp_path: Path) -> None:
    measured = compared(tmp_path, Scripted([[2]]), Scripted([[2]], second=(30, 4.0)), [None])[0]
    assert measured["answers_identical"] == 1
    assert measured["greatest_logit_difference"] == pytest.approx(1.0)
    assert "a logit differs by 1" in inequalities(measured)[0]


@pytest.mark.parametrize(("wrong", "falls"), [(0, False), (1, False), (2, True)])
def test_a_metric_may_fall_by_a_point_and_no_more(tmp_path: Path, wrong: int, falls: bool) -> None:
    right = [[2]] * 100
    measured = compared(tmp_path, Scripted(right), Scripted([[3]] * wrong + right[wrong:]), ["a"] * 100)[0]
    assert measured["metrics"]["exact_match"] == {"adapter": 1.0, "export": pytest.approx(1 - wrong / 100)}
    assert bool(losses(measured)) == falls


def test_fields_are_measured_where_answers_have_them(tmp_path: Path) -> None:
    measured = compared(tmp_path, Scripted([[2]]), Scripted([[2]]), ['{"a": 1}'])[0]
    assert measured["metrics"].keys() == {"exact_match", "field_match"}
    assert Reference().limit == pytest.approx(1e-4)
    assert Found().identical == 0


@pytest.mark.parametrize(
    ("form", "dtype", "reason"),
    [("merged", "float32", "EXPORT_DIFFERS"), ("merged", "bfloat16", "METRIC_FELL"), ("onnx", "int8", "METRIC_FELL")],
)
def test_an_export_that_is_not_equal_enough_is_refused_unless_forced(form: str, dtype: str, reason: str) -> None:
    _insist(form, dtype, [], force=False)
    _insist(form, dtype, ["it fell"], force=True)
    with pytest.raises(Refused, match="it fell; force keeps it") as refused:
        _insist(form, dtype, ["it fell"], force=False)
    assert refused.value.reason == reason


def test_a_lossy_form_is_measured_or_refused(tmp_path: Path) -> None:
    measured = compared(tmp_path, Scripted([[2]]), Scripted([[2]]), [None])[0]
    order = export_pb2.Export(spec=export_pb2.ExportSpec(adapter_version="adapters/a/versions/1"))
    assert _problems("merged", "float32", measured, order) == []
    assert "has no data here to measure onnx of int8 on" in _problems("onnx", "int8", measured, order)[0]


def test_a_version_that_came_damaged_is_not_exported(tmp_path: Path) -> None:
    contract = ProcessingContract(
        "ab" * 32, "cd" * 32, "ef" * 32, 4096, 65_536, 16, 2, 2, "bicubic-antialias", (0.5,) * 3, (0.5,) * 3, "1", "1"
    )
    (tmp_path / "processing_contract.json").write_text(json.dumps(contract.to_dict()))
    (tmp_path / "adapter_config.json").write_text(json.dumps({"r": 1, "lora_alpha": 1}))
    save_file({"a": torch.ones(1)}, tmp_path / "adapter_model.safetensors")
    with pytest.raises(Refused, match="the version has digest") as refused:
        _adapter(tmp_path, tmp_path, "ab" * 32)
    assert (refused.value.reason, refused.value.transient) == ("ADAPTER_DAMAGED", True)
