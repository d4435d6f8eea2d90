"""Several small computations at a time, each in a process of its own with one thread.

For models this small, two processes of one thread do nearly twice the work of one process with two. What a worker
computes it leaves in the artefact cache; one thread each, so that its bytes do not depend on how many there are.
"""

import ctypes
import math
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from joblib import Parallel, delayed, parallel_config
from joblib.externals.loky import process_executor
from tqdm import tqdm

IDLE = 20  # seconds that a worker waits for more, since starting one takes several: then its memory is free again


@contextmanager
def one_thread() -> Iterator[None]:
    """Inside, torch computes with one thread: what else runs, such as a browser, then does not hold it up."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def each(function: Callable, items: Sequence, name: str) -> None:
    """Call `function(item)` for every item in worker processes, with a progress bar. What it raises is raised here."""
    if not items:
        return
    _give_back()
    # never one job: joblib would run it in this process
    jobs = max(2, min(len(items), os.cpu_count() or 1))
    with parallel_config("loky", n_jobs=jobs, inner_max_num_threads=1, idle_worker_timeout=IDLE):
        done = Parallel(return_as="generator_unordered")(delayed(_alone)(function, item) for item in items)
        for _ in tqdm(done, desc=name, total=len(items), leave=False):
            pass


def _give_back() -> None:
    """Return to the system what this process has freed and kept (Makefile), since others are about to need it."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc's
    if trim is not None:
        trim(0)


def _alone(function: Callable, item) -> None:
    torch.set_num_threads(1)
    # loky takes memory that malloc keeps (Makefile) for a leak, and would start another worker for the items left
    process_executor._MAX_MEMORY_LEAK_SIZE = math.inf
    shown = tqdm.__init__
    # the bars of several processes overwrite each other
    tqdm.__init__ = lambda self, *args, **kwargs: shown(self, *args, **(kwargs | {"disable": True}))
    function(item)
    _give_back()
