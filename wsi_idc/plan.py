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


def plan(
    wanted: Mapping[str, Any], complete: Mapping[str, Any] | None, failed: str | None, *, force: bool = False
) -> Plan:
    """Run, redo or skip.

    Args:
        wanted: what the result would be made from, name -> value: settings, source and so on.
        complete: the store's record of the result it has, with the same names, or None.
        failed: why the last attempt failed, or None.
        force: do it again whatever the store has.
    """
    if complete is None:
        return Plan("run", "failed last time" if failed else "new")
    changed = [name for name, value in wanted.items() if complete.get(name) != value]
    if changed:
        return Plan("redo", f"{' and '.join(changed)} changed")
    if force:
        return Plan("redo", "forced")
    if failed:
        return Plan("redo", "failed last time")
    return Plan("skip", "already done")
