"""A cluster's workers: the bytes of one machine, though one is killed, and what cannot be used is told."""

import json
import os
import signal
import sys
import threading

import pytest
from conftest import bytes_of
from distributed import LocalCluster
from distributed.scheduler import KilledWorker
from studied import PROFILE
from test_parallel import note, refuse

from helpers.chapters import subject
from helpers.stages import artifacts, engines, on_dask, parallel
from helpers.stages.partner import train_within_memory
from helpers.study import Study


class Killed(Study):
    """A study whose worker is killed in the midst of the first training."""

    def train(self, base, pairs, recipe, seed, folder):
        if not (once := artifacts.root().parent / "killed").exists():
            once.touch()
            train_within_memory(base, pairs[::2], recipe, seed, folder)  # what a worker leaves half done
            os.kill(os.getpid(), signal.SIGKILL)
        train_within_memory(base, pairs, recipe, seed, folder)


def is_main(path):
    path.write_text(str(threading.current_thread() is threading.main_thread()))


def running(**changes):
    """A cluster on this machine."""
    usual = {"n_workers": 1, "threads_per_worker": 1, "memory_limit": 0, "dashboard_address": "127.0.0.1:0"}
    return LocalCluster(host="127.0.0.1", protocol="tcp://", **usual | changes)


@pytest.fixture(scope="module")
def two():
    """A cluster of two worker processes, started without make's environment."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("OMP_NUM_THREADS", "DSTEER_ARTIFACTS"):
            patch.delenv(name, raising=False)
        with running(n_workers=2) as cluster:
            patch.undo()
            yield cluster


@pytest.fixture(scope="module")
def one_machine(trained):
    """The folder of the tiny study's artefacts, made in this process."""
    return artifacts.root()


@pytest.fixture(autouse=True)
def folder(monkeypatch, tmp_path):
    """An artefact folder of the test's own, and no long waits."""
    monkeypatch.setattr(on_dask, "PATIENCE", 0.2)
    monkeypatch.setenv("DSTEER_ARTIFACTS", str(tmp_path / "artefacts"))
    return tmp_path / "artefacts"


@pytest.fixture
def ask(monkeypatch):
    """`ask(cluster)`: what is given to workers from now on, that cluster has to do."""
    monkeypatch.setattr(on_dask, "PATIENCE", 10)
    return lambda cluster: monkeypatch.setenv("DASK", cluster.scheduler_address)


def test_a_cluster_leaves_the_bytes_of_one_machine_though_a_worker_is_killed(one_machine, folder, two, ask):
    ask(two)
    stages = [lambda one: one.chosen.adapter, lambda one: one.answers("base", "heldout")]
    subject.compute([Killed(PROFILE)], "a study", *stages)
    made = bytes_of(folder)
    assert (folder.parent / "killed").exists() and any(name.endswith("adapter_model.safetensors") for name in made)
    assert made.items() <= bytes_of(one_machine).items()


def test_a_cluster_s_workers_compute_with_one_thread_and_into_the_folder_of_this_process(two, folder, tmp_path, ask):
    ask(two)
    paths = [tmp_path / str(i) for i in range(4)]
    parallel.each(note, paths, "four")
    found = [json.loads(path.read_text()) for path in paths]
    assert {(worker["threads"], worker["artefacts"]) for worker in found} == {(1, str(folder))}
    assert os.getpid() not in {worker["process"] for worker in found}
    assert list(folder.iterdir()) == []


def test_a_cluster_of_one_worker_is_used_too(tmp_path, ask):
    with running(processes=False) as cluster:
        ask(cluster)
        parallel.each(is_main, [tmp_path / "a"], "one")
    assert (tmp_path / "a").read_text() == "False"


# --- What cannot be used ---


def test_two_clusters_are_refused(monkeypatch):
    for name in ("DASK", "RAY"):
        monkeypatch.setenv(name, "here")
    with pytest.raises(ValueError, match=r"^DASK=here and RAY=here are two clusters: leave one of them out\.$"):
        parallel.each(note, [1], "one")


@pytest.mark.parametrize("address", ["tcp://127.0.0.1:1", "nowhere", "tcp:/here"])
def test_a_scheduler_that_does_not_answer_is_told(address, monkeypatch):
    monkeypatch.setenv("DASK", address)
    with pytest.raises(ConnectionError, match=rf"^No Dask scheduler answers at DASK={address} .*docs/cluster\.md"):
        parallel.each(note, [1], "one")


@pytest.mark.parametrize(
    ("cluster", "error", "said"),
    [
        ({"n_workers": 0}, ConnectionError, r"has no worker: docs/cluster\.md"),
        ({"threads_per_worker": 3}, ValueError, "has 3 threads, .* with --nworkers 3 --nthreads 1"),
    ],
)
def test_workers_that_cannot_be_used_are_told(cluster, error, said, ask, monkeypatch):
    with running(processes=False, **cluster) as started, pytest.raises(error, match=said):
        ask(started)
        monkeypatch.setattr(on_dask, "PATIENCE", 1)
        parallel.each(note, [1], "one")


def test_a_cluster_that_lacks_this_code_is_told(two, ask, monkeypatch):
    def cannot():
        raise ModuleNotFoundError("helpers")

    monkeypatch.setattr(on_dask, "_is_here", cannot)
    ask(two)
    with pytest.raises(ValueError, match="cannot import this project's code: start"):
        parallel.each(note, [1], "one")


def test_what_a_cluster_s_worker_raises_is_raised_here_and_so_is_its_death(two, tmp_path, ask, monkeypatch):
    ask(two)
    with pytest.raises(KeyError, match="the worker of a"):
        parallel.each(refuse, [tmp_path / "a"], "one")
    monkeypatch.setattr(two.scheduler, "allowed_failures", 0)
    with pytest.raises(KilledWorker):
        parallel.each(os._exit, [1], "one that kills whatever worker has it")


def test_a_worker_that_does_not_see_the_folder_is_told(tmp_path):
    with pytest.raises(FileNotFoundError, match=f"does not see the artefact folder {tmp_path}: set DSTEER_ARTIFACTS"):
        engines.look_for(tmp_path / "not here")


def test_a_package_that_is_missing_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    monkeypatch.setenv("RAY", "auto")
    with pytest.raises(ModuleNotFoundError, match=r"^RAY= needs the package ray, .*docs/cluster\.md"):
        parallel.each(note, [1], "one")
