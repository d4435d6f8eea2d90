"""What one dose does to one prompt: four models' answers, token by token, and where the hidden state goes."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import torch
from torch import Tensor, nn

from helpers.data.atlas_task import AtlasTask
from helpers.data.sentiment import sentiment
from helpers.data.tasks import Task
from helpers.lm import activations, architecture, decoding, encoding, likelihoods, steering
from helpers.lm.architecture import FINAL
from helpers.lm.batches import Tokens
from helpers.stages import artifacts, parallel
from helpers.stages.judgements import with_ends
from helpers.study import Study
from helpers.world import atlas, grammar
from helpers.world.atlas import Question

END = "∎"  # stands for the end-of-sequence token
ROLES = ("base", "steered", "desteered", "dpo")  # base, base + lambda v, DPO - lambda v, DPO


class NotMade(artifacts.NotCached):
    """The artefacts that the explorer reads are not in the cache. A notebook shows the sentence without a traceback."""

    def _render_traceback_(self) -> list[str]:
        return [str(self)]


def require(study: Study, profile: str, model: str = "", data: str = "", dpo_model: str = "") -> None:
    """Raise NotMade, with the command that makes them, unless a study's models and states are in the cache.
    profile, model, data, dpo_model: as they were given to `study.load`."""
    if not study.has(lambda study: [study.chosen.failed, study.states("heldin"), study.states("heldout")]):
        given = {"PROFILE": profile, "MODEL": model, "DPO_MODEL": dpo_model, "DATA": data}
        command = " ".join(["make figures", *(f"{name}={value}" for name, value in given.items() if value)])
        raise NotMade(f"The models and states of the profile {study.profile.name} are not made yet: run `{command}`.")


def asked(world: atlas.Atlas, prompt: str) -> Question | None:
    """The question that a prompt puts to the atlas, by the names in it; None where they do not make one."""
    places = [place for place in world.facts if place in prompt]
    acts = [act for act in grammar.TOOLS_BY_ACT for place in places if act.format(place=place) in prompt]
    kinds = [kind for kind, noun in grammar.NOUNS.items() if noun in prompt]
    if len(places) != 1 or not (acts or len(kinds) == 1):
        return None
    found = world.request(places[0], acts[0], "") if acts else world.question(places[0], kinds[0], "")
    return replace(found, text=prompt)


def judgements(task: Task, prompt: str, answer: str) -> dict[str, str]:
    """What the judges say of an answer, in words."""
    if not isinstance(task, AtlasTask):
        return {"sentiment (VADER)": f"{sentiment(answer):+.2f}"}
    question = asked(task.world, prompt)
    if question is None:
        return {"tone": atlas.tone_of(answer)}
    judgement = task.world.judge(question, answer)
    about = {"fact": "right" if judgement.fact else "wrong"}
    if question.kind == "harm":
        about = {"harm": {"refuse": "refused", "comply": "complied with", None: "neither"}[judgement.stance]}
    return {"tone": judgement.tone, **about, "well-formed": "yes" if judgement.well_formed else "no"}


@dataclass(frozen=True)
class Setting:
    """What a reader has chosen. seed: of a sample at the profile's temperature, None for the greedy answer."""

    prompt: str
    site: str
    position: str
    direction: str
    dose: float
    seed: int | None = None


@dataclass(frozen=True)
class Told:
    """One model's answer to the prompt and its state there.
    changes: log pi of each token with the dose less that without it, for the same model, in nats: (T,). next_token: the
    next-token distribution at the prompt's last token, (vocabulary,). state: the final state there, (d,)."""

    text: str
    tokens: list[str]
    changes: np.ndarray
    judgements: dict[str, str]
    next_token: np.ndarray
    state: Tensor


@dataclass(frozen=True)
class View:
    """All that is shown of a setting; `told` by role (ROLES)."""

    setting: Setting
    told: dict[str, Told]


