"""Canaries: what is reported of a version that takes a share of the requests, and when the share is taken back."""

from __future__ import annotations

from dataclasses import replace

from veneer_rpc.names import AdapterName, AdapterVersionName, ModelName, parse_one_of
from veneer_trainer.domain.adapters import MAX_REASON, PRODUCTION, Adapter, settings_of
from veneer_trainer.domain.serving import ServingFigures, passed_bounds
from veneer_trainer.evaluation_ports import EvaluationStore
from veneer_trainer.registry_ports import RegistryStore, ServingStore

ACTOR = "rollback policy"
"""Who moved an alias back by itself, in the history."""

_VERDICTS = 1000  # newest that are counted


class Canaries:
    """Counts while an adapter's traffic is split, and takes the share back when a bound of its policy is passed.

    Counting begins anew when the split changes or an alias of the adapter moves: what is compared saw the same hours.
    Then the split goes, and its alias points where production does, so that requests which name it are answered.

    Args:
        store: adapters.
        figures: what was counted.
        verdicts: people's judgements.
    """

    def __init__(self, store: RegistryStore, figures: ServingStore, verdicts: EvaluationStore) -> None:
        self._store = store
        self._figures = figures
        self._verdicts = verdicts

    def report(self, tenant: str, version: AdapterVersionName, figures: ServingFigures) -> None:
        """Takes what a replica counted since its report before."""
        if not figures.requests:
            return
        with self._store.together():
            adapter = self._store.find(tenant, AdapterName(version.adapter))
            if adapter is None or adapter.traffic_split is None:
                return
            if version.version in (adapter.aliases.get(adapter.traffic_split.alias), adapter.aliases.get(PRODUCTION)):
                self._figures.count(adapter, self._since(adapter), version.version, figures)
                self._judge(adapter)

    def judged(self, tenant: str, subject: str) -> None:
        """A person has judged an answer of `subject`."""
        name = parse_one_of(subject, "subject", AdapterVersionName, ModelName)
        if not isinstance(name, AdapterVersionName):
            return
        with self._store.together():
            adapter = self._store.find(tenant, AdapterName(name.adapter))
            if adapter is not None:
                self._judge(adapter)

    def _judge(self, adapter: Adapter) -> None:
        split = adapter.traffic_split
        if split is None or split.rollback is None:
            return
        canary, production = adapter.aliases.get(split.alias, 0), adapter.aliases.get(PRODUCTION, 0)
        if not canary or not production or canary == production:
            return
        serving, nothing = self._figures.figures(adapter, self._since(adapter)), ServingFigures()
        passed = passed_bounds(
            split.rollback,
            serving.get(canary, nothing),
            serving.get(production, nothing),
            self._scores(adapter.tenant, str(AdapterVersionName(adapter.name.adapter, canary))),
        )
        if passed:
            adapter = self._store.change(adapter, replace(settings_of(adapter), traffic_split=None))
            self._store.move(adapter, split.alias, production, ACTOR, "; ".join(passed)[:MAX_REASON], back=True)

    def _since(self, adapter: Adapter) -> int:
        """The number of the newest move: figures from before it are of another comparison."""
        return next((move.sequence for move in self._store.moves(adapter, None, 1)), 0)

    def _scores(self, tenant: str, version: str) -> list[float]:
        return [
            each.score if each.subject == version else 1 - each.score
            for each in self._verdicts.judgements(tenant, None, _VERDICTS, version)
        ]
