"""A network observed by Ray actors that share its batches."""

import contextlib
import logging
import os
import socket
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import ray

from fastcal.definition import Network
from fastcal.errors import DataError, ModelError, UnavailableError, check_range
from fastcal.feed.feed import Feed, length
from fastcal.model import Model
from fastcal.observe.backends import Backend, Enough, LocalBackend, OnnxRuntimeBackend, choose_backend
from fastcal.observe.observations import Observations
from fastcal.observe.ray_crew import FIRST, Crew, Job, last_line
from fastcal.progress import Progress

#: Seconds to wait for a cluster that may not exist.
_PATIENCE_SECONDS = 10.0

_log = logging.getLogger("fastcal")


@dataclass(frozen=True)
class RayBackend(Backend):
    """Ray actors that share a feed's batches.

    The histograms are those of one process if the actors' machines compute the same activations. The first batch sets
    the ranges of the tensors, and every worker observes it when it starts. A worker is then given one share after
    another: successive batches, and the ranges that are known. It counts from these ranges on, and `Histogram.append`
    puts its counts together with those of the shares before. If a tensor's range was not known to the worker (the
    tensor was 0 in all batches so far) and an earlier share has set the range meanwhile, the share is counted again. A
    share counts as a whole or not at all, so the share of a worker that died is given to another worker.

    Attributes:
        workers: The number of actors.
        address: The cluster; None for the one that RAY_ADDRESS names, else one that is started here for the time of the
            observation. Ignored if the process is connected to Ray already.
        asked: The name of the backend that the workers use; "auto" is decided on a node with a GPU if the cluster has
            one.
        backends: The local backends by name.
        threads: The number of CPUs of each worker; by default as many as leave room for all workers.
    """

    workers: int
    address: str | None
    asked: str
    backends: Mapping[str, LocalBackend]
    threads: int | None = None
    name = "ray"

    def observe(
        self, network: Network, feed: Feed, progress: Callable[[Progress], None], enough: Enough | None = None
    ) -> Observations:
        """Run a network over the batches of a feed: see `Backend.observe`.

        Raises:
            ModelError: The network is not an ONNX file.
            DataError: The feed cannot be divided.
            UnavailableError: Ray cannot be reached, or workers die again and again.
            FastcalError: The error of a worker, of the first batch in order that goes wrong.
        """
        check_range("workers", self.workers, 1)
        if not isinstance(network, Model):
            raise ModelError("workers run ONNX files, not an INetworkDefinition; leave workers out")
        feed.part(FIRST, gpu=None, threads=1)  # raises before Ray is started if the feed cannot be divided
        if length(feed) is None:
            raise DataError("workers must know how many batches there are, and the feed does not; leave workers out")
        timeline: list[Progress] = []

        def keep(state: Progress) -> None:
            timeline.append(replace(state))
            progress(state)

        with _connected(self.address, self.workers):
            nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
            gpus = sum(int(node.get("GPU", 0)) for node in nodes)
            backend = self.backends[_choose(self.asked, gpus)]
            on_gpus = gpus > 0 and (backend.name == "tensorrt" or feed.gpu is not None)
            threads = self.threads or cpus_each(nodes, self.workers, on_gpus)
            room = sum(room_for(node, threads, on_gpus) for node in nodes)
            if room < self.workers:
                each = f"{threads} CPUs" + " and a GPU" * on_gpus
                _log.info("Ray has room for %d of the %d workers, with %s each", room, self.workers, each)
            if isinstance(backend, OnnxRuntimeBackend):
                backend = replace(backend, threads=threads)
            crew = Crew(Job(network, feed, backend, self.workers, threads, on_gpus), keep)
            try:
                found = crew.observe()
            finally:
                crew.dismiss()
        return Observations(network.label, backend.name, backend.precision, found.total, found.shared_scales, timeline)


@contextlib.contextmanager
def _connected(address: str | None, workers: int) -> Iterator[None]:
    """Connect this process to Ray for the time of the context."""
    if ray.is_initialized():
        yield
        return
    address = address or os.environ.get("RAY_ADDRESS", "local")
    resources: dict[str, Any] = {}
    if address == "local":  # there may be more workers than cores
        resources = {"num_cpus": max(workers, len(os.sched_getaffinity(0))), "include_dashboard": False}
    host, _, port = address.rpartition(":")
    try:
        if host and port.isdecimal():  # Ray waits for ever for a cluster that does not exist
            socket.create_connection((host.removeprefix("ray://"), int(port)), _PATIENCE_SECONDS).close()
        ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR, **resources)
    except (ConnectionError, OSError, RuntimeError, ValueError) as error:
        raise UnavailableError(
            f"cannot connect to Ray at {address}: {last_line(error)}; `ray start --head` starts a cluster, and "
            "without an address Ray is started here"
        ) from error
    try:
        yield
    finally:
        ray.shutdown()


def _choose(asked: str, gpus: int) -> str:
    """Return the name of the backend that all workers use."""
    if gpus == 0:
        if asked == "tensorrt":
            raise UnavailableError("backend tensorrt needs GPUs, and the Ray cluster has none; use backend onnxruntime")
        return "onnxruntime"
    if asked != "auto":
        return asked
    chosen: str = ray.get(ray.remote(num_gpus=1)(choose_backend).remote("auto", True))
    return chosen


def cpus_each(nodes: Sequence[Mapping[str, float]], workers: int, on_gpus: bool) -> int:
    """Return the most CPUs that each worker can have if all workers are to have room; 1 if there is no such number."""
    most = max(int(node.get("CPU", 0)) for node in nodes)
    fitting = (cpus for cpus in range(most, 1, -1) if sum(room_for(node, cpus, on_gpus) for node in nodes) >= workers)
    return next(fitting, 1)


def room_for(node: Mapping[str, float], cpus: int, on_gpus: bool) -> int:
    """Return the number of workers with that many CPUs each that a node has room for."""
    room = int(node.get("CPU", 0)) // cpus
    return min(room, int(node.get("GPU", 0))) if on_gpus else room
