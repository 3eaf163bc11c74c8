"""`wsi-idc view`: a slide with its map in the browser."""

from typing import Annotated

import typer

from wsi_idc import USE
from wsi_idc.cli.export import MapModelOption, ThresholdOption
from wsi_idc.cli.options import DEFAULT_STORE, JsonOption, StoreOption, console_for


def view(
    slide_id: Annotated[str | None, typer.Argument(help="Which slide; else a list of all.")] = None,
    store: StoreOption = DEFAULT_STORE,
    model: MapModelOption = None,
    threshold: ThresholdOption = None,
    port: Annotated[int, typer.Option(help="Port on this machine; 0: any that is free.", min=0, max=65535)] = 8430,
    browser: Annotated[bool, typer.Option("--browser", help="Open the page in the default browser.")] = False,
    json_lines: JsonOption = False,
) -> None:
    """Show slides with their maps in the browser, on this machine only, until Ctrl-C."""
    console = console_for(json_lines=json_lines)
    import signal
    from urllib.parse import quote

    from wsi_idc.errors import UsageError
    from wsi_idc.results import choose_model
    from wsi_idc.store import open_store
    from wsi_idc.view.server import Views, serving

    if threshold is not None and not 0 < threshold < 1:
        raise UsageError("--threshold", f"{threshold:g} is not between 0 and 1", "see --help")
    opened = open_store(store)
    views = Views(opened, choose_model(opened, model), threshold)
    if slide_id is not None:
        views.result(slide_id)
    with serving(views, port, console.trouble) as (server, url):
        page = url if slide_id is None else f"{url}slides/{quote(slide_id, safe='')}/"
        console.record("serving", url=page)
        console.line(f"{page}  (this machine only; Ctrl-C ends it). {USE}")
        if browser:
            import webbrowser

            webbrowser.open(page)
        # Nothing is written here that an interrupt could break: it is the way to end, and no failure.
        signal.signal(signal.SIGINT, signal.default_int_handler)
        try:
            server.serve_forever()
        except KeyboardInterrupt:
            console.line("ended")
