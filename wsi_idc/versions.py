"""Which versions of packages are installed."""

from functools import cache


@cache
def installed(package: str) -> str:
    """A package's version, looked up once a process: its metadata are a mail of hundreds of lines, 2.5 ms to parse.

    Raises:
        PackageNotFoundError: it is not installed.
    """
    from importlib.metadata import version

    return version(package)
