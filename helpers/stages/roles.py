"""The models that stages open: what decides each, and how it is had."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass

from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from helpers.lm.loading import BaseAndPartner


@dataclass(frozen=True)
class Role:
    """A model as `base` or as `dpo`. `key` says what decides it: its weights, its precision and its device.

    opened: the model, for as long as the context lasts. tokenizer: its tokenizer.
    """

    name: str
    key: str
    opened: Callable[[], AbstractContextManager[nn.Module]]
    tokenizer: Callable[[], PreTrainedTokenizerBase]


@dataclass(frozen=True)
class Fresh:
    """A model that whoever loads it may change: read anew from its files, with no other model in memory."""

    key: str
    load: Callable[[], tuple[PreTrainedModel, PreTrainedTokenizerBase]]


@dataclass(frozen=True)
class Both:
    """A base and a partner of it, read anew together, with no other model in memory."""

    key: str
    load: Callable[[], BaseAndPartner]
