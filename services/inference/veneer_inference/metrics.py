"""What Prometheus reads of this replica: how answers went, by adapter, and the engine's figures of the moment.

Owns names, labels and their bound. What is measured where is the callers' matter.
"""

from collections.abc import Callable, Iterable, Iterator
from typing import Literal

from prometheus_client import CollectorRegistry, Counter, Histogram
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.exposition import generate_latest

from veneer_inference.domain.registry import Registry, Release
from veneer_inference.ports import EngineInfo, EngineStats

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
MOST_ADAPTERS = 200  # label sets; adapters beyond share one, so that neither memory nor a scrape grows without end
OTHERS = ("", "others")

Outcome = Literal["answered", "cancelled", "refused", "failed"]
Labels = tuple[str, str]

_ADAPTER = ("tenant", "adapter")
_WAITS_S = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
_TOKENS_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5)
_GAUGES = {"feature_bytes": "Bytes of pictures' features that are kept."}  # of the engine's counters, those that fall


class Metrics:
    """The figures of one replica. Its methods are called on the event loop; `page` may run in a thread.

    Args:
        engine: what the living engine is and does; None while it is being started.
        held: the versions that the engine holds.
    """

    def __init__(
        self,
        engine: Callable[[], tuple[EngineInfo, EngineStats] | None],
        held: Callable[[], Iterable[Release]],
    ) -> None:
        self._engine = engine
        self._held = held
        self._known: set[Labels] = {("", ""), OTHERS}
        self._aliases: dict[tuple[str, str, str], str] | None = None
        self._registry = registry = CollectorRegistry()
        self._requests = Counter(
            "veneer_requests", "Requests that reached the engine, by how they ended.", (*_ADAPTER, "outcome"),
            registry=registry,
        )  # fmt: skip
        self._first_token_s = Histogram(
            "veneer_time_to_first_token_seconds", "From arrival to the first token.", _ADAPTER, buckets=_WAITS_S,
            registry=registry,
        )  # fmt: skip
        self._token_s = Histogram(
            "veneer_time_per_token_seconds", "Mean of an answer's tokens after its first.", _ADAPTER,
            buckets=_TOKENS_S, registry=registry,
        )  # fmt: skip
        self._queued_s = Histogram(
            "veneer_queue_seconds", "From arrival to admission by the engine, reading the prompt included.", _ADAPTER,
            buckets=_WAITS_S, registry=registry,
        )  # fmt: skip
        self._prompt_tokens = Counter("veneer_prompt_tokens", "Of prompts.", _ADAPTER, registry=registry)
        self._cached_tokens = Counter(
            "veneer_cached_prompt_tokens", "Of prompts, from the prefix cache.", _ADAPTER, registry=registry
        )
        self._answer_tokens = Counter("veneer_answer_tokens", "Of answers.", _ADAPTER, registry=registry)
        self._swaps = Counter(
            "veneer_adapter_swaps", "Moves of an alias to another version while this replica ran.", _ADAPTER,
            registry=registry,
        )  # fmt: skip

    def ended(
        self,
        tenant: str,
        release: Release | None,
        outcome: Outcome,
        *,
        prompt_tokens: int,
        cached_tokens: int = 0,
        answer_tokens: int = 0,
        queued_s: float = 0.0,
        first_token_s: float = 0.0,
        total_s: float = 0.0,
    ) -> None:
        """A request has ended.

        Args:
            tenant: who asked.
            release: what answered; None for the base alone.
            outcome: how it ended.
            prompt_tokens: of its prompt.
            cached_tokens: of its prompt, from the prefix cache.
            answer_tokens: of its answer; the times count where there is one.
            queued_s: from arrival to admission.
            first_token_s: from arrival to the first token.
            total_s: from arrival to the last token.
        """
        labels = self._labels(tenant, release.version.adapter) if release else ("", "")
        self._requests.labels(*labels, outcome).inc()
        if not answer_tokens:
            return
        self._prompt_tokens.labels(*labels).inc(prompt_tokens)
        self._cached_tokens.labels(*labels).inc(cached_tokens)
        self._answer_tokens.labels(*labels).inc(answer_tokens)
        self._queued_s.labels(*labels).observe(queued_s)
        self._first_token_s.labels(*labels).observe(first_token_s)
        if answer_tokens > 1:
            self._token_s.labels(*labels).observe((total_s - first_token_s) / (answer_tokens - 1))

    def followed(self, registry: Registry) -> None:
        """Counts the aliases that moved since the last call; the first call counts none."""
        aliases = {
            (served.tenant, served.adapter, alias): release.digest
            for served in registry.served
            for alias, release in served.aliases.items()
        }
        before = self._aliases if self._aliases is not None else aliases
        for key, digest in aliases.items():
            if before.get(key, digest) != digest:
                self._swaps.labels(*self._labels(key[0], key[1])).inc()
        self._aliases = aliases

    def snapshot(self) -> Callable[[], bytes]:
        """What the page shows of the engine now; the returned function makes the page, and may run in a thread."""
        families = [*self._engine_families()]
        return lambda: generate_latest(self._registry) + generate_latest(_Fixed(families))

    def _labels(self, tenant: str, adapter: str) -> Labels:
        labels = tenant, adapter
        if labels not in self._known:
            if len(self._known) >= MOST_ADAPTERS:
                return OTHERS
            self._known.add(labels)
        return labels

    def _engine_families(self) -> Iterator[Metric]:
        living = self._engine()
        yield _gauge("veneer_engine_up", "1 while an engine answers.", living is not None)
        if living is None:
            return
        info, stats = living
        yield _gauge("veneer_engine_running_requests", "Requests in the batch of the last step.", stats.running)
        yield _gauge("veneer_engine_waiting_requests", "Requests that wait for the engine.", stats.waiting)
        yield _gauge("veneer_engine_kv_tokens", "Tokens of key-value memory in use.", stats.kv_tokens_in_use)
        yield _gauge("veneer_engine_kv_capacity_tokens", "Tokens of key-value memory.", info.kv_capacity_tokens)
        yield _gauge(
            "veneer_engine_adapter_slots", "Adapters that can be ready for a step at once.", info.adapter_slots
        )
        in_slot = sum(state.in_slot for state in stats.adapters)
        yield _gauge("veneer_engine_adapter_slots_in_use", "Slots that hold an adapter.", in_slot)
        yield _gauge("veneer_engine_adapters", "Adapters in the engine's memory.", len(stats.adapters))
        size_bytes = sum(state.size_bytes for state in stats.adapters)
        yield _gauge("veneer_engine_adapter_bytes", "Bytes of their tensors.", size_bytes)
        yield _counter("veneer_engine_steps", "Steps that computed something.", stats.steps)
        for name, value in sorted(stats.counters.items()):
            if name in _GAUGES:
                yield _gauge(f"veneer_engine_{name}", _GAUGES[name], value)
            else:
                yield _counter(f"veneer_engine_{name}", f"The engine's count of {name.replace('_', ' ')}.", value)
        yield from self._adapter_families(stats)

    def _adapter_families(self, stats: EngineStats) -> Iterator[Metric]:
        labels = (*_ADAPTER, "version")
        active = GaugeMetricFamily("veneer_adapter_active_requests", "Requests that use a version now.", labels=labels)
        in_slot = GaugeMetricFamily("veneer_adapter_in_slot", "1 where a version is in a slot.", labels=labels)
        states = {state.digest: state for state in stats.adapters}
        for release in self._held():
            if (state := states.get(release.digest)) is not None:
                values = (release.tenant, release.version.adapter, str(release.version.version))
                active.add_metric(values, state.active_requests)
                in_slot.add_metric(values, state.in_slot)
        yield active
        yield in_slot


class _Fixed(CollectorRegistry):
    """Families that were made beforehand."""

    def __init__(self, families: Iterable[Metric]) -> None:
        super().__init__()
        self._families = list(families)

    def collect(self) -> Iterator[Metric]:
        return iter(self._families)


def _gauge(name: str, text: str, value: float) -> Metric:
    return GaugeMetricFamily(name, text, value=float(value))


def _counter(name: str, text: str, value: float) -> Metric:
    return CounterMetricFamily(name, text, value=float(value))
