"""Training a profile's partners with several processes, a GPU each.

    accelerate launch --num_processes 2 -m tools.launch --profile P

The main process does what a notebook would, up to the profile's last seed. It alone takes the cache's locks for what is
made, saves and shows progress; the others wait, and take part in each training that it calls them to (data parallel,
through TRL and accelerate). What it leaves in the cache is found by every notebook, under the key that a single process
would have used; `helpers.lm.training.train` says in what such a partner differs from one process' own.

All processes read one cache: on several machines DSTEER_ARTIFACTS has to name a folder that they share.
"""

import argparse
import os
import sys
import traceback
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list, parse_flag_from_env
from accelerate.utils.memory import should_reduce_batch_size

from helpers import profiles
from helpers.lm import loading
from helpers.lm.recipe import Recipe
from helpers.lm.training import TrainingPair
from helpers.profiles import Profile
from helpers.stages import artifacts, parallel
from helpers.stages.artifacts import Artifact
from helpers.stages.partner import train, train_within_memory
from helpers.stages.roles import Fresh
from helpers.study import Study

# The others wait while the main process pretrains, samples and judges; a process that dies is noticed by the launcher.
PATIENCE = timedelta(days=7)


class Member(Study):
    """A study in one of several processes. In the main one, to train is to call the others to train too."""

    def __init__(self, profile: Profile, share: int | None = None):
        """share: how many pairs each process computes at a time; all of its part of a batch by default."""
        super().__init__(profile)
        self.share = share

    def train(self, base: Fresh, pairs: Sequence[TrainingPair], recipe: Recipe, seed: int, folder: Path) -> None:
        state = PartialState()
        if state.num_processes == 1 and self.share is None:
            train_within_memory(base, pairs, recipe, seed, folder)
            return
        if state.is_main_process:
            _tell((recipe, folder))
        part = recipe.batch_size // state.num_processes
        share = self.share or part
        try:
            train(base, pairs, recipe, seed, folder, share * state.num_processes)
        except RuntimeError as error:
            if not should_reduce_batch_size(error):
                raise
            smaller = [size for size in range(1, share) if part % size == 0]
            remedy = f"launch with --share {smaller[-1]}" if smaller else "take more memory, or a smaller model"
            raise MemoryError(
                f"Training runs out of memory with {share} pair(s) at a time in each process: {remedy}."
            ) from error


def lead(study: Study) -> None:
    """Make the profile's own partners: `Study.chosen` and its other seeds. Controls are trained by the notebooks."""
    if not study.has(lambda study: study.source):
        parallel.each(_make_source, [study.profile], "the base model")
    recipe = study.chosen.recipe
    for k in range(study.profile.sizes.seeds):
        study.adapter(recipe.replace(seed=recipe.seed + k))


def _make_source(profile: Profile) -> Artifact:
    """Pretrain the base in a worker that knows of no other processes: transformers would wait for them to take part."""
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"):
        os.environ.pop(name, None)
    return Study(profile).source


def follow(study: Member) -> None:
    """Take part in each training that the main process calls to, until it says that there is no more."""
    with artifacts.nothing_made():
        while (called := _tell(None)) is not None:
            recipe, folder = called
            study.train(study.lm.fresh(), study.training_pairs, recipe, study.profile.seed, folder)


def _tell(message: tuple[Recipe, Path] | None) -> tuple[Recipe, Path] | None:
    """What the main process has to say, which it gives and the others return."""
    return broadcast_object_list([message])[0]


def check(profile: Profile, processes: int, share: int | None) -> None:
    """Raise ValueError, in one sentence, for what cannot be trained by so many processes."""
    if profile.dpo_model:
        raise ValueError(f"The partner of profile {profile.name!r} is a ready one: there is nothing to train.")
    batch_size = profile.recipe.batch_size
    if batch_size % processes:
        raise ValueError(
            f"A recipe's batch of {batch_size} pairs cannot be shared equally by {processes} processes: launch a "
            "number of processes that divides it, or change batch_size in the profile."
        )
    part = batch_size // processes
    if share is not None and (share < 1 or part % share):
        raise ValueError(f"--share must divide {part}, a process' part of a batch of {batch_size}; got {share}.")


def join(profile: Profile) -> PartialState:
    """Join the other processes on the profile's device, a GPU each where it is cuda.
    Raises ValueError for a launcher's setup that is not data parallel, or not on that device."""
    if any(parse_flag_from_env(f"ACCELERATE_USE_{name}") for name in ("DEEPSPEED", "FSDP", "MEGATRON_LM")):
        raise ValueError("Each process trains a whole copy of the model: launch without DeepSpeed, FSDP or Megatron.")
    # the profile's dtype and device decide how it is trained, not what the launcher was once configured to
    for name in ("ACCELERATE_MIXED_PRECISION", "ACCELERATE_USE_CPU"):
        os.environ.pop(name, None)
    device = loading.resolved_device(profile.device)
    state = PartialState(cpu=device == "cpu", timeout=PATIENCE)
    if state.num_processes > 1 and state.device.type != device:
        raise ValueError(
            f"The processes were launched on {state.device.type}, but the profile's device is {device!r}: set it to "
            f"{state.device.type!r} in the profile, or launch one process."
        )
    return state


def _reason(error: Exception) -> str:
    """What a reader can act on: a sentence of ours as it is, anything unforeseen with its traceback."""
    if isinstance(error, torch.distributed.DistError) or "Connection closed by peer" in str(error):
        return "another one did."
    if isinstance(error, ValueError | MemoryError | OSError | artifacts.NotCached):
        return str(error)
    return "".join(traceback.format_exception(error))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--profile", default="atlas")
    parser.add_argument("--model", default="", help="replaces the profile's model: a hub id, a folder or a .gguf file")
    parser.add_argument("--data", default="", help="replaces the profile's preference data")
    parser.add_argument("--share", type=int, help="pairs that each process computes at a time, when memory is short")
    given = parser.parse_args()
    try:
        profile = profiles.load(given.profile, given.model, given.data)
        state = join(profile)
        check(profile, state.num_processes, given.share)
    except (ValueError, FileNotFoundError) as error:  # alike in every process, so one says it, and fails
        if int(os.environ.get("RANK", 0)):
            return 0
        print(error, file=sys.stderr)
        return 2
    try:
        study = Member(profile, given.share)
        if state.is_main_process:
            print(f"Training with {state.num_processes} process(es) on {state.device.type}.", file=sys.stderr)
            lead(study)
            _tell(None)
        else:
            follow(study)
    except Exception as error:  # the launcher ends the other processes when one returns this
        print(f"Process {state.process_index} stopped: {_reason(error)}", file=sys.stderr)
        return 1
    state.destroy_process_group()
    return 0


if __name__ == "__main__":
    sys.exit(main())
