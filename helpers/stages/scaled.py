"""A partner whose adapter is scaled, as stages take models."""

import json
from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from helpers.lm import adapters
from helpers.stages import keys
from helpers.stages.roles import Role


def scaled(partner: Role, scale: float) -> Role:
    """A partner with its adapter scaled (lm/adapters.py). Opening it raises NotScalable where there is none."""

    @contextmanager
    def opened() -> Iterator[nn.Module]:
        with partner.opened() as model, adapters.scaled(model, scale):
            yield model

    key = json.dumps([partner.key, "scaled", scale, keys.code_of(__name__)])  # no stage reaches this code by import
    return Role(f"{scale:.3g} x adapter", key, opened, partner.tokenizer)
