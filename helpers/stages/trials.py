"""A partner that was tried: its weights, its training log, its health."""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import pandas as pd

from helpers.lm.recipe import Recipe, step_of
from helpers.stages import examined
from helpers.stages.artifacts import Artifact
from helpers.stages.health import Health


@dataclass(frozen=True)
class Trial:
    """recipe: None of a ready partner, which has no log either. examine: what `examined` finds, when it is needed."""

    recipe: Recipe | None
    adapter: Artifact
    examine: Callable[[], tuple[dict[str, float], pd.DataFrame]]
    criteria: Health

    @property
    def log(self) -> pd.DataFrame | None:
        """A row a training step."""
        if self.recipe is None:
            return None
        whole = pd.read_csv(self._run / "log.csv")
        return whole.head(step_of(self.recipe.stop, len(whole)))

    @property
    def _run(self) -> Path:
        return self.adapter.path if self.recipe.stop == 1 else self.adapter.path.parent

    @property
    def loss_terms(self) -> dict[str, float]:
        """The mean loss of its last ten training steps, and its sigmoid term at their mean margins, nats."""
        last = self.log.tail(10)
        return {"loss": last["loss"].mean(), "its sigmoid term": np.logaddexp(0, -last["rewards/margins"]).mean()}

    @property
    def processes(self) -> int:
        """How many processes trained it together."""
        parts = self._run / "parts.json"
        return json.loads(parts.read_text())["processes"] if parts.exists() else 1

    @cached_property
    def _examined(self) -> tuple[dict[str, float], pd.DataFrame]:
        return self.examine()

    @property
    def measured(self) -> dict[str, float]:
        """What the health criteria and the choice are about."""
        return self._examined[0]

    @property
    def answers(self) -> pd.DataFrame:
        """Its sampled and judged answers to the validation prompts."""
        return self._examined[1]

    @property
    def failed(self) -> list[str]:
        """The health criteria that it does not meet."""
        return examined.failed_criteria(self.measured, self.criteria)


def chosen(trials: Sequence[Trial]) -> Trial:
    """Of the healthy trials the one that moves the behaviour most; if none is healthy, of those that fail the fewest
    criteria. A single one is not examined."""
    if len(trials) == 1:
        return trials[0]
    return max(trials, key=lambda trial: (-len(trial.failed), trial.measured["preferred"]))


def caveat(trial: Trial, unembedding_moved: float) -> str:
    """What a reader of any number about a partner has to know of it, as Markdown.

    unembedding_moved: by what share of its norm a ready partner's unembedding differs from the base's.
    """
    text = f"**The DPO partner**{_origin(trial)}"
    if unembedding_moved:
        text += (
            f". Its unembedding differs from the base's by {unembedding_moved:.1%} of its norm: base + v* at `final` "
            "is read through the base's, so that part of DPO is in no v*"
        )
    return text + (
        f". It **fails** {', '.join(trial.failed)} on validation prompts." if trial.failed else _healthy(trial)
    )


def _healthy(trial: Trial) -> str:
    """That it is healthy, and by what, where perplexity alone can tell."""
    if trial.measured.keys() - {"preferred"} == {"perplexity_ratio"}:
        ratio = trial.measured["perplexity_ratio"]
        return f". It is healthy, as far as perplexity tells ({ratio:.2f} times the base's; no rule knows facts here)."
    return ". It is healthy."


def _origin(trial: Trial) -> str:
    """How a partner was trained, as far as it is known."""
    recipe = trial.recipe
    if recipe is None:
        return (
            " is a ready one; how it was trained is not known here, nor whether on these very prompts: *held-out* says "
            "that v* was estimated on others"
        )
    text = f": sigmoid DPO, β = {recipe.beta:g}, learning rate {recipe.learning_rate:g}"
    text += f", stopped after {recipe.stop:g} of its run" if recipe.stop < 1 else ""
    if trial.processes > 1:  # one process would have rounded otherwise
        text += f", trained by {trial.processes} processes together"
    if recipe.nll_weight:
        terms = trial.loss_terms
        text += (
            f", plus {recipe.nll_weight:g} × the negative log-likelihood of the chosen answers. Over the last ten "
            f"steps the loss is {terms['loss']:.2f}; the sigmoid term at their mean margins is "
            f"{terms['its sigmoid term']:.2f} nats of it. What follows is about this mixture; among the controls are "
            "partners trained on either term alone"
        )
    return text
