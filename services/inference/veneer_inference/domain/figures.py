"""How each version's answers went since the last report."""

from collections import deque
from dataclasses import dataclass, field

from veneer_inference.domain.registry import Release

_SAMPLES = 1000


@dataclass(slots=True)
class Figures:
    """Counts of one version, and the latencies of its last answers in seconds."""

    answered: int = 0
    failed: int = 0
    latencies_s: deque[float] = field(default_factory=lambda: deque(maxlen=_SAMPLES))

    def latency_p95_s(self) -> float:
        """The 95th percentile, nearest rank; 0 without answers."""
        ordered = sorted(self.latencies_s)
        return ordered[(95 * len(ordered) + 99) // 100 - 1] if ordered else 0.0


class FiguresByVersion:
    """The figures of all versions."""

    def __init__(self) -> None:
        self._figures: dict[Release, Figures] = {}

    def answered(self, release: Release, latency_s: float) -> None:
        """Counts an answer."""
        figures = self._figures.setdefault(release, Figures())
        figures.answered += 1
        figures.latencies_s.append(latency_s)

    def failed(self, release: Release) -> None:
        """Counts a request that failed by the service's fault."""
        self._figures.setdefault(release, Figures()).failed += 1

    def take(self) -> dict[Release, Figures]:
        """Hands over all figures and begins anew."""
        taken, self._figures = self._figures, {}
        return taken

    def give_back(self, taken: dict[Release, Figures]) -> None:
        """Takes figures back that could not be reported."""
        for release, earlier in taken.items():
            figures = self._figures.setdefault(release, Figures())
            figures.answered += earlier.answered
            figures.failed += earlier.failed
            figures.latencies_s = deque([*earlier.latencies_s, *figures.latencies_s], _SAMPLES)
