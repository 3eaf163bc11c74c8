"""`wsi-idc doctor`: whether this machine, this installation and the store are fit for work."""

from collections import Counter

import typer

from wsi_idc.cli.options import DEFAULT_STORE, JsonOption, QuietOption, StoreOption, console_for


def doctor(
    store: StoreOption = DEFAULT_STORE,
    json_lines: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Try readers, codecs and the model, look at the machine and the store; say what to do. Exit 1 on a fault."""
    console = console_for(json_lines=json_lines, quiet=quiet)
    from dataclasses import asdict

    from wsi_idc.doctor import examine

    counts = Counter[str]()
    for check in examine(store):
        counts[check.state] += 1
        console.record("check", **asdict(check))
        console.line(str(check), level=0 if check.state == "ok" else -1)
    found = {state: counts[state] for state in ("ok", "warning", "fault")}
    console.record("summary", command="doctor", **found)
    console.line("doctor: " + ", ".join(f"{count} {state}" for state, count in found.items()))
    if counts["fault"]:
        raise typer.Exit(1)
