"""How aliases go back, what an owner may set, and what nobody may delete."""

import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st

from veneer_rpc.errors import Aborted, FailedPrecondition, InvalidArgument, violations
from veneer_rpc.names import AdapterName, AdapterVersionName, ModelName
from veneer_trainer.domain.adapters import (
    Adapter,
    AdapterVersion,
    AliasMove,
    Inspected,
    Lineage,
    RollbackPolicy,
    Settings,
    TrafficSplit,
    check_deletable,
    check_settings,
    checked_alias,
    checked_reason,
    version_before,
)
from veneer_trainer.domain.jobs import Contract
from veneer_trainer.domain.publishing import _check_base
from veneer_trainer.domain.spec import Lora

CONTRACT = Contract("c", "m", "t", "p", 1, 2, 16, 2, 2, "bicubic", (), (), "", "")


def move(to: int, back: bool = False) -> AliasMove:
    return AliasMove(0, "production", 0, to, "me", "", 0.0, back)


@pytest.mark.parametrize(
    ("moves", "versions", "expected"),
    [
        ([], {1}, 0),
        ([move(1)], {1}, 0),
        ([move(1), move(2)], {1, 2}, 1),
        ([move(1), move(2), move(3), move(2, True)], {1, 2, 3}, 1),  # two in a row go back two versions
        ([move(1), move(2), move(1, True)], {1, 2}, 0),
        ([move(1), move(2), move(1, True), move(3)], {1, 2, 3}, 1),
        ([move(1), move(2), move(3)], {1, 3}, 1),  # one that was deleted is passed over
        ([move(1), move(2), move(3), move(1, True)], {1, 3}, 0),
        ([move(1), move(2), move(1)], {1, 2}, 2),
        ([move(1), move(2), move(1)], {1}, 0),  # not to itself
        ([move(1), move(2), move(0), move(3)], {1, 2, 3}, 0),  # what it was before its removal is forgotten
    ],
)
def test_a_rollback_goes_to_the_version_before(moves: list[AliasMove], versions: set[int], expected: int) -> None:
    assert version_before(moves, versions) == expected


@given(st.lists(st.integers(0, 4), max_size=30))
def test_promotions_and_rollbacks_are_a_stack(acts: list[int]) -> None:
    """0 rolls back, where it can; any other number is promoted if the alias is not there already."""
    moves, stack = list[AliasMove](), list[int]()
    for act in acts:
        if act and (not stack or stack[-1] != act):
            stack.append(act)
            moves.append(move(act))
        elif not act:
            target = version_before(moves, range(1, 5))
            below = stack[-2] if len(stack) > 1 else 0
            assert target == below
            if target:
                stack.pop()
                moves.append(move(target, True))


def problems(settings: Settings, aliases: tuple[str, ...] = ("production", "canary")) -> list[str]:
    try:
        with violations() as found:
            check_settings(settings, aliases, found)
    except InvalidArgument as error:
        return [each.field for each in error.violations]
    return []


def test_settings_have_bounds() -> None:
    assert problems(Settings("a", {"k": "v"}, TrafficSplit("canary", 0.1, RollbackPolicy()), True)) == []
    assert problems(Settings("a" * 201)) == ["adapter.display_name"]
    assert problems(Settings(labels={"K": "v"})) == ["adapter.labels['K']"]
    assert problems(Settings(labels={f"k{i}": "v" for i in range(65)})) == ["adapter.labels"]
    for alias in ("none", "production"):
        assert problems(Settings(traffic_split=TrafficSplit(alias, 0.1))) == ["adapter.traffic_split.alias"]
    assert problems(Settings(traffic_split=TrafficSplit("canary", float("nan")))) == ["adapter.traffic_split.share"]
    policy = RollbackPolicy(0, 2.0, 0.5, -1.0)
    assert len(problems(Settings(traffic_split=TrafficSplit("canary", 1, policy)))) == 4


def test_aliases_and_reasons_have_a_form() -> None:
    assert checked_alias("") == "production"
    assert checked_alias("canary-2") == "canary-2"
    for wrong in ("1", "A", "a" * 33, "a/b", "a@b"):
        with pytest.raises(InvalidArgument):
            checked_alias(wrong)
    with pytest.raises(InvalidArgument):
        checked_reason("x" * 513)


def test_an_adapter_stays_on_its_base() -> None:
    adapter = Adapter("t", AdapterName("a"), "u", "", {}, ModelName("m"), {}, None, False, 0, 7, 0.0, 0.0)
    _check_base(None, ModelName("m"))
    _check_base(adapter, ModelName("m"))
    with pytest.raises(FailedPrecondition, match="adapters/a stands on models/m, not on models/n") as refused:
        _check_base(adapter, ModelName("n"))
    assert refused.value.reason == "OTHER_BASE"


def test_a_version_that_is_named_stays_and_a_stale_etag_changes_nothing() -> None:
    content = Inspected("d", CONTRACT, Lora(), (), 0, ())
    version = AdapterVersion("u", AdapterVersionName("a", 1), content, Lineage(), None, (), 0.0)
    check_deletable(version, [])
    with pytest.raises(FailedPrecondition, match="alias canary"):
        check_deletable(dataclasses.replace(version, aliases=("canary",)), [])
    with pytest.raises(FailedPrecondition, match="trainingJobs/x"):
        check_deletable(version, ["trainingJobs/x"])
    adapter = Adapter("t", AdapterName("a"), "u", "", {}, ModelName("m"), {}, None, False, 0, 7, 0.0, 0.0)
    adapter.check_etag("")
    adapter.check_etag("r7")
    with pytest.raises(Aborted):
        adapter.check_etag("r6")
