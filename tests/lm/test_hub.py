"""Without a network the hub's libraries use their caches, at once."""

import socket

import datasets
import pytest
from huggingface_hub import constants

from helpers.lm import hub


@pytest.fixture(autouse=True)
def as_it_was(monkeypatch):
    for where in (constants, datasets.config):
        monkeypatch.setattr(where, "HF_HUB_OFFLINE", False)
    hub.offline_without_a_network.cache_clear()
    yield
    hub.offline_without_a_network.cache_clear()


def no_address(*_):
    raise socket.gaierror(-2, "Name or service not known")


@pytest.mark.parametrize("lookup, proxies, offline", [
    (no_address, {}, True),
    (no_address, {"https": "http://localhost:1"}, False),  # which may know the address
    (lambda *_: [()], {}, False),
])  # fmt: skip
def test_the_hub_is_asked_only_where_it_may_answer(monkeypatch, lookup, proxies, offline):
    monkeypatch.setattr(socket, "getaddrinfo", lookup)
    monkeypatch.setattr(hub, "getproxies", lambda: proxies)
    hub.offline_without_a_network()
    assert constants.HF_HUB_OFFLINE == datasets.config.HF_HUB_OFFLINE == offline
