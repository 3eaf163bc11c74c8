"""A store with maps that are known."""

import pytest


@pytest.fixture
def store(scored):
    """See `scored`."""
    return scored
