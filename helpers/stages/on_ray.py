"""joblib on a Ray cluster."""

import logging
import socket
from collections.abc import Iterator
from contextlib import contextmanager

import ray
from joblib import parallel_config
from ray.util.joblib import register_ray

PATIENCE = 30  # seconds that a cluster may take to answer


@contextmanager
def joined(address: str) -> Iterator[None]:
    """Inside, joblib computes on a Ray cluster.

    Raises ConnectionError where none is there, and ValueError for one of a single CPU.
    """
    try:
        _reach(address)
        ray.init(address, log_to_driver=False, logging_level=logging.ERROR)
    except (OSError, ValueError, RuntimeError) as error:
        raise ConnectionError(
            f"No Ray cluster answers at RAY={address} ({error}): docs/cluster.md says how one is started."
        ) from None
    try:
        if ray.cluster_resources().get("CPU", 0) < 2:  # joblib would run one job in this process
            raise ValueError(f"The Ray cluster at {address} has fewer than two CPUs: add a machine, or leave RAY= out.")
        register_ray()
        with parallel_config("ray", n_jobs=-1):
            yield
    finally:
        ray.shutdown()


def _reach(address: str) -> None:
    """Raise OSError or ValueError for a host and port where nothing answers: Ray would wait for many minutes."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if host:
        socket.create_connection((host, int(port)), PATIENCE).close()
