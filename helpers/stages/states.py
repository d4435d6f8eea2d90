"""A model's states: at every site and position, and the one that the paper reads."""

from collections.abc import Sequence
from pathlib import Path

from helpers.lm import activations, architecture
from helpers.lm.activations import POSITIONS
from helpers.lm.architecture import FINAL
from helpers.lm.batches import Tokens
from helpers.stages.artifacts import stage
from helpers.stages.roles import Role


@stage
def states(folder: Path, role: Role, sequences: Sequence[Tokens], positions: Sequence[str] = POSITIONS) -> None:
    """Fill a folder with a file for each site and position, (N, d) float32 (`activations.stored` lists them)."""
    with role.opened() as model:
        sites = architecture.sites(model)
        activations.hidden_states(model, sequences, sites, positions, f"states, {role.name}", folder)


@stage
def final_states(folder: Path, role: Role, prompts: Sequence[list[int]]) -> None:
    """Fill a folder with the file of `final`, `prompt_last`: the paper's h."""
    ends = [Tokens(prompt, []) for prompt in prompts]
    with role.opened() as model:
        activations.hidden_states(model, ends, [FINAL], ["prompt_last"], f"final states, {role.name}", folder)
