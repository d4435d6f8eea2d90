"""A profile says what to study: the model, its preference data, the DPO recipe and how much to measure.

A profile is data, a TOML file: the built-in ones are those in profiles/, and any other may extend one of them. Nothing
in it can execute.
"""

import hashlib
import json
import re
import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import Field, field_validator, model_validator

from helpers.data import catalogue, naming
from helpers.data.sizes import Sizes
from helpers.lm.recipe import STOPS, Grid, Recipe
from helpers.lm.wheel import Wheel
from helpers.places import PROJECT
from helpers.settings import Settings
from helpers.stages.health import Health
from helpers.world.organism import Organism

FOLDER = PROJECT / "profiles"
BUILT_IN = tuple(sorted(path.stem for path in FOLDER.glob("*.toml")))
_NAMES = Annotated[tuple[str, ...], Field(strict=False)]
_MATCHED = ("SFT", "shuffled", "reversed")
EMBEDDED = "atlas"  # the `model` that is trained here rather than loaded


class Extent(Settings):
    """How much is measured beside the headline numbers, which takes most of the time that a large model needs.

    random, differences, signs: how many random directions, differences of base states and means of randomly signed
    displacements stand beside v*. sites: those at which v* is tried; every site where none is named. spans: over which
    it is added there. draws: of each prompt there. partners, stops: the controls that are trained, and the shares of a
    run at which partners are compared. seeds: of each control, at most as many as of the partner. ranks: of adapters
    that are trained beside the recipe's. every: partners at stops are measured on every so many-th held-out prompt.
    alone: whether other preferences on the same base are left out, rather than compared with the profile's own.
    """

    random: int = Field(20, ge=5)
    differences: int = Field(10, ge=1)
    signs: int = Field(4, ge=1)
    sites: _NAMES = ()
    spans: Annotated[tuple[Literal["response", "prompt", "all"], ...], Field(strict=False)] = ("response", "all")
    draws: int = Field(4, ge=1)
    partners: _NAMES = (*_MATCHED, "mixture")
    stops: Annotated[tuple[float, ...], Field(strict=False)] = STOPS
    seeds: int = Field(3, ge=1)
    every: int = Field(2, ge=1)
    ranks: Annotated[tuple[int, ...], Field(strict=False)] = (1, 32)
    alone: bool = False

    @field_validator("partners")
    @classmethod
    def _controls_are_there(cls, partners: tuple[str, ...]) -> tuple[str, ...]:
        if not set(_MATCHED) <= set(partners) <= {*_MATCHED, "mixture"}:
            raise ValueError(
                f"extent.partners must be {', '.join(_MATCHED)}, beside which DPO is measured, and mixture where it is "
                f"wanted; got {', '.join(partners)}."
            )
        return partners


class Profile(Settings):
    """One study. `model` and `data` are the embedded ones, a Hugging Face hub id (`@revision` allowed) or a local path.

    model: a GGUF file too. wheel: where its weights are on the package index, for want of a hub.
    dpo_model: a ready partner of `model`, a whole model or a PEFT adapter; nothing is trained then.
    data: "atlas:<family>" (the organism's preference families), "atlas:<family>+<family>" (a mixture of them in equal
    shares), "onpolicy:vader" (story continuations sampled from the model itself, the happiest and the saddest by VADER
    as chosen and rejected), "onpolicy:vader-conditional" (the saddest preferred for half of the heroes), the file or
    hub id of pairs (helpers/data/sources.py), "onpolicy:<file or hub id>": its prompts, answered by the model, or
    "prompts:<file or hub id>": its prompts alone, on which a ready partner is looked at.
    score: what judges answers where pairs come from elsewhere; on-policy pairs are its best and worst.
    device: "auto" is the first of cuda, mps and cpu that there is, "spread" accelerate's device map, for a model larger
    than one GPU. quantize: "4bit" is bitsandbytes'.
    recipe, grid: every recipe of the grid is tried on validation prompts; of those that keep what `health` asks for,
    the one that moves the behaviour most is taken.
    doses: sorted.
    """

    name: str
    model: str = EMBEDDED
    wheel: Wheel | None = None
    dpo_model: str = ""
    data: str = "atlas:tone"
    score: Literal[catalogue.SCORES] = "closer"
    seed: int = Field(0, ge=0)
    dtype: Literal["float32", "bfloat16", "float16", "float64"] = "float32"
    device: Literal["cpu", "cuda", "mps", "auto", "spread"] = "cpu"
    quantize: Literal["", "4bit"] = ""
    organism: Organism = Organism()
    recipe: Recipe = Recipe()
    grid: Grid = Grid(learning_rate=(5e-4, 1e-3), stop=(0.25, 0.5, 0.75, 1.0))
    health: Health = Health()
    sizes: Sizes = Sizes()
    extent: Extent = Extent()
    worlds: int = Field(8, ge=2)  # organisms that `make worlds` pretrains
    doses: Annotated[tuple[float, ...], Field(strict=False)] = (
        -3.0, -2.0, -1.5, -1.0, -0.75, -0.5, -0.25, 0.0, 0.25, 0.5, 0.75, 1.0, 1.5, 2.0, 3.0,
    )  # fmt: skip

    @field_validator("name")
    @classmethod
    def _can_name_a_folder(cls, name: str) -> str:
        if not re.fullmatch(r"\w[\w.-]*", name):
            raise ValueError(
                f"profile.name must be letters, digits, -, _ and ., since a folder bears it; got {name!r}."
            )
        return name

    @field_validator("data")
    @classmethod
    def _exists(cls, data: str) -> str:
        if source := naming.split_prefix(data)[1]:
            naming.refuse_folder(source)
        if not catalogue.is_known(data):
            raise ValueError(
                f"profile.data: unknown data {data!r}; there are {', '.join(catalogue.DATA)}, mixtures of different "
                f"families such as atlas:tone+refusal, files of pairs ({', '.join(naming.SUFFIXES)}, each .gz too) and "
                "hub ids."
            )
        return data

    @field_validator("doses")
    @classmethod
    def _with_both_ends(cls, doses: tuple[float, ...]) -> tuple[float, ...]:
        if not {0.0, 1.0} <= set(doses):
            raise ValueError(f"profile.doses must contain 0 and 1, the base and one whole v*; got {list(doses)}.")
        return tuple(sorted(doses))

    @model_validator(mode="after")
    def _partners_are_compared_where_one_is_taken(self) -> Self:
        unknown, missing = set(self.extent.stops) - set(STOPS), {1.0, *self.grid.stop} - set(self.extent.stops)
        if unknown or missing:
            raise ValueError(
                f"extent.stops must be among {', '.join(map(str, STOPS))} and name 1.0 and every stop of the grid; got "
                f"{', '.join(map(str, self.extent.stops))} beside grid.stop = {list(self.grid.stop)}."
            )
        return self

    @model_validator(mode="after")
    def _partner_has_a_base(self) -> Self:
        if self.dpo_model and self.model == EMBEDDED:
            raise ValueError(
                f"profile.dpo_model: the ready partner {self.dpo_model!r} needs the base that it was trained from: "
                "give MODEL= too."
            )
        return self

    @model_validator(mode="after")
    def _prompts_alone_train_nothing(self) -> Self:
        if self.data.startswith(naming.PROMPTS) and not self.dpo_model:
            raise ValueError(
                f"profile.data: {self.data!r} say nothing of what is preferred: give a ready partner of the model with "
                "DPO_MODEL= too, or pairs with DATA=."
            )
        return self

    @property
    def recipes(self) -> tuple[Recipe, ...]:
        """What is tried."""
        return self.grid.recipes(self.recipe)

    @property
    def families(self) -> dict[str, str]:
        """{name: data} of the families on one base that are compared, the constant ones first, or the profile's own
        alone (`Extent.alone`)."""
        every = catalogue.families_beside(self.data, bool(self.dpo_model))
        own = {name: data for name, data in every.items() if data == self.data}
        return (own or {self.data.split(":")[-1]: self.data}) if self.extent.alone else every

    def trained_by(self, recipe: Recipe) -> Self:
        """The same with one recipe, untried."""
        return self.replace(recipe=recipe, grid=Grid())

    @property
    def hash(self) -> str:
        """Sixteen hexadecimal digits that tell this study from any other."""
        return hashlib.sha256(json.dumps(self.model_dump(), sort_keys=True).encode()).hexdigest()[:16]


