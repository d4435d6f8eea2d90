"""How a partner is trained, as data."""

from typing import Literal

from pydantic import Field

from helpers.settings import Settings

OBJECTIVES = ("dpo", "sft")
LABELS = ("true", "shuffled", "reversed")


class Recipe(Settings):
    """How a partner is trained (TRL's DPOTrainer, a PEFT LoRA adapter on every linear layer of the blocks).

    objective: "dpo", or "sft", the control that keeps the same batches and steps and drops the sigmoid term.
    labels: which answer of a pair counts as chosen: the "true" one or, as controls, either at random ("shuffled") or
    the other one ("reversed").
    """

    beta: float = Field(1.0, ge=0)  # the paper's
    learning_rate: float = Field(5e-4, ge=0)
    epochs: int = Field(2, ge=1)
    batch_size: int = Field(32, ge=1)
    rank: int = Field(8, ge=0)  # of the adapter; 0 trains all weights of the blocks instead
    nll_weight: float = Field(0.0, ge=0)  # weight of an added NLL term on the chosen answers; 0 is plain sigmoid DPO
    objective: Literal[OBJECTIVES] = "dpo"
    labels: Literal[LABELS] = "true"
    seed: int = Field(0, ge=0)  # of the order of the pairs and the adapter's first weights, added to the profile's
