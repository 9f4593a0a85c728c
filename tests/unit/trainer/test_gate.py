import pytest

from veneer_rpc.errors import FailedPrecondition, InvalidArgument
from veneer_trainer.domain import gate
from veneer_trainer.domain.gate import Comparison


def test_a_gate_is_comparisons_joined_by_and() -> None:
    assert gate.parse("") == ()
    assert gate.parse("exact_match >= 0.9 and field_match/total>production") == (
        Comparison("exact_match", ">=", 0.9), Comparison("field_match/total", ">", "production"),
    )  # fmt: skip


@pytest.mark.parametrize(
    "text",
    ["exact_match", "exact_match >= ", ">= 1", "a >= 1 or b >= 2", "a >= 1; b", "a >= nan", "a >= inf", "a => 1",
     "__import__('os')", "a >= 1 and", "a >= Production", "x" * 2000],
)  # fmt: skip
def test_what_is_not_one_is_refused(text: str) -> None:
    with pytest.raises(InvalidArgument):
        gate.parse(text)


def test_every_comparison_must_hold_and_the_figures_are_told() -> None:
    known: dict[tuple[str, str], tuple[float | None, float | None]] = {
        ("exact_match", ""): (0.8, None), ("exact_match", "production"): (0.8, 0.7),
        ("exact_match", "canary"): (0.8, None), ("cer", ""): (None, None),
    }  # fmt: skip

    def figures(metric: str, alias: str) -> tuple[float | None, float | None]:
        return known[metric, alias]

    gate.check(gate.parse("exact_match >= 0.8 and exact_match > production"), figures)
    for text, said in (
        ("exact_match > 0.8", "exact_match is 0.8, which is not > 0.8"),
        ("exact_match < production", r"not < production \(0.7\)"),
        ("exact_match >= canary", "canary has no exact_match"),
        ("exact_match >= 0.8 and exact_match >= 0.9 and cer <= 1", "not >= 0.9; no succeeded evaluation has cer"),
        ("cer <= 1", "no succeeded evaluation has cer"),
    ):
        with pytest.raises(FailedPrecondition, match=said) as raised:
            gate.check(gate.parse(text), figures)
        assert raised.value.reason == "GATE_NOT_MET"
