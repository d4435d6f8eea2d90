"""The bars of worker processes, which would overwrite each other: each worker writes where its innermost one stands,
and the process that waits for them shows it behind its own."""

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from io import StringIO
from pathlib import Path
from tempfile import TemporaryDirectory

from tqdm import tqdm

EVERY = 2  # seconds


@contextmanager
def shown(bar: tqdm) -> Iterator[Path]:
    """A folder for workers to write into (`told`); what stands in it is shown behind a bar."""
    ended = threading.Event()

    def show(folder: Path) -> None:
        before = ""
        while not ended.wait(EVERY):
            now = "; ".join(filter(None, map(_text, sorted(folder.iterdir()))))
            if now != before:
                bar.set_postfix_str(now)
            before = now

    with TemporaryDirectory() as folder:
        thread = threading.Thread(target=show, args=[Path(folder)], daemon=True)
        thread.start()
        try:
            yield Path(folder)
        finally:
            ended.set()
            thread.join()


@contextmanager
def told(folder: Path) -> Iterator[None]:
    """Inside, the bars of this process are written into a folder in place of being drawn; nowhere, where there is no
    such folder, as for a cluster's worker on another machine."""
    kept, begin = {name: vars(tqdm)[name] for name in ("__init__", "display")}, tqdm.__init__
    path = folder / str(os.getpid())

    def init(bar: tqdm, *args, **kwargs) -> None:
        begin(bar, *args, **(kwargs | {"file": StringIO()}))

    def display(bar: tqdm, msg: str | None = None, pos: int | None = None) -> None:
        if msg is None and folder.is_dir():
            path.write_text(line(bar))

    tqdm.__init__, tqdm.display = init, display
    try:
        yield
    finally:
        tqdm.__init__, tqdm.display = kept.values()
        path.unlink(missing_ok=True)


def line(bar: tqdm) -> str:
    """What a bar is about, how far it is and, once that can be told, how long it takes: "training 3/8, 00:10 left"."""
    rate = bar.format_dict["rate"] or (bar.n / bar.format_dict["elapsed"] if bar.format_dict["elapsed"] else 0)
    left = f", {tqdm.format_interval((bar.total - bar.n) / rate)} left" if bar.total and rate else ""
    return f"{bar.desc.removesuffix(': ')} {bar.n}{f'/{bar.total}' if bar.total else ''}{left}".strip()


def _text(path: Path) -> str:
    with suppress(FileNotFoundError):  # its worker is done
        return path.read_text()
    return ""
