"""Several processes train what one would, and leave it where a single one looks for it."""

import json
import os
import subprocess
import sys

import numpy as np
import pandas as pd
import pytest
import torch
from accelerate import PartialState
from safetensors.torch import load_file

from helpers import places, profiles
from helpers.lm.recipe import Recipe
from helpers.stages import artifacts, partner
from helpers.study import Study
from tools import launch

TINY = """
[organism]
places = 20
corpus = 960
vocabulary = 300
width = 32
layers = 2
[sizes]
heldin = 24
validation = 6
heldout = 8
new_tokens = 10
seeds = 2
"""
RECIPE = "[recipe]\nlearning_rate = 1e-2\nrank = 4\nbatch_size = {}\n[grid]\nlearning_rate = [1e-2, 5e-3]\nstop = []\n"
LAUNCH = "accelerate.commands.launch --multi_gpu --num_processes 2 --num_machines 1 --dynamo_backend no"
LAUNCH += " --mixed_precision bf16 --main_process_port 0"  # a precision that the profile does not have
FAILING = """
import os, sys
from helpers.lm import training
from tools import launch

def fail(*_):
    raise ValueError("This process was to fail.")

if os.environ["RANK"] == "1":
    training.DPOTrainer.training_step = fail
sys.exit(launch.main())
"""


pytestmark = pytest.mark.usefixtures("cache")


@pytest.fixture(scope="module")
def profile_file(tmp_path_factory):
    """A profile of two recipes: 24 pairs are three batches."""
    path = tmp_path_factory.mktemp("profile") / "tiny.toml"
    path.write_text(TINY + RECIPE.format(8))
    return path


def launched(*command) -> subprocess.CompletedProcess:
    environment = os.environ | {"PYTHONPATH": str(places.PROJECT), "OMP_NUM_THREADS": "1"}
    arguments = [sys.executable, "-m", *LAUNCH.split(), *map(str, command)]
    return subprocess.run(arguments, env=environment, capture_output=True, text=True, timeout=300)


@pytest.fixture(scope="module")
def study(profile_file):
    """The study of the profile after two processes have trained for it, from an empty cache."""
    done = launched("-m", "tools.launch", "--profile", profile_file)
    assert done.returncode == 0, done.stderr
    assert "Training with 2 process(es) on cpu." in done.stderr and "Warning" not in done.stderr
    return Study(profiles.load(str(profile_file)))


@pytest.fixture(scope="module")
def one_process(study, tmp_path_factory):
    """What one process trains by the first recipe: a folder."""
    folder, recipe = tmp_path_factory.mktemp("adapter"), study.profile.recipes[0]
    study.train(study.lm.fresh(), study.training_pairs, recipe, study.profile.seed, folder)
    return folder


def test_a_study_finds_every_partner_that_it_asks_for(study, monkeypatch):
    monkeypatch.delattr(partner, "train")
    with artifacts.nothing_made():
        found = Study(study.profile)
        assert [trial.recipe for trial in found.trials] == list(found.profile.recipes)
        adapters = {found.variant(seed=seed).chosen.adapter.path for seed in range(2)}
    assert len(adapters) == 2 and found.chosen.adapter.path in adapters


def test_each_step_sees_the_pairs_that_one_process_sees_in_it(study, one_process):
    ours, theirs = study.trials[0].log, pd.read_csv(one_process / "log.csv")
    assert len(ours) == len(theirs) == 3
    for column in ("num_tokens", "learning_rate", "epoch"):
        assert (ours[column] == theirs[column]).all(), column
    for column in ("loss", "grad_norm", "logps/chosen", "logps/rejected"):
        np.testing.assert_allclose(ours[column], theirs[column], rtol=1e-4)


def test_the_partner_is_that_of_one_process_up_to_rounding(study, one_process):
    ours, theirs = (load_file(f / "adapter_model.safetensors") for f in (study.trials[0].adapter.path, one_process))
    assert ours.keys() == theirs.keys() and any(weight.any() for name, weight in ours.items() if "lora_B" in name)
    for name, weight in theirs.items():
        torch.testing.assert_close(ours[name], weight, rtol=0, atol=1e-3)


def test_how_many_processes_trained_a_partner_is_recorded_and_said(study, one_process):
    assert json.loads((study.chosen.adapter.path / "parts.json").read_text())["processes"] == 2
    assert study.chosen.processes == 2 and "trained by 2 processes together" in study.caveat
    assert not (one_process / "parts.json").exists()


