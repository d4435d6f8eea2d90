"""What is studied: a base model, the preferences that it is taught, and the partner that they make of it.

The first three chapters of a study (study.py). A stage is computed once and kept; what it does stands in
helpers/stages/, a file each.
"""

from collections.abc import Callable, Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import Self

import numpy as np
import pandas as pd

from helpers import profiles
from helpers.data import tasks
from helpers.data.preferences import Drawn, PreferencePair
from helpers.lm import architecture, encoding
from helpers.lm.batches import Tokens
from helpers.lm.recipe import Recipe
from helpers.lm.training import TrainingPair
from helpers.profiles import Profile
from helpers.stages import artifacts, engines, examined, parallel, trials
from helpers.stages.artifacts import Artifact
from helpers.stages.encoded import encoded_pairs
from helpers.stages.keys import Fixed
from helpers.stages.loaded import OneModel, Placement
from helpers.stages.model_files import model_files
from helpers.stages.organism import organism
from helpers.stages.pairs import drawn_pairs
from helpers.stages.partner import partner, train_within_memory
from helpers.stages.reference import base_logps
from helpers.stages.trials import Trial
from helpers.world import atlas
from helpers.world.question import Question


class Subject:
    """A profile's base model, preferences and partner. `train` is what trains a partner (stages/partner.py)."""

    train = staticmethod(train_within_memory)

    def __init__(self, profile: Profile):
        self.profile = profile
        self.task = tasks.task(profile.data, profile.score, profile.seed, profile.sizes, profile.organism.places)
        self._encoded: dict[str, tuple[Sequence[Tokens], Sequence[Tokens]]] = {}
        self._prompts: dict[str, Sequence[list[int]]] = {}
        self._states: dict[str, dict[tuple[str, str, str], Path]] = {}
        self._final: dict[str, dict[tuple[str, str, str], Path]] = {}

    # --- 1. The base model ---

    @cached_property
    def source(self) -> Artifact:
        """Where the base model's files are: pretrained or converted here, a folder, or a hub id."""
        if self.profile.model != profiles.EMBEDDED:
            return model_files(self.profile.model, self.profile.wheel)
        return organism(self.profile.organism, self.profile.seed)

    @property
    def origin(self) -> str:
        """Where the base model's weights come from, in words."""
        model, files = self.profile.model, self.source
        if model == profiles.EMBEDDED:
            return "pretrained here"
        if files.path == Path(model):
            return f"the folder {files.path.name}" if files.path.is_dir() else files.key  # a hub id with its commit
        held = None if Path(model).is_file() else self.profile.wheel
        named = f"{Path(held.file).name} in the package {held.package} {held.version}" if held else Path(model).name
        return f"{named}: its weights, rounded as they are there, in float32"

    @cached_property
    def lm(self) -> OneModel:
        """The model in memory: its parts, its tokenizer, and the model as `base` or as `dpo`."""
        profile = self.profile
        placement = Placement(profile.dtype, profile.device, profile.quantize)
        return OneModel(self.source, placement, lambda: self.chosen.adapter)

    # --- 2. Its preferences ---

    @cached_property
    def _drawn(self) -> Drawn:
        return drawn_pairs(self.task, self.lm.role("base"))

    @property
    def pairs(self) -> dict[str, Sequence[PreferencePair]]:
        """The preference pairs of each split; no prompt is in two splits."""
        return self._drawn.pairs

    @property
    def account(self) -> dict[str, int]:
        """What became of each row that the pairs were drawn from; empty where they are written here."""
        return self._drawn.account

    def encoded(self, split: str) -> tuple[Sequence[Tokens], Sequence[Tokens]]:
        """The pairs of a split as token ids: with their chosen answers, with their rejected answers.

        Raises ValueError for an unknown split.
        """
        if split not in self.pairs:
            raise ValueError(f"There is no split {split!r}: choose from {', '.join(self.pairs)}.")
        if split not in self._encoded:
            self._encoded[split] = encoded_pairs(self.pairs[split], self.lm.role("base"))
        return self._encoded[split]

    def prompts(self, split: str) -> Sequence[list[int]]:
        """The prompts of a split as token ids."""
        if split not in self._prompts:
            self._prompts[split] = Fixed(tokens.prompt for tokens in self.encoded(split)[0])
        return self._prompts[split]

    def factors(self, split: str) -> np.ndarray:
        """What the prompts of a split share, a row a factor, (K, N) labels: what an interval over prompts resamples."""
        return np.array([self.task.levels(pair) for pair in self.pairs[split]]).T

    @property
    def varied(self) -> str:
        """What the rows of `factors` are, in words."""
        return " and ".join(self.task.factors)

    def before_value(self, question: Question) -> tuple[Tokens, str]:
        """A question with its plain answer up to the value's first telling word, as a prompt, and that word."""
        start, word = self.task.before_value(question)
        answers = (atlas.plain_answer(question), start)
        whole, part = (encoding.encode(self.lm.tokenizer, question.text, answer).ids for answer in answers)
        return Tokens(whole[: next(i for i, (a, b) in enumerate(zip(whole, part)) if a != b)]), word

    @cached_property
    def training_pairs(self) -> Sequence[TrainingPair]:
        """The held-in pairs that partners are trained on. What the base makes of them is computed once for them all."""
        encoded = self.encoded("heldin")
        return Fixed(map(TrainingPair, *encoded, base_logps(self.lm.role("base"), *encoded)))

    # --- 3. Its partner ---

    @property
    def trains(self) -> bool:
        """Whether the partner is trained here, and not a ready one."""
        return not self.profile.dpo_model

    @cached_property
    def trials(self) -> list[Trial]:
        """The recipes of the profile's grid, each judged on validation prompts; or the ready partner alone."""
        return [self._trial(recipe) for recipe in (self.profile.recipes if self.trains else [None])]

    @property
    def chosen(self) -> Trial:
        """Of the healthy trials the one that moves the behaviour most; if none is healthy, of the healthiest."""
        return trials.chosen(self.trials)

    def adapter(self, recipe: Recipe) -> Artifact:
        """The partner trained by a recipe."""
        return partner(self.lm.fresh(), self.training_pairs, recipe, self.profile.seed, self.train)

    def _trial(self, recipe: Recipe | None) -> Trial:
        ready = self.profile.dpo_model
        files = model_files(ready, None) if recipe is None else self.adapter(recipe)
        return Trial(recipe, files, partial(self._examined, files), self.profile.health)

    def _examined(self, files: Artifact) -> tuple[dict[str, float], pd.DataFrame]:
        base, sizes = self.lm.role("base"), self.profile.sizes
        return examined.examined(
            self.task, self.pairs["validation"], self.prompts("validation"), self.answers("base", "validation"),
            self.lm.both_with(files), base, sizes.new_tokens, self.profile.seed, sizes.draws, sizes.temperature,
        )  # fmt: skip

    @property
    def recipe(self) -> Recipe:
        """The chosen trial's recipe, for which nothing is trained where there is only one; beside a ready partner the
        profile's first, by which a vector is trained in its place."""
        is_given = len(self.profile.recipes) == 1 or not self.trains
        return self.profile.recipes[0] if is_given else self.chosen.recipe

    @property
    def caveat(self) -> str:
        """What a reader of any number about the partner has to know of it, as Markdown."""
        return trials.caveat(self.chosen, 0.0 if self.trains else self.lm.both.unembedding_moved)

    def variant(self, **changes) -> Self:
        """The same base and pairs with another partner, its recipe the chosen one with these fields changed.

        Raises ValueError for a field that a recipe does not have, and where the partner is a ready one.
        """
        unknown = sorted(changes.keys() - Recipe.model_fields.keys())
        if unknown:
            raise ValueError(f"A recipe has no {unknown[0]!r}; it has {', '.join(Recipe.model_fields)}.")
        if not self.trains:
            raise ValueError("This partner is a ready one, so none like it can be trained: leave DPO_MODEL= out.")
        recipe = self.recipe.replace(**changes)
        return self if recipe == self.recipe else type(self)(self.profile.trained_by(recipe))

    def about(self, data: str) -> Self:
        """The same base with a partner trained on other preferences (`Profile.data`), its recipe chosen for them."""
        return self if data == self.profile.data else type(self)(self.profile.replace(data=data))

    @cached_property
    def replicates(self) -> list[Self]:
        """This study and its chosen recipe trained with other seeds, `sizes.seeds` in all, ready to be compared.

        A ready partner is alone.
        """
        if not self.trains:
            return [self]
        studies = [self.variant(seed=self.recipe.seed + k) for k in range(self.profile.sizes.seeds)]
        compute(studies[1:], "other training seeds")
        return studies

    def has(self, stages: "Stages") -> bool:
        """Whether all that `stages(self)` asks for is in the cache."""
        try:
            with artifacts.nothing_made():
                stages(self)
        except artifacts.NotCached:
            return False
        return True