def load(name_or_path: str, model: str | None = None, data: str | None = None, dpo_model: str | None = None) -> Profile:
    """Return a built-in profile by name or one from a TOML file, its model, data and partner replaced where given.

    A model given without a partner takes the profile's own partner away: it is another model's.

    A TOML file holds the fields of Profile, tables for its parts and `extends = "<built-in name>"`; what it leaves out
    is as there, or Profile's default. Raises ValueError or FileNotFoundError with one sentence that names what is wrong
    and what would be right.
    """
    if not name_or_path.endswith(".toml") and name_or_path not in BUILT_IN:
        raise ValueError(
            f"Unknown profile {name_or_path!r}: give one of {', '.join(BUILT_IN)}, or the path of a .toml file."
        )
    profile = _read(FOLDER / f"{name_or_path}.toml" if name_or_path in BUILT_IN else Path(name_or_path))
    named = {"model": model, "data": data, "dpo_model": dpo_model}
    given = {name: resolved(value) for name, value in named.items() if value}
    return profile.replace(**({"dpo_model": "", "wheel": None} if model else {}) | given) if given else profile


def resolved(given: str, folder: Path = Path()) -> str:
    """A path that exists in a folder, made absolute, since notebooks run in a folder of their own; anything else as it
    is. The file after `onpolicy:` or `prompts:` too."""
    head, path = naming.split_prefix(given)
    at = folder / Path(path).expanduser()
    return f"{head}{at.resolve()}" if path and at.exists() else given


def _read(path: Path, others: Sequence[str] = BUILT_IN) -> Profile:
    """The profile in a TOML file, which may extend one of `others` but itself."""
    table = {"name": path.stem} | _table(path)
    others = [name for name in others if path.resolve() != FOLDER / f"{name}.toml"]
    if table["name"] in others:
        raise ValueError(f"{path}: {table['name']!r} is a built-in profile, whose figures it would replace: rename it.")
    parent = table.pop("extends", None)
    if parent is not None and parent not in others:
        raise ValueError(f"{path}: extends = {parent!r} is not a built-in profile ({', '.join(others)}).")
    base = Profile(name=EMBEDDED) if parent is None else _read(FOLDER / f"{parent}.toml", others)
    if "model" in table:
        table = {"dpo_model": "", "wheel": None} | table  # the parent's are another model's
    for name in ("model", "dpo_model", "data"):
        if isinstance(table.get(name), str):
            table[name] = resolved(table[name], path.parent)
    for name, part in base:
        if isinstance(part, Settings) and isinstance(table.get(name), dict):
            table[name] = dict(part) | table[name]
    try:
        return base.replace(**table)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def _table(path: Path) -> dict:
    if not path.is_file():
        raise FileNotFoundError(f"The profile file {path} does not exist: give its path from the project's folder.")
    try:
        return tomllib.loads(path.read_text(encoding="utf-8-sig"))  # some editors begin it with a byte-order mark
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"The profile file {path} is not valid TOML: {error}.") from error
