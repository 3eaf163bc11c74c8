"""What is to be done with a slide is decided without touching it."""

from wsi_idc.plan import Plan, plan

WANTED = {"tile size": 50, "source": "abc"}


def test_a_new_slide_is_run():
    assert plan(WANTED, None) == plan(WANTED, None, force=True)
    assert plan(WANTED, None).action == "run"


def test_a_slide_that_is_done_is_skipped_unless_forced():
    assert plan(WANTED, dict(WANTED)).action == "skip"
    assert (plan(WANTED, dict(WANTED), force=True).action) == "redo"


def test_every_change_is_a_reason_and_is_named():
    assert plan(WANTED, {**WANTED, "source": "def"}).reason == "source changed"
    assert plan(WANTED, {"tile size": 64, "source": "def"}).reason == "tile size and source changed"
    assert plan(WANTED, {"source": "abc"}).action == "redo"


def test_what_the_record_has_beyond_is_no_reason():
    assert plan(WANTED, {**WANTED, "other": 1}).action == "skip"


def test_a_failure_is_tried_again():
    assert plan(WANTED, None, "disk full") == Plan("run", "disk full")
    assert plan(WANTED, dict(WANTED), "disk full") == Plan("redo", "disk full")
