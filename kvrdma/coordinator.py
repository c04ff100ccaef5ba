"""How ranks agree. One rank agrees with itself; the coordinator over an engine's group comes with TP."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from kvrdma.cache import Job
from kvrdma.layout import Bitmap


class Coordinator(Protocol):
    """Ranks agree, over a group made from the engine's process group, or given.

    A value returned for a job is equal on every rank that gets one; a rank that cannot know raises
    `CoordinationLost` and must not go on with a value of its own. Every wait ends.
    """

    @property
    def rank(self) -> int:
        """This rank's number; rank 0 owns the index."""

    @property
    def world(self) -> int:
        """How many ranks there are."""

    def agree(self, job_id: int, ok: Bitmap, *, timeout: float) -> Bitmap:
        """What all ranks have of a job."""

    def share(self, jobs: Sequence[Job] | None, *, timeout: float) -> Sequence[Job]:
        """Rank 0's jobs, on every rank in one order."""


class SoloCoordinator:
    """One rank, which agrees with itself."""

    @property
    def rank(self) -> int:
        """This rank's number: 0."""
        return 0

    @property
    def world(self) -> int:
        """How many ranks there are: 1."""
        return 1

    def agree(self, job_id: int, ok: Bitmap, *, timeout: float) -> Bitmap:
        """What this rank has."""
        return ok

    def share(self, jobs: Sequence[Job] | None, *, timeout: float) -> Sequence[Job]:
        """This rank's jobs."""
        return jobs or ()
