"""`RaySites`: sites that are workers of a Ray cluster, each with many clients."""

from __future__ import annotations

import uuid
from collections.abc import Mapping, Sequence

from typing_extensions import override

from split_lightning.engines.expected import Expected
from split_lightning.engines.hello import ClientData, Hello
from split_lightning.engines.link import Link, Room
from split_lightning.engines.ray_cluster import RayCluster
from split_lightning.engines.ray_worker import NewAnswers, RayWorker
from split_lightning.engines.remote import RemoteSite, Sites
from split_lightning.engines.shapes import Shapes
from split_lightning.message import role_of
from split_lightning.placement import client_of


class RaySites(Sites):
    """Places the clients of a run on the workers of a cluster that one party trusts.

    Ray runs code on any node for every member, and sends Python objects pickled. The
    calls themselves are frames, in arrays of bytes.

    Args:
        address: The cluster: `auto` or `HOST:PORT`; `None`: a new one on this machine.
        workers: Number of workers; clients are dealt out among them.
        num_cpus: Number of CPUs that Ray reserves for each worker.
        num_gpus: Number of GPUs; a part of one for workers that share it.
        starts: How often a worker may start, before the run ends.

    Attributes:
        new_answers: Builds a site in a worker's process.

    Raises:
        ImportError: If Ray is not installed.
        ValueError: If there is no worker.
    """

    new_answers: NewAnswers

    def __init__(
        self,
        address: str | None = None,
        workers: int = 2,
        num_cpus: float = 1,
        num_gpus: float = 0,
        starts: int = 10,
    ) -> None:
        if workers < 1:
            raise ValueError(
                f"Expected argument `workers` to be at least 1, but got {workers}."
            )
        self.workers = workers
        self.resources = {"num_cpus": num_cpus, "num_gpus": num_gpus}
        self.starts = starts
        self.cluster = RayCluster(address)
        room = Room()
        self.links = [Link(f"worker-{number}", room) for number in range(workers)]
        self._sites = [RemoteSite(link.name, link.deliver) for link in self.links]
        self._parties: dict[str, int] = {}  # by party its number
        self._workers: list[RayWorker] = []
        self._told: list[ClientData] = []

    @override
    def of(self, party: str) -> RemoteSite | None:
        if role_of(party) != "client":
            return None
        number = self._parties.setdefault(party, len(self._parties))
        return self._sites[number % self.workers]

    @override
    def meet(
        self, parties: Sequence[str], agreed: Mapping[str, str]
    ) -> list[ClientData]:
        if not self._workers:
            self._require_work(parties)
            self.cluster.open(self.workers * self.resources["num_cpus"])
            self._workers = [self._new_worker(n, parties) for n in range(self.workers)]
            for worker in self._workers:
                worker.start()
            for worker in self._workers:
                self._told = self._heard(worker, agreed)
        return self._told

    def _require_work(self, parties: Sequence[str]) -> None:
        if self.workers > len(parties):
            raise ValueError(
                "Expected argument `workers` to be at most the number of clients "
                f"({len(parties)}), but got {self.workers}: the others would have "
                "nothing to do."
            )

    def _new_worker(self, number: int, parties: Sequence[str]) -> RayWorker:
        own = [party for party in parties if self.of(party) is self._sites[number]]
        clients = sorted({client_of(party) for party in own})
        return RayWorker(
            self.links[number], self.new_answers, clients, self.resources, self.starts
        )

    def _heard(self, worker: RayWorker, agreed: Mapping[str, str]) -> list[ClientData]:
        """Returns what a worker says about the samples of all clients."""
        _, _, plain = worker.greeting()
        try:
            return list(Hello.of(plain, agreed).data)
        except ValueError as error:
            raise ValueError(f"{worker.link.name} cannot take part: {error}.") from None

    @override
    def expect(self, shapes: Shapes) -> None:
        for link in self.links:
            link.expected = Expected(shapes)

    @override
    def begin(self, barrier: Mapping[str, str]) -> None:
        names = [link.name for link in self.links]
        if barrier and sorted(barrier) != sorted(names):
            raise ValueError(
                f"Expected argument `workers` to be {len(barrier)}, as in the run of "
                f"`ckpt_path`: each has the states of its clients. Got {self.workers}."
            )
        session = uuid.uuid4().hex
        for worker, site in zip(self._workers, self._sites, strict=True):
            worker.link.reset()
            site.reset()
            worker.begin(session, barrier.get(site.name))

    @override
    def keep(self) -> Mapping[str, str]:
        number = uuid.uuid4().hex[:8]
        for future in [site.call("keep", number) for site in self._sites]:
            future.result()
        return dict.fromkeys([site.name for site in self._sites], number)

    @override
    def end(self, final: Mapping[str, Sequence[tuple[int, str]]]) -> None:
        pass  # the process with the Trainer saves the networks

    @override
    def close(self) -> None:
        for worker in self._workers:
            worker.end()
        self._workers = []
        self.cluster.close()
