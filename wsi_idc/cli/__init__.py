"""The command line: one module a command, options in `options`, all put together in `main`."""

from wsi_idc.cli.main import app, main

__all__ = ["app", "main"]
