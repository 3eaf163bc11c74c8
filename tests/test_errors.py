"""Each error is one line, and survives the way from a worker process."""

import pickle

import pytest

from wsi_idc import errors


def tree(cls=errors.WsiIdcError):
    return [cls, *(found for child in cls.__subclasses__() for found in tree(child))]


def test_the_tree_drawn_in_the_module_is_the_tree_there_is():
    for cls in tree():
        assert cls.__name__ in errors.__doc__


@pytest.mark.parametrize("cls", [cls for cls in tree() if not issubclass(cls, errors.FaultsError)])
def test_an_error_says_which_input_what_is_wrong_and_what_to_do(cls):
    error = cls("slide.svs", "two\nlines", "do this")
    assert str(error) == "slide.svs: two lines; do this"
    again = pickle.loads(pickle.dumps(error))
    assert (type(again), str(again), again.exit_code) == (cls, str(error), error.exit_code)


def test_a_manifest_error_lists_its_faults():
    error = pickle.loads(pickle.dumps(errors.ManifestError("m.csv", ["line 2, x", "line 3, y"])))
    assert str(error).splitlines() == ["m.csv: 2 faults; nothing was written", "  line 2, x", "  line 3, y"]


def test_exit_codes():
    codes = {cls.__name__: cls.exit_code for cls in tree()}
    assert codes["WsiIdcError"] == codes["SlideError"] == codes["RegionError"] == 1
    assert codes["UsageError"] == codes["ManifestError"] == codes["ModelError"] == codes["StoreError"] == 2
    assert codes["StoreBusyError"] == 75
