"""joblib on a Dask cluster."""

from collections.abc import Iterator
from contextlib import contextmanager

from distributed import Client
from joblib import parallel_config
from joblib._dask import DaskDistributedBackend

PATIENCE = 30  # seconds that a scheduler may take to answer, and its first worker to come


@contextmanager
def joined(address: str) -> Iterator[None]:
    """Inside, joblib computes in the workers of a scheduler.

    Raises ConnectionError where none is there, and ValueError for workers that cannot be used.
    """
    try:
        client = Client(address, timeout=PATIENCE, set_as_default=False)
    except (OSError, ValueError) as error:
        raise ConnectionError(
            f"No Dask scheduler answers at DASK={address} ({error}): docs/cluster.md says how one is started."
        ) from None
    with client:
        _check_workers(client, address)
        with parallel_config(_Dask(client=client)):
            yield


def _check_workers(client: Client, address: str) -> None:
    try:
        client.wait_for_workers(1, timeout=PATIENCE)
    except TimeoutError:
        raise ConnectionError(
            f"The Dask scheduler at {address} has no worker: docs/cluster.md says how one is started."
        ) from None
    for worker, threads in client.nthreads().items():
        if threads > 1:
            raise ValueError(
                f"The Dask worker {worker} has {threads} threads, which would share their random numbers: start it "
                f"with --nworkers {threads} --nthreads 1."
            )
    try:
        client.run_on_scheduler(_is_here)
        client.run(_is_here)  # at once, whatever else the workers have to do
    except Exception as error:
        raise ValueError(
            f"The Dask cluster at {address} cannot import this project's code: start its scheduler and workers from "
            "this project's environment."
        ) from error


def _is_here() -> None:
    """What can be called where this module can be imported."""


class _Dask(DaskDistributedBackend):
    """joblib's, except that a single worker is used too, and that what Dask gives up is told."""

    def configure(self, *args, **kwargs) -> int:
        return max(2, super().configure(*args, **kwargs))  # joblib would run one job in this process

    def submit(self, func, callback=None):
        submitted = super().submit(func, callback)
        # joblib's calls back with results alone, and waits forever for what has killed its workers
        submitted.add_done_callback(lambda done: callback(done.exception()) if done.exception() else None)
        return submitted