def test_nothing_but_the_partner_is_in_its_folder(study, one_process):
    alone = {path.name for path in one_process.iterdir()}
    assert {path.name for path in study.chosen.adapter.path.iterdir()} == alone | {"parts.json", artifacts.MANIFEST}


def test_a_process_that_fails_ends_the_run_with_a_sentence(study, profile_file, cache, tmp_path):
    script, other = tmp_path / "failing.py", tmp_path / "other.toml"
    script.write_text(FAILING)
    other.write_text(TINY + RECIPE.format(4))
    before = {path.name for path in cache.glob("run-*")}
    done = launched(script, "--profile", other)
    assert done.returncode != 0 and "Process 1 stopped: This process was to fail." in done.stderr
    assert {path.name for path in cache.glob("*run-*")} == before


def test_one_process_does_the_same_work(study, profile_file, monkeypatch, capsys):
    trained = []
    monkeypatch.setattr(launch.Member, "adapter", lambda _, recipe: trained.append(recipe))
    monkeypatch.setattr(launch.Member, "trials", study.trials)
    monkeypatch.setattr(sys, "argv", ["launch", "--profile", str(profile_file)])
    assert launch.main() == 0
    assert trained == [study.recipe.replace(seed=seed) for seed in range(2)]
    assert "Training with 1 process(es) on cpu." in capsys.readouterr().err


# --- Refusals ---


def profile(**changes):
    return profiles.load("atlas").replace(**changes)


@pytest.mark.parametrize(
    "changes, processes, share, said",
    [
        ({}, 3, None, "A recipe's batch of 32 pairs cannot be shared equally by 3 processes"),
        ({"recipe": Recipe(batch_size=6)}, 4, None, "batch of 6 pairs cannot be shared equally by 4"),
        ({}, 2, 5, "--share must divide 16, a process' part of a batch of 32; got 5."),
        ({}, 1, 0, "--share must divide 32, a process' part of a batch of 32; got 0."),
        ({"model": "base", "dpo_model": "partner"}, 1, None, "is a ready one: there is nothing to train."),
    ],
)
def test_what_cannot_be_trained_is_refused(changes, processes, share, said):
    with pytest.raises(ValueError, match=said):
        launch.check(profile(**changes), processes, share)


def test_what_divides_is_not_refused():
    launch.check(profile(), 4, 2)


@pytest.mark.parametrize("rank, status, said", [("0", 2, True), ("1", 0, False)])
def test_one_process_says_what_is_wrong_for_all(rank, status, said, monkeypatch, capsys):
    """The others do not fail before it: the launcher would end it unheard."""
    monkeypatch.setenv("RANK", rank)
    monkeypatch.setattr(sys, "argv", ["launch", "--profile", "nowhere"])
    assert launch.main() == status
    assert ("Unknown profile 'nowhere'" in capsys.readouterr().err) == said


@pytest.mark.parametrize("name", ["DEEPSPEED", "FSDP", "MEGATRON_LM"])
def test_a_sharded_model_is_refused(name, monkeypatch):
    monkeypatch.setenv(f"ACCELERATE_USE_{name}", "true")
    with pytest.raises(ValueError, match="launch without DeepSpeed, FSDP or Megatron"):
        launch.join(profile())


def test_processes_on_another_device_than_the_profile_s_are_refused(monkeypatch):
    monkeypatch.setattr(PartialState, "__init__", lambda self, **_: vars(self).update(num_processes=2, device=DEVICE))
    with pytest.raises(ValueError, match="were launched on cuda, but the profile's device is 'cpu': set it to 'cuda'"):
        launch.join(profile())


DEVICE = torch.device("cuda", 1)


@pytest.mark.parametrize("share, remedy", [(16, "launch with --share 8"), (1, "take more memory, or a smaller model")])
def test_running_out_of_memory_is_said_with_its_remedy(share, remedy, monkeypatch, tmp_path):
    def out_of_memory(*_):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    monkeypatch.setattr(launch, "train", out_of_memory)
    with pytest.raises(MemoryError, match=f"with {share} pair.* in each process: {remedy}"):
        launch.Member(profile(), share).train(None, [], Recipe(), 0, tmp_path)
