"""Memory that was freed and is kept for what comes next (Makefile): others may need it more."""

import ctypes

import psutil

MUCH = 3 * 2**29  # bytes: a process that holds more reads a large model, whose stages take longer than asking again


def give_back() -> None:
    """Return to the system what this process has freed and kept."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc's
    if trim is not None:
        trim(0)


def give_back_much() -> None:
    """The same, where it may be much."""
    if psutil.Process().memory_info().rss > MUCH:
        give_back()
