"""How far a run is, told to the store's lease, where `status` sees it."""

from collections.abc import Sequence

from wsi_idc.store import Store
from wsi_idc.work.jobs import Listener, Outcome


class Telling:
    """A listener that passes on what it is told, and tells the lease how many slides have ended.

    Args:
        store: held by the run.
        command: what runs.
        slides: that it will run.
        listener: who else is told.
    """

    def __init__(self, store: Store, command: str, slides: Sequence[str], listener: Listener) -> None:
        self._store, self._listener = store, listener
        self._command, self._slides = command, len(slides)
        self._ended = {"done": 0, "failed": 0}
        self._tell()

    def _tell(self) -> None:
        self._store.tell({"command": self._command, "slides": self._slides, **self._ended})

    def prepared(self, job_id: str, tiles: int) -> None:
        """See `Listener.prepared`."""
        self._listener.prepared(job_id, tiles)

    def advanced(self, job_id: str, tiles: int) -> None:
        """See `Listener.advanced`."""
        self._listener.advanced(job_id, tiles)

    def ended(self, job_id: str, outcome: Outcome) -> None:
        """See `Listener.ended`."""
        self.count(outcome)
        self._listener.ended(job_id, outcome)

    def left_out(self, job_id: str) -> None:
        """See `Listener.left_out`."""
        self._listener.left_out(job_id)

    def count(self, outcome: Outcome) -> None:
        """Count a slide that has ended otherwise."""
        self._ended[outcome.status] += 1
        self._tell()
