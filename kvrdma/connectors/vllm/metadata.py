"""What the two halves send each other, once a step. With one process it goes by reference: nobody changes it."""

from __future__ import annotations

from dataclasses import dataclass, field

from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorMetadata, KVConnectorWorkerMetadata

from kvrdma.cache import Job, JobReport, PoolReport
from kvrdma.keys import KeySpace


@dataclass(slots=True)
class StepJobs(KVConnectorMetadata):
    """The scheduler half's jobs for every rank. `keyspace` comes with the first step and after each change.

    `loads` says which request each LOAD job is for; `failed_loads` are requests that wait for a load which
    could not even be planned: the workers report them failed at once. `stale_loads` are LOAD jobs, sent before
    or with this step, that a reset has overtaken: they are reported failed once their copy is terminal.
    """

    jobs: list[Job] = field(default_factory=list)
    keyspace: KeySpace | None = None
    loads: dict[int, str] = field(default_factory=dict)
    failed_loads: list[str] = field(default_factory=list)
    stale_loads: list[int] = field(default_factory=list)


@dataclass(slots=True)
class RankReports(KVConnectorWorkerMetadata):
    """What the ranks have done since the last step, and how far their pools are while these grow."""

    reports: list[JobReport]
    pools: list[PoolReport] = field(default_factory=list)

    def aggregate(self, other: KVConnectorWorkerMetadata) -> RankReports:
        """Both ranks' reports, in a new object."""
        assert isinstance(other, RankReports)
        return RankReports([*self.reports, *other.reports], [*self.pools, *other.pools])
