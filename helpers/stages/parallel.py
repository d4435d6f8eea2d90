"""Several small computations at a time, each in a process of its own with one thread.

For models this small, two processes of one thread do nearly twice the work of one process with two. What a worker
computes it leaves in the artefact cache; one thread each, so that its bytes do not depend on how many there are.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from joblib import Parallel, delayed
from joblib.externals.loky import process_executor
from tqdm import tqdm

from helpers.stages import bars, engines, memory


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
    """Call `function(item)` for every item in worker processes, with a progress bar behind which theirs are told
    (bars.py). What it raises is raised here.

    Raises what `engines.engine` does, and FileNotFoundError where a cluster's worker does not see the artefact folder.
    """
    if not items:
        return
    memory.give_back()  # others are about to need it
    total = {"total": len(items), "leave": False}
    with engines.engine(len(items)) as seen, tqdm(desc=name, **total) as bar, bars.shown(bar) as folder:
        _WithBar(bar)(delayed(_alone)(function, item, seen, folder) for item in items)


class _WithBar(Parallel):
    """joblib's, all handed out at once, for a worker that comes later too. Its own bar needs no results as they come,
    which Ray's does not give."""

    def __init__(self, bar: tqdm):
        super().__init__(pre_dispatch="all")
        self._bar = bar

    def print_progress(self) -> None:
        self._bar.update(self.n_completed_tasks - self._bar.n)


def _alone(function: Callable, item, seen: Path | None, folder: Path) -> None:
    if seen is not None:
        engines.look_for(seen)
    torch.set_num_threads(1)
    # loky takes memory that malloc keeps (Makefile) for a leak, and would start another worker for the items left
    process_executor._MAX_MEMORY_LEAK_SIZE = math.inf
    with bars.told(folder):
        function(item)
    memory.give_back()
