"""A study: one profile's stages, from the base model to steered answers, each computed once and cached.

Notebooks ask a study for a stage and get it at once, or after it has been computed, whichever notebook is opened first.
One model is in memory: the base, or the pair that contains it (the adapter off or on).
"""

import hashlib
import json
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict, dataclass, replace
from functools import cached_property, partial
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from helpers import (
    activations,
    artifacts,
    atlas,
    bipo,
    encoding,
    generation,
    geval,
    gradients,
    judges,
    lowrank,
    metrics,
    models,
    parallel,
    preferences,
    pretraining,
    profiles,
    sources,
    spectra,
    steering,
    training,
)
from helpers.activations import Tokens
from helpers.artifacts import Artifact
from helpers.models import FINAL, Pair
from helpers.preferences import Example
from helpers.profiles import Health, Profile, Recipe
from helpers.steering import SteeringVector
from helpers.training import PreferencePair

# PEFT 0.21.2 asks transformers 5.23.0 by an old name; nothing that a reader of a notebook could mend.
warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing. is deprecated", category=FutureWarning)
# Nor could they of PEFT's setting itself what GPT-2's transposed layers need.
warnings.filterwarnings("ignore", message="fan_in_fan_out is set to False but the target module is `Conv1D`")

# The notebook that shows each stage; the Makefile's edges follow from it (tests/test_makefile.py).
SHOWN_IN = {
    "base": "00_model_organism",
    "in_float64": "01_derivation_check",
    "examples": "00_model_organism",
    "encoded": "00_model_organism",
    "account": "00_model_organism",
    "trials": "02_dpo_lora",
    "reward_margins": "02_dpo_lora",
    "token_vector": "02_dpo_lora",
    "chosen": "02_dpo_lora",
    "recipe": "02_dpo_lora",
    "pair": "02_dpo_lora",
    "partner": "02_dpo_lora",
    "replicates": "02_dpo_lora",
    "states": "02_dpo_lora",
    "displacements": "02_dpo_lora",
    "outcome": "02_dpo_lora",
    "vector": "03_steering_vector",
    "direction": "03_steering_vector",
    "templates": "00_model_organism",
    "sweep": "04_add_subtract",
    "losses": "04_add_subtract",
    "truthfulness": "04_add_subtract",
    "log_ratios": "04_add_subtract",
    "divergences": "04_add_subtract",
    "token_vectors": "06_controls",
    "variant": "06_controls",
    "prompted": "06_controls",
    "optimised_vector": "06_controls",
    "beliefs": "06_controls",
    "about": "07_when_is_dpo_steering",
    "validated_sites": "07_when_is_dpo_steering",
    "best_site": "07_when_is_dpo_steering",
    "by_rank": "07_when_is_dpo_steering",
    "divergence_by_rank": "07_when_is_dpo_steering",
}


def load(profile: str, model: str | None = None, data: str | None = None, dpo_model: str | None = None) -> "Study":
    """The study of a profile (a built-in name or a .toml path), its model, data and partner replaced where given."""
    return Study(profiles.load(profile, model, data, dpo_model))


@dataclass(frozen=True)
class Trial:
    """One DPO partner tried: its weights, its training log (a row a step) and its health on validation prompts.

    recipe: None of a ready partner, which has no log either.
    """

    recipe: Recipe | None
    adapter: Artifact
    examine: Callable[[], Artifact]
    criteria: Health

    @property
    def log(self) -> pd.DataFrame | None:
        if self.recipe is None:
            return None
        return pd.read_csv(self.adapter.path / "log.csv")

    @property
    def processes(self) -> int:
        """How many processes trained it together."""
        parts = self.adapter.path / "parts.json"
        return json.loads(parts.read_text())["processes"] if parts.exists() else 1

    @cached_property
    def _examined(self) -> Artifact:
        return self.examine()

    @property
    def measured(self) -> dict[str, float]:
        return self._examined.read_json("health.json")

    @property
    def answers(self) -> pd.DataFrame:
        """Its sampled and judged answers to the validation prompts."""
        return pd.DataFrame(self._examined.read_json("answers.json"))

    @property
    def failed(self) -> list[str]:
        """The health criteria that it does not meet."""
        return failed_criteria(self.measured, self.criteria)


def prepare(studies: Sequence["Study"], name: str, stages: "Stages | None" = None) -> None:
    """Compute for each study what it lacks of some stages, by default of what partners are compared by."""
    stages = stages or Study.compare
    missing = [study for study in studies if not study.has(stages)]
    if not missing:
        return
    missing.sort(key=lambda study: study.has(lambda of: of.chosen.adapter))  # what takes long is not left to the end
    if parallel.is_small(missing[0].base):
        parallel.each(partial(_compute, stages), [study.profile for study in missing], name)
    else:  # one model in memory: a study of its own each, gone with its model when it is done
        for study in missing:
            _compute(stages, study.profile)


def _compute(stages: "Stages", profile: Profile) -> None:
    stages(Study(profile))


