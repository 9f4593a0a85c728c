"""Which version answers: aliases, traffic splits, versions, and what each tenant may know of."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from veneer_inference.domain.registry import Registry, Release, Served, Split
from veneer_rpc.errors import NotFound
from veneer_rpc.names import AdapterAliasName, AdapterName, AdapterVersionName


def release(version: int, tenant: str = "acme", adapter: str = "digits") -> Release:
    return Release(tenant, AdapterVersionName(adapter, version), f"{version:064x}")


def served(split: Split | None = None, tenant: str = "acme", **aliases: int) -> Served:
    return Served(tenant, "digits", {alias: release(each, tenant) for alias, each in aliases.items()}, split)


NAME = AdapterName("digits")


def test_the_adapter_alone_is_its_production_version() -> None:
    registry = Registry(1, [served(production=2, canary=3)])
    assert registry.resolve("acme", NAME, "") == release(2)
    assert registry.resolve("acme", AdapterAliasName("digits", "canary"), "") == release(3)


def test_a_moved_alias_answers_at_once() -> None:
    registry = Registry(1, [served(production=1)])
    registry.change(2, [served(production=2)], [])
    assert registry.resolve("acme", NAME, "") == release(2)
    assert registry.revision == 2
    assert registry.find("acme", AdapterVersionName("digits", 1)) == release(1)  # still there by its number


def test_another_tenants_adapter_is_unknown() -> None:
    registry = Registry(1, [served(production=1), served(tenant="other", production=7)])
    assert registry.resolve("other", NAME, "") == release(7, "other")
    with pytest.raises(NotFound, match="there is: none"):
        registry.resolve("third", NAME, "")


def test_not_found_says_what_there_is() -> None:
    registry = Registry(1, [served(production=1, canary=2)])
    with pytest.raises(NotFound, match="there is no adapters/digitz; there is: adapters/digits"):
        registry.resolve("acme", AdapterName("digitz"), "")
    with pytest.raises(NotFound, match="has no alias blue; there is: canary, production"):
        registry.resolve("acme", AdapterAliasName("digits", "blue"), "")
    unknown = registry.unknown("acme", AdapterVersionName("digits", 9))
    assert "canary = 2, production = 1" in unknown.message


@given(key=st.text(min_size=1, max_size=20), share=st.floats(0, 1), more=st.floats(0, 1))
def test_a_routing_key_stays_on_its_side_and_a_growing_share_keeps_its_keys(
    key: str, share: float, more: float
) -> None:
    low, high = sorted((share, more))
    small = Registry(1, [served(Split("canary", low), production=1, canary=2)])
    large = Registry(1, [served(Split("canary", high), production=1, canary=2)])
    first = small.resolve("acme", NAME, key)
    assert all(small.resolve("acme", NAME, key) == first for _ in range(3))
    if first == release(2):
        assert large.resolve("acme", NAME, key) == release(2)


def test_shares_are_kept() -> None:
    registry = Registry(1, [served(Split("canary", 0.25), production=1, canary=2)])
    keyed = [registry.resolve("acme", NAME, f"user-{index}") for index in range(4000)]
    drawn = [registry.resolve("acme", NAME, "") for _ in range(4000)]
    for answers in (keyed, drawn):
        assert 0.2 < answers.count(release(2)) / 4000 < 0.3


def test_the_canaries_of_two_adapters_do_not_fall_on_the_same_keys() -> None:
    """Else the same tenth of the people would try everything."""
    split = Split("canary", 0.1)
    other = {alias: release(version, adapter="other") for alias, version in (("production", 1), ("canary", 2))}
    registry = Registry(1, [served(split, production=1, canary=2), Served("acme", "other", other, split)])
    sides = [
        [registry.resolve("acme", name, f"user-{index}").version.version == 2 for index in range(1000)]
        for name in (NAME, AdapterName("other"))
    ]
    assert all(60 < sum(side) < 140 for side in sides)
    assert sum(map(all, zip(*sides, strict=True))) < 30


def test_a_split_to_a_missing_alias_and_named_aliases_leave_the_split_out() -> None:
    registry = Registry(1, [served(Split("canary", 1.0), production=1)])
    assert registry.resolve("acme", NAME, "k") == release(1)
    registry.change(2, [served(Split("canary", 1.0), production=1, canary=2)], [])
    assert registry.resolve("acme", NAME, "k") == release(2)
    assert registry.resolve("acme", AdapterAliasName("digits", "production"), "k") == release(1)


def test_what_is_deleted_is_gone_with_all_its_versions() -> None:
    registry = Registry(1, [served(production=1), served(tenant="other", production=1)])
    registry.learn(release(5))
    registry.change(2, [], [("acme", "digits")])
    assert set(registry.known) == {release(1, "other")}
    with pytest.raises(NotFound):
        registry.resolve("acme", NAME, "")


def test_a_snapshot_is_everything() -> None:
    registry = Registry(1, [served(production=1), served(tenant="other", production=1)], [release(4)])
    registry.replace(9, [served(production=2)])
    assert registry.revision == 9
    assert set(registry.known) == {release(1), release(2), release(4)}


def test_a_version_is_learned_and_forgotten() -> None:
    registry = Registry(1, [served(production=1)])
    registry.learn(release(3))
    assert not registry.is_aliased(release(3))
    assert registry.is_aliased(release(1))
    registry.forget("acme", release(3).version)
    assert registry.find("acme", release(3).version) is None
