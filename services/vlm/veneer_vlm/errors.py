"""What this package raises where it refuses something from outside.

    RefusedError
    ├── ConfigError    a config.json that this forward pass cannot honour
    ├── TargetError    target modules that no adapter can have on this base
    ├── WeightsError   weights that cannot be found, or do not fit their configuration
    └── AdapterError   a PEFT folder that cannot be used on this base

A programmer's mistake (shapes that disagree, a full cache slot) is a plain ValueError, or an error named
beside what raises it.
"""

_SHOWN = 20


class RefusedError(ValueError):
    """Base of all: everything wrong with one thing, at once.

    Attributes:
        violations: one sentence for each objection, with the offending value.
    """

    def __init__(self, place: str, violations: list[str]) -> None:
        rest = f"; and {len(violations) - _SHOWN} more" if len(violations) > _SHOWN else ""
        super().__init__(f"{place}: {'; '.join(violations[:_SHOWN])}{rest}")
        self.violations = violations


class ConfigError(RefusedError):
    """A `config.json` that this forward pass cannot honour."""


class TargetError(RefusedError):
    """Target modules that no adapter can have on this base."""


class WeightsError(RefusedError):
    """Weights that cannot be found, or do not fit their configuration."""


class AdapterError(RefusedError):
    """A PEFT folder that cannot be used on this base."""
