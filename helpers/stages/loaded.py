"""One model in memory: the base or, once there is one, the base and its partner, which hold it together."""

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cached_property
from typing import NamedTuple

from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from helpers.lm import architecture, loading, products
from helpers.lm.loading import BaseAndPartner
from helpers.stages.artifacts import Artifact
from helpers.stages.roles import Both, Fresh, Role


class Placement(NamedTuple):
    """In what precision, where and how compressed models are loaded, as in a Profile."""

    dtype: str
    device: str
    quantize: str


class OneModel:
    """Loads a base and its partner when they are asked for, and lets go of one before it loads the other."""

    def __init__(self, base: Artifact, placement: Placement, partner: Callable[[], Artifact]):
        """partner: called when a partner is first needed."""
        self.base_files = base
        self.placement = placement
        self.partner_files = partner

    @cached_property
    def _base(self) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
        return loading.load(self.base_files.path, *self.placement)

    @property
    def base(self) -> PreTrainedModel:
        """The base model, alone."""
        return self._base[0]

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        return self.both.tokenizer if "both" in vars(self) else self._base[1]

    @cached_property
    def both(self) -> BaseAndPartner:
        """The base with its partner."""
        partner = self.partner_files()
        self._let_go()
        return loading.load_both(self.base_files.path, partner.path, *self.placement)

    @contextmanager
    def playing(self, role: str) -> Iterator[nn.Module]:
        """The model in a role, `base` or `dpo`; `base` needs no partner."""
        if role == "base" and "both" not in vars(self):
            with products.fast(self.base):
                yield self.base
        else:
            with self.both.playing(role) as model:
                yield model

    def in_float64(self) -> PreTrainedModel:
        """The base model read anew in float64, for what is exact: beside its device where that has no float64."""
        device = loading.resolved_device(self.placement.device)
        return loading.load(self.base_files.path, "float64", "cpu" if device == "mps" else device)[0]

    @cached_property
    def sites(self) -> list[str]:
        """All sites of the model, in order of depth."""
        with self.playing("base") as model:
            return architecture.sites(model)

    @cached_property
    def unembedding(self) -> Tensor:
        """The base's output embedding W_U, a row a token: (vocabulary, d), float32."""
        with self.playing("base") as model:
            return architecture.unembedding(model).weight.detach().float().cpu()

    def _let_go(self) -> None:
        for held in ("_base", "both"):
            vars(self).pop(held, None)

    # --- What stages are handed ---

    def role(self, name: str | Role) -> Role:
        """The model in a role, as stages take it; one that is a Role already, such as a changed model, as it is."""
        if isinstance(name, Role):
            return name
        key = self._key() if name == "base" else self._key(self.partner_files())
        return Role(name, key, lambda: self.playing(name), lambda: self.tokenizer)

    def fresh(self) -> Fresh:
        """The base, read anew for a stage that changes it."""

        def load() -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
            self._let_go()
            return loading.load(self.base_files.path, *self.placement)

        return Fresh(self._key(), load)

    def both_with(self, partner: Artifact) -> Both:
        """The base and one of several partners, read anew."""

        def load() -> BaseAndPartner:
            self._let_go()
            return loading.load_both(self.base_files.path, partner.path, *self.placement)

        return Both(self._key(partner), load)

    def _key(self, partner: Artifact | None = None) -> str:
        """Weights, and what precision and device they are computed in."""
        placed = self.placement._replace(device=loading.resolved_device(self.placement.device))
        return json.dumps([self.base_files.key, partner and partner.key, *placed])
