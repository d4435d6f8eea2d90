"""A LoRA adapter at another strength than it was trained to: W + lambda B A in the place of W + B A."""

from collections.abc import Iterator
from contextlib import contextmanager

from peft import PeftModel, PeftType
from peft.helpers import rescale_adapter_scale
from peft.tuners.lora import LoraLayer
from torch import nn

BESIDES = ("modules_to_save", "trainable_token_indices", "layer_replication")  # what a LoRA can change besides B A


class NotScalable(ValueError):
    """A partner differs from its base by more, or by something else, than low-rank matrices that can be scaled."""


@contextmanager
def scaled(model: nn.Module, scale: float) -> Iterator[None]:
    """Inside, a partner's adapter changes its base `scale` times as much as it was trained to: 0 is the base and 1 the
    partner, bit for bit. Raises NotScalable where `check` does."""
    check(model)
    with rescale_adapter_scale(model, float(scale)):
        yield


def check(model: nn.Module) -> None:
    """Raise NotScalable, in a sentence, for a model that is not its base with a plain LoRA adapter on it."""
    if not isinstance(model, PeftModel):
        raise NotScalable("The partner is a whole model and no adapter: there is nothing to scale.")
    config = model.peft_config[model.active_adapter]
    if config.peft_type != PeftType.LORA:
        raise NotScalable(f"The partner's adapter is {config.peft_type.value} and no LoRA: it has no scale.")
    besides = [name for name in BESIDES if getattr(config, name)] + ["bias"] * (config.bias != "none")
    if any(module.lora_variant for module in model.modules() if isinstance(module, LoraLayer)):
        besides.append("a variant of LoRA, such as DoRA")
    if besides:
        raise NotScalable(f"The partner's adapter holds more than B A ({', '.join(besides)}): scaled, that would stay.")