Stages = Callable[[Subject], object]  # asks a study for some of its stages, which are computed thereby


def compute(studies: Sequence[Subject], name: str, *stages: Stages) -> None:
    """Compute for each study what it lacks of each of some stages, by default of what partners are compared by
    (`measure`): in processes of their own where several models fit, else one after the other.

    Raises what `parallel.each` does, and FileNotFoundError where a cluster left nothing that this process finds.
    """
    stages = stages or (lambda study: study.measure(),)
    missing = [(study, asked) for study in studies for asked in stages if not study.has(asked)]
    # what takes long is not left to the end
    missing.sort(key=lambda found: found[0].has(lambda study: study.chosen.adapter))
    kinds = [(type(study), study.profile, asked) for study, asked in missing]
    if missing and _fits_beside(missing[0][0]):
        parallel.each(_ask, kinds, name)
        _check_found(missing, name)
    elif len(studies) == 1:  # its model may be in memory already
        for study, asked in missing:
            asked(study)
    else:  # one model in memory: a study of its own each, gone with its model when it is done
        for kind in kinds:
            _ask(kind)


def _check_found(asked: Sequence[tuple[Subject, Stages]], name: str) -> None:
    cluster = engines.cluster()
    lost = sum(not study.has(stages) for study, stages in asked) if cluster else 0
    if lost:
        raise FileNotFoundError(
            f"The workers of {cluster} are done with {name}, but {lost} of {len(asked)} are not found in "
            f"{artifacts.root()} here: give all machines the same code and packages, and mount that folder as "
            "docs/cluster.md says."
        )


def _fits_beside(subject: Subject) -> bool:
    """Whether several models like a study's fit beside each other; an organism need not be made to be measured."""
    return subject.profile.model == profiles.EMBEDDED or architecture.fits_beside_another(subject.lm.base)


def _ask(kind: tuple[type[Subject], Profile, Stages]) -> None:
    subject, profile, stages = kind
    stages(subject(profile))
