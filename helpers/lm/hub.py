"""The Hugging Face hub, where there is no network."""

import socket
from functools import cache
from urllib.parse import urlsplit
from urllib.request import getproxies

import datasets
from huggingface_hub import constants


@cache  # for a process
def offline_without_a_network() -> None:
    """Where the hub's host has no address and no proxy could know one, have its libraries look into their caches alone:
    else each time that it is asked they try for half a minute, and warn six times."""
    if getproxies().keys() & {"http", "https", "all"}:
        return
    try:
        socket.getaddrinfo(urlsplit(constants.ENDPOINT).hostname, 443)
    except OSError:
        constants.HF_HUB_OFFLINE = datasets.config.HF_HUB_OFFLINE = True