class Study:
    """The stages of one profile. Every method returns the same values in every session on one machine."""

    def __init__(self, profile: Profile):
        self.profile = profile
        self.task = preferences.task(profile)
        self._encoded: dict[str, tuple[list[Tokens], list[Tokens]]] = {}
        self._stored_states: dict[tuple[str, str], Artifact] = {}

    # --- The base model and its preference data ---

    @cached_property
    def source(self) -> Artifact:
        """Where the base model comes from: pretrained here, a folder, or a hub id."""
        if self.profile.model != profiles.EMBEDDED:
            return Artifact(Path(self.profile.model), models.identity(self.profile.model))
        spec, seed = self.profile.organism, self.profile.seed
        return artifacts.fetch(
            "organism",
            {"spec": asdict(spec), "seed": seed},
            lambda folder: pretraining.pretrain(spec, seed, folder),
            code=[atlas, pretraining],
        )

    @cached_property
    def _loaded_base(self) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
        return models.load(self.source.path, *self._placed)

    @property
    def _placed(self) -> tuple[str, str, str]:
        """In what precision, where and how compressed models are loaded."""
        return self.profile.dtype, self.profile.device, self.profile.quantize

    @property
    def base(self) -> PreTrainedModel:
        """The base model, alone."""
        return self._loaded_base[0]

    def in_float64(self) -> PreTrainedModel:
        """The base model loaded anew in float64, for what is exact: beside the profile's device where that has no
        float64."""
        device = models.resolved_device(self.profile.device)
        return models.load(self.source.path, "float64", "cpu" if device == "mps" else device)[0]

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        return self._loaded_base[1]

    @cached_property
    def ends(self) -> list[int]:
        """The tokens that end an answer."""
        return encoding.ends(self.tokenizer)

    @cached_property
    def _examples(self) -> Artifact:
        def write(folder: Path) -> None:
            found = self.task.draw(self.base, self.tokenizer)
            rows = {split: [asdict(example) for example in examples] for split, examples in found.examples.items()}
            (folder / "examples.json").write_text(json.dumps(rows))
            (folder / "account.json").write_text(json.dumps(found.account))

        # precision and device decide what is sampled, and every later stage, all of which are made from these
        dtype, device, quantize = self._placed
        placed = {"dtype": dtype, "device": models.resolved_device(device), "quantize": quantize}
        params = {"data": self.profile.data, "seed": self.profile.seed, "sizes": asdict(self.profile.sizes), **placed}
        code = [atlas, preferences, encoding, generation]
        source = profiles.source_of(self.profile.data)
        if source is not None:
            params |= {"data": sources.identity(source), "score": self.profile.score}
            params |= {
                "on-policy": self.profile.data.startswith("onpolicy:"),
                "judge": judges.identity(self.profile.score),
            }
            code += [sources, judges, geval, metrics]
        return artifacts.fetch("examples", params, write, [self.source], code)

    @cached_property
    def examples(self) -> dict[str, list[Example]]:
        """The preference pairs of each split; no prompt is in two splits."""
        rows = self._examples.read_json("examples.json")
        return {split: [preferences.example_from(row) for row in rows[split]] for split in preferences.SPLITS}

    @property
    def account(self) -> dict[str, int]:
        """What became of each row that the pairs were drawn from; empty where they are written here."""
        return self._examples.read_json("account.json")

    def encoded(self, split: str) -> tuple[list[Tokens], list[Tokens]]:
        """The pairs of a split as token ids: with their chosen answers, with their rejected answers.

        Raises ValueError for an unknown split.
        """
        if split not in preferences.SPLITS:
            raise ValueError(f"There is no split {split!r}: choose from {', '.join(preferences.SPLITS)}.")

        def write(folder: Path) -> None:
            pairs = preferences.encode_pairs(self.tokenizer, self.examples[split])
            (folder / "pairs.json").write_text(json.dumps(pairs))

        if split not in self._encoded:
            upstream, code = [self.source, self._examples], [encoding, preferences.encode_pairs]
            made = artifacts.fetch("encoded", {"split": split}, write, upstream, code)
            chosen, rejected = ([Tokens(*ids) for ids in answers] for answers in made.read_json("pairs.json"))
            self._encoded[split] = chosen, rejected
        return self._encoded[split]

    def templates(self, split: str) -> np.ndarray:
        """The wording that each prompt of a split shares with others, (N,): what an interval over prompts resamples."""
        return np.array([self.task.template(example) for example in self.examples[split]])

    # --- The DPO partner ---

    @property
    def trains(self) -> bool:
        """Whether the partner is trained here, and not a ready one."""
        return not self.profile.dpo_model

    @cached_property
    def trials(self) -> list[Trial]:
        """The profile's recipes in order, up to the first healthy one, each judged on validation prompts; or the ready
        partner alone."""
        if not self.trains:
            return [self._trial(None)]
        tried = []
        for recipe in self.profile.recipes:
            tried.append(self._trial(recipe))
            if len(self.profile.recipes) > 1 and not tried[-1].failed:
                break
        return tried

    @property
    def chosen(self) -> Trial:
        """The first healthy trial; if none is healthy, the one that fails the fewest criteria."""
        return self.trials[0] if len(self.trials) == 1 else min(self.trials, key=lambda trial: len(trial.failed))

    @property
    def recipe(self) -> Recipe:
        """The chosen trial's recipe, for which nothing is trained where there is only one; beside a ready partner the
        profile's first, by which a vector is trained in its place."""
        is_given = len(self.profile.recipes) == 1 or not self.trains
        return self.profile.recipes[0] if is_given else self.chosen.recipe

    @property
    def partner(self) -> str:
        """What a reader of any number about the DPO partner has to know of it, as Markdown."""
        failed = self.chosen.failed
        text = f"**The DPO partner**{self._origin(self.chosen)}"
        if not self.trains and (moved := self.pair.unembedding_moved):
            text += (
                f". Its unembedding differs from the base's by {moved:.1%} of its norm: base + v* at `final` is read "
                "through the base's, so that part of DPO is in no v*"
            )
        return text + (f". It **fails** {', '.join(failed)} on validation prompts." if failed else ". It is healthy.")

    @staticmethod
    def _origin(trial: Trial) -> str:
        """How a partner was trained, as far as it is known."""
        recipe = trial.recipe
        if recipe is None:
            return (
                " is a ready one; how it was trained is not known here, nor whether on these very prompts: *held-out* "
                "says that v* was estimated on others"
            )
        text = f": sigmoid DPO, β = {recipe.beta:g}"
        if trial.processes > 1:  # one process would have rounded otherwise
            text += f", trained by {trial.processes} processes together"
        if recipe.nll_weight:
            last = trial.log.tail(10)
            loss, margins = last["loss"].mean(), last["rewards/margins"]
            text += (
                f", plus {recipe.nll_weight:g} × the negative log-likelihood of the chosen answers. Over the last ten "
                f"steps the loss is {loss:.2f}; the sigmoid term at their mean margins is "
                f"{np.logaddexp(0, -margins).mean():.2f} nats of it. What follows is about this mixture; "
                "notebook 06 trains on either term alone"
            )
        return text

    def variant(self, **changes) -> "Study":
        """The same base and pairs with another partner, its recipe the chosen one with these fields changed.

        Raises ValueError for a field that a recipe does not have, and where the partner is a ready one.
        """
        unknown = sorted(changes.keys() - asdict(self.recipe).keys())
        if unknown:
            raise ValueError(f"A recipe has no {unknown[0]!r}; it has {', '.join(asdict(self.recipe))}.")
        if not self.trains:
            raise ValueError("This partner is a ready one, so none like it can be trained: leave DPO_MODEL= out.")
        recipe = replace(self.recipe, **changes)
        return self if recipe == self.recipe else Study(replace(self.profile, recipes=(recipe,)))

    @cached_property
    def replicates(self) -> list["Study"]:
        """This study and its chosen recipe trained with other seeds, `sizes.seeds` in all, ready to be compared.

        A ready partner is alone.
        """
        if not self.trains:
            return [self]
        studies = [self.variant(seed=self.recipe.seed + k) for k in range(self.profile.sizes.seeds)]
        prepare(studies[1:], "other training seeds")
        return studies

    def about(self, data: str) -> "Study":
        """The same base with a partner trained by the chosen recipe on other preferences (`Profile.data`)."""
        return self if data == self.profile.data else Study(replace(self.profile, data=data, recipes=(self.recipe,)))

    def compare(self) -> None:
        """Compute all that partners of one base are compared by: states, and answers with and without v*."""
        for split in ("heldin", "heldout"):
            self.states(split)
        for role in models.ROLES:
            self.answers(role, "heldout")
            self.steered(role)

    def has(self, stages: "Stages") -> bool:
        """Whether all that `stages(self)` asks for is in the cache."""
        try:
            with artifacts.nothing_made():
                stages(self)
        except artifacts.NotCached:
            return False
        return True

    @cached_property
    def _base_logps(self) -> Artifact:
        def write(folder: Path) -> None:
            with self.playing("base") as model:
                pairs = training.pairs_of(model, *self.encoded("heldin"))
            (folder / "base_logps.json").write_text(json.dumps([pair.base_logps for pair in pairs]))

        code = [activations, metrics, training.pairs_of]
        return artifacts.fetch("base_logps", {}, write, [self.source, self._examples], code)

    @property
    def pairs(self) -> list[PreferencePair]:
        """The held-in pairs that partners are trained on. What the base makes of them is computed once for them all."""
        logps = map(tuple, self._base_logps.read_json("base_logps.json"))
        return list(map(PreferencePair, *self.encoded("heldin"), logps))

    @property
    def ready(self) -> Artifact:
        """The ready partner."""
        partner = self.profile.dpo_model
        return Artifact(Path(partner), models.identity(partner))

    def adapter(self, recipe: Recipe) -> Artifact:
        """The partner trained by a recipe."""
        params = {"recipe": asdict(recipe), "seed": self.profile.seed}
        upstream = [self.source, self._examples, self._base_logps]
        return artifacts.fetch("partner", params, partial(self.train, recipe), upstream, [training])

    def train(self, recipe: Recipe, folder: Path) -> None:
        """Train a partner by a recipe into a folder, computing as many pairs at once as fit into memory; `adapter` does
        so once."""
        training.within_memory(lambda at_once: self.train_by_parts(recipe, folder, at_once), recipe.batch_size)

    def train_by_parts(self, recipe: Recipe, folder: Path, at_once: int) -> None:
        """Train a partner by a recipe into a folder, `at_once` pairs of a batch at a time."""
        pairs = self.pairs
        vars(self).pop("_loaded_base", None)  # one model in memory
        model, tokenizer = models.load(self.source.path, *self._placed)
        training.train(model, tokenizer, pairs, recipe, self.profile.seed, folder, at_once)

    def _trial(self, recipe: Recipe | None) -> Trial:
        adapter = self.ready if recipe is None else self.adapter(recipe)

        def examine(folder: Path) -> None:
            base = self.answers("base", "validation")
            vars(self).pop("_loaded_base", None)
            health, answers = self._health(models.load_pair(self.source.path, adapter.path, *self._placed), base)
            (folder / "health.json").write_text(json.dumps(health))
            _write_judged(answers, folder)

        upstream = [self.source, self._examples]
        code = [atlas, preferences, generation, activations, encoding, metrics]
        code += [Study._health, Study._reward_margins, Study._judged, Study.ended, Study._sampled, fluency]
        return Trial(
            recipe,
            adapter,
            lambda: artifacts.fetch("health", {}, examine, [*upstream, adapter], code),
            self.profile.health,
        )

    def _health(self, pair: Pair, base: pd.DataFrame) -> tuple[dict[str, float], pd.DataFrame]:
        """What the health criteria are about, on validation prompts, and the DPO model's answers."""
        with pair.role("dpo") as model:
            ids = self._sampled(model, "validation")
        dpo = self._judged("validation", ids, pair.role("base"))
        accuracy = (self._reward_margins(pair, "validation") > 0).mean()
        health = {"reward_accuracy": float(accuracy), "preferred": float(dpo["preferred"].mean())}
        if "fact" in dpo:
            health["fact_loss"] = float(base["fact"].mean() - dpo["fact"].mean())
        return health | fluency(dpo, base), dpo

    def _reward_margins(self, pair: Pair, split: str) -> np.ndarray:
        margins = {}
        for role in models.ROLES:
            with pair.role(role) as model:
                chosen, rejected = (metrics.response_logps(model, answers) for answers in self.encoded(split))
            margins[role] = chosen - rejected
        return margins["dpo"] - margins["base"]

    def reward_margins(self, split: str) -> np.ndarray:
        """The implicit reward margin (m / beta) of each pair of a split, in nats: (N,)."""
        return self._reward_margins(self.pair, split)

    @cached_property
    def pair(self) -> Pair:
        """The base model with its chosen DPO partner, as one model."""
        adapter = self.chosen.adapter
        vars(self).pop("_loaded_base", None)
        return models.load_pair(self.source.path, adapter.path, *self._placed)

    @contextmanager
    def playing(self, role: str) -> Iterator[nn.Module]:
        """The model that plays `base` or `dpo`; `base` needs no DPO partner."""
        if role == "base" and "pair" not in vars(self):
            yield self.base
        else:
            with self.pair.role(role) as model:
                yield model

    # --- States and directions ---

    def states(self, split: str) -> Mapping[tuple[str, str, str], Tensor]:
        """{(role, site, position): (N, d) float32} for the prompts of a split; both roles read the chosen answers."""

        paths = {(role, *key): path for role in models.ROLES for key, path in self._states(role, split).items()}
        return activations.Stored(paths)

    def _states(self, role: str, split: str) -> dict[tuple[str, str], Path]:
        """The file of each site and position."""

        def write(folder: Path) -> None:
            with self.playing(role) as model:
                sequences, sites = self.encoded(split)[0], models.sites(model)
                activations.hidden_states(model, sequences, sites, activations.POSITIONS, f"states, {role}", folder)

        if (role, split) not in self._stored_states:
            upstream = [self._examples, self.source if role == "base" else self.chosen.adapter]
            made = artifacts.fetch("states", {"role": role, "split": split}, write, upstream, [activations, models])
            self._stored_states[role, split] = made
        return activations.stored(self._stored_states[role, split].path)

    def displacements(self, split: str, site: str = FINAL, position: str = "prompt_last") -> Tensor:
        """Delta h = h_dpo - h_base for the prompts of a split, (N, d). ValueError for an unknown site or position."""
        states = self.states(split)
        if ("dpo", site, position) not in states:
            raise ValueError(
                f"There are no states at {site!r}, {position!r}: sites are {', '.join(self.sites)}, positions "
                f"{', '.join(activations.POSITIONS)}."
            )
        return states["dpo", site, position] - states["base", site, position]

    @cached_property
    def sites(self) -> list[str]:
        """All sites of the model, in order of depth."""
        with self.playing("base") as model:
            return models.sites(model)

    def direction(self, site: str = FINAL, position: str = "prompt_last") -> Tensor:
        """v* as a tensor, (d,): the mean displacement over held-in prompts (section 3). Needs no model in memory."""
        return self.displacements("heldin", site, position).double().mean(0).float()

    def vector(self, site: str = FINAL, position: str = "prompt_last") -> SteeringVector:
        """v* with all that is needed to use it elsewhere."""
        base = self.states("heldin")["base", site, position]
        return self._steering_vector(self.direction(site, position), site, position, f"v_star_{site}_{position}", base)

    def token_vectors(self) -> Tensor:
        """v(i) = e_w - e_l for each held-in pair, w and l the tokens at which its answers first differ: (N, d)."""
        with self.playing("base") as model:
            W = models.unembedding(model).weight.detach().float().cpu()
        rows = []
        for chosen, rejected in zip(*self.encoded("heldin")):
            t = gradients.first_difference(chosen.response, rejected.response)
            rows.append(W[chosen.response[t]] - W[rejected.response[t]])
        return torch.stack(rows)

    def token_vector(self) -> SteeringVector:
        """v_token: the mean of the held-in pairs' e_w - e_l."""
        base = self.states("heldin")["base", FINAL, "prompt_last"]
        return self._steering_vector(
            self.token_vectors().double().mean(0).float(), FINAL, "prompt_last", "v_token", base
        )

    def optimised_vector(self, site: str = FINAL) -> Tensor:
        """One vector trained at a site by the partner's own loss, (d,): in place of an adapter (helpers/bipo.py)."""
        recipe = self.recipe

        def write(folder: Path) -> None:
            scale = self.states("heldin")["base", site, "prompt_last"].square().mean().sqrt().item()
            seed = self.profile.seed + recipe.seed
            pairs = training.relabelled(self.pairs, recipe.labels, seed)
            with self.playing("base") as model:
                v = bipo.optimised_vector(model, pairs, site, recipe, scale, seed)
            save_file({"vector": v}, folder / "vector.safetensors")

        params = {"recipe": asdict(recipe), "site": site, "seed": self.profile.seed}
        made = artifacts.fetch(
            "optimised",
            params,
            write,
            [self._base_logps, self.chosen.adapter],
            [bipo, activations, steering, gradients, training],
        )
        return load_file(made.path / "vector.safetensors")["vector"]

    def _steering_vector(self, v: Tensor, site: str, position: str, name: str, base: Tensor) -> SteeringVector:
        return SteeringVector(
            v, site, position, name, models.signature(self.pair.base), self.profile.dtype,
            state_norm=base.norm(dim=1).mean().item(), n_prompts=len(base),
            profile=self.profile.name, profile_hash=self.profile.hash,
        )  # fmt: skip

    # --- Answers, steered or not ---

    def answers(self, role: str, split: str) -> pd.DataFrame:
        """One sampled answer to each prompt of a split, judged: a row a prompt, with its text and token ids."""

        def decode() -> list[list[list[int]]]:
            with self.playing(role) as model:
                return self._sampled(model, split, name=f"answers, {role}")

        return self._answers({"role": role, "split": split}, decode)

    def steered(self, role: str) -> pd.DataFrame:
        """Answers to the held-out prompts at dose 1 of v* at `final`: base + v*, or DPO - v*."""
        v = self.direction()
        return self.sweep(role, FINAL, (v if role == "base" else -v)[None])

    def outcome(self, role: str, dose: int, judged: str) -> np.ndarray:
        """What a judge says of the answers to held-out prompts at dose 0 or 1 of v* at `final` (`steered`), (N,)."""
        table = self.steered(role) if dose else self.answers(role, "heldout")
        return table.sort_values("prompt")[judged].to_numpy()

    def prompted(self) -> pd.DataFrame:
        """The base's answers to the held-out prompts with the preferred behaviour asked for in words."""

        def decode() -> list[list[list[int]]]:
            asked = [encoding.encode(self.tokenizer, self.task.asked_for(e)).prompt for e in self.examples["heldout"]]
            with self.playing("base") as model:
                return generation.sample(model, self.tokenizer, asked, self.profile.sizes.new_tokens, self.profile.seed)

        return self._answers({"role": "base", "split": "heldout", "asked": "in words"}, decode)

    def beliefs(self, role: str, deltas: Tensor) -> pd.DataFrame:
        """What a model holds true, whatever it would say, with each of `deltas`, (arms, d), added at `final`.

        Every value of the asked kind is scored in the answer that states it without a tone. A row an arm and a held-out
        prompt: `rank` of the true value by log-probability, 1 the likeliest, and `lead`, its log-probability less that
        of the best other one, in nats.
        """

        def write(folder: Path) -> None:
            stated = [self.task.stated(example) for example in self.examples["heldout"]]
            sequences = [
                encoding.encode(self.tokenizer, example.prompt, answer)
                for example, answers in zip(self.examples["heldout"], stated) for answer in answers
            ]  # fmt: skip
            with self.playing(role) as model:
                logps = metrics.response_logps(model, sequences, deltas)
            ends = np.cumsum([len(answers) for answers in stated])[:-1]
            table = pd.DataFrame(
                [
                    {"arm": arm, "prompt": i, "rank": int((row > row[0]).sum()) + 1, "lead": row[0] - row[1:].max()}
                    for i, of_one in enumerate(np.split(logps, ends, axis=1)) for arm, row in enumerate(of_one)
                ]
            )  # fmt: skip
            (folder / "beliefs.json").write_text(json.dumps(table.to_dict("list")))

        params = {"role": role, "deltas": _checksum(deltas)}
        upstream = [self._examples, self.source if role == "base" else self.chosen.adapter]
        made = artifacts.fetch("beliefs", params, write, upstream, [atlas, preferences, metrics, Study.beliefs])
        return pd.DataFrame(made.read_json("beliefs.json"))

    def sweep(
        self, role: str, site: str, deltas: Tensor, span: str = "response", split: str = "heldout"
    ) -> pd.DataFrame:
        """Sampled answers to the prompts of a split with each of `deltas` added at a site, judged.

        deltas: (arms, d), or (arms, N, d) where every prompt has its own. A row an arm and a prompt: `arm`, `prompt`,
        `text`, `ids` and what the task's judge says. All arms decode in one batch and share their random numbers; those
        that add nothing are the unsteered answers, which are not decoded again.
        """

        def decode() -> list[list[list[int]]]:
            moved = deltas.flatten(1).any(dim=1)
            unsteered = [] if moved.all() else self.answers(role, split)["ids"].tolist()
            if not moved.any():
                return [unsteered] * len(moved)
            with self.playing(role) as model:
                name = f"answers, {role} + {int(moved.sum())} doses at {site}"
                steered = iter(self._sampled(model, split, site, deltas[moved], span, name))
            return [next(steered) if moves else unsteered for moves in moved]

        return self._answers(
            {"role": role, "split": split, "site": site, "deltas": _checksum(deltas), "span": span}, decode
        )

    def _answers(self, params: dict, decode: Callable[[], list[list[list[int]]]]) -> pd.DataFrame:
        """What `decode` samples, kept as it is, and what the task's judge says of it, kept where it spoke of all."""

        def write(folder: Path) -> None:
            _write_judged(self._judged(params["split"], answers, self.playing("base")), folder)

        upstream = [self._examples, self.source if params["role"] == "base" else self.chosen.adapter]
        sampled = artifacts.fetch(
            "sampled",
            params,
            lambda folder: (folder / "ids.json").write_text(json.dumps(decode())),
            upstream,
            [generation, activations, steering, encoding, Study._sampled, Study.sweep, Study.prompted],
        )
        answers = sampled.read_json("ids.json")
        code = [atlas, preferences, encoding, activations, metrics, Study._judged, Study.ended]
        made = artifacts.fetch("answers", {"split": params["split"]}, write, [self._examples, sampled], code)
        return pd.DataFrame(made.read_json("answers.json"))

    # --- On open text ---

    def losses(self, role: str, deltas: Tensor) -> np.ndarray:
        """A model's mean loss a token on each held-out chosen answer, nats, with each of `deltas`, (arms, d), added at
        `final`: (arms, N). Their mean's exponential is the perplexity."""
        chosen = self.encoded("heldout")[0]
        with self.playing(role) as model:
            logps = metrics.response_logps(model, chosen, deltas)
        return -logps / np.array([len(tokens.response) for tokens in chosen])

    def truthfulness(self, role: str, deltas: Tensor) -> judges.Truthfulness:
        """TruthfulQA's MC1 and MC2 of a model, with each of `deltas`, (arms, d), added at `final`: (arms, N) each.

        Raises judges.Unavailable where the questions cannot be had, and for a model that was trained here, on a world
        in which they mean nothing.
        """
        if self.profile.model == profiles.EMBEDDED:
            raise judges.Unavailable(
                "the embedded organism knows nothing of our world: its own facts are judged by rule."
            )
        rows = judges.truthfulqa_rows()

        def write(folder: Path) -> None:
            with self.playing(role) as model:
                found = judges.truthfulqa(model, self.tokenizer, rows, deltas)
            save_file({name: torch.from_numpy(of) for name, of in found._asdict().items()}, folder / "of.safetensors")

        asked = hashlib.sha256(json.dumps(rows, sort_keys=True).encode()).hexdigest()
        params = {"role": role, "deltas": _checksum(deltas), "rows": asked}
        made = artifacts.fetch("truthfulness", params, write, [self.source, self.chosen.adapter], [judges, metrics])
        read = load_file(made.path / "of.safetensors")
        return judges.Truthfulness(*(read[name].numpy() for name in judges.Truthfulness._fields))

    # --- Beyond one vector at one site ---

    @cached_property
    def validated_sites(self) -> pd.DataFrame:
        """base + v* at dose 1 of every site and position, on validation prompts: a row each, indexed by the two.

        `preferred`: the share of answers that show the preferred behaviour; `ahead`: by how much that exceeds v* at
        `final`, `prompt_last`, the low end of the 95 % interval; `changed`: the share of answers not the base's own;
        `fluent`: whether the text loses no more against the base's own than the health criteria allow.
        """
        base, wordings, tables = self.answers("base", "validation"), self.templates("validation"), {}
        for site in self.sites:
            deltas = torch.stack([self.direction(site, position) for position in activations.POSITIONS])
            if deltas.any():  # the embeddings are moved by no adapter
                table = self.sweep("base", site, deltas, split="validation")
                tables |= {
                    (site, position): table[table["arm"] == i] for i, position in enumerate(activations.POSITIONS)
                }
        usual = tables[FINAL, "prompt_last"]["preferred"].to_numpy()
        rows = {
            key: {
                "preferred": table["preferred"].mean(),
                "ahead": metrics.interval(metrics.difference, table["preferred"], usual, groups=wordings).low,
                "changed": np.mean([ids != own for ids, own in zip(table["ids"], base["ids"])]),
                "fluent": _is_fluent(table, base, self.profile.health),
            }
            for key, table in tables.items()
        }
        return pd.DataFrame.from_dict(rows, orient="index")

    @property
    def best_site(self) -> tuple[str, str]:
        """The site and position of `validated_sites` with most of the preferred behaviour.

        `final`, `prompt_last` unless another is ahead of it beyond chance and fluent.
        """
        found = self.validated_sites
        better = found[found["fluent"] & (found["ahead"] > 0)]
        return tuple(better["preferred"].idxmax()) if len(better) else (FINAL, "prompt_last")

    def _rank_deltas(self, site: str, position: str) -> dict[str, Tensor]:
        """{kind: (ranks, N, d)}: what rank-k steering adds to the held-out prompts (helpers/lowrank.py).

        The linear map reads the prompt's last token, whatever position the displacements are measured at. Kept, since a
        singular value decomposition may differ in its last bits with the number of threads.
        """

        def write(folder: Path) -> None:
            moved = {split: self.displacements(split, site, position) for split in ("heldin", "heldout")}
            states = {split: self.states(split)["base", site, "prompt_last"] for split in moved}
            U = lowrank.directions(moved["heldin"])
            found = lowrank.coefficients(states["heldin"], moved["heldin"], states["heldout"], moved["heldout"], U)
            ks = lowrank.ranks(U.shape[1])
            save_file({kind: lowrank.truncated(c, U, ks) for kind, c in found.items()}, folder / "deltas.safetensors")

        code = [lowrank, spectra, activations, models]
        params = {"site": site, "position": position}
        made = artifacts.fetch("ranks", params, write, [self._examples, self.chosen.adapter], code)
        return load_file(made.path / "deltas.safetensors")

    def by_rank(self, site: str = FINAL, position: str = "prompt_last") -> pd.DataFrame:
        """The base's answers to the held-out prompts under rank-k steering at a site, judged.

        The rows of `sweep`, with the `kind` of coefficients (lowrank.KINDS) and `k`.
        """
        deltas, arms = self._ranked(site, position)
        return self.sweep("base", site, deltas).join(arms, on="arm")

    def divergence_by_rank(self) -> pd.DataFrame:
        """`divergences` of the base under rank-k steering at `final`, with the `kind` of coefficients and `k`, and of
        the base alone, with kind "none" and k 0."""
        deltas, arms = self._ranked(FINAL, "prompt_last")
        found = self.divergences("base", torch.cat([torch.zeros_like(deltas[:1]), deltas]))
        arms = pd.concat([pd.DataFrame({"kind": ["none"], "k": [0]}), arms], ignore_index=True)
        return found.join(arms, on="arm")

    def _ranked(self, site: str, position: str) -> tuple[Tensor, pd.DataFrame]:
        """What the arms of rank-k steering add at a site, (arms, N, d), and the `kind` and `k` of each."""
        deltas = self._rank_deltas(site, position)
        ks = lowrank.ranks(deltas["own"].shape[-1])
        arms = pd.DataFrame([(kind, k) for kind in lowrank.KINDS for k in ks], columns=["kind", "k"])
        return torch.cat([deltas[kind] for kind in lowrank.KINDS]), arms

    def _sampled(
        self, model: nn.Module, split: str, site=None, deltas=None, span="response", name: str | None = None
    ) -> list[list[list[int]]]:
        prompts = [tokens.prompt for tokens in self.encoded(split)[0]]
        return generation.sample(
            model, self.tokenizer, prompts, self.profile.sizes.new_tokens, self.profile.seed, site, deltas, span, name
        )

    def _judged(self, split: str, ids: list[list[list[int]]], as_base: AbstractContextManager) -> pd.DataFrame:
        """A row an arm and a prompt; `token_loss`, the base's mean loss a token of an answer and its end (of those that
        there are, the likeliest), stands in for rules on real text."""
        rows = []
        for arm, answers in enumerate(ids):
            texts = generation.texts(self.tokenizer, answers)
            for i, judged in enumerate(self.task.judged(self.examples[split], texts)):
                rows.append({"arm": arm, "prompt": i, "text": texts[i], "ids": answers[i], **judged})
        table = pd.DataFrame(rows)
        if "well_formed" not in table:
            prompts = [self.encoded(split)[0][i].prompt for i in table["prompt"]]
            with as_base as model:
                losses = [metrics.token_losses(model, ended) for ended in self.ended(prompts, table["ids"])]
            table["token_loss"] = np.fmin.reduce(losses)
        return table

    def ended(self, prompts: Sequence[list[int]], answers: Sequence[list[int]]) -> Iterator[list[Tokens]]:
        """Sampled answers to prompts, each with its end unless it was cut before it came to one: for each of the tokens
        that end an answer in turn, since a sample does not keep its own."""
        most = self.profile.sizes.new_tokens
        for end in self.ends or [None]:
            yield [Tokens(p, encoding.ended(ids, end, most)) for p, ids in zip(prompts, answers, strict=True)]

    def log_ratios(self, role: str, deltas: Tensor) -> pd.DataFrame:
        """What each of `deltas`, (arms, d), added at `final` makes of the held-out pairs.

        A row an arm and a prompt: `margin`, log pi(chosen) - log pi(rejected) in nats, and `prefers`, whether it is
        above zero.
        """

        def compute() -> dict[str, np.ndarray]:
            with self.playing(role) as model:
                chosen, rejected = (metrics.response_logps(model, given, deltas) for given in self.encoded("heldout"))
            return {"margin": chosen - rejected, "prefers": (chosen > rejected).astype(float)}

        upstream = [self._examples, self.source if role == "base" else self.chosen.adapter]
        code = [activations, steering, metrics, Study.log_ratios, Study._by_arm]
        return self._by_arm("log_ratios", role, deltas, compute, upstream, code)

    def divergences(self, role: str, deltas: Tensor) -> pd.DataFrame:
        """How far each of `deltas`, (arms, d) or (arms, N, d), added at `final` leaves a model from its goal, which for
        the base is the DPO model and for the DPO model the base.

        A row an arm and a held-out prompt: `kl`, KL(goal || steered) in nats, summed over the goal's own answer and its
        end.
        """

        def compute() -> dict[str, np.ndarray]:
            goal = "dpo" if role == "base" else "base"
            prompts = [tokens.prompt for tokens in self.encoded("heldout")[0]]
            answered = next(self.ended(prompts, self.answers(goal, "heldout")["ids"]))  # which end, no KL depends on
            parts = [self._kl(goal, role, some, deltas) for some in self._in_memory(answered)]
            return {"kl": np.concatenate(parts, axis=1)}

        code = [activations, steering, generation, encoding, metrics]
        code += [Study.divergences, Study._by_arm, Study._kl, Study.ended, Study._sampled]
        upstream = [self._examples, self.chosen.adapter]
        return self._by_arm("divergences", role, deltas, compute, upstream, code)

    @staticmethod
    def _by_arm(
        stage: str, role: str, deltas: Tensor, compute: Callable[[], dict], upstream: list, code: list
    ) -> pd.DataFrame:
        """Values (arms, prompts) as a table with a row for each, kept."""

        def write(folder: Path) -> None:
            values = compute()
            arms, prompts = np.indices(next(iter(values.values())).shape)
            rows = {"arm": arms, "prompt": prompts, **values}
            (folder / "rows.json").write_text(json.dumps({name: of.ravel().tolist() for name, of in rows.items()}))

        made = artifacts.fetch(stage, {"role": role, "deltas": _checksum(deltas)}, write, upstream, code)
        return pd.DataFrame(made.read_json("rows.json"))

    def _kl(self, goal: str, role: str, answered: Sequence[Tokens], deltas: Tensor) -> np.ndarray:
        with self.playing(goal) as model:
            distributions = metrics.response_distributions(model, answered)
        with self.playing(role) as model:
            return metrics.kl_to(distributions, model, answered, deltas)

    def _in_memory(self, answered: Sequence[Tokens]) -> Iterator[Sequence[Tokens]]:
        """As many answers at a time as their next-token distributions may be kept in memory."""
        vocabulary = models.unembedding(self.pair.base).out_features
        longest = max(len(tokens.response) for tokens in answered)
        n = max(1, metrics.MAX_LOGITS // (vocabulary * max(longest, 1)))
        return (answered[i : i + n] for i in range(0, len(answered), n))


def _write_judged(answers: pd.DataFrame, folder: Path) -> None:
    """Keep judged answers; those of which a judge could not be asked are to be judged in a later session."""
    (folder / "answers.json").write_text(json.dumps(answers.to_dict("list")))
    if answers["preferred"].isna().any():
        (folder / artifacts.UNFINISHED).touch()


Stages = Callable[[Study], object]  # asks a study for some of its stages, which are computed thereby


def fluency(answers: pd.DataFrame, base: pd.DataFrame) -> dict[str, float]:
    """What the health criteria ask of text: its share that is well-formed or, where no rule knows, its perplexity under
    the base against that of the base's own answers."""
    if "well_formed" in answers:
        return {"well_formed": float(answers["well_formed"].mean())}
    return {"perplexity_ratio": float(np.exp(answers["token_loss"].mean() - base["token_loss"].mean()))}


def _is_fluent(answers: pd.DataFrame, base: pd.DataFrame, health: Health) -> bool:
    found = fluency(answers, base)
    if "well_formed" in found:  # where the base's own text is not faultless, steering need not mend it
        return bool(found["well_formed"] >= base["well_formed"].mean() - (1 - health.min_well_formed))
    return not failed_criteria(found, health)


def failed_criteria(measured: dict[str, float], health: Health) -> list[str]:
    """The names of the health criteria that measured values do not meet."""
    met = {
        "reward_accuracy": lambda x: x >= health.min_reward_accuracy,
        "preferred": lambda x: x >= health.min_preferred,
        "fact_loss": lambda x: x <= health.max_fact_loss,
        "well_formed": lambda x: x >= health.min_well_formed,
        "perplexity_ratio": lambda x: x <= health.max_perplexity_ratio,
    }
    return [name for name, value in measured.items() if not met[name](value)]


def _checksum(deltas: Tensor | None) -> str | None:
    return None if deltas is None else hashlib.sha256(deltas.float().contiguous().numpy().tobytes()).hexdigest()
