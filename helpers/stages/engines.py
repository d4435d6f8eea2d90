"""Whose worker processes joblib computes in: this machine's, or those of the cluster that DASK or RAY names.

What a cluster's workers compute reaches this process through the artefact cache alone, so all of them see one folder.
"""

import os
import socket
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from tempfile import NamedTemporaryFile

from joblib import parallel_config

from helpers.stages import artifacts, orphans

IDLE = 20  # seconds that a worker here waits for more, since starting one takes several: then its memory is free again


def cluster() -> str | None:
    """The cluster that is asked for, such as "DASK=tcp://host:8786"; None for this machine alone.

    Raises ValueError where two are.
    """
    given = [f"{name}={os.environ[name]}" for name in ("DASK", "RAY") if os.environ.get(name)]
    if len(given) > 1:
        raise ValueError(f"{' and '.join(given)} are two clusters: leave one of them out.")
    return given[0] if given else None


@contextmanager
def engine(items: int) -> Iterator[Path | None]:
    """Inside, joblib computes in worker processes: this machine's, or a cluster's, which look for the file that is
    yielded (`look_for`).

    Raises ValueError, ConnectionError or ModuleNotFoundError for a cluster that cannot be used.
    """
    named = cluster()
    if named is None:
        # never one job: joblib would run it in this process
        jobs = max(2, min(items, os.cpu_count() or 1))
        ending = {"initializer": orphans.end_with, "initargs": (os.getpid(),)}  # at once: other imports take seconds
        with parallel_config("loky", n_jobs=jobs, inner_max_num_threads=1, idle_worker_timeout=IDLE, **ending):
            yield None
    else:
        folder = artifacts.root()
        folder.mkdir(parents=True, exist_ok=True)
        with _joined(*named.split("=", 1)), NamedTemporaryFile(dir=folder, prefix=".seen-") as file:
            yield Path(file.name)


def _joined(name: str, address: str) -> AbstractContextManager[None]:
    try:  # each takes a second to import
        if name == "DASK":
            from helpers.stages.on_dask import joined
        else:
            from helpers.stages.on_ray import joined
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"{name}= needs the package {error.name}, which is not installed here: docs/cluster.md says how it is."
        ) from None
    return joined(address)


def look_for(seen: Path) -> None:
    """In a cluster's worker: take the folder of `seen` for the artefact cache.

    Raises FileNotFoundError where that file, which the process that asked has put there, is not seen.
    """
    if not seen.exists():
        raise FileNotFoundError(
            f"The worker on {socket.gethostname()} does not see the artefact folder {seen.parent}: set "
            "DSTEER_ARTIFACTS to a folder that all machines share under one path."
        )
    os.environ["DSTEER_ARTIFACTS"] = str(seen.parent)
