"""Serves slides and their maps to a browser on this machine, and to nobody else."""

import os
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from html import escape
from threading import Lock
from typing import TYPE_CHECKING, Any
from urllib.parse import quote, urlsplit

from wsi_idc import USE
from wsi_idc.console import printable
from wsi_idc.errors import UsageError, WsiIdcError, system_reason
from wsi_idc.names import MAX_ID_BYTES, check_slide_id
from wsi_idc.results import Absent, Choice, Result, look, require
from wsi_idc.store import Store, at_once

if TYPE_CHECKING:
    from flask import Flask
    from werkzeug.serving import BaseWSGIServer

    from wsi_idc.view.pixels import Pixels

HOST = "127.0.0.1"
_OPEN = 4
"""Slides that are kept open."""
_POLICY = (
    "default-src 'none'; img-src 'self' data: blob:; connect-src 'self'; style-src 'unsafe-inline'; font-src data:; "
    # Bokeh makes functions of the page's own text.
    "script-src 'unsafe-inline' 'unsafe-eval'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)


class Views:
    """The slides of a store as they are looked at; a few are kept open.

    Args:
        store: the store.
        choice: whose maps.
        threshold: P(positive) from which a tile is positive; None: the model's.
    """

    def __init__(self, store: Store, choice: Choice, threshold: float | None) -> None:
        self.store, self.choice, self.threshold = store, choice, threshold
        self._open: OrderedDict[str, tuple[str, Pixels]] = OrderedDict()
        self._lock = Lock()

    def result(self, slide_id: str, threshold: float | None = None) -> Result:
        """A slide's result, as the store has it now.

        Raises:
            UsageError: there is none.
        """
        self._check_id(slide_id)
        found = look(self.store, self.choice, slide_id, self.threshold if threshold is None else threshold)
        # Asked only now: to list a store that lies far away takes time.
        if isinstance(found, Absent) and slide_id not in self.store.all_slide_ids():
            raise _unknown(slide_id)
        return require(found, self.choice.model)

    def _check_id(self, slide_id: str) -> None:
        """Refuse what can be no slide's: it names no place in the store."""
        if check_slide_id(slide_id):
            raise _unknown(slide_id if len(slide_id) <= MAX_ID_BYTES else f"{slide_id[:MAX_ID_BYTES]}...")

    def pixels(self, slide_id: str) -> "Pixels":
        """A slide's pictures, whether it has a map or not; opened anew where the slide was extracted again.

        Raises:
            StoreError: its tiles are not complete.
            UsageError: there can be no such slide.
        """
        from wsi_idc.view.pixels import Pixels

        self._check_id(slide_id)
        slide = self.store.slide(slide_id)
        with self._lock:
            identity, pixels = self._open.get(slide_id, ("", None))
            if pixels is None or identity != slide.identity:
                pixels = Pixels(slide)
                self._open[slide_id] = (slide.identity, pixels)
            self._open.move_to_end(slide_id)
            # What is left is closed when nobody reads it any more: Python counts.
            while len(self._open) > _OPEN:
                self._open.popitem(last=False)
            return pixels

    def all(self) -> list[Result | Absent]:
        """Every slide of the store."""
        return at_once(lambda name: look(self.store, self.choice, name, self.threshold), self.store.all_slide_ids())


def _unknown(slide_id: str) -> UsageError:
    return UsageError(slide_id, "no such slide in the store", "wsi-idc status lists them")


def make_app(views: Views, say: Callable[[str], None]) -> "Flask":
    """The pages, as a WSGI application; `say` is told of what went wrong here, in a line."""
    from flask import Flask, Response, abort, jsonify, request
    from werkzeug.exceptions import HTTPException

    app = Flask("wsi_idc.view", static_folder=None)

    @app.before_request
    def _only_here() -> None:
        """A page of another site could send its visitors' browsers here under a name of its own."""
        if urlsplit(f"//{request.host}").hostname not in (HOST, "localhost"):
            abort(403)

    @app.after_request
    def _locked_down(answer: Response) -> Response:
        answer.headers["Content-Security-Policy"] = _POLICY
        answer.headers["X-Content-Type-Options"] = "nosniff"
        answer.headers["Referrer-Policy"] = "no-referrer"
        answer.headers["Cache-Control"] = "no-store"
        return answer

    @app.errorhandler(WsiIdcError)
    def _told(error: WsiIdcError) -> tuple[str, int]:
        return _plain(str(error)), 404

    @app.errorhandler(Exception)
    def _broken(error: Exception) -> Any:
        if isinstance(error, HTTPException):
            return error
        if os.environ.get("WSI_IDC_DEBUG"):
            raise error
        line = f"{type(error).__name__}: {error}"
        say(f"{request.path}: {line}; a defect: please report it, with what WSI_IDC_DEBUG=1 prints")
        return _plain(line), 500

    @app.get("/")
    def _index() -> str:
        return _index_page(views)

    @app.get("/favicon.ico")
    def _icon() -> tuple[str, int]:
        return "", 204

    @app.get("/slides/<slide_id>/")
    def _slide(slide_id: str) -> str:
        from wsi_idc.view.page import page

        result = views.result(slide_id)
        return page(result, views.pixels(slide_id))

    @app.get("/slides/<slide_id>/regions")
    def _regions(slide_id: str) -> Any:
        from wsi_idc.view.page import found_regions

        threshold = request.args.get("threshold", type=float)
        if threshold is None or not 0 < threshold < 1:
            abort(400)
        return jsonify(found_regions(views.result(slide_id, threshold)))

    @app.get("/slides/<slide_id>/pictures/<int:zoom>/<int:column>/<int:row>.jpg")
    def _picture(slide_id: str, zoom: int, column: int, row: int) -> Any:
        content = views.pixels(slide_id).picture(zoom, column, row)
        return Response(content, mimetype="image/jpeg")

    return app


def _plain(text: str) -> str:
    return _page("wsi-idc", f"<p>{escape(printable(text))}</p><p><a href='/'>All slides</a></p>")


def _page(title: str, body: str) -> str:
    return (
        f"<!doctype html><html lang='en'><head><meta charset='utf-8'><title>{escape(title)}</title>"
        "<meta name='viewport' content='width=device-width'>"
        "<style>body{font:16px/1.5 system-ui,sans-serif;margin:2em auto;max-width:60em;padding:0 1em}"
        "td,th{text-align:left;padding:.2em 1em .2em 0;overflow-wrap:anywhere}</style></head>"
        f"<body><main>{body}</main></body></html>"
    )


def _index_page(views: Views) -> str:
    rows = []
    for found in views.all():
        name = escape(found.slide_id)
        if isinstance(found, Result):
            link = f"<a href='/slides/{escape(quote(found.slide_id, safe=''))}/'>{name}</a>"
            rows.append(f"<tr><td>{link}</td><td>{found.slide.count:,} tiles</td></tr>")
        else:
            rows.append(f"<tr><td>{name}</td><td>{escape(printable(str(found)))}</td></tr>")
    model, store = escape(views.choice.model), escape(views.store.address)
    return _page(
        "wsi-idc view",
        f"<h1>Maps by {model}</h1><p>{store}. <b>{escape(USE)}</b></p>"
        f"<table><thead><tr><th>Slide</th><th>Map</th></tr></thead><tbody>{''.join(rows)}</tbody></table>",
    )


@contextmanager
def serving(views: Views, port: int, say: Callable[[str], None]) -> Iterator[tuple["BaseWSGIServer", str]]:
    """A server on the loopback address that listens, and its URL; `serve_forever` makes it answer.

    Args:
        views: what is shown.
        port: 0: any that is free.
        say: is told of what went wrong, in a line.

    Raises:
        UsageError: the port cannot be had.
    """
    import logging
    import socket

    from werkzeug.serving import make_server

    # It tells every request, and ends the process by itself where a port is taken.
    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    listening = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listening.bind((HOST, port))
        listening.listen()
    except OSError as error:
        listening.close()
        raise UsageError("--port", f"{port} cannot be had ({system_reason(error)})", "give another, or 0") from error
    server = make_server(HOST, port, make_app(views, say), threaded=True, fd=listening.fileno())
    # A browser keeps its connections open: nobody waits for them at the end.
    server.daemon_threads = True  # type: ignore[attr-defined]
    try:
        yield server, f"http://{HOST}:{listening.getsockname()[1]}/"
    finally:
        server.server_close()
        listening.close()
