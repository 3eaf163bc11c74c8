"""What is to be done with a slide is decided without touching it."""

from wsi_idc.plan import plan

WANTED = {"tile size": 50, "source": "abc"}


def test_a_new_slide_is_run():
    assert plan(WANTED, None, None) == plan(WANTED, None, None, force=True)
    assert plan(WANTED, None, None).action == "run"


def test_a_slide_that_is_done_is_skipped_unless_forced():
    assert plan(WANTED, dict(WANTED), None).action == "skip"
    assert (plan(WANTED, dict(WANTED), None, force=True).action) == "redo"


def test_every_change_is_a_reason_and_is_named():
    assert plan(WANTED, {**WANTED, "source": "def"}, None).reason == "source changed"
    assert plan(WANTED, {"tile size": 64, "source": "def"}, None).reason == "tile size and source changed"
    assert plan(WANTED, {"source": "abc"}, None).action == "redo"


def test_what_the_record_has_beyond_is_no_reason():
    assert plan(WANTED, {**WANTED, "other": 1}, None).action == "skip"


def test_a_failure_is_tried_again():
    assert plan(WANTED, None, "disk full").action == "run"
    assert plan(WANTED, dict(WANTED), "disk full") == plan(WANTED, dict(WANTED), "disk full")
    assert plan(WANTED, dict(WANTED), "disk full").action == "redo"
