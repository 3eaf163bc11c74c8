"""`wsi-idc verify`: whether the store is what was written."""

from typing import Annotated

import typer

from wsi_idc.cli.options import DEFAULT_STORE, JsonOption, OnlyOption, QuietOption, StoreOption, console_for


def verify(
    store: StoreOption = DEFAULT_STORE,
    repair: Annotated[
        bool, typer.Option("--repair", help="Remove what is damaged or left over, so that the next run does it again.")
    ] = False,
    model: Annotated[str, typer.Option(help="Read the maps by this model alone.", metavar="NAME")] = "",
    only: OnlyOption = None,
    json_lines: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Read every array of a store against its checksums, and every map against its tiles. Exit 1 on any damage."""
    console = console_for(json_lines=json_lines, quiet=quiet)
    from dataclasses import asdict

    from wsi_idc import verify as command

    with console.progress("verify") as listener:
        found = command.verify(store, only=only or [], model=model, repair=repair, listener=listener)
    for finding in found.findings:
        console.record(finding.kind, **{name: value for name, value in asdict(finding).items() if name != "kind"})
        if finding.bad and not finding.slide:
            console.trouble(f"damaged {finding}")
        elif not finding.bad:
            console.line(f"{finding.kind} {finding}")
    for line in found.repairs:
        console.record("repaired", text=line)
        console.line(f"repaired {line}")
    damaged, harmless = found.count("damage", "unreadable"), found.count("leftover", "begun")
    console.record(
        "summary",
        command="verify",
        slides=found.slides,
        maps=found.maps,
        damaged=damaged,
        leftovers=harmless,
        repaired=len(found.repairs),
        seconds=round(found.seconds, 1),
    )
    advice = ""
    if damaged:
        advice = "run wsi-idc extract and infer: they make it again" if repair else "--repair removes what is damaged"
    elif harmless and not repair:
        advice = "--repair removes what is left over"
    console.line(
        f"verify: {found.slides:,} slides and {found.maps:,} maps read, {damaged:,} damaged, {harmless:,} left over"
        f" ({found.seconds:.1f} s)" + (f"; {advice}" if advice else "")
    )
    if damaged:
        raise typer.Exit(1)
