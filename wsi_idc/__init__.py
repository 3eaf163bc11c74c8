"""wsi-idc: probability maps of invasive ductal carcinoma from whole-slide images. Research use only.

For programs there are four functions, `open_slide`, `open_store`, `load_model` and `score`; what they need is imported
when one of them is asked for, so that `import wsi_idc` costs nothing. What they raise is an `errors.WsiIdcError`.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from wsi_idc.api import load_model, open_slide, open_store, score

__version__ = "0.1.0"

USE = "Research use only. Not for diagnosis."
"""Said wherever results are shown."""

__all__ = ["USE", "__version__", "load_model", "open_slide", "open_store", "score"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    # Not by an import statement: the package stands below all its modules, and the API above nearly all of them.
    from importlib import import_module

    return getattr(import_module("wsi_idc.api"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