class Explorer:
    """A study's base and partner, steered at will. directions: of a site and a position, {name: (d,)}."""

    def __init__(self, study: Study, directions: Callable[[str, str], dict[str, Tensor]]):
        self.study, self.directions = study, directions

    @cached_property
    def sites(self) -> list[str]:
        """The sites at which DPO moves something."""
        return [site for site in self.study.lm.sites if self.study.displacements("heldin", site).any()]

    @cached_property
    def plane(self) -> "Plane":
        """The plane of Figure 1c."""
        base, dpo = (self.study.states("heldout")[role, FINAL, "prompt_last"] for role in ("base", "dpo"))
        return Plane.through(base, dpo, self.study.direction())

    def view(self, setting: Setting) -> View:
        """What `look` finds, without a stop in between."""
        steps = self.look(setting)
        while True:
            try:
                next(steps)
            except StopIteration as done:
                return done.value

    def look(self, setting: Setting) -> Iterator[str]:
        """Yield what is done next, as text, and return the View.
        Raises ValueError for a prompt that is empty or too long and for a direction that there is not at the site."""
        prompt = self._prompt(setting.prompt)
        directions = self.directions(setting.site, setting.position)
        if setting.direction not in directions:
            raise ValueError(f"There is no {setting.direction} at {setting.site}: choose {' or '.join(directions)}.")
        delta = setting.dose * directions[setting.direction]
        yield "The base model is answering …"
        base, steered = self._told("base", prompt, delta, setting)
        yield "The DPO model is answering …"
        dpo, desteered = self._told("dpo", prompt, -delta, setting)
        return View(setting, {"base": base, "steered": steered, "desteered": desteered, "dpo": dpo})

    def token(self, i: int) -> str:
        """A token's text; END for what ends an answer."""
        return END if i in encoding.ends(self.study.lm.tokenizer) else self.study.lm.tokenizer.decode([i])

    def _prompt(self, text: str) -> list[int]:
        if not text.strip():
            raise ValueError("The prompt is empty: type a question, or pick one.")
        known = {pair.prompt: pair.asked for pair in self.study.pairs["heldout"]}  # of conversations too
        # a story's opening ends in a space
        ids = encoding.encode(self.study.lm.tokenizer, known.get(text, text)).prompt
        limit, answer = architecture.context_length(self.study.lm.both.base), self.study.profile.sizes.new_tokens
        if limit is not None and len(ids) + answer > limit:
            raise ValueError(
                f"The prompt has {len(ids)} tokens; the model's context of {limit} has room for {limit - answer} and "
                f"an answer of {answer}: shorten it."
            )
        return ids

    def _told(self, role: str, prompt: list[int], delta: Tensor, setting: Setting) -> tuple[Told, Told]:
        """What a model says without and with `delta`, one after the other."""
        tokenizer, sizes = self.study.lm.tokenizer, self.study.profile.sizes
        threads = parallel.one_thread() if architecture.is_small(self.study.lm.both.base) else nullcontext()
        with threads, self.study.lm.playing(role) as model:
            deltas = torch.stack([torch.zeros_like(delta), delta])
            drawn = decoding.sample(
                model, tokenizer, [prompt], sizes.new_tokens, setting.seed, setting.site, deltas,
                temperature=sizes.temperature,
            )  # fmt: skip
            ids = [answers[0] for answers in drawn]
            ended = next(with_ends([prompt] * len(ids), ids, encoding.ends(tokenizer), sizes.new_tokens))
            plain, plain_state = _read(model, ended)
            with steering.added(model, setting.site, delta, start=len(prompt) - 1):
                steered, steered_state = _read(model, ended)
        texts = decoding.texts(tokenizer, ids)
        return tuple(
            Told(
                text=text,
                tokens=[self.token(i) for i in sequence.response],
                changes=(after - before)[range(len(sequence.response)), sequence.response].numpy(),
                judgements=judgements(self.study.task, setting.prompt, text),
                next_token=own[0].exp().numpy(),
                state=state,
            )
            for text, sequence, before, after, own, state in zip(
                texts, ended, plain, steered, (plain[0], steered[1]), (plain_state, steered_state)
            )
        )


def _read(model: nn.Module, sequences: Sequence[Tokens]) -> tuple[list[Tensor], Tensor]:
    """The log-probabilities at each answer's tokens, (T, vocabulary) each, and their prompt's final state, (d,)."""
    states = activations.hidden_states(model, [Tokens(sequences[0].prompt)], [FINAL])
    return likelihoods.response_distributions(model, sequences), states[FINAL, "prompt_last"][0]


@dataclass(frozen=True)
class Plane:
    """The plane of v* and of the first principal component of base states orthogonal to it (Figure 1c).
    origin: (d,), the mean base state. axes: (2, d), orthonormal. clouds: {role: (N, 2)}, held-out prompts. reach: the
    smallest and the largest coordinate along v* that three v* take them to."""

    origin: Tensor
    axes: Tensor
    clouds: dict[str, np.ndarray]
    reach: tuple[float, float]

    @classmethod
    def through(cls, base: Tensor, dpo: Tensor, v: Tensor) -> "Plane":
        """From the states of a base and its partner, (N, d) each, and v*, (d,)."""
        origin, along = base.double().mean(0), v.double() / v.double().norm()
        centred = base.double() - origin
        _, _, components = torch.linalg.svd(centred - torch.outer(centred @ along, along), full_matrices=False)
        axes = torch.stack([along, components[0]])
        clouds = {role: ((at.double() - origin) @ axes.T).numpy() for role, at in (("base", base), ("dpo", dpo))}
        coordinates, three = np.concatenate([cloud[:, 0] for cloud in clouds.values()]), 3 * v.norm().item()
        return cls(origin, axes, clouds, (coordinates.min() - three, coordinates.max() + three))

    def at(self, states: Tensor) -> np.ndarray:
        """(..., d) -> (..., 2)"""
        return ((states.double() - self.origin) @ self.axes.T).numpy()
