"""How much is drawn, as data."""

from pydantic import Field

from helpers.settings import Settings


class Sizes(Settings):
    """How many prompts each split holds, and how the model answers."""

    heldin: int = Field(2000, ge=2)
    validation: int = Field(360, ge=2)
    heldout: int = Field(240, ge=2)
    new_tokens: int = Field(34, ge=1)  # the longest answer that the atlas knows has 33
    draws: int = Field(16, ge=1)  # answers to each prompt, whose mean is an outcome
    temperature: float = Field(1.0, gt=0)  # of sampled answers; likelihoods and KL are of the model as it is, at 1
    longest: int = Field(1024, ge=2)  # tokens of a prompt and its answer; longer pairs from elsewhere are set aside
    samples_per_prompt: int = Field(8, ge=2)  # on-policy pairs only
    seeds: int = Field(3, ge=1)  # DPO partners trained by the chosen recipe for each headline number
