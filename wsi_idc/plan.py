"""The decision, apart from the deed: what is to be done with one slide, and why."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

Action = Literal["run", "redo", "skip"]


@dataclass(frozen=True)
class Plan:
    """What to do with one slide, and the reason as a user reads it."""

    action: Action
    reason: str


def changes(wanted: Mapping[str, Any], made_from: Mapping[str, Any]) -> list[str]:
    """The names whose values a result was not made from."""
    return [name for name, value in wanted.items() if name not in made_from or made_from[name] != value]


def plan(
    wanted: Mapping[str, Any], made_from: Mapping[str, Any] | None, trouble: str = "", *, force: bool = False
) -> Plan:
    """Run, redo or skip.

    Args:
        wanted: what the result would be made from, name -> value: settings, source and so on.
        made_from: what the result that the store has was made from, with the same names, or None.
        trouble: why that result cannot be used, or why there is none; empty where nothing hinders.
        force: do it again whatever the store has.
    """
    if made_from is None:
        return Plan("run", trouble or "new")
    changed = changes(wanted, made_from)
    if changed:
        return Plan("redo", f"{' and '.join(changed)} changed")
    if force:
        return Plan("redo", "forced")
    if trouble:
        return Plan("redo", trouble)
    return Plan("skip", "already done")
