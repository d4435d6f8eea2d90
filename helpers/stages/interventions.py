"""A model that is changed for as long as a stage has it open."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from functools import partial

from torch import Tensor, nn

from helpers.lm import activations, adapters, architecture, block_vectors
from helpers.lm.linear_shifts import LinearShift
from helpers.stages import keys
from helpers.stages.roles import Role


def with_vectors(role: Role, vectors: Mapping[str, Tensor]) -> Role:
    """A model with a vector, (d,), added at every position of each site."""
    return _changed(role, "vectors", dict(vectors), lambda model: block_vectors.added(model, vectors))


def with_shift(role: Role, shift: LinearShift) -> Role:
    """A model with a shift at `final` that its own state there decides: a change of its head alone."""

    def moved(states: Tensor) -> Tensor:
        return states + shift(states).to(states)

    return _changed(role, "head", shift, lambda model: activations.hooked(model, architecture.FINAL, moved))


def cut(partner: Role, rank: int) -> Role:
    """A partner whose adapter is cut to a rank (`adapters.cut`). Opening it raises NoPlainAdapter where there is
    none."""
    return _changed(partner, f"cut to {rank}", rank, partial(adapters.cut, rank=rank))


def scaled(partner: Role, scale: float) -> Role:
    """A partner with its adapter scaled (`adapters.scaled`). Opening it raises NoPlainAdapter where there is none."""
    return _changed(partner, f"scaled by {scale:.3g}", scale, partial(adapters.scaled, scale=scale))


def _changed(role: Role, how: str, by: object, inside: Callable[[nn.Module], AbstractContextManager]) -> Role:
    """A role that is changed `inside` while it is open; what decides the change is `by` and the code here."""

    @contextmanager
    def opened() -> Iterator[nn.Module]:
        with role.opened() as model, inside(model):
            yield model

    decided = keys.digests({how: by})[how]
    return Role(f"{role.name}, {how}", f"{role.key} {how} {decided} {keys.code_of(__name__)}", opened, role.tokenizer)
