"""Several processes that train one network: which of them this is.

Lightning starts the helpers of a training, ranks 1 and up, as copies of the command. A helper serves one training and
ends: it prepares the same tiles, shares the steps, and writes, judges and says nothing.
"""

import os


def rank() -> int:
    """Which of several processes this is: 0 for the one that the user started."""
    return int(os.environ.get("LOCAL_RANK", "0"))
