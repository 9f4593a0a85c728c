"""Which linears of a base an adapter sits on, and how many parameters that makes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from veneer_rpc.errors import Violations, violations
from veneer_trainer.domain.spec import PRESETS, Lora

_PRESET_GROUPS = {
    "decoder": ("decoder",),
    "decoder+merger": ("decoder", "merger"),
    "decoder+merger+vision": ("decoder", "merger", "vision"),
}
_ATTENTION = ("q_proj", "v_proj")


@dataclass(frozen=True, slots=True)
class Linear:
    """A linear that an adapter may sit on: the part of the base it is in (`decoder`, `merger`, `vision`)."""

    group: str
    outputs: int
    inputs: int


def targeted(base: Mapping[str, Linear], lora: Lora, field: str = "spec") -> dict[str, Linear]:
    """Returns the linears that a spec adapts, by whole module name, sorted.

    A name matches as in PEFT: a module's whole name, or its end after a dot.

    Args:
        base: every adaptable linear of the base.
        lora: the names or the preset, and the rank.
        field: the spec's path in the request, for the violations.

    Raises:
        InvalidArgument: a name that matches nothing, or a rank above the smaller side of a target.
    """
    with violations() as found:
        names = set().union(*(_matches(base, name, f"{field}.lora", found) for name in lora.target_modules))
        for name in sorted(names):
            least = min(base[name].outputs, base[name].inputs)
            if lora.rank > least:
                text = f"must be at most {least}, the smaller side of {name}, was {lora.rank}"
                found.add(f"{field}.lora.rank", "OUT_OF_RANGE", text)
                break
    return {name: base[name] for name in sorted(names)}


def trainable_parameters(linears: Iterable[Linear], lora: Lora) -> int:
    """Returns how many parameters an adapter on these linears trains; DoRA adds a magnitude per output."""
    magnitudes = 1 if lora.use_dora else 0
    return sum(lora.rank * (one.outputs + one.inputs) + magnitudes * one.outputs for one in linears)


def _matches(base: Mapping[str, Linear], target: str, field: str, found: Violations) -> set[str]:
    if target in _PRESET_GROUPS:
        names = {name for name, linear in base.items() if linear.group in _PRESET_GROUPS[target]}
    elif target in PRESETS:
        decoder = {name for name, linear in base.items() if linear.group == "decoder"}
        names = {name for name in decoder if name.rpartition(".")[2] in _ATTENTION}
    else:
        names = {name for name in base if name == target or name.endswith(f".{target}")}
    if not names:
        text = f"{target!r} matches no linear of the base"
        found.add(f"{field}.target_modules", "TARGET_UNKNOWN", text)
    return names
